"""The files beside a disk's own: its partitions, ``NAME.p1``, and its internal snapshots, ``NAME@SNAPSHOT``.

A partition is a raw node, a window of the disk's top node, so that node orders the requests for both. The table is read
once; a guest's later changes of it show in the next mount.

A snapshot is a second, read-only node on the image's own storage. Its tables and clusters do not change while the disk
is written to: they have an additional reference, so writes to the disk copy them. That holds as long as the snapshot
exists, and nothing deletes snapshots of a mounted image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import logging
from collections.abc import Iterable, Sequence

import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.children import Role
from fusedisk.block.model.node import Node, NodeConfig
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request.immediate import Lent, Pieces
from fusedisk.core.errors import FusediskError, NoSpaceError, OptionError, OutOfRangeError
from fusedisk.export.export import Attributes, Export, FileSettings
from fusedisk.export.names import check_name
from fusedisk.export.partitions.reading import read_table
from fusedisk.export.partitions.table import Partition, Table

log = logging.getLogger(__name__)

MOST_SNAPSHOTS = 256
"""The most files for the snapshots of one image; each keeps tables in memory."""
MOST_PARTITIONS = 1024
"""The most files for the partitions of all snapshots of one image."""
_CACHES = 32 << 20
"""Bytes that the caches of all snapshots of an image share."""
_SMALLEST_CACHE = 1 << 20
_MOST_LOOKUPS, _LOOKUPS_AT_ONCE = 256, 32
"""The most pieces of a partition that are looked up to count its data, and after how many other tasks get a turn."""
_COUNTING_PAUSE = 20
"""The pause between two counts, as a multiple of the time that the last one took."""
_DEFAULT_CLUSTER_SIZE = 64 << 10
_MAX_TABLES = 256 << 20
"""The most bytes for the tables that all snapshots of an image hold in memory."""


class View(Export):
    """A file over something of another file's image; ``disk`` is the file that it was made from."""

    disk: Export

    async def allocated(self) -> int:
        """Return an upper bound: the data of a part of an image is not counted."""
        return min(self.backend.length, await self.disk.allocated())


