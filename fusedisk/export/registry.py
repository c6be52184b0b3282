"""The live exports of one process: files that come, change and go while faces serve them.

A face (the mount, later NBD and QMP) registers as a :class:`Face`. It is asked before each change, and told after it.
One change runs at a time. A disk brings its partitions and snapshots along and takes them away with it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence

import trio

from fusedisk.block.graph import root
from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import FusediskError, NodeNotFoundError, OperationBlockedError
from fusedisk.export.export import Export
from fusedisk.export.names import check_unique
from fusedisk.export.opening import ImageRequest, OpenSettings, open_exports
from fusedisk.export.views import View


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

    async def prepare(self, change: Change, export: Export) -> None:
        """Get ready for a change. Raises OperationBlockedError if it is impossible, even by force."""

    async def told(self, change: Change, export: Export) -> None:
        """Take note of a change that has happened."""


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
        """Open images and show their files. Raises a FusediskError; then there is no new file."""
        async with self._changing:
            opened = await open_exports(self.graph, images, settings)
            try:
                check_unique((export.name, export.source) for export in [*self, *opened])
            except BaseException:
                with trio.CancelScope(shield=True):
                    await _close(opened)
                raise
            for export in opened:
                self._enter(export)
            for export in opened:
                await self._tell(Change.ADDED, export)
            return opened

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Flush a disk, take its files away and close it. Refused while one is open, unless ``force``: then the next
        request of an open handle fails with ESTALE. Everything that was answered is flushed."""
        async with self._changing:
            family = self.family(self.disk(name))
            await self._prepare(Change.REMOVED, family, force=force)
            await family[0].flush()
            self._check_opens(Change.REMOVED, family, force=force)  # again, after the flush
            for export in family:
                if self._opens(export):
                    self._generations[export.name] = export.generation + 1
                del self.by_name[export.name], self.by_inode[export.inode]
                export.leave()
            with trio.CancelScope(shield=True):
                for export in family:
                    await self._tell(Change.REMOVED, export)
                await _close(family)

    async def resize(self, name: str, length: int) -> None:
        """Give a disk another length."""
        async with self._changing:
            disk = self.disk(name)
            await self._prepare(Change.RESIZED, [disk], force=True)
            await disk.truncate(length)
            await self._tell(Change.RESIZED, disk)

    async def change_medium(self, name: str, image: ImageRequest | None, settings: OpenSettings) -> None:
        """Put another image behind a file; None takes the medium out. Name, inode and open handles stay. What was
        answered is flushed to the old image. Raises a FusediskError; then nothing has changed."""
        async with self._changing:
            disk = self.disk(name)
            if len(self.family(disk)) > 1:
                raise OperationBlockedError(f"the medium of '{name}' stays, as files show parts of it.")
            await self._prepare(Change.MEDIUM, [disk], force=True)
            backend, fresh = Backend(self.graph, name), None
            if image is not None:
                (fresh,) = await open_exports(self.graph, [image], settings)
                fresh.leave()
                backend = fresh.backend
            try:
                with trio.CancelScope(shield=True):
                    await root.exchange(disk.backend, backend)
                    disk.source, disk.overlay = (fresh.source, fresh.overlay) if fresh is not None else ("", None)
                    disk.immutable = fresh is not None and fresh.immutable
                    await disk.access_changed()
                    await self._tell(Change.MEDIUM, disk)
            finally:
                with trio.CancelScope(shield=True):
                    await backend.close()

    async def set_writable(self, name: str, writable: bool, *, force: bool = False) -> None:
        """Let a disk be written to, or no longer. Taking that away is refused while it is open for writing, unless
        ``force``: then writes of such handles fail with EROFS."""
        async with self._changing:
            disk = self.disk(name)
            if len(self.family(disk)) > 1:
                raise OperationBlockedError(f"'{name}' stays as it is, as files show parts of it.")
            disk.check_medium()
            await self._prepare(Change.ACCESS, [disk], force=force or writable, writing=True)
            await root.set_writable(disk.backend, writable)
            await disk.access_changed()
            await self._tell(Change.ACCESS, disk)

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

    async def _prepare(self, change: Change, exports: Sequence[Export], *, force: bool, writing: bool = False) -> None:
        self._check_opens(change, exports, force=force, writing=writing)
        for export in exports:
            for face in self.faces:
                await face.prepare(change, export)

    async def _tell(self, change: Change, export: Export) -> None:
        for face in self.faces:
            await face.told(change, export)


async def _close(exports: Sequence[Export]) -> None:
    """Close the backends of exports, parts before their disk. Raises the first error, at the end."""
    failure: FusediskError | None = None
    for export in reversed(exports):
        try:
            await export.backend.close()
        except FusediskError as exc:
            failure = failure or exc
    if failure is not None:
        raise failure
