"""One top-level node as a flat file: data, size, times, ownership, extended attributes.

Free of FUSE, so that every face of the mount shares it. All methods run in the one trio thread; state changes only
between awaits. Errors are :class:`~fusedisk.core.errors.FusediskError` with the errno that a POSIX caller sees.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NoReturn

import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.model.node import Node
from fusedisk.block.request.attempts import Attempts
from fusedisk.block.request.immediate import Lent, Pieces
from fusedisk.core.at_once import WouldWait, run_at_once
from fusedisk.core.errors import FusediskError, NoMediumError, NoSpaceError, ReadOnlyError
from fusedisk.core.locks import Mutex, Signal
from fusedisk.export.chain import backing_chain, storage_nodes
from fusedisk.export.times import Times

log = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 4096
EVERYTHING = (0, 1 << 63)
"""Offset and length of a whole file, however long it is."""
_MAX_BLOCK_SIZE = 2 << 20
WRITE_BEHIND_SECONDS = 5
"""The interval of most file systems."""
_MOST_SKIPPED_FLUSHES = 32
"""Flushes in a row that go straight to a task while the host's disk is slow."""
_PERMISSION_BITS = 0o777
_WRITE_BITS = 0o222


@dataclasses.dataclass(slots=True)
class Attributes:
    """The answer to ``stat``: sizes in bytes, ``blocks`` in units of 512 bytes, times in nanoseconds since 1970."""

    inode: int
    mode: int
    uid: int
    gid: int
    size: int
    blocks: int
    block_size: int
    mtime_ns: int
    ctime_ns: int
    current: bool = True
    """False: it may be out of date soon without our knowledge, so it must not be cached."""


@dataclasses.dataclass(slots=True)
class FileSettings:
    """The user's settings for the attributes of an export."""

    mode: int | None = None
    """Permission bits, 0600 unless given; a read-only export has no write bits."""
    uid: int | None = None
    """Owner; this process's unless given."""
    gid: int | None = None
    growable: bool = False
    """Writes past the end make the disk longer."""


