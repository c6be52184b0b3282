"""Inflating data of a known length: zlib streams, raw deflate, zstd. The GIL is released meanwhile.

What the data says has no influence on how much is made of it: output is bounded by the wanted length.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fusedisk.compression.libdeflate import libdeflate

Source = bytes | bytearray | memoryview
Content = bytes | bytearray | memoryview
Inflate = Callable[[Source, int], Content]
"""From compressed data, which may be followed by anything, and a length in bytes to as many bytes. Raises
InflateError. Any thread may call it, also several at once."""
InflateWithin = Callable[[int, int, int, int], bool]
"""From one part of some memory to another, each given as offset and length in bytes. False where Inflate would raise
InflateError; then what is in the other part is anything. One thread may call it."""
InflatePrefix = Callable[[memoryview, int], Content | None]
"""The first bytes of what writable memory inflates to, for much less than all of it takes; None where all of it is as
good a way, or the only one to find out."""


class InflateError(Exception):
    """The data is not what it should be."""


@dataclass(frozen=True, slots=True)
class Codec:
    """What one kind of compressed data inflates with."""

    inflate: Inflate
    within: Callable[[memoryview], InflateWithin]
    """Makes it, for writable memory."""
    prefix: InflatePrefix


def raw_deflate(window_bits: int) -> Codec:
    """``window_bits`` as :func:`zlib.decompressobj` has them, without their sign."""
    inflate = zlib_inflater(-window_bits)
    library = libdeflate()
    if library is None:
        return _whole_only(inflate)

    def within(memory: memoryview) -> InflateWithin:
        fill, otherwise = library.within(memory), _within(inflate, memory)
        return lambda *parts: fill(*parts) or otherwise(*parts)

    return Codec(inflate, within, library.prefix)


def zstd() -> Codec:
    """One frame. Its blocks are as large as most clusters, so there is no prefix that takes less."""
    return _whole_only(zstd_inflater())


def _whole_only(inflate: Inflate) -> Codec:
    return Codec(inflate, partial(_within, inflate), lambda data, size: None)


def _within(inflate: Inflate, memory: memoryview) -> InflateWithin:
    def into(offset: int, length: int, place: int, size: int) -> bool:
        try:
            memory[place : place + size] = inflate(memory[offset : offset + length], size)
        except InflateError:
            return False
        return True

    return into


def zlib_inflater(window_bits: int) -> Inflate:
    """``window_bits`` as :func:`zlib.decompressobj` has them: negative for raw deflate, else a zlib stream."""
    import deflate

    decompress = deflate.deflate_decompress if window_bits < 0 else deflate.zlib_decompress

    def inflate(data: Source, size: int) -> Content:
        try:
            content: bytearray = decompress(data, size)
        except deflate.DeflateError:
            pass
        else:
            if len(content) == size:
                return content
        # libdeflate is faster, zlib has the last word: it also takes data that stops in the middle, or goes on after
        # what is wanted.
        return inflate_by_zlib(data, size, window_bits)

    return inflate


def inflate_by_zlib(data: Source, size: int, window_bits: int) -> Content:
    """What :func:`zlib_inflater` does, by the standard library alone."""
    try:
        content = zlib.decompressobj(window_bits).decompress(data, size)
    except zlib.error as exc:
        raise InflateError(str(exc)) from exc
    return _whole(content, size)


def zstd_inflater() -> Inflate:
    """For one frame."""
    import zstandard

    def inflate(data: Source, size: int) -> bytes:
        try:
            with zstandard.ZstdDecompressor().stream_reader(data) as reader:
                return _whole(reader.read(size), size)
        except zstandard.ZstdError as exc:
            raise InflateError(str(exc)) from exc

    return inflate


def zlib_stream() -> Codec:
    """A zlib stream, with its header and checksum."""
    return _whole_only(zlib_inflater(15))


CODECS: dict[str, Callable[[], Codec]] = {"deflate-4k": lambda: raw_deflate(12), "zstd": zstd, "zlib": zlib_stream}
"""By name: raw deflate with a window of 4 KiB, zstd frames, zlib streams."""


def _whole(content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise InflateError(f"it ends after {len(content)}")
    return content
