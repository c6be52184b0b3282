"""Going from one state of an image's metadata to another with a single write.

Everything that changes is written to clusters that nothing refers to: L1 and L2 tables, the snapshot table, refcount
blocks, the refcount table. After a barrier one write of 48 bytes, in the first sector of the file, lets the header lead
to all of it: disk size, L1 table, refcount table and snapshot table are neighbours there. Stopped before that write the
file is what it was, after it the file is what it shall be; there is no state between them, in version 2 either, and no
leak. What the old state alone had used has a refcount of zero in the new one, and nobody gets it before a second
barrier.
"""

from __future__ import annotations

import heapq
import logging
import re
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import trio

from fusedisk.block.model.driver import HoldBack
from fusedisk.block.request import space
from fusedisk.core.errors import FusediskError, ImageError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.counts import Counts, are_zero
from fusedisk.drivers.format.qcow2.entries import ENTRIES_AT_ONCE, HostRun, encode_table
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.refcount import Refcounts
from fusedisk.drivers.format.qcow2.refcount_block import RefcountOverflow, RefcountUnderflow
from fusedisk.drivers.format.qcow2.snapshot_references import balance

log = logging.getLogger(__name__)

_BLOCKS_AT_ONCE = 256
_HOST_BLOCK = 4096
_L1_BYTES_AT_ONCE = 1 << 20
_ONES = re.compile(b"\1+")
_FIELDS = struct.Struct(">QIIQQIIQ")
"""The header's fields from the disk size to the snapshot table."""


class State(NamedTuple):
    """The new values of the header's fields. Offsets and sizes are bytes."""

    size: int
    l1: array[int]
    l1_offset: int
    snapshots: int
    snapshots_offset: int


class NewTable(NamedTuple):
    """An L2 table for :meth:`Switch.new_tables`."""

    old: int
    """The host offset of the one that it replaces."""
    data: bytearray
    references: int
    """How many L1 entries will lead to it."""


