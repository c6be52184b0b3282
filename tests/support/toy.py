"""``toy``: a format driver for tests of the engine, with clusters, a backing file and special extents.

Its table lies in a :class:`Table`, which outlives the node; guest data lies in the ``file`` child. Freed host space is
used again at once, so that a request that relies on an extent too long reads somebody else's bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from fusedisk.block.model.children import BackingReference
from fusedisk.block.model.driver import Driver
from fusedisk.block.model.extent import DATA, UNALLOCATED, ZERO, Extent, WriteExtent
from fusedisk.block.model.flags import ZERO_NEW, Buffer
from fusedisk.core.errors import NotSupportedError
from fusedisk.core.options import Options, option
from fusedisk.drivers.format.block_entries import Area, Entries
from fusedisk.drivers.format.block_storage import Flat, Level, Space
from fusedisk.drivers.format.block_table import BlockTable
from fusedisk.drivers.format.table_driver import TableDriver
from tests.support.stepping import Steps

MAGIC = b"TOY!\0\0\0\2"
"""A file that starts so is probed as ``toy``."""
HEADER = 512
INVERTED = 1 << 63
ENTRIES = Entries(8, "little", unit=1, kinds={0: UNALLOCATED, 1: ZERO}, special=INVERTED)


@dataclasses.dataclass(eq=False)
class Table:
    """An image: its length, cluster size, the backing file its header names, and where its clusters lie."""

    length: int
    cluster_size: int = 512
    backing: str | None = None
    zeroes: bool = True
    """Whether it has zero clusters; without, write-zeroes and discard are not supported."""
    special: dict[int, bytes] = dataclasses.field(default_factory=dict)
    """Guest clusters that the driver must transform: stored inverted here."""
    free: list[int] = dataclasses.field(default_factory=list)
    end: int = HEADER
    """Host offset of the first space never used; the first 512 bytes are the header's."""
    steps: Steps = dataclasses.field(default_factory=Steps)
    opened: int = 0

    def __post_init__(self) -> None:
        count = max(4 * -(-self.length // self.cluster_size), 1024)
        self.level = Level(None, ENTRIES, count, ())  # type: ignore[arg-type]  # it is nowhere in the file

    def put(self, *clusters: int) -> None:
        """Give clusters the next host space."""
        for cluster in clusters:
            self.level.table[cluster] = self.end
            self.end += self.cluster_size

    def zero(self, cluster: int) -> None:
        """Let a cluster read as zeroes."""
        self.level.table[cluster] = 1

    def invert(self, cluster: int, content: bytes) -> None:
        """Store a cluster inverted."""
        self.level.table[cluster], self.special[cluster] = INVERTED, content

    def clusters(self, kind: int = DATA) -> set[int]:
        """Return the clusters of one kind."""
        return {number for number, entry in enumerate(self.level.table) if ENTRIES.kind(entry) == kind}


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


class ToySpace(Space):
    """Uses what is freed at once, the newest first."""

    toy: Table

    async def take(self, count: int) -> tuple[int, int, bool]:
        if self.toy.free:
            return self.toy.free.pop(0), 1, False
        self.toy.end += self.area.size
        return self.toy.end - self.area.size, 1, False

    async def trim(self) -> None:
        pass

    def give_back(self, place: int) -> None:
        self.toy.free.append(place)

    def free(self, place: int) -> None:
        self.toy.free.insert(0, place)


class ToyDriver(TableDriver):
    """See the module. Without the short ways, and each method can be suspended and broken."""

    name = "toy"
    can_run_at_once = False
    supports_backing = True
    options_type = ToyOptions
    toy: Table
    lookup = Driver.lookup
    lookup_in_place = Driver.lookup_in_place

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head.startswith(MAGIC) else 0

    def backing_reference(self) -> BackingReference | None:
        return BackingReference(self.toy.backing, None) if self.toy.backing else None

    async def open(self) -> None:
        toy = _TABLES[self.options.table]
        await toy.steps.take("open")
        toy.opened += 1
        self.toy = toy
        edge = self.node.children["file"]
        area = Area(HEADER, edge.node.length, size=toy.cluster_size)
        space = ToySpace(edge.node, area, end=0)
        space.toy = toy
        self.table = BlockTable(self.node, edge, Flat(toy.level, area), space)

    async def close(self) -> None:
        self.toy.opened -= 1
        await self.toy.steps.take("close")
        assert not self.table.busy, "closed with allocations in flight"

    async def length(self) -> int:
        await self.toy.steps.take("length")
        return self.toy.length

    async def map(self, offset: int, length: int) -> Extent:
        await self.toy.steps.take("map", offset, length)
        size = self.toy.cluster_size
        extent = await super().map(offset, length)
        return extent._replace(length=min(extent.length, size - offset % size)) if extent.compressed else extent

    async def read_special(self, extent: Extent, offset: int, buffer: Buffer) -> None:
        await self.toy.steps.take("special", offset, len(buffer))
        cluster, inside = divmod(offset, self.toy.cluster_size)
        content = bytes(byte ^ 0xFF for byte in self.toy.special[cluster])
        buffer[:] = content[inside : inside + len(buffer)]

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        await self.toy.steps.take("map-write", offset, length)
        return await super().map_write(offset, length)

    async def publish(self, allocation: object) -> None:
        try:
            await self.toy.steps.take("publish", getattr(allocation, "place", 0))
        except BaseException:
            self.abandon(allocation)
            raise
        await super().publish(allocation)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self.toy.steps.take("zero", offset, length, flags)
        self._check(offset, length)
        await super().write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self.toy.steps.take("discard", offset, length)
        self._check(offset, length)
        await super().discard(offset, length)

    def _check(self, offset: int, length: int) -> None:
        size, end = self.toy.cluster_size, offset + length
        if not self.toy.zeroes:
            raise NotSupportedError("toy without zero clusters.")
        assert not offset % size, f"offset {offset} is not aligned"
        assert not end % size or end == self.node.length, f"end {end} is not aligned"

    async def flush_to_os(self) -> None:
        await self.toy.steps.take("flush-to-os")

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        await self.toy.steps.take("truncate", length, 0, flags)
        await self.table.resize(self.toy.length, length, zero_new=bool(flags & ZERO_NEW))
        self.toy.length = length
