"""The live exports of one process: files that come, change and go while faces serve them.

A face (the mount, later NBD and QMP) registers as a :class:`Face`. It is asked before each change, and told after it.
One change runs at a time. A disk brings its partitions and snapshots along and takes them away with it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress

import trio

from fusedisk.block.graph import root
from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import FusediskError, NodeNotFoundError, OperationBlockedError
from fusedisk.export.export import Export
from fusedisk.export.names import check_unique
from fusedisk.export.opening import ImageRequest, OpenSettings, cannot_change, open_exports
from fusedisk.export.views import PartitionExport, View


class Change(enum.Enum):
    """What happens to an export."""

    ADDED = "add"
    REMOVED = "remove"
    RESIZED = "resize"
    MEDIUM = "change the medium of"
    ACCESS = "change the access to"


class Face:
    """One way to serve the exports; a subclass overrides what concerns it."""

    def opens(self, export: Export, *, writing: bool = False) -> int:
        """Return how many times a file is open here; with ``writing`` only those that may write."""
        return 0

    async def before_opening(self, images: Sequence[ImageRequest]) -> None:
        """Look at images that are about to be opened. Raises a FusediskError for one that must not be."""

    async def prepare(self, change: Change, export: Export, *, writable: bool) -> None:
        """Get ready for a change, after which the file is ``writable`` or not. Raises OperationBlockedError if it is
        impossible, even by force."""

    async def told(self, change: Change, export: Export) -> None:
        """Take note of a change that has happened."""

    async def settled(self) -> None:
        """Take note that all files of a change have been told of."""


class Registry:
    """Exports by name and by inode number."""

    def __init__(self, graph: Graph, exports: Sequence[Export] = ()) -> None:
        self.graph = graph
        self.faces: list[Face] = []
        self.by_name: dict[str, Export] = {}
        self.by_inode: dict[int, Export] = {}
        self._generations: dict[str, int] = {}
        self._changing = trio.Lock()
        for export in exports:
            self._enter(export)

    def __iter__(self) -> Iterator[Export]:
        return iter(list(self.by_name.values()))

    def __len__(self) -> int:
        return len(self.by_name)

    def disk(self, name: str) -> Export:
        """Return the disk of that name. Raises NodeNotFoundError; OperationBlockedError for a part of a disk."""
        export = self.by_name.get(name)
        if export is None:
            raise NodeNotFoundError(f"there is no file '{name}'.")
        if isinstance(export, View):
            raise OperationBlockedError(f"'{name}' is a part of '{export.disk.name}': name that instead.")
        return export

    def family(self, disk: Export) -> list[Export]:
        """Return a disk and its parts, the disk first."""
        found = [disk]
        for export in self:
            if isinstance(export, View) and export.disk in found:
                found.append(export)
        return found

    async def add(self, images: Sequence[ImageRequest], settings: OpenSettings) -> list[Export]:
        """Open images and show their files. Raises a FusediskError; then no file is new, and nothing stays open."""
        async with self._changing:
            opened = await self._open(images, settings)
            async with _closed_on_failure(opened):
                check_unique((export.name, export.source) for export in [*self, *opened])
                for export in opened:
                    await self._prepare(Change.ADDED, [export], force=True, writable=export.writable)
            with trio.CancelScope(shield=True):
                for export in opened:
                    self._enter(export)
                for export in opened:
                    await self._tell(Change.ADDED, export)
                await self._settle()
            return opened

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Flush a disk, take its files away and close it. Refused while one is open, unless ``force``: then the next
        request of an open handle fails with ESTALE. Everything that was answered is flushed."""
        async with self._changing:
            family = self.family(self.disk(name))
            await self._prepare(Change.REMOVED, family, force=force)
            await family[0].flush()
            self._check_opens(Change.REMOVED, family, force=force)  # again, after the flush
            _check_direct(Change.REMOVED, family)
            with trio.CancelScope(shield=True):
                await self._take_away(family)
                await self._settle()
                await _close([export.backend for export in family])

    async def resize(self, name: str, length: int) -> None:
        """Give a disk another length."""
        async with self._changing:
            disk = self.disk(name)
            await self._prepare(Change.RESIZED, [disk], force=True, writable=disk.writable)
            await disk.truncate(length)
            await self._tell(Change.RESIZED, disk)
            await self._settle()

    async def change_medium(
        self, name: str, image: ImageRequest | None, settings: OpenSettings, *, force: bool = False
    ) -> None:
        """Put another image behind a file; None takes the medium out. Name, inode and open handles stay. Files of
        partitions and snapshots go with the old medium, and come with the new one. Refused while one of those is open,
        unless ``force``. What was answered is flushed to the old image. Raises a FusediskError; then nothing has
        changed."""
        async with self._changing:
            disk = self.disk(name)
            old = self.family(disk)[1:]
            fresh: list[Export] = []
            if image is not None:
                fresh = await self._open([dataclasses.replace(image, name=name)], settings)
            async with _closed_on_failure(fresh):
                await self._prepare_medium(disk, old, fresh, force=force)
                disk.exchanging = True
                try:
                    _check_direct(Change.MEDIUM, [disk])
                    with trio.CancelScope(shield=True):
                        spare = fresh[0].backend if fresh else Backend(self.graph, name)
                        await root.exchange(disk.backend, spare)
                        await self._medium_changed(disk, old, fresh)
                finally:
                    disk.exchanging = False
            with trio.CancelScope(shield=True):
                await _close([spare, *(export.backend for export in old)])

    async def _prepare_medium(
        self, disk: Export, old: Sequence[Export], fresh: Sequence[Export], *, force: bool
    ) -> None:
        staying = [export for export in self if export is not disk and export not in old]
        check_unique((export.name, export.source) for export in [*staying, *fresh])
        if fresh and _is_cached_less(fresh[0], disk) and self._opens(disk):
            raise OperationBlockedError(
                f"'{disk.name}' is open and its content cached, which the new medium does not allow, as other files or "
                "programs may change it: close it first."
            )
        await self._prepare(Change.REMOVED, old, force=force)
        writable = bool(fresh) and fresh[0].writable
        await self._prepare(Change.MEDIUM, [disk], force=True, writable=writable)
        for export in fresh[1:]:
            await self._prepare(Change.ADDED, [export], force=True, writable=export.writable)
        self._check_opens(Change.REMOVED, old, force=force)  # again, after the waiting

    async def _medium_changed(self, disk: Export, old: Sequence[Export], fresh: Sequence[Export]) -> None:
        """Let the files of the old medium go, and those of the new one come."""
        await self._take_away(old)
        disk.leave()
        # With handles open it stays as it is: without the kernel's cache, which is right for any medium.
        shared = bool(self._opens(disk)) and disk.shared_views, bool(self._opens(disk)) and disk.shared_image
        disk.source, disk.overlay, disk.immutable = "", None, False
        if fresh:
            fresh[0].leave()
            disk.source, disk.overlay, disk.immutable = fresh[0].source, fresh[0].overlay, fresh[0].immutable
            shared = shared[0] or fresh[0].shared_views, shared[1] or fresh[0].shared_image
        disk.shared_views, disk.shared_image = shared
        await disk.access_changed()
        for export in fresh[1:]:
            assert isinstance(export, View)
            if export.disk is fresh[0]:
                export.disk = disk
                if isinstance(export, PartitionExport):
                    export.join(disk)
            self._enter(export)
        await self._tell(Change.MEDIUM, disk)
        for export in fresh[1:]:
            await self._tell(Change.ADDED, export)
        await self._settle()

    async def set_writable(self, name: str, writable: bool, *, force: bool = False) -> None:
        """Let a disk and its partitions be written to, or no longer. Taking that away is refused while one is open for
        writing, unless ``force``: then writes of such handles fail with EROFS."""
        async with self._changing:
            disk = self.disk(name)
            disk.check_medium()
            parts = [export for export in self.family(disk) if isinstance(export, PartitionExport)]
            targets = [disk, *(export for export in parts if export.disk is disk)]
            if disk.writable == writable:
                return
            if writable and len(targets) > 1 and not disk.shared_views and any(map(self._opens, targets)):
                raise OperationBlockedError(
                    f"'{name}' or one of its partitions is open and cached, so none of them can become writable: close "
                    "them first."
                )
            await self._prepare(Change.ACCESS, targets, force=force or writable, only_writing=True, writable=writable)
            for export in targets:
                export.exchanging = True
            try:
                _check_direct(Change.ACCESS, targets)
                with trio.CancelScope(shield=True):
                    await self._change_access(targets, writable)
            finally:
                for export in targets:
                    export.exchanging = False

    async def _change_access(self, targets: Sequence[Export], writable: bool) -> None:
        await _set_writable([export.backend for export in targets], writable)
        for export in targets:
            await export.access_changed()
            export.immutable = not writable and cannot_change(targets[0].backend.node)
            # Handles of the time before stay open without the kernel's cache, so the files stay uncached.
            export.shared_views = export.shared_views or (writable and len(targets) > 1)
        for export in targets:
            await self._tell(Change.ACCESS, export)
        await self._settle()

    async def _open(self, images: Sequence[ImageRequest], settings: OpenSettings) -> list[Export]:
        for face in self.faces:
            await face.before_opening(images)
        return await open_exports(self.graph, images, settings)

    async def _take_away(self, exports: Sequence[Export]) -> None:
        """Remove files. Programs that still have them open get ESTALE. The caller closes their backends."""
        for export in exports:
            if self._opens(export):
                self._generations[export.name] = export.generation + 1
            del self.by_name[export.name], self.by_inode[export.inode]
            export.leave()
        for export in exports:
            await self._tell(Change.REMOVED, export)

    def _enter(self, export: Export) -> None:
        export.generation = self._generations.get(export.name, 0)
        self.by_name[export.name] = export
        self.by_inode[export.inode] = export

    def _opens(self, export: Export, *, writing: bool = False) -> int:
        return sum(face.opens(export, writing=writing) for face in self.faces)

    def _check_opens(self, change: Change, exports: Sequence[Export], *, force: bool, writing: bool = False) -> None:
        for export in exports:
            if not force and self._opens(export, writing=writing):
                how = "open for writing" if writing else "open"
                raise OperationBlockedError(f"'{export.name}' is {how}: close it first, or {change.value} it by force.")

    async def _prepare(
        self,
        change: Change,
        exports: Sequence[Export],
        *,
        force: bool,
        only_writing: bool = False,
        writable: bool = False,
    ) -> None:
        self._check_opens(change, exports, force=force, writing=only_writing)
        if change is not Change.RESIZED:
            _check_direct(change, exports)
        for export in exports:
            for face in self.faces:
                await face.prepare(change, export, writable=writable)

    async def _tell(self, change: Change, export: Export) -> None:
        for face in list(self.faces):
            await face.told(change, export)

    async def _settle(self) -> None:
        for face in list(self.faces):
            await face.settled()