class Switch:
    """A new state in the making. Everything here runs inside :meth:`Committer.exclusive`.

    If :meth:`commit` does not return normally, the caller calls :meth:`undo`; then nothing has changed.
    """

    def __init__(self, image: Image, refcounts: Refcounts) -> None:
        self.image = image
        self.geometry = image.geometry
        self.refcounts = refcounts
        self.codec = refcounts.codec
        self.blocks_at_once = max(ENTRIES_AT_ONCE // self.geometry.block_entries, 1)
        """Refcount blocks that one step works on."""
        clusters = self.geometry.clusters(image.storage.node.length)
        self.gained = Counts(clusters)
        """The references that clusters in use gain in the new state."""
        self.lost = Counts(clusters)
        """The references that they lose."""
        self.changed_l2: set[int] = set()
        """Host offsets of L2 tables that may go."""
        self.done = False
        """The new state is the image's."""
        self._new: dict[int, int] = {}
        """References of new clusters."""

    # --- collecting -------------------------------------------------------------------------------------

    async def new_table(self, data: bytes | bytearray | memoryview) -> int:
        """Write a table to new clusters; returns its host offset, 0 where there is nothing to write. Raises
        NoSpaceError or HostError."""
        if not data:
            return 0
        run = await self._allocate(self.geometry.clusters(len(data)))
        offset = run.first << self.geometry.cluster_bits
        padding = bytes(-len(data) % self.geometry.cluster_size)
        await self.image.put_new_table(offset, b"".join((data, padding)) if padding else data)
        return offset

    async def new_l1(self, l1: array[int]) -> int:
        """Write an L1 table to new clusters, in pieces; returns its host offset, 0 for an empty one."""
        if not l1:
            return 0
        run = await self._allocate(self.geometry.clusters(8 * len(l1)))
        offset = run.first << self.geometry.cluster_bits
        size = max(_L1_BYTES_AT_ONCE, self.geometry.cluster_size)
        for start in range(0, run.clusters << self.geometry.cluster_bits, size):
            piece = l1[start // 8 : (start + size) // 8]
            piece.frombytes(bytes(-8 * len(piece) % self.geometry.cluster_size))
            await self.image.put_new_table(offset + start, encode_table(piece))
            await trio.lowlevel.checkpoint()
        return offset

    async def new_tables(self, tables: Sequence[NewTable]) -> dict[int, int]:
        """Write L2 tables to new clusters; returns their host offsets by the old ones. Raises NoSpaceError or
        HostError, and ImageError for more references than refcounts can count."""
        bits = self.geometry.cluster_bits
        places: dict[int, int] = {}
        while tables:
            run = await self._allocate(len(tables), exact=False)
            part, tables = tables[: run.clusters], tables[run.clusters :]
            more = [table.references - 1 for table in part]
            if any(more):
                await self.refcounts.add(run.first, more)
                self._new |= zip(range(run.first, run.first + run.clusters), [1 + count for count in more], strict=True)
            offset = run.first << bits
            await self.image.put_new_table(offset, b"".join(table.data for table in part))
            places |= {table.old: offset + (number << bits) for number, table in enumerate(part)}
        return places

    async def _allocate(self, clusters: int, *, exact: bool = True) -> HostRun:
        """Clusters for tables, also where a part of :attr:`Image.l2` was before."""
        run = await self.refcounts.allocate(clusters, exact=exact)
        self._new |= dict.fromkeys(range(run.first, run.first + run.clusters), 1)
        bits = self.geometry.cluster_bits
        self.image.l2.drop_all(range(run.first << bits, run.first + run.clusters << bits))
        return run

    def lose_table(self, offset: int, length: int) -> None:
        """Note that the new state does not use a table. Raises ImageError if the table is invalid."""
        first, count = offset >> self.geometry.cluster_bits, self.geometry.clusters(length)
        if first + count > self.lost.clusters:
            raise ImageError(
                f"'{self.image.filename}' has a table of {length} bytes at {offset}, behind the end of the file; "
                "'fusedisk check -r all' may repair it."
            )
        self.lost.add_run(first, count)

    def undo(self) -> None:
        """Give the new clusters back. Synchronous."""
        self.refcounts.free((), references=dict(sorted(self._new.items())))
        self._new.clear()

    # --- new refcounts ----------------------------------------------------------------------------------

    async def new_refcounts(self, block_index: int) -> array[int]:
        """The refcounts of one block in the new state, as far as it was collected.

        Raises ImageError where one is too large for its width, CorruptImageError where one would be below zero.
        """
        geometry = self.geometry
        first, count = block_index * geometry.block_entries, geometry.block_entries
        values = self.codec.decode(await self.refcounts.blocks.load(self._block_offset(block_index)))
        if not self._changes(block_index):
            return values
        try:
            return balance(values, self.gained.part(first, count), self.lost.part(first, count), geometry.refcount_bits)
        except RefcountUnderflow:
            raise await self.image.corruption(
                f"the refcount of a cluster from {first << geometry.cluster_bits} on is less than its references"
            ) from None
        except RefcountOverflow:
            raise ImageError(
                f"'{self.image.filename}' has refcounts of {geometry.refcount_bits} bits, which cannot count one "
                "more reference."
            ) from None

    def _block_offset(self, block_index: int) -> int:
        table = self.refcounts.table
        return table[block_index] if block_index < len(table) else 0

    async def _place_blocks(self) -> tuple[dict[int, int], int]:
        """Give new clusters to the blocks that change and to the refcount table, which loses the old ones, until
        that changes no other block. Returns the blocks' places by index, and the table's."""
        bits, per_block, header = self.geometry.cluster_bits, self.geometry.block_entries, self.image.header
        pending = await self._touched_blocks()
        heapq.heapify(pending)
        places: dict[int, int] = {}
        table = await self._allocate(header.refcount_table_clusters)
        while True:
            while pending:
                index = heapq.heappop(pending)
                if index in places:
                    continue
                if len(places) % _BLOCKS_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
                old = self._block_offset(index)
                if not old:
                    raise await self.image.corruption(
                        f"clusters from {index * per_block << bits} on are in use, but have no refcounts"
                    )
                places[index] = (await self._allocate(1)).first << bits
                self.lost.grow((old >> bits) + 1)
                self.lost.add_run(old >> bits, 1)
                heapq.heappush(pending, (old >> bits) // per_block)
            if table.clusters != header.refcount_table_clusters:
                # It has grown meanwhile.
                self.refcounts.free([table])
                for cluster in range(table.first, table.first + table.clusters):
                    del self._new[cluster]
                table = await self._allocate(header.refcount_table_clusters)
            first = header.refcount_table_offset >> bits
            homes = {cluster // per_block for cluster in range(first, first + table.clusters)}
            pending = sorted(homes - places.keys())
            if not pending:
                self.lost.grow(first + table.clusters)
                self.lost.add_run(first, table.clusters)
                return places, table.first << bits

    async def _touched_blocks(self) -> list[int]:
        """The blocks whose refcounts change, as far as was collected."""
        per_block = self.geometry.block_entries
        touched = sorted(self.gained.touched(per_block) | self.lost.touched(per_block))
        found: list[int] = []
        for start in range(0, len(touched), _BLOCKS_AT_ONCE):
            found += filter(self._changes, touched[start : start + _BLOCKS_AT_ONCE])
            await trio.lowlevel.checkpoint()
        return found

    def _changes(self, block_index: int) -> bool:
        per_block = self.geometry.block_entries
        parts = (counts.part(block_index * per_block, per_block) for counts in (self.gained, self.lost))
        return any(part is not None and bool(part.tobytes().strip(b"\0")) for part in parts)

    # --- switching --------------------------------------------------------------------------------------

    async def commit(self, state: State, hold_back: HoldBack, *, discard: bool) -> None:
        """Put the file and memory into the new state, within ``hold_back``. ``discard``: give unused host space back.

        Raises what writing raises, with nothing changed, unless the image is fenced.
        """
        image, refcounts = self.image, self.refcounts
        places, table_offset = await self._place_blocks()
        freed: list[HostRun] = []
        for number, (index, offset) in enumerate(sorted(places.items())):
            values = await self.new_refcounts(index)
            await image.announce("refblock_alloc_write_blocks")
            await image.put_new_table(offset, self.codec.encode(values))
            if discard:
                freed += self._freed(index, values)
            if number % self.blocks_at_once == 0:
                await trio.lowlevel.checkpoint()
        table = array("Q", refcounts.table)
        for index, offset in places.items():
            table[index] = offset
        await image.announce("refblock_alloc_write_table")
        await image.put_new_table(table_offset, encode_table(table))
        # Blocks that only new clusters are in: in the old state these are leaks at worst.
        await refcounts.write_blocks()
        l2_places = await image.sorted_l2(state.l1)
        await image.barrier()
        async with hold_back():
            await self._put_header(state, table_offset)
            self._new.clear()
            self._take(state, table, table_offset, l2_places)
        try:
            await image.barrier()
        except BaseException as exc:
            image.writable = False
            image.fence(f"A change of its snapshots may not be on disk: {str(exc).rstrip('.')}.")
            raise
        await self._discard(freed)

    async def _put_header(self, state: State, table_offset: int) -> None:
        header = self.image.header
        await self.image.announce("refblock_alloc_switch_table")
        fields = _FIELDS.pack(
            state.size,
            header.crypt_method,
            len(state.l1),
            state.l1_offset,
            table_offset,
            header.refcount_table_clusters,
            state.snapshots,
            state.snapshots_offset,
        )
        await self.image.put_header_fields(layout.SIZE_FIELD, fields)

    def _take(self, state: State, table: array[int], table_offset: int, l2_places: array[int]) -> None:
        """Put memory into the new state. Synchronous."""
        self.done = True
        image, header = self.image, self.image.header
        header.size = state.size
        header.l1_size, header.l1_table_offset = len(state.l1), state.l1_offset
        header.refcount_table_offset = table_offset
        header.nb_snapshots, header.snapshots_offset = state.snapshots, state.snapshots_offset
        image.l1[:] = state.l1
        image.l2.drop_all(self.changed_l2)
        image.inflated.clear()
        image.l2_places = l2_places
        self.refcounts.take_over(table)
        image.place_fixed()
        image.mapping_changed()

    # --- host space -------------------------------------------------------------------------------------

    def _freed(self, block_index: int, values: array[int]) -> Iterator[HostRun]:
        """Clusters of a block that lose their last reference."""
        first = block_index * self.geometry.block_entries
        lost = self.lost.part(first, len(values))
        if lost is None:
            return
        free = are_zero(values)
        if 1 not in free:
            return
        # Larger than zero only where nothing is left and something was lost.
        ended = int.from_bytes(free, "big") & ~int.from_bytes(are_zero(lost), "big")
        for run in _ONES.finditer(ended.to_bytes(len(free), "big")):
            yield HostRun(first + run.start(), run.end() - run.start())

    async def _discard(self, runs: list[HostRun]) -> None:
        """Free host space. A failure is only logged, since the operation itself is done."""
        bits = self.geometry.cluster_bits
        ranges: list[tuple[int, int]] = []
        for run in _joined(runs):
            start, end = run.first << bits, run.first + run.clusters << bits
            # Hosts give back whole blocks only, and small clusters are many.
            if end - start >= _HOST_BLOCK or start // _HOST_BLOCK != (end - 1) // _HOST_BLOCK:
                ranges.append((start, end - start))
        try:
            await space.discard_ranges(self.image.storage.node, ranges)
        except FusediskError as exc:
            log.warning("%s: freed space stays in the file: %s", self.image.filename, exc)


def _joined(runs: Iterable[HostRun]) -> Iterator[HostRun]:
    """Sorted runs, neighbours as one."""
    first = end = -1
    for run in runs:
        if run.first != end:
            if end > first:
                yield HostRun(first, end - first)
            first = run.first
        end = run.first + run.clusters
    if end > first:
        yield HostRun(first, end - first)
