"""``toy``: a format driver for tests, the smallest that has clusters, a backing file and special extents.

Its table lies in a :class:`Table`, which outlives the node; guest data lies in the ``file`` child. Freed host space is
used again at once, so that a request that relies on an extent too long reads somebody else's bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import trio

from fusedisk.block.model.driver import ZERO_NEW, BackingReference, Buffer, ChildSpec, Driver, Role
from fusedisk.block.model.extent import DATA, SPECIAL, UNALLOCATED, ZERO, Extent, WriteExtent
from fusedisk.block.model.limits import Limits
from fusedisk.block.request import io
from fusedisk.core.errors import NotSupportedError
from fusedisk.core.options import Options, option
from tests.support.stepping import Steps

MAGIC = b"TOY!\0\0\0\2"
"""A file that starts so is probed as ``toy``."""


@dataclasses.dataclass(eq=False)
class Table:
    """An image: its length, cluster size, the backing file its header names, and where its clusters lie."""

    length: int
    cluster_size: int = 512
    backing: str | None = None
    zeroes: bool = True
    """Whether it has zero clusters; without, write-zeroes and discard are not supported."""
    clusters: dict[int, int] = dataclasses.field(default_factory=dict)
    """Guest cluster to host offset."""
    zeroed: set[int] = dataclasses.field(default_factory=set)
    special: dict[int, bytes] = dataclasses.field(default_factory=dict)
    """Guest clusters that the driver must transform: stored inverted here."""
    free: list[int] = dataclasses.field(default_factory=list)
    end: int = 512
    """Host offset of the first space never used; the first 512 bytes are the header's."""
    steps: Steps = dataclasses.field(default_factory=Steps)
    opened: int = 0


_TABLES: dict[str, Table] = {}


@contextmanager
def tables(**named: Table) -> Iterator[None]:
    """Make tables known to the option ``table``."""
    _TABLES.update(named)
    try:
        yield
    finally:
        for name in named:
            del _TABLES[name]


@dataclasses.dataclass(slots=True)
class ToyOptions(Options):
    """Options of ``toy``."""

    table: str = option("", help="name of the table")


class _Allocation(NamedTuple):
    cluster: int
    host: int


