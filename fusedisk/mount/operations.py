"""The handlers that pyfuse3 calls: FUSE's requests in terms of exports.

An exception other than FUSEError would end pyfuse3's main loop and with it every disk of the mount, so each handler
goes through :func:`_guarded`, and what it raises through :mod:`.errors`.

Every handler is a task of its own, so one that waits for cold data holds up no other. Lookups need no counting: the
kernel learns at once when a file goes, and its number is never given to a file of another name.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from fusedisk.core.locks import Signal
from fusedisk.export.export import EVERYTHING, Attributes, Export
from fusedisk.export.names import NAME_MAX, ROOT_INODE
from fusedisk.export.registry import Registry
from fusedisk.export.views import View
from fusedisk.mount.errors import errno_of
from fusedisk.mount.handles import Handles

log = logging.getLogger(__name__)

ATTR_TIMEOUT = 60.0
"""Seconds for which the kernel may answer ``stat`` itself. It asks again after its own writes, and we notify it of all
other changes. Whenever it asks and finds another mtime it drops its cached pages, so it should not ask too often."""
ENTRY_TIMEOUT = 3600.0
"""Seconds for which the kernel may remember a name. A file that goes is taken out of its memory at once."""

_Self = TypeVar("_Self")
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def _guarded(
    handler: Callable[Concatenate[_Self, _Args], Coroutine[Any, Any, _Result]],
) -> Callable[Concatenate[_Self, _Args], Coroutine[Any, Any, _Result]]:
    """Translate what a handler raises into what pyfuse3 passes to the kernel."""

    async def guard(self: _Self, /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        try:
            return await handler(self, *args, **kwargs)
        except Exception as exc:
            raise FUSEError(errno_of(handler.__name__, exc)) from exc

    return guard


class Operations(pyfuse3.Operations):
    """One directory with a file for each export, or with ``single`` the one export as the mount's root.

    ``kernel_cache``: the kernel may cache a file if it learns of every change.
    """

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, registry: Registry, *, single: bool = False, kernel_cache: bool = True) -> None:
        super().__init__()
        self.registry = registry
        self._single = single
        self._by_inode = registry.by_inode
        if single:
            (only,) = registry
            self._by_inode = {ROOT_INODE: only}
        self._kernel_cache = kernel_cache
        self.handles = Handles(registry)
        first = self.exports[0]
        self._root_mode = stat.S_IFDIR | _directory_bits(first.mode)
        self._root_owner = (first.uid, first.gid)
        self._changed_ns = 0
        """When a file came or went last; 0 as long as none has."""
        shared = any(export.shared_views for export in self.exports)
        self.maps_uncached = not shared and not all(map(self.cached, self.exports))
        """Whether files that the kernel does not cache may be mapped shared: for the whole life of the mount."""

    def files_changed(self) -> None:
        """Note that a file came or went."""
        self._changed_ns = time.time_ns()

    @property
    def exports(self) -> list[Export]:
        """All files, in the order of their arrival."""
        return list(self.registry)

    @property
    def single(self) -> bool:
        """Whether the mount is one file."""
        return self._single

    @property
    def open_files(self) -> int:
        """The number of open file handles."""
        return len(self.handles)

    @property
    def released(self) -> Signal:
        """Given whenever a file is closed for good."""
        return self.handles.released

    def inode_of(self, export: Export) -> int:
        """The number by which the kernel knows an export."""
        return ROOT_INODE if self._single else export.inode

    # --- names and attributes ---------------------------------------------------------------------------

    @_guarded
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        """Find a file by its name."""
        if name in (b".", b".."):
            return await self._attributes(parent_inode)
        export = (
            self.registry.by_name.get(os.fsdecode(name)) if parent_inode == ROOT_INODE and not self._single else None
        )
        if export is None:
            raise FUSEError(errno.ENOENT)
        return self._entry(await export.attributes(), export.inode, export.generation)

    @_guarded
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """``stat``."""
        return await self._attributes(inode)

    @_guarded
    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """Do nothing: a file's number is its own for ever."""

    @_guarded
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Serve chmod, chown, utimes and truncate. The kernel has checked the permissions."""
        if inode == ROOT_INODE and not self._single:
            self._set_root(attr, fields)
            return await self._attributes(inode)
        export = self.export_of(inode)
        if fh is not None:
            self.handles.find(fh)  # of a file that was removed: the number is that of its successor
        if fields.update_size:
            async with export.changing(*EVERYTHING):
                await export.truncate(attr.st_size)
        if fields.update_mode:
            export.set_mode(attr.st_mode)
        if fields.update_uid or fields.update_gid:
            export.set_owner(attr.st_uid if fields.update_uid else None, attr.st_gid if fields.update_gid else None)
        if fields.update_mtime:
            export.set_mtime(attr.st_mtime_ns)
        return await self._attributes(inode)

    def _set_root(self, attr: EntryAttributes, fields: SetattrFields) -> None:
        if fields.update_mode:
            self._root_mode = stat.S_IFDIR | (attr.st_mode & 0o777)
        uid, gid = self._root_owner
        self._root_owner = (
            attr.st_uid if fields.update_uid else uid,
            attr.st_gid if fields.update_gid else gid,
        )

    def export_of(self, inode: int) -> Export:
        """Return the file with this inode number; raises FUSEError."""
        export = self._by_inode.get(inode)
        if export is None:
            raise FUSEError(errno.EISDIR if inode == ROOT_INODE else errno.ESTALE)
        return export

    async def _attributes(self, inode: int) -> EntryAttributes:
        if inode == ROOT_INODE and not self._single:
            return await self._root_attributes()
        export = self.export_of(inode)
        return self._entry(await export.attributes(), inode, export.generation, lasting=export.immutable)

    def _entry(self, found: Attributes, inode: int, generation: int, *, lasting: bool = False) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = found.mode
        entry.st_nlink = 1
        entry.generation = generation
        entry.st_uid = found.uid
        entry.st_gid = found.gid
        entry.st_size = found.size
        entry.st_blocks = found.blocks
        entry.st_blksize = found.block_size
        entry.st_atime_ns = entry.st_mtime_ns = found.mtime_ns
        entry.st_ctime_ns = found.ctime_ns
        entry.attr_timeout = ENTRY_TIMEOUT if lasting else ATTR_TIMEOUT if found.current else 0.0
        entry.entry_timeout = ENTRY_TIMEOUT
        return entry

    async def _root_attributes(self) -> EntryAttributes:
        """The directory is as old as its newest file, or as the last that came or went while we served."""
        mtime_ns = max([self._changed_ns, *[(await export.attributes()).mtime_ns for export in self.exports]])
        entry = EntryAttributes()
        entry.st_ino = ROOT_INODE
        entry.st_mode = self._root_mode
        entry.st_nlink = 2
        entry.st_uid, entry.st_gid = self._root_owner
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = mtime_ns
        entry.attr_timeout = 0.0 if any(export.shared_image for export in self.exports) else ATTR_TIMEOUT
        entry.entry_timeout = ENTRY_TIMEOUT
        return entry

    @_guarded
    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        """The kernel checks permissions itself (``default_permissions``)."""
        return True

    @_guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Sizes of all disks together. ``f_bsize`` is the smallest unit in which one of them allocates, which is what a
        loop device takes for its discard granularity."""
        unit = max(512, min((export.block_size for export in self.exports), default=512))
        disks = [export for export in self.exports if not isinstance(export, View)]
        total = sum(export.length for export in disks)
        used = min(total, sum([await export.allocated() for export in disks]))
        answer = StatvfsData()
        answer.f_bsize = answer.f_frsize = unit
        answer.f_blocks = -(-total // unit)
        answer.f_bfree = answer.f_bavail = (total - used) // unit
        answer.f_files = len(self.exports)
        answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = NAME_MAX
        return answer

    # --- directory --------------------------------------------------------------------------------------

    @_guarded
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """Open the one directory; its handle has no meaning."""
        return FileHandleT(0)

    @_guarded
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """List the files by inode number, which is the position, too: files may come and go meanwhile."""
        for export in sorted(self.exports, key=lambda export: export.inode):
            if export.inode <= start_id:
                continue
            entry = self._entry(await export.attributes(), export.inode, export.generation)
            name = FileNameT(os.fsencode(export.name))
            if not pyfuse3.readdir_reply(token, name, entry, export.inode):
                return

    @_guarded
    async def releasedir(self, fh: FileHandleT) -> None:
        """Do nothing: directory handles have no state."""
        self.handles.released.notify()

    @_guarded
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Do nothing: names are never stored."""

    # --- files ------------------------------------------------------------------------------------------

    @_guarded
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """Open a file."""
        export = self.export_of(inode)
        async with export.changing(*(EVERYTHING if flags & os.O_TRUNC else (0, 0))):
            number, _ = await self.handles.open(export, flags)
        cached = self.cached(export)
        return FileInfo(fh=FileHandleT(number), direct_io=not cached, keep_cache=cached)

    def cached(self, export: Export) -> bool:
        """Whether the kernel may keep what it reads, over opens too: all changes come through the same file then."""
        return self._kernel_cache and not export.shared_views and not export.shared_image

    @_guarded
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Read; short only at the disk's end. Used only without the data channel, like all data requests below."""
        export = self.handles.find(fh).export
        export.keep(off, size)  # nothing here says that the kernel does not
        return await export.read(off, size)  # type: ignore[return-value]  # pyfuse3 takes any buffer

    @_guarded
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Write; short only at the end of a disk that may not grow."""
        handle = self.handles.find(fh)
        async with handle.export.changing(off, len(buf)):
            # Nothing here says whether the kernel writes a page of its cache.
            return await handle.write(off, buf, page=True)

    @_guarded
    async def flush(self, fh: FileHandleT) -> None:
        """Called on every close(2): the last chance to report write errors."""
        await self.handles.find(fh).flush()

    @_guarded
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Put everything written before on stable storage. This is the only barrier that a loop device has."""
        await self.handles.find(fh).export.flush()

    @_guarded
    async def release(self, fh: FileHandleT) -> None:
        """Close a handle, after its last descriptor was closed."""
        self.handles.close(fh)

    # --- extended attributes ----------------------------------------------------------------------------

    @_guarded
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        """Return one of ``user.fusedisk.*``."""
        export = self._by_inode.get(inode)
        if export is None or not name.startswith(b"user.fusedisk."):
            raise FUSEError(pyfuse3.ENOATTR)
        value = (await export.xattrs()).get(os.fsdecode(name))
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return os.fsencode(value)

    @_guarded
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        """Return the names of a file's attributes; the directory has none."""
        export = self._by_inode.get(inode)
        if export is None:
            return []
        return [XAttrNameT(os.fsencode(name)) for name in await export.xattrs()]

    @_guarded
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> None:
        """There is no place to keep them."""
        raise FUSEError(errno.EOPNOTSUPP)

    @_guarded
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        """There is no place to keep them."""
        raise FUSEError(errno.EOPNOTSUPP)

    # --- requests that a directory of disks refuses -----------------------------------------------------

    @_guarded
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        """No symbolic links here."""
        raise FUSEError(errno.EINVAL)

    async def _refuse(self, *request: Any) -> Any:
        """Files come and go by the registry, not by system calls."""
        raise FUSEError(errno.EPERM)

    create: Any = _refuse
    mknod: Any = _refuse
    mkdir: Any = _refuse
    unlink: Any = _refuse
    rmdir: Any = _refuse
    symlink: Any = _refuse
    rename: Any = _refuse
    link: Any = _refuse


def _directory_bits(file_mode: int) -> int:
    """Return the mode of the directory: users that may read or write a file may list and enter it."""
    readable = (file_mode | file_mode << 1) & 0o444
    return 0o700 | readable | readable >> 2