class Export:
    """A backend as a regular file. Made by :meth:`open`."""

    def __init__(self, backend: Backend, name: str, inode: int, settings: FileSettings) -> None:
        self.backend = backend
        self.name = name
        self.inode = inode
        self.generation = 0
        """How many files of this name were removed while they were open: their handles are not this one's."""
        self.writable = backend.writable
        self.growable = settings.growable
        self.uid = os.geteuid() if settings.uid is None else settings.uid
        self.gid = os.getegid() if settings.gid is None else settings.gid
        self.mode = stat.S_IFREG
        self.source = ""
        """The image as the user named it."""
        self.shared_views = False
        """Other files show the same bytes and one of them may be written to, so none of them may be cached."""
        self.immutable = False
        """Its bytes cannot change while it is open."""
        self.shared_image = False
        """Others may write to the image meanwhile, so nothing of it may be cached."""
        self.overlay: str | None = None
        """The layer that takes the writes in place of the image: ``throw-away`` or its name."""
        self.on_change: Callable[[bool], None] | None = None
        """Called when the kernel's cached attributes are stale without its knowledge; with True, its data too."""
        self.drop_pages: Callable[[], Awaitable[None]] | None = None
        """Lets the kernel drop all data that it has cached of this file; returns once it has."""
        self.origin = 0
        """The offset of the file on its family's disk, in bytes."""
        self._writers_past_cache = 0
        """Open handles whose writes bypass the kernel's cache of this file."""
        self._flush_attempts = Attempts(_MOST_SKIPPED_FLUSHES)
        self._times = Times(self.chain_names, lambda: self._tell(data=False))
        self._unflushed = False
        self._passed_through = False
        self._written = Signal()
        """There are writes that :meth:`write_behind` has not seen."""
        self._resize = Mutex()
        self._resizing = 0
        self._exchanging = False
        self._writes_now = self.writable
        """Whether :meth:`write_now` may try."""
        self.set_mode(0o600 if settings.mode is None else settings.mode)
        backend.on_resize.append(self._resized)

    @classmethod
    async def open(cls, backend: Backend, name: str, inode: int, settings: FileSettings | None = None) -> Export:
        """Return an export of ``backend`` as the file ``name``. The caller keeps the backend and closes it."""
        export = cls(backend, name, inode, settings or FileSettings())
        storage = [node.exact_filename() for node in storage_nodes(backend.node, backing=False)]
        await export._times.start(storage)
        return export

    def join(self, other: Export) -> None:
        """Join the family of ``other``, which shows the same bytes: a write through one changes the times of both."""
        self._times.join(other._times)
        self.shared_views = other.shared_views = other.shared_views or self.writable or other.writable

    # --- data -------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """The length of the disk in bytes. If the kernel accesses the host file directly, that is looked up first."""
        if self.empty:
            return 0
        self._look_past()
        return self.backend.length

    @property
    def empty(self) -> bool:
        """Whether the disk has no medium."""
        return self.backend.root is None

    def check_medium(self) -> None:
        """Raise NoMediumError (ENOMEDIUM) if the disk has no medium."""
        if self.empty:
            raise NoMediumError(f"'{self.name}' has no medium.")

    async def read_medium(self) -> NoReturn:
        """The error of a read without a medium."""
        raise NoMediumError(f"'{self.name}' has no medium.")

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        """Return up to ``length`` bytes from ``offset``: fewer only at the end of the disk."""
        self.check_medium()
        length = min(length, self.length - offset)
        if length <= 0:
            return b""
        buffer = bytearray(length)
        await self.backend.read_into(offset, memoryview(buffer))
        return buffer

    async def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; returns the number of bytes read: fewer only at the end of the disk."""
        self.check_medium()
        length = min(len(buffer), self.length - offset)
        if length <= 0:
            return 0
        await self.backend.read_into(offset, buffer[:length])
        return length

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` if that is possible without waiting. False: ``buffer`` may hold anything."""
        return self.backend.immediate.read(offset, buffer)

    def lend_now(self, offset: int, length: int) -> list[Lent] | Pieces | None:
        """Return where the bytes of a range lie, so that the caller can send them without a copy and then call
        :meth:`count_lent`; None if that is not possible without waiting. Valid until the next await."""
        return self.backend.immediate.lend(offset, length)

    def count_lent(self, length: int) -> None:
        """Count bytes that were sent from where :meth:`lend_now` found them."""
        self.backend.immediate.count_lent(length)

    def write_now(self, offset: int, data: memoryview) -> bool:
        """Write ``data`` if that is possible without waiting. False: a part may be written."""
        if not self._writes_now:
            return False
        if self._times.family.keeps_some and self._times.family.keeps(
            self.origin + offset, self.origin + offset + len(data)
        ):
            return False
        if not self.backend.write_now(offset, data):
            return self.growable and offset + len(data) > self.backend.length and self._append_now(offset, data)
        self.touch()
        return True

    def _append_now(self, offset: int, data: memoryview) -> bool:
        """Write past the end of the disk, if that is possible without waiting. False: it may be longer already."""
        backend = self.backend
        if backend.drain_count or not backend.immediate.ways().at_once:
            return False
        try:
            return run_at_once(self.write(offset, data)) == len(data)
        except WouldWait:
            return False

    async def write(self, offset: int, data: bytes | memoryview) -> int:
        """Write ``data``; returns how many bytes were written.

        As on a block device, a write that crosses the end is cut there, and one that starts there raises NoSpaceError
        (ENOSPC); a growable export grows first. Raises ReadOnlyError on a read-only export.
        """
        self.check_writable()
        end = offset + len(data)
        if end > self.length:
            if self.growable:
                await self.extend(end)
            elif offset >= self.backend.length:
                raise NoSpaceError(
                    f"'{self.name}' is {self.backend.length} bytes long and does not grow, a request went up to {end}."
                )
            else:
                data = memoryview(data)[: self.backend.length - offset]
        self.touch()
        await self.backend.write(offset, data)
        self.touch()
        return len(data)

    def check_read(self, offset: int, length: int) -> None:
        """Raise the error of reading a range that is not on the disk. Parts of disks override this; a disk has none."""

    def keep(self, offset: int, length: int) -> None:
        """Note that the kernel puts what it reads there into its page cache, if there are writers that bypass it."""
        if self.shared_views or self._writers_past_cache:
            self._times.family.keep(self, self.origin + offset, self.origin + offset + length)

    async def drop_kept(self, offset: int, length: int) -> None:
        """Make the kernel drop its pages of a changed range, in all files that show it. Call it before the change is
        answered, also after a failed one: a part may be changed. See :meth:`.Family.drop`."""
        if self.shared_views:
            await self._times.family.drop(self.origin + offset, self.origin + offset + length)

    def begin_writing_past_cache(self) -> None:
        """Note that a handle writes past the kernel's cache of this file, which other handles use."""
        self._writers_past_cache += 1

    def end_writing_past_cache(self) -> None:
        """Undo one :meth:`begin_writing_past_cache`."""
        self._writers_past_cache -= 1
        if not self._writers_past_cache and not self.shared_views:
            self._times.family.forget(self)

    async def drop_overtaken(self, offset: int, length: int) -> bool:
        """Do as :meth:`drop_kept` after a write past the kernel's cache. True: there were pages. One that a program has
        changed through memory was written back whole, over what was written, so write that again."""
        return await self._times.family.drop(self.origin + offset, self.origin + offset + length)

    @asynccontextmanager
    async def changing(self, offset: int, length: int) -> AsyncIterator[None]:
        """Wrap a change of a range; calls :meth:`drop_kept` at the end."""
        try:
            yield
        except Exception:
            await self.drop_kept(offset, length)
            raise
        await self.drop_kept(offset, length)

    async def flush(self) -> None:
        """Put every write that was answered before this call on stable storage."""
        if self.empty:
            return  # flushed when the medium was taken out
        self._look_past()
        if not self._unflushed:
            await self.backend.flush()
            return
        self._unflushed = False
        try:
            await self.backend.flush()
            await self._times.image_written()
        except BaseException:
            self._unflushed = True
            raise

    def flush_now(self) -> bool:
        """Flush if that is possible without a task, although it blocks for the time of a quick flush. False: call
        :meth:`flush`."""
        if self.empty or self.backend.drain_count or not self.backend.immediate.ways().at_once:
            return False
        if self._flush_attempts.skipped():
            return False
        try:
            run_at_once(self.flush())
        except WouldWait:
            self._flush_attempts.failed()
            return False
        self._flush_attempts.backoff = 0
        return True

    # --- direct access to the host file -----------------------------------------------------------------

    def passthrough_descriptor(self, *, may_grow: bool) -> int | None:
        """Return a descriptor of the host file for direct access by the kernel, writable if the disk is; None if
        something in between must see the requests. ``may_grow``: a write past the end may make the disk longer."""
        backend = self.backend
        descriptor = backend.node.driver.host_descriptor()
        if descriptor is None or self.shared_views or self._exchanging or not backend.immediate.ways().passthrough:
            return None
        if self.writable and not self.growable and not may_grow and self._is_regular(descriptor):
            return None
        return descriptor

    @staticmethod
    def _is_regular(descriptor: int) -> bool:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)

    @property
    def passed_through(self) -> bool:
        """Whether the kernel accesses the host file directly and bypasses this process."""
        return self._passed_through

    def begin_passthrough(self) -> None:
        """Note that the host file may change without our knowledge from now on."""
        self._passed_through = True
        self.backend.begin_passthrough()

    def end_passthrough(self) -> None:
        """Undo one ``begin_passthrough``."""
        self._look_past()
        self._passed_through = False
        self.backend.end_passthrough()

    def _look_past(self) -> None:
        """Assume that the host file was written from outside: update the length, and expect new times."""
        if self._passed_through and self.writable:
            self.backend.note_external_write()
            self.touch()

    async def write_behind(self) -> None:
        """Write cached changes to the OS every few seconds, so that less is lost if the process dies. Never returns."""
        while True:
            await self._written.wait()
            await trio.sleep(WRITE_BEHIND_SECONDS)
            self._written.clear()
            if self.empty:
                continue  # flushed when the medium was taken out
            try:
                await self.backend.write_back()
            except FusediskError as exc:
                # The next flush reports the error to its caller.
                log.warning("%s: writing the cached changes to the host failed: %s", self.name, exc)
            await self._times.image_written()

    async def truncate(self, length: int) -> None:
        """Resize the disk. Its current size is always accepted, even if the format cannot be resized."""
        self.check_writable()
        async with self._resize:
            if length != self.length:
                await self._set_length(length)

    def check_writable(self) -> None:
        """Raise ReadOnlyError on a read-only export, NoMediumError on one without a medium."""
        self.check_medium()
        if not self.writable:
            raise ReadOnlyError(f"'{self.name}' is read-only.")

    async def extend(self, length: int) -> None:
        """Make the disk at least ``length`` bytes long, whether writes may do that or not."""
        unit = self.backend.node.limits.length_unit
        async with self._resize:
            if length > self.length:
                await self._set_length(-(-length // unit) * unit)

    async def _set_length(self, length: int) -> None:
        self.touch()
        self._resizing += 1
        try:
            await self.backend.truncate(length)
        finally:
            self._resizing -= 1
        self.touch()

    def touch(self) -> None:
        """Note that guest-visible content has changed or is about to. The kernel asks for the attributes again after
        each such request."""
        self._unflushed = True
        self._written.notify()
        self._times.touch()

    def _resized(self, length: int) -> None:
        if not self._resizing:
            self._tell(data=True)

    def _tell(self, *, data: bool) -> None:
        if self.on_change is not None:
            self.on_change(data)

    # --- attributes -------------------------------------------------------------------------------------

    @property
    def block_size(self) -> int:
        """The unit in which the image allocates, in bytes: a power of two from 512 to 2 MiB."""
        size = 0 if self.empty else self.backend.node.limits.cluster_size
        size = size or DEFAULT_BLOCK_SIZE
        return max(512, min(1 << (size.bit_length() - 1), _MAX_BLOCK_SIZE))

    async def allocated(self) -> int:
        """Return the bytes that the top layer of the image takes up on its host; the virtual length if unknown."""
        if self.empty:
            return 0
        size = await self.backend.node.driver.allocated_size()
        return self.backend.length if size is None else size

    async def attributes(self) -> Attributes:
        """Return the answer to ``stat``."""
        length = self.length
        await self._times.report()
        allocated = await self.allocated()
        return Attributes(
            inode=self.inode,
            mode=self.mode,
            uid=self.uid,
            gid=self.gid,
            size=length,
            blocks=-(-allocated // 512),
            block_size=self.block_size,
            mtime_ns=self._times.mtime_ns,
            ctime_ns=self._times.ctime_ns,
            current=not self.shared_image and not self.empty,
        )

    def set_mode(self, mode: int) -> None:
        """Set the permission bits; other bits are dropped, and for a read-only export the write bits too."""
        self._wanted_mode = mode = mode & _PERMISSION_BITS
        if not self.writable:
            mode &= ~_WRITE_BITS
        self.mode = stat.S_IFREG | mode
        self._times.attributes_changed()

    @property
    def exchanging(self) -> bool:
        """Whether medium or access are being changed, so that the kernel may have pages of the time before. A page that
        it writes back on its own may be of either time, so such a write must fail; and no direct access may begin."""
        return self._exchanging

    @exchanging.setter
    def exchanging(self, exchanging: bool) -> None:
        self._exchanging = exchanging
        self._writes_now = self.writable and not exchanging

    async def access_changed(self) -> None:
        """Note that the backend stands on another medium, or may write or no longer: look at it again."""
        self.writable = self.backend.writable
        self._writes_now = self.writable and not self._exchanging
        if not self.empty:
            storage = [node.exact_filename() for node in storage_nodes(self.backend.node, backing=False)]
            await self._times.start(storage)
        self.set_mode(self._wanted_mode)

    def leave(self) -> None:
        """Have no part in the family of a disk any more."""
        self._times.leave()

    def pages_stale(self) -> None:
        """Let the kernel drop what it has cached of the file: it holds what was not stored."""
        self._tell(data=True)

    def set_owner(self, uid: int | None, gid: int | None) -> None:
        """Set owner and group for the life of the mount; None leaves one as it is."""
        self.uid = self.uid if uid is None else uid
        self.gid = self.gid if gid is None else gid
        self._times.attributes_changed()

    def set_mtime(self, mtime_ns: int) -> None:
        """Set the modification time until the next write."""
        self._times.set_mtime(mtime_ns)

    def pin_mtime(self, mtime_ns: int) -> None:
        """Fix the modification time, whatever happens to the image's files. For exports that are never written to."""
        self._times.pin(mtime_ns)

    # --- extended attributes ----------------------------------------------------------------------------

    @property
    def image(self) -> Node:
        """The node of the image that the user named, below filters and an overlay."""
        chain = backing_chain(self.backend.node)
        return chain[1] if self.overlay is not None and len(chain) > 1 else chain[0]

    async def xattrs(self) -> dict[str, str]:
        """Return ``user.fusedisk.*``, a description of the image for people and scripts; nothing without a medium."""
        if self.empty:
            return {}
        top = self.backend.node
        chain = backing_chain(top)
        return {
            "user.fusedisk.format": self.image.driver.name,
            "user.fusedisk.node-name": top.name,
            "user.fusedisk.image": self.image.filename,
            "user.fusedisk.overlay": self.overlay or "no",
            "user.fusedisk.chain": "\n".join(node.filename for node in chain),
            "user.fusedisk.virtual-size": str(self.backend.length),
            "user.fusedisk.allocated": str(await self.allocated()),
            "user.fusedisk.cluster-size": str(top.limits.cluster_size),
            "user.fusedisk.read-only": "no" if self.writable else "yes",
        }

    def chain_names(self) -> list[str | None]:
        """Return the names of all files of the image and its backing files; None for one without a name."""
        return [] if self.empty else [node.exact_filename() for node in storage_nodes(self.backend.node)]

    def chain_files(self, *, backing: bool = True) -> list[str]:
        """Return the names of all local files of the image and its backing files; without ``backing`` only of those
        that writes may reach."""
        found = storage_nodes(self.backend.node, backing=backing)
        return [name for node in found if (name := node.exact_filename()) is not None]
