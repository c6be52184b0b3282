"""A record of the changes of metadata that the file lacks, in a buffer that may outlive the process (a shared memfd).

A format adds each change when it makes it in memory: a place in the file and the bytes that belong there. When it has
written them, it settles them. If the process dies, its successor finds in the buffer what was changed and not written.

The buffer starts with two words of 8 bytes: a magic number, and the bounds of what counts, its start in the upper half
and its end in the lower one; 0 means that changes are missing. Then come changes: place (8 bytes), length of the data
and kind (4 each), the data, zeroes up to a multiple of 8. Numbers are in the machine's byte order.

One aligned store of the bounds makes a change count, whole, or lets go of those that are settled. Everything else is
written outside the bounds. So the buffer is consistent at whatever instant the process dies.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview

_MAGIC = b"fdchg\0\0\1"
_CHANGE = struct.Struct("=QII")
_FIRST = 16
"""Where changes begin."""
_MOST = 1 << 31
"""Bytes of a buffer that are used at most: bounds have 32 bits."""


class Change(NamedTuple):
    """One change, as a successor finds it."""

    kind: int
    """Which kind of metadata, as the format defines it."""
    place: int
    """Where in the file it belongs."""
    data: bytes


class ChangeLog:
    """The changes of one image. The class must be the only one that writes to the buffer."""

    def __init__(self, buffer: bytearray | memoryview) -> None:
        """Start with no changes, whatever ``buffer`` holds: call :func:`changes_in` before."""
        self._bytes = memoryview(buffer).cast("B")[:_MOST]
        self._bounds = self._bytes[8:_FIRST].cast("Q")
        self.clear()
        self._bytes[:8] = _MAGIC

    @property
    def full(self) -> bool:
        """Whether the changes should be written to the file soon: there is little space left, or was too little."""
        return not self._complete or self._end > len(self._bytes) // 2

    def clear(self) -> None:
        """Note that the file has all changes."""
        self._start = self._end = _FIRST
        self._complete, self._gap = True, False
        self._publish()

    def add(self, kind: int, place: int, data: Buffer) -> None:
        """Add a change. Without space for it the log is worthless until the file has all changes so far."""
        start = self._end + _CHANGE.size
        stop = start + (len(data) + 7 & ~7)
        if stop > len(self._bytes):
            self.lose()
            return
        _CHANGE.pack_into(self._bytes, self._end, place, len(data), kind)
        self._bytes[start : start + len(data)] = data
        self._end = stop
        if self._complete:
            self._publish()

    def lose(self) -> None:
        """Make the log worthless until the file has all changes so far."""
        self._complete, self._gap = False, True
        self._bounds[0] = 0

    def mark(self) -> int:
        """Return a mark behind all changes so far, for :meth:`settle`."""
        if not self._complete:
            self._start = self._end = _FIRST
            self._gap = False
        return self._end

    def settle(self, mark: int) -> None:
        """Note that the file has all changes before the last ``mark``."""
        if self._gap:
            return
        self._start, self._complete = mark, True
        self._publish()
        count = self._end - mark
        if _FIRST + count <= mark:
            self._bytes[_FIRST : _FIRST + count] = self._bytes[mark : self._end]
            self._start, self._end = _FIRST, _FIRST + count
            self._publish()

    def _publish(self) -> None:
        self._bounds[0] = self._start << 32 | self._end


def changes_in(buffer: Buffer) -> Iterator[Change] | None:
    """Return the changes that a dead process left, the oldest first. None: some are missing, so only the file counts,
    as after any crash."""
    view = memoryview(buffer).cast("B")
    bounds = view[8:_FIRST].cast("Q")[0]
    if view[:8] != _MAGIC or not bounds:
        return None
    return _between(view, bounds >> 32, bounds & 0xFFFF_FFFF)


def _between(view: memoryview, start: int, end: int) -> Iterator[Change]:
    while start < end:
        place, length, kind = _CHANGE.unpack_from(view, start)
        start += _CHANGE.size
        yield Change(kind, place, bytes(view[start : start + length]))
        start += length + 7 & ~7