class PartitionExport(View):
    """One partition of ``disk``."""

    table: Table
    partition: Partition

    _counted = 0
    """The last result of :meth:`allocated`."""
    _counted_at = -1
    """The disk's count of writes at that time; -1: never counted."""
    _count_again = 0.0
    """The earliest time for the next count, so that counting takes a small part of the time only."""

    async def allocated(self) -> int:
        """Return the bytes of the partition in the top layer of the image. If there are very many pieces, only the
        first are counted, and the rest is taken to be equally full."""
        written, now = self.disk.backend.node.completed_writes, trio.current_time()
        if self._counted_at < 0 or (self._counted_at != written and now >= self._count_again):
            try:
                self._counted = await self._count()
            except FusediskError as exc:
                log.debug("the data of '%s' could not be counted: %s", self.name, exc)
                return await super().allocated()
            self._counted_at = written
            self._count_again = trio.current_time() + _COUNTING_PAUSE * (trio.current_time() - now)
        return self._counted

    async def attributes(self) -> Attributes:
        """Return the answer to ``stat``; not for caching while a new count is put off."""
        found = await super().attributes()
        found.current = found.current and self._counted_at in (-1, self.disk.backend.node.completed_writes)
        return found

    async def _count(self) -> int:
        end = max(0, min(self.backend.length, self._bytes_left()))
        offset = found = lookups = 0
        while offset < end and lookups < _MOST_LOOKUPS:
            status = await self.backend.block_status(offset, end - offset)
            if status.data and not status.depth:
                found += status.length
            offset += status.length
            lookups += 1
            if lookups % _LOOKUPS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        if offset < end:
            found = min(found * end // offset, await super().allocated())
        return found

    @property
    def image(self) -> Node:
        return self.disk.image

    @property
    def block_size(self) -> int:
        """The disk's, unless that does not fit the partition's start."""
        start = self.partition.start
        return min(self.disk.block_size, max(512, start & -start)) if start else self.disk.block_size

    # The disk may have become shorter: a request for what is gone must not get as far as the drivers.

    def _bytes_left(self) -> int:
        """Return how many bytes of the partition are still on the disk."""
        return self.disk.backend.length - self.partition.start

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        """Like Export.read; raises OutOfRangeError (EIO) past the end of a disk that has become shorter."""
        self.check_read(offset, length)
        return await super().read(offset, length)

    async def read_into(self, offset: int, buffer: memoryview) -> int:
        """Like Export.read_into; raises OutOfRangeError (EIO) past the end of a disk that has become shorter."""
        self.check_read(offset, len(buffer))
        return await super().read_into(offset, buffer)

    def check_read(self, offset: int, length: int) -> None:
        """Raise OutOfRangeError (EIO) past the end of a disk that has become shorter."""
        end = min(offset + length, self.backend.length)
        if end > max(self._bytes_left(), offset):
            raise OutOfRangeError(
                f"'{self.name}' goes on up to {self.partition.end}, but '{self.disk.name}' has become shorter and ends "
                f"at {self.disk.backend.length}.",
                errno=errno.EIO,
            )

    async def write(self, offset: int, data: bytes | memoryview) -> int:
        """Like Export.write; the disk's end counts too if the disk has become shorter."""
        there = self._bytes_left()
        if offset >= there and self.writable:
            raise NoSpaceError(f"'{self.name}' has only {max(there, 0)} bytes left, as '{self.disk.name}' is shorter.")
        return await super().write(offset, memoryview(data)[: there - offset])

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Like Export.read_now, but only within the disk."""
        return offset + len(buffer) <= self._bytes_left() and super().read_now(offset, buffer)

    def lend_now(self, offset: int, length: int) -> list[Lent] | Pieces | None:
        """Like Export.lend_now, but only within the disk."""
        return super().lend_now(offset, length) if offset + length <= self._bytes_left() else None

    def write_now(self, offset: int, data: memoryview) -> bool:
        """Like Export.write_now, but only within the disk."""
        return offset + len(data) <= self._bytes_left() and super().write_now(offset, data)

    async def xattrs(self) -> dict[str, str]:
        """Return the disk's attributes and those from the partition table."""
        own = await super().xattrs()
        return {
            **await self.disk.xattrs(),
            **{f"user.fusedisk.{key}": own[f"user.fusedisk.{key}"] for key in _OWN},
            "user.fusedisk.partition-table": self.table.kind,
            "user.fusedisk.partition-start": str(self.partition.start),
            "user.fusedisk.partition-type": self.partition.type,
            "user.fusedisk.partition-uuid": self.partition.uuid,
            "user.fusedisk.partition-name": self.partition.name,
        }


_OWN = ("node-name", "virtual-size", "allocated", "read-only")
"""Attributes of which a partition has its own."""


class SnapshotExport(View):
    """One internal snapshot of the image of ``disk``."""

    snapshot: SnapshotInfo

    async def xattrs(self) -> dict[str, str]:
        """Return the image's attributes and those of the snapshot."""
        date = datetime.datetime.fromtimestamp(self.snapshot.date // 10**9, datetime.UTC)
        return {
            **await super().xattrs(),
            "user.fusedisk.snapshot-id": self.snapshot.id,
            "user.fusedisk.snapshot-name": self.snapshot.name,
            "user.fusedisk.snapshot-date": date.isoformat(),
        }


# --- partitions -----------------------------------------------------------------------------------------


async def open_partitions(graph: Graph, disk: Export, settings: FileSettings, exports: list[Export]) -> int:
    """Add a file for each partition of ``disk`` to ``exports``; none, and a warning, without a partition table. Returns
    their number.

    Raises OptionError if a name gets too long.
    """
    table = await _read_table(disk)
    if table is None:
        return 0
    assert disk.backend.root is not None
    group = disk.backend.root.group = disk.backend.root.group or object()
    config = NodeConfig(force_share=disk.backend.node.config.force_share, discard="unmap")
    for partition in table.partitions:
        name = check_name(f"{disk.name}.p{partition.number}")
        window = {
            "driver": "raw",
            "file": disk.backend.node.name,
            "offset": partition.start,
            "size": partition.length,
        }
        source = f"{disk.source} (partition {partition.number})"
        backend = await graph.open_backend(
            window,
            name=source,
            writable=disk.writable,
            config=config,
            write_cache=disk.backend.write_cache,
            group=group,
        )
        view = PartitionExport(backend, name, 0, dataclasses.replace(settings, growable=False))
        view.disk, view.table, view.partition, view.source = disk, table, partition, source
        view.overlay, view.immutable = disk.overlay, disk.immutable
        view.origin = partition.start
        view.join(disk)
        exports.append(view)
    return len(table.partitions)


async def _read_table(disk: Export) -> Table | None:
    try:
        table = await read_table(disk.backend.read, disk.backend.length)
    except FusediskError as exc:
        log.warning("'%s' gets no files of partitions, as its partition table cannot be read: %s", disk.name, exc)
        return None
    if isinstance(table, str):
        log.warning("'%s' gets no files of partitions: %s.", disk.name, table)
        return None
    for remark in table.remarks:
        log.warning("'%s': %s.", disk.name, remark)
    return table


# --- snapshots ------------------------------------------------------------------------------------------


async def open_snapshots(
    graph: Graph, disk: Export, settings: FileSettings, exports: list[Export], *, partitions: bool
) -> None:
    """Add a read-only file for each internal snapshot of the image of ``disk`` to ``exports``, and with ``partitions``
    for theirs.

    A damaged snapshot is skipped with a warning; the others get their files.
    """
    image = disk.image
    snapshots = image.driver.list_snapshots()
    if not snapshots:
        log.warning("'%s' gets no files of snapshots: its image holds none.", disk.name)
    more = 0
    for name, snapshot in _affordable(disk, _named(disk, snapshots)):
        try:
            view = await _open_snapshot(graph, disk, name, snapshot, settings, min(len(snapshots), MOST_SNAPSHOTS))
        except FusediskError as exc:
            log.warning("'%s' gets no file for snapshot '%s': %s", disk.name, snapshot.id, exc)
            continue
        exports.append(view)
        if partitions and more < MOST_PARTITIONS:
            more += await open_partitions(graph, view, settings, exports)
            if more >= MOST_PARTITIONS:
                log.warning("'%s': partitions of the snapshots after '%s' get no files.", disk.name, name)


async def _open_snapshot(
    graph: Graph, disk: Export, name: str, snapshot: SnapshotInfo, settings: FileSettings, count: int
) -> SnapshotExport:
    image = disk.image
    group = object()
    spec: dict[str, object] = {
        "driver": image.driver.name,
        "internal-snapshot": snapshot.id,
        "l2-cache-size": max(_CACHES // count, _SMALLEST_CACHE),
        "backing": image.backing.node.name if image.backing is not None else None,
    }
    for edge in image.children.values():
        if edge.role is not Role.BACKING:
            group = edge.group = edge.group or group
            spec[edge.name] = edge.node.name
    config = NodeConfig(force_share=image.config.force_share)
    source = f"{disk.source} (snapshot {snapshot.id})"
    backend = await graph.open_backend(spec, name=source, config=config, group=group)
    backend.node.driver.take_key(image.driver)
    view = SnapshotExport(backend, name, 0, dataclasses.replace(settings, growable=False))
    view.disk, view.snapshot, view.source = disk, snapshot, source
    view.immutable = not image.config.force_share
    view.pin_mtime(snapshot.date)
    return view


def _named(disk: Export, snapshots: Sequence[SnapshotInfo]) -> list[tuple[str, SnapshotInfo]]:
    """Choose a file name for each snapshot that can have one, in their order: its name if that is plain and unique,
    else its id."""
    names = [snapshot.name for snapshot in snapshots]
    chosen: dict[int, str] = {}
    taken: set[str] = set()
    for index, snapshot in enumerate(snapshots):
        if names.count(snapshot.name) == 1 and _is_plain(disk, snapshot.name):
            chosen[index] = snapshot.name
            taken.add(snapshot.name)
    known: set[str] = set()
    for index, snapshot in enumerate(snapshots):
        if snapshot.id in known:
            chosen.pop(index, None)
            log.warning("'%s': only the first of the snapshots with the id '%s' gets a file.", disk.name, snapshot.id)
            continue
        known.add(snapshot.id)
        if index not in chosen:
            if snapshot.id in taken or not _is_plain(disk, snapshot.id):
                log.warning("'%s': the snapshot in place %d has no name for a file.", disk.name, index + 1)
                continue
            chosen[index] = snapshot.id
            taken.add(snapshot.id)
    return [(f"{disk.name}@{chosen[index]}", snapshots[index]) for index in sorted(chosen)]


def _is_plain(disk: Export, text: str) -> bool:
    """Whether ``text`` is valid in a file name and printable on a terminal."""
    with contextlib.suppress(OptionError):
        return bool(text) and text.isprintable() and bool(check_name(f"{disk.name}@{text}"))
    return False


def _affordable(disk: Export, named: Iterable[tuple[str, SnapshotInfo]]) -> list[tuple[str, SnapshotInfo]]:
    """Return as many of the snapshots as may be open at the same time."""
    unit = disk.image.limits.cluster_size or _DEFAULT_CLUSTER_SIZE
    affordable: list[tuple[str, SnapshotInfo]] = []
    left = _MAX_TABLES
    for name, snapshot in named:
        left -= snapshot.disk_size // unit // (unit // 8) * 8
        if left < 0 or len(affordable) == MOST_SNAPSHOTS:
            log.warning("'%s': only %d of its snapshots get files.", disk.name, len(affordable))
            break
        affordable.append((name, snapshot))
    return affordable
