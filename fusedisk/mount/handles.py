"""Open files: what the kernel's handles stand for. Both ways of serving, pyfuse3's and the channel's, use them."""

from __future__ import annotations

import errno
import os

import trio

from fusedisk.core.errors import NoSpaceError, ReadOnlyError
from fusedisk.export import ranges
from fusedisk.export.export import Export


class Handle:
    """An open file."""

    __slots__ = ("backing", "direct", "export", "synchronous", "writable")

    def __init__(self, export: Export, flags: int) -> None:
        self.export = export
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.direct = bool(flags & os.O_DIRECT)
        self.synchronous = bool(flags & os.O_DSYNC)
        """What changes the content is to be on stable storage when it is answered (O_SYNC has the bit of O_DSYNC). The
        kernel sees to that only where it caches the file, and not for all requests then."""
        self.backing = 0
        """The kernel's number for the host file that it reads and writes past us; 0 where it does not."""

    async def write(self, offset: int, data: bytes | memoryview) -> int:
        """Write; short only at the end of a disk that may not grow.

        Linux turns a short O_DIRECT write into EIO, so there the reason is told at once, by NoSpaceError.
        """
        written = await self.export.write(offset, data)
        if written < len(data) and self.direct:
            raise NoSpaceError(f"'{self.export.name}' ended {len(data) - written} bytes before a write did.")
        return written

    async def settle(self) -> None:
        """Something was changed through this handle and is about to be answered."""
        if self.synchronous:
            await self.export.flush()

    async def flush(self) -> None:
        """close(): the last chance to tell the writer of an error, so what was written goes to disk now."""
        if self.writable:
            await self.export.flush()


class Handles:
    """All open files of a mount, by small integers that count up."""

    def __init__(self) -> None:
        self.by_number: dict[int, Handle] = {}
        self._last = 0
        self.released = trio.Event()
        """Set, and replaced, whenever a file is closed for good."""

    def __len__(self) -> int:
        return len(self.by_number)

    async def open(self, export: Export, flags: int) -> tuple[int, Handle]:
        """A new handle and its number. Raises ReadOnlyError where it could not be written to.

        O_TRUNC takes all content away: a growable disk is empty then, any other keeps its length, all zeroes. Tools
        such as ``cp`` skip the holes of what they copy into a file that they have just emptied.
        """
        handle = Handle(export, flags)
        if handle.writable and not export.writable:
            raise ReadOnlyError(f"'{export.name}' is read-only.", errno=errno.EROFS)
        if handle.writable and flags & os.O_TRUNC:
            if export.growable:
                await export.truncate(0)
            else:
                await ranges.zero(export, 0, export.length, punch=True, keep_size=True)
        self._last += 1
        self.by_number[self._last] = handle
        return self._last, handle

    def close(self, number: int) -> Handle:
        """The last descriptor of a handle is closed."""
        handle = self.by_number.pop(number)
        self.wake()
        return handle

    def wake(self) -> None:
        """Something was closed: let those look who wait for the mount to become idle."""
        self.released.set()
        self.released = trio.Event()
