"""What libdeflate can do beyond what the package ``deflate`` offers: inflate to where the caller wants it, or a part.

The package's extension module has all of libdeflate's functions, with the names of libdeflate.h; they are called as
they are. Where a build of it keeps them to itself, :func:`libdeflate` is None and everybody does without.

libdeflate knows only whole streams: it stops where the output has no more room, but does not say how far it came. It
stops less than 258 bytes before the end of the output, the length of the longest match, unless what follows is a
stored block, of which it then takes nothing. So the output has some more room than is wanted, with random bytes in it:
once they are overwritten, it came further than that.

There is a gap before the random bytes, for two things that are not output. As it copies whole words, it writes up to
some 40 bytes past where it stands. And where a stream is cut off, it takes up to eight bytes of zeroes for what
follows, before it notices: those are up to 1289 bytes of output, as five matches.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache

_SUCCESS, _BAD_DATA, _INSUFFICIENT_SPACE = 0, 1, 3
_GAP = 2048
_MARK = os.urandom(16)
_LONGEST_MATCH = 258
PREFIX_MORE = _GAP + len(_MARK) + _LONGEST_MATCH
"""Bytes that :meth:`Libdeflate.prefix` inflates beyond those that are wanted."""

_byte = ctypes.c_char
_address = ctypes.addressof


class Libdeflate:
    """Raw deflate. Any thread may call it, also several at once; the GIL is released meanwhile. All memory must be
    writable, as only of that one may take the address."""

    def __init__(self, path: str) -> None:
        """``path``: of the library. Raises OSError or AttributeError where it is not one."""
        library = ctypes.CDLL(path)
        self._allocate = library.libdeflate_alloc_decompressor
        self._allocate.argtypes = ()
        self._allocate.restype = ctypes.c_void_p
        self._decompress = library.libdeflate_deflate_decompress
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._decompress.argtypes = (pointer, pointer, size, pointer, size, pointer)
        self._decompress.restype = ctypes.c_int
        self._spare: list[int] = []
        """Decompressors that nobody uses; each of them only works for one at a time."""

    def within(self, memory: memoryview) -> Callable[[int, int, int, int], bool]:
        """What inflates from one part of ``memory`` to another, for one thread at a time: called with offset and length
        of the data, which may be followed by anything, and offset and length of the target. False: that may hold
        anything, since the data is damaged or inflates to another length."""
        decompress, decompressor = self._decompress, self._decompressor()
        start = _byte.from_buffer(memory)  # as long as this is there, so is the memory
        base, end = _address(start), len(memory)

        def into(offset: int, length: int, place: int, size: int, _: object = start) -> bool:
            if not length:
                return False
            assert max(offset + length, place + size) <= end, (offset, length, place, size)
            # Without a place for the length, no other length than that of the target is a success.
            done: int = decompress(decompressor, base + offset, length, base + place, size, None)
            return done == _SUCCESS

        return into

    def prefix(self, data: memoryview, size: int) -> bytearray | None:
        """The first ``size`` bytes of what ``data`` inflates to. None: this is not the way to find out."""
        output = bytearray(size + PREFIX_MORE)
        mark = size + _GAP
        output[mark : mark + len(_MARK)] = _MARK
        if self._call(data, output) != _INSUFFICIENT_SPACE or output[mark : mark + len(_MARK)] == _MARK:
            return None
        del output[size:]
        return output

    def _call(self, data: memoryview, target: memoryview | bytearray) -> int:
        if not len(data):
            return _BAD_DATA
        try:
            decompressor = self._spare.pop()
        except IndexError:
            decompressor = self._decompressor()
        source, output = _byte.from_buffer(data), _byte.from_buffer(target)
        result: int = self._decompress(decompressor, _address(source), len(data), _address(output), len(target), None)
        self._spare.append(decompressor)
        return result

    def _decompressor(self) -> int:
        decompressor: int | None = self._allocate()
        if not decompressor:
            raise MemoryError("libdeflate has no room for a decompressor")
        return decompressor


@cache
def libdeflate() -> Libdeflate | None:
    """Where it can be called."""
    try:
        import deflate._deflate as extension

        return Libdeflate(extension.__file__)
    except (ImportError, OSError, AttributeError):
        return None