def _check_direct(change: Change, exports: Sequence[Export]) -> None:
    """Raise OperationBlockedError if the kernel accesses the host file of an export, which only closing it can end."""
    for export in exports:
        if export.passed_through:
            raise OperationBlockedError(
                f"'{export.name}' is open and the kernel accesses its host file directly (passthrough): close it "
                f"before you {change.value} it."
            )


def _is_cached_less(one: Export, other: Export) -> bool:
    """Whether the kernel may not cache ``one``, though it may cache ``other``."""
    return (one.shared_views and not other.shared_views) or (one.shared_image and not other.shared_image)


async def _set_writable(backends: Sequence[Backend], writable: bool) -> None:
    """Let the backends of a disk and of its partitions write, or no longer. The disk is the first to begin, and the
    last to end, as partitions write through it. Raises an error; then nothing has changed."""
    done: list[Backend] = []
    try:
        for backend in backends if writable else reversed(backends):
            await root.set_writable(backend, writable)
            done.append(backend)
    except BaseException:
        for backend in reversed(done):
            await root.set_writable(backend, not writable)
        raise


@asynccontextmanager
async def _closed_on_failure(exports: Sequence[Export]) -> AsyncIterator[None]:
    """Close exports if the block fails."""
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True), suppress(FusediskError):  # the first error says why
            await _close([export.backend for export in exports])
        raise


async def _close(backends: Sequence[Backend]) -> None:
    """Close the backends of a disk and its parts, parts first. Raises the first error, at the end."""
    failure: FusediskError | None = None
    for backend in reversed(backends):
        try:
            await backend.close()
        except FusediskError as exc:
            failure = failure or exc
    if failure is not None:
        raise failure