class ToyDriver(Driver):
    """See the module."""

    name = "toy"
    supports_backing = True
    options_type = ToyOptions
    child_specs = (ChildSpec("file", Role.FILE),)
    table: Table

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head.startswith(MAGIC) else 0

    def may_be_named(self) -> bool:
        return True

    def backing_reference(self) -> BackingReference | None:
        return BackingReference(self.table.backing, None) if self.table.backing else None

    async def open(self) -> None:
        table = _TABLES[self.options.table]
        await table.steps.take("open")
        table.opened += 1
        self.table = table
        self._in_flight: dict[int, trio.Event] = {}

    async def close(self) -> None:
        self.table.opened -= 1
        await self.table.steps.take("close")
        assert not self._in_flight, "closed with allocations in flight"

    async def length(self) -> int:
        await self.table.steps.take("length")
        return self.table.length

    def refresh_limits(self, limits: Limits) -> None:
        limits.cluster_size = limits.zeroes_alignment = limits.discard_alignment = self.table.cluster_size

    # --- mapping ----------------------------------------------------------------------------------------

    def _lookup(self, cluster: int) -> tuple[int, int]:
        table = self.table
        if cluster in table.special:
            return SPECIAL, -1
        if cluster in table.zeroed:
            return ZERO, -1
        host = table.clusters.get(cluster)
        return (UNALLOCATED, -1) if host is None else (DATA, host)

    async def map(self, offset: int, length: int) -> Extent:
        await self.table.steps.take("map", offset, length)
        size = self.table.cluster_size
        cluster, inside = divmod(offset, size)
        status, host = self._lookup(cluster)
        count = size - inside
        while status != SPECIAL and count < length:
            cluster += 1
            after = host + (count + inside) if status == DATA else -1
            if self._lookup(cluster) != (status, after):
                break
            count += size
        count = min(count, length)
        if status == DATA:
            return Extent(DATA, count, self.node.children["file"], host + inside)
        return Extent(status, count, compressed=status == SPECIAL)

    async def read_special(self, extent: Extent, offset: int, buffer: Buffer) -> None:
        await self.table.steps.take("special", offset, len(buffer))
        cluster, inside = divmod(offset, self.table.cluster_size)
        content = bytes(byte ^ 0xFF for byte in self.table.special[cluster])
        buffer[:] = content[inside : inside + len(buffer)]

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        await self.table.steps.take("map-write", offset, length)
        table, size = self.table, self.table.cluster_size
        cluster, inside = divmod(offset, size)
        count = min(length, size - inside)
        while (event := self._in_flight.get(cluster)) is not None:
            await event.wait()
        host = table.clusters.get(cluster)
        child = self.node.children["file"]
        if host is not None and cluster not in table.zeroed:
            return WriteExtent(count, child, host + inside)
        if table.free:
            host = table.free.pop(0)
        else:
            host, table.end = table.end, table.end + size
        self._in_flight[cluster] = trio.Event()
        tail = max(0, min((cluster + 1) * size, self.node.length) - offset - count)
        return WriteExtent(count, child, host + inside, _Allocation(cluster, host), inside, tail)

    async def publish(self, allocation: object) -> None:
        assert isinstance(allocation, _Allocation)
        try:
            await self.table.steps.take("publish", allocation.host)
        except BaseException:
            self.abandon(allocation)
            raise
        self._drop(allocation.cluster)
        self.table.clusters[allocation.cluster] = allocation.host
        self.node.change_mapping()
        self._in_flight.pop(allocation.cluster).set()

    def abandon(self, allocation: object) -> None:
        assert isinstance(allocation, _Allocation)
        self.table.free.append(allocation.host)
        self._in_flight.pop(allocation.cluster).set()

    def _drop(self, cluster: int) -> None:
        """Forget what a cluster holds; its host space is free."""
        table = self.table
        table.zeroed.discard(cluster)
        table.special.pop(cluster, None)
        host = table.clusters.pop(cluster, None)
        if host is not None:
            table.free.insert(0, host)

    # --- other requests ---------------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self.table.steps.take("zero", offset, length, flags)
        if not self.table.zeroes:
            raise NotSupportedError("toy without zero clusters.")
        for cluster in self._units(offset, length):
            self._drop(cluster)
            self.table.zeroed.add(cluster)
        self.node.change_mapping()

    async def discard(self, offset: int, length: int) -> None:
        await self.table.steps.take("discard", offset, length)
        if not self.table.zeroes:
            raise NotSupportedError("toy without zero clusters.")
        for cluster in self._units(offset, length):
            self._drop(cluster)
            if self.node.backing is not None:
                self.table.zeroed.add(cluster)
        self.node.change_mapping()

    def _units(self, offset: int, length: int) -> range:
        size, end = self.table.cluster_size, offset + length
        assert not offset % size, f"offset {offset} is not aligned"
        assert not end % size or end == self.node.length, f"end {end} is not aligned"
        return range(offset // size, -(-end // size))

    async def flush_to_os(self) -> None:
        await self.table.steps.take("flush-to-os")

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        await self.table.steps.take("truncate", length, 0, flags)
        table, size = self.table, self.table.cluster_size
        old = table.length
        if flags & ZERO_NEW and old % size:
            await self._zero_tail(old, min(length, -(-old // size) * size))
        for cluster in [*table.clusters, *table.zeroed]:
            if cluster * size >= length:
                self._drop(cluster)
        if flags & ZERO_NEW:
            table.zeroed |= set(range(-(-old // size), -(-length // size)))
        table.length = length

    async def _zero_tail(self, start: int, end: int) -> None:
        """The last cluster ends inside: what a longer backing file holds behind the old end must not show."""
        table, size = self.table, self.table.cluster_size
        cluster, inside = divmod(start, size)
        storage = self.node.children["file"].node
        if cluster in table.clusters:
            await io.write(storage, table.clusters[cluster] + inside, (memoryview(bytes(end - start)),))
        elif cluster not in table.zeroed and self.node.backing is not None:
            content = memoryview(bytearray(size))
            await io.read(self.node.backing.node, cluster * size, content[:inside])
            await io.write(storage, table.end, (content,))
            table.clusters[cluster], table.end = table.end, table.end + size
