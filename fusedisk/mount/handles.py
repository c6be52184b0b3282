"""Open files, by the kernel's handle numbers. Both ways of serving, pyfuse3's and the channel's, use them.

A number says which file was opened and how: inode, generation of the file, flags. So it does not depend on what was
opened before, and a daemon that takes over a mount understands the numbers that another one gave out. Opens of one file
with the same flags share a number.
"""

from __future__ import annotations

import errno
import os

from fusedisk.core.errors import HostError, NoSpaceError, ReadOnlyError
from fusedisk.core.locks import Signal
from fusedisk.export import ranges
from fusedisk.export.export import Export
from fusedisk.export.registry import Registry

_GENERATION_SHIFT, _INODE_SHIFT = 4, 16
_GENERATIONS = 1 << (_INODE_SHIFT - _GENERATION_SHIFT)
_WRITABLE, _DIRECT, _SYNCHRONOUS, _PAST_CACHE = 1, 2, 4, 8


class Handle:
    """An open file."""

    __slots__ = ("direct", "export", "kernel_backing_id", "opens", "past_cache", "synchronous", "writable")

    def __init__(self, export: Export, flags: int, *, past_cache: bool = False) -> None:
        self.export = export
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.direct = bool(flags & os.O_DIRECT)
        self.synchronous = bool(flags & os.O_DSYNC)
        """Changes must be on stable storage when they are answered (O_SYNC has the bit of O_DSYNC). The kernel ensures
        that only for files that it caches, and not for all requests."""
        self.past_cache = past_cache
        """It writes past the kernel's page cache, although the file is cached."""
        self.kernel_backing_id = 0
        """The kernel's number for the host file that it accesses directly; 0 if it does not."""

        self.opens = 0
        """How many times the file is open under this number."""

    @property
    def number(self) -> int:
        """The number by which the kernel knows it."""
        flags = self.writable * _WRITABLE | self.direct * _DIRECT | self.synchronous * _SYNCHRONOUS
        flags |= self.past_cache * _PAST_CACHE
        generation = self.export.generation % _GENERATIONS
        return self.export.inode << _INODE_SHIFT | generation << _GENERATION_SHIFT | flags

    async def write(self, offset: int, data: bytes | memoryview, *, page: bool, synchronous: bool = False) -> int:
        """Write; short only at the end of a disk that may not grow. The bytes are on stable storage afterwards if the
        handle or the write is ``synchronous``.

        ``page``: the bytes may be a page of the kernel's cache. Written while another medium comes, it would hold bytes
        of the old one, so that fails (EIO).

        Linux turns a short O_DIRECT write into EIO, so such a write raises NoSpaceError, which has the right errno.
        """
        export = self.export
        if page and export.exchanging:
            raise HostError(f"'{export.name}' changed while a page of it was written.", errno=errno.EIO)
        try:
            written = await export.write(offset, data)
        except BaseException:
            if page and not export.writable:
                export.pages_stale()
            raise
        if written < len(data) and self.direct:
            raise NoSpaceError(f"'{export.name}' ended {len(data) - written} bytes before a write did.")
        if synchronous or self.synchronous:
            await export.flush()
        return written

    async def sync_if_requested(self) -> None:
        """Flush before a change through this handle is answered, if the handle is synchronous."""
        if self.synchronous:
            await self.export.flush()

    async def flush(self) -> None:
        """Serve close(2): flush, since this is the last chance to report an error to the writer."""
        if self.writable:
            await self.export.flush()


class Handles:
    """All open files of a mount, by their numbers."""

    def __init__(self, registry: Registry) -> None:
        self.by_number: dict[int, Handle] = {}
        self._registry = registry
        self.past_cache = 0
        """How many times files are open for writing past the kernel's cache."""
        self.released = Signal()
        """Given whenever a handle is released, so that tasks that wait for the mount to become idle look again."""

    def __len__(self) -> int:
        return sum(handle.opens for handle in self.by_number.values())

    async def open(self, export: Export, flags: int, *, past_cache: bool = False) -> tuple[int, Handle]:
        """Return a new handle and its number. Raises ReadOnlyError for writing to a read-only export.

        O_TRUNC removes all content: a growable disk becomes empty, any other keeps its length, all zeroes. Zeroes are
        needed since tools such as ``cp`` skip holes when they copy into a file that they have just truncated.
        """
        export.check_medium()
        handle = Handle(export, flags, past_cache=past_cache)
        if handle.writable and not export.writable:
            raise ReadOnlyError(f"'{export.name}' is read-only.", errno=errno.EROFS)
        if handle.writable and flags & os.O_TRUNC:
            if export.growable:
                await export.truncate(0)
            else:
                await ranges.zero(export, 0, export.length, punch=True, keep_size=True)
        number = handle.number
        if self._registry.by_inode.get(export.inode) is not export:
            raise self._stale(number)  # removed meanwhile
        handle = self.by_number.setdefault(number, handle)
        self._opened(handle)
        return number, handle

    def find(self, number: int) -> Handle:
        """Return the handle with this number, also one that another daemon has opened. Raises HostError (ESTALE) if
        its file was removed."""
        found = self.by_number.get(number)
        if found is not None:
            return found
        export = self._registry.by_inode.get(number >> _INODE_SHIFT)
        if export is not None:
            flags = os.O_RDWR if number & _WRITABLE else os.O_RDONLY
            flags |= (os.O_DIRECT if number & _DIRECT else 0) | (os.O_SYNC if number & _SYNCHRONOUS else 0)
            handle = Handle(export, flags, past_cache=bool(number & _PAST_CACHE))
            if handle.number == number:
                self._opened(handle)
                self.by_number[number] = handle
                return handle
        raise self._stale(number)

    def _opened(self, handle: Handle) -> None:
        handle.opens += 1
        if handle.past_cache:
            self.past_cache += 1
            handle.export.begin_writing_past_cache()

    @staticmethod
    def _stale(number: int) -> HostError:
        return HostError(f"the file of the open handle {number:#x} was removed.", errno=errno.ESTALE)

    def opens_of(self, export: Export, *, writing: bool = False) -> int:
        """Return how many times a file is open; with ``writing`` only those that may write."""
        handles = [handle for handle in self.by_number.values() if handle.export is export]
        return sum(handle.opens for handle in handles if handle.writable or not writing)

    def close(self, number: int) -> Handle | None:
        """Count down after the last descriptor of one open was closed. None: the file was removed before."""
        handle = self.by_number.get(number)
        if handle is not None:
            handle.opens -= 1
            if handle.past_cache:
                self.past_cache -= 1
                handle.export.end_writing_past_cache()
            if not handle.opens:
                del self.by_number[number]
        self.released.notify()
        return handle

    def drop(self, export: Export) -> None:
        """Forget all handles of a file that was removed; requests of them get ESTALE."""
        for handle in [handle for handle in self.by_number.values() if handle.export is export]:
            self.past_cache -= handle.opens * handle.past_cache
            del self.by_number[handle.number]
        self.released.notify()
