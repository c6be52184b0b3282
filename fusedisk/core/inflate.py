"""Inflating data of a known length: zlib streams, raw deflate, zstd. The GIL is released meanwhile.

What the data says has no influence on how much is made of it: output is bounded by the wanted length.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

Source = bytes | bytearray | memoryview
Content = bytes | bytearray | memoryview
Inflate = Callable[[Source, int], Content]
"""From compressed data, which may be followed by anything, and a length in bytes to as many bytes. Raises
InflateError. Any thread may call it, also several at once."""


class InflateError(Exception):
    """The data is not what it should be."""


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


INFLATERS: dict[str, Callable[[], Inflate]] = {"deflate-4k": lambda: zlib_inflater(-12), "zstd": zstd_inflater}
"""By name of the codec: raw deflate with a window of 4 KiB, zstd frames."""


def _whole(content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise InflateError(f"it ends after {len(content)}")
    return content
