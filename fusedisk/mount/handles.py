"""Open files, by the kernel's handle numbers. Both ways of serving, pyfuse3's and the channel's, use them."""

from __future__ import annotations

import errno
import os

from fusedisk.core.errors import NoSpaceError, ReadOnlyError
from fusedisk.core.locks import Signal
from fusedisk.export import ranges
from fusedisk.export.export import Export


class Handle:
    """An open file."""

    __slots__ = ("direct", "export", "kernel_backing_id", "synchronous", "writable")

    def __init__(self, export: Export, flags: int) -> None:
        self.export = export
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.direct = bool(flags & os.O_DIRECT)
        self.synchronous = bool(flags & os.O_DSYNC)
        """Changes must be on stable storage when they are answered (O_SYNC has the bit of O_DSYNC). The kernel ensures
        that only for files that it caches, and not for all requests."""
        self.kernel_backing_id = 0
        """The kernel's number for the host file that it accesses directly; 0 if it does not."""

    async def write(self, offset: int, data: bytes | memoryview) -> int:
        """Write; short only at the end of a disk that may not grow.

        Linux turns a short O_DIRECT write into EIO, so such a write raises NoSpaceError, which has the right errno.
        """
        written = await self.export.write(offset, data)
        if written < len(data) and self.direct:
            raise NoSpaceError(f"'{self.export.name}' ended {len(data) - written} bytes before a write did.")
        return written

    async def settle(self) -> None:
        """Flush before a change through this handle is answered, if the handle is synchronous."""
        if self.synchronous:
            await self.export.flush()

    async def flush(self) -> None:
        """Serve close(2): flush, since this is the last chance to report an error to the writer."""
        if self.writable:
            await self.export.flush()


class Handles:
    """All open files of a mount, by small integers that count up."""

    def __init__(self) -> None:
        self.by_number: dict[int, Handle] = {}
        self._last = 0
        self.released = Signal()
        """Given whenever a handle is released, so that tasks that wait for the mount to become idle look again."""

    def __len__(self) -> int:
        return len(self.by_number)

    async def open(self, export: Export, flags: int) -> tuple[int, Handle]:
        """Return a new handle and its number. Raises ReadOnlyError for writing to a read-only export.

        O_TRUNC removes all content: a growable disk becomes empty, any other keeps its length, all zeroes. Zeroes are
        needed since tools such as ``cp`` skip holes when they copy into a file that they have just truncated.
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
        """Remove a handle, after its last descriptor was closed."""
        handle = self.by_number.pop(number)
        self.released.notify()
        return handle
