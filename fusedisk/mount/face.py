"""The mount as a face of the registry: files come, go and change under it while it serves.

Each change tells the kernel what it must forget, and returns once it has. That needs our answers to its requests, so
all of it runs beside them: see :mod:`.notifying`.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import trio

from fusedisk.core.errors import FusediskError, HostError, OperationBlockedError
from fusedisk.core.locks import Signal
from fusedisk.core.offload import run_opening
from fusedisk.export.export import Export
from fusedisk.export.names import ROOT_INODE
from fusedisk.export.opening import ImageRequest, absolute
from fusedisk.export.registry import Change, Face
from fusedisk.export.views import View
from fusedisk.mount import export_records, loop_device, mountinfo, remounting
from fusedisk.mount.loop_follower import LoopFollower
from fusedisk.mount.notifying import Notifier
from fusedisk.mount.operations import Operations
from fusedisk.mount.runtime import MountRecord

log = logging.getLogger(__name__)

MOST_FILES = 4096
"""The most files of a mount without the data channel, where some requests of each may wait for the kernel."""


class MountFace(Face):
    """One mount; ``place`` tells where it is now, and blocks for a moment."""

    def __init__(self, operations: Operations, notifier: Notifier, place: Callable[[], str]) -> None:
        self.record: MountRecord | None = None
        """Is kept true as files come, go and change; None: there is none."""
        self.fixed = operations.single
        """The mount is for its one file, and no other may come."""
        self.device = ""
        """``major:minor`` of the mount's files."""
        self._operations = operations
        self._notifier = notifier
        self._place = place
        self._nursery: trio.Nursery | None = None
        self._tasks: dict[Export, list[trio.CancelScope]] = {}
        self._followers: dict[Export, LoopFollower] = {}
        self._writable = any(export.writable for export in operations.exports)
        """Whether the mount as a whole is to be written to."""
        self._stale: set[int] = set()
        """Inodes whose cached data the kernel must drop."""
        self._some_stale = Signal()

    # --- serving ----------------------------------------------------------------------------------------

    def start(self, nursery: trio.Nursery) -> None:
        """Begin to look after the files, and after those that come."""
        self._nursery = nursery
        nursery.start_soon(self._drop_stale_pages)
        for export in self._operations.exports:
            self._begin(export)
        self._operations.registry.faces.append(self)

    def stop(self) -> None:
        """The mount ends."""
        self._nursery = None
        self._operations.registry.faces.remove(self)
        self._notifier.end()

    def _begin(self, export: Export) -> None:
        if self._nursery is None:
            return
        inode = self._operations.inode_of(export)
        export.on_change = partial(self._changed, inode)
        export.drop_pages = partial(self._notifier.drop_pages, inode)
        self._followers[export] = follower = LoopFollower(export, partial(self._path, export))
        self._tasks[export] = []
        for task in (follower.run, export.write_behind):
            scope = trio.CancelScope()
            self._tasks[export].append(scope)
            self._nursery.start_soon(_run, scope, task)

    def _end(self, export: Export) -> None:
        export.on_change = export.drop_pages = None
        if export in self._followers:
            self._followers.pop(export).leave()
            for scope in self._tasks.pop(export):
                scope.cancel()

    def _path(self, export: Export) -> str:
        """Where a file is now. Blocks for a moment."""
        return self._place() if self._operations.single else os.path.join(self._place(), export.name)

    def _changed(self, inode: int, data: bool) -> None:
        if not data:
            # Attributes alone take no waiting, and the next client must see the new ones.
            self._notifier.invalidate(inode, True)
            return
        self._stale.add(inode)
        self._some_stale.notify()

    async def _drop_stale_pages(self) -> None:
        while True:
            await self._some_stale.wait()
            while self._stale:
                await self._notifier.drop_pages(self._stale.pop())

    # --- before a change --------------------------------------------------------------------------------

    def opens(self, export: Export, *, writing: bool = False) -> int:
        """See :class:`.Face`."""
        return self._operations.handles.opens_of(export, writing=writing)

    async def before_opening(self, images: Sequence[ImageRequest]) -> None:
        """Refuse images that lie on this mount: we would wait for ourselves."""
        for image in images:
            options = await run_opening(absolute, image.spec, self._operations.registry.graph.drivers)
            names = list(_filenames(options))
            if await trio.to_thread.run_sync(self._is_ours, names, abandon_on_cancel=True):
                raise OperationBlockedError(f"'{image.text}' lies on the mount that is to show it.")

    def _is_ours(self, names: Sequence[str]) -> bool:
        for name in names:
            try:
                number = os.stat(name).st_dev
            except (OSError, ValueError):
                continue
            if f"{os.major(number)}:{os.minor(number)}" == self.device:
                return True
        return False

    async def prepare(self, change: Change, export: Export, *, writable: bool) -> None:
        """See :class:`.Face`."""
        if change is Change.ADDED:
            self._check_may_come(export)
        elif change in (Change.REMOVED, Change.MEDIUM):
            if change is Change.REMOVED and self.fixed:
                raise OperationBlockedError(f"'{export.name}' is all that '{self._place()}' shows: unmount that.")
            await self._check_no_loop_device(change, export)
        if writable:
            self._check_mappings(export, shared=export.shared_views or isinstance(export, View))
            await self._make_writable(export)
        if change is not Change.ADDED:
            # What programs have changed in memory reaches the image as it is now.
            await self._notifier.drop_pages(self._operations.inode_of(export))

    def _check_may_come(self, export: Export) -> None:
        if self.fixed:
            raise OperationBlockedError(f"'{self._place()}' shows one image only, so '{export.name}' cannot join it.")
        if self._notifier.channel is None and len(self._operations.exports) >= MOST_FILES:
            raise OperationBlockedError(f"the mount has {MOST_FILES} files, the most without the data channel.")
        self._check_mappings(export, shared=export.shared_views)

    def _check_mappings(self, export: Export, *, shared: bool) -> None:
        channel = self._notifier.channel
        if shared and channel is not None and channel.maps_uncached:
            raise OperationBlockedError(
                f"'{export.name}' shows the same bytes as another file, which this mount cannot serve, as it was made "
                "for files that are not cached and can be mapped into memory: mount the image on its own."
            )

    async def _check_no_loop_device(self, change: Change, export: Export) -> None:
        """A loop device would go on with what it has cached of the old content."""
        path = await trio.to_thread.run_sync(self._path, export)
        found = await trio.to_thread.run_sync(loop_device.attached_to, path)
        if found:
            raise OperationBlockedError(
                f"'{export.name}' has the loop device {found[0]}: detach that (losetup -d {found[0]}) before you "
                f"{change.value} it."
            )

    async def _make_writable(self, export: Export) -> None:
        if self._writable:
            return
        try:
            await self._notifier.in_thread(self._remount, False)
        except HostError as exc:
            if exc.errno != errno.EPERM:
                raise
            raise OperationBlockedError(
                f"'{export.name}' cannot be writable, as '{self._place()}' is mounted read-only and only root may "
                "change that."
            ) from exc
        self._writable = True

    def _remount(self, read_only: bool) -> None:
        place = self._place()
        for mount in mountinfo.mounts():
            if (mount.mountpoint, mount.device) == (place, self.device):
                remounting.remount(mount, read_only=read_only)

    # --- after a change ---------------------------------------------------------------------------------

    async def told(self, change: Change, export: Export) -> None:
        """See :class:`.Face`."""
        if change is Change.ADDED:
            await self._has_come(export)
            return
        inode = self._operations.inode_of(export)
        if change is Change.REMOVED:
            self._operations.handles.drop(export)
            if self._notifier.channel is not None:
                self._notifier.channel.forget(export)
            self._end(export)
            await self._notifier.delete(export.name, inode)
            self._operations.files_changed()
        await self._notifier.drop_pages(inode)
        if change is Change.RESIZED and export in self._followers:
            await self._followers[export].follow()

    async def _has_come(self, export: Export) -> None:
        self._begin(export)
        self._operations.files_changed()
        if export.generation:
            # The kernel may still hold the inode of a removed file of this name. It gives that up when it sees the new
            # one, so that no request of the old one can reach the new file by its number.
            await self._notifier.in_thread(_look_at, partial(self._path, export))

    async def settled(self) -> None:
        """See :class:`.Face`."""
        exports = self._operations.exports
        if not self._operations.single:
            self._notifier.invalidate(ROOT_INODE, True)
        if self._notifier.channel is not None:
            self._notifier.channel.shared = any(export.shared_views for export in exports)
        await self._follow_access(any(export.writable for export in exports))
        if self.record is not None:
            try:
                await trio.to_thread.run_sync(export_records.rewrite, self.record, exports)
            except FusediskError as exc:
                log.error("%s", exc)

    async def _follow_access(self, writable: bool) -> None:
        """Let the mount be read-only when all of its files are."""
        if writable or not self._writable:
            return
        try:
            await self._notifier.in_thread(self._remount, True)
            self._writable = False
        except FusediskError as exc:
            # Not root, or a file is open for writing by force. The files are read-only all the same.
            log.debug("the mount stays writable: %s", exc)


async def _run(scope: trio.CancelScope, task: Callable[[], Any]) -> None:
    with scope:
        await task()


def _look_at(path: Callable[[], str]) -> None:
    try:
        os.stat(path())
    except OSError as exc:
        log.debug("looking at a new file: %s", exc)


def _filenames(options: Mapping[str, Any]) -> Iterator[str]:
    """The names of all files that nested options speak of."""
    for key, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                yield from _filenames(item)
            elif key == "filename" and isinstance(item, str):
                yield item
