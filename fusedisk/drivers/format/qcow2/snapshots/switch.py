"""Going from one state of an image's metadata to another with a single write.

Everything that changes is written to clusters that nothing refers to: L1 and L2 tables, the snapshot table, refcount
blocks, the refcount table. After a barrier one write of 48 bytes, in the first sector of the file, lets the header lead
to all of it: disk size, L1 table, refcount table and snapshot table are neighbours there. Stopped before that write the
file is what it was, after it the file is what it shall be; there is no state between them, in version 2 either. What
the old state alone had used has a refcount of zero in the new one, and nobody gets it before a second barrier.

Most of that can be done beside requests that change the old state: the mutex is held but for pauses. What they change
is done again; see :mod:`.active` for the tables, here refcount blocks are. A crash meanwhile leaks the new
clusters at worst.
"""

from __future__ import annotations

import itertools
import logging
import struct
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import trio

from fusedisk.block.model.driver import HoldBack
from fusedisk.block.request import space
from fusedisk.core.errors import CorruptImageError, FusediskError, ImageError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.counts import Counts, are_zero
from fusedisk.drivers.format.qcow2.entries import ENTRIES_AT_ONCE, HostRun, encode_table
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.refcount import Pause, Refcounts
from fusedisk.drivers.format.qcow2.refcount_block import RefcountOverflow, RefcountUnderflow
from fusedisk.drivers.format.qcow2.snapshots.references import balance

log = logging.getLogger(__name__)

STEP_SECONDS = 0.005
"""How long the work goes on before others run. Changing tasks costs more than many a piece of work."""
_BLOCKS_AT_ONCE = 256
_RUNS_AT_ONCE = 256
_HOST_BLOCK = 4096
_L1_BYTES_AT_ONCE = 1 << 20
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
    """A new state in the making. Everything here but :meth:`discard` runs under the mutex, and :meth:`commit` inside
    :meth:`Committer.exclusive`.

    If :meth:`commit` does not return normally, the caller calls :meth:`undo`; then nothing has changed.
    """

    def __init__(self, image: Image, refcounts: Refcounts, *, gives_way: bool = False) -> None:
        """``gives_way``: others get the mutex in each :meth:`pause`."""
        self.image = image
        self.geometry = image.geometry
        self.refcounts = refcounts
        self.codec = refcounts.codec
        self.gives_way = gives_way
        self.blocks_at_once = max(ENTRIES_AT_ONCE // self.geometry.block_entries, 1)
        """Refcount blocks that one step works on."""
        clusters = self.geometry.clusters(image.storage.node.length)
        self.gained = Counts(clusters)
        """The references that clusters in use gain in the new state."""
        self.lost = Counts(clusters)
        """The references that they lose."""
        self.changed_l2: set[int] = set()
        """Host offsets of L2 tables that may go."""
        self.runs: dict[int, int] = {}
        """See :meth:`.L2Table.first_of_run`: of tables, by host offset, that were looked at and have not changed."""
        self.done = False
        """The new state is the image's."""
        self._pause_at = 0.0
        """When the next :meth:`pause` is due."""
        self._new: dict[int, int] = {}
        """References of new clusters."""
        self._stale: set[int] | None = None
        """Blocks, by index, whose new version is not in the file or out of date. None until :meth:`begin_blocks`."""
        self._places: dict[int, int] = {}
        """Host offsets of the new versions of blocks, by index."""
        self._table = HostRun(0, 0)
        """The place of the new refcount table."""
        self._old_table = (0, 0)
        """Offset and clusters of the table that it replaces."""
        self._old_l1: tuple[int, int] | None = None
        """Offset and clusters of the L1 table that the new state does not use. None until :meth:`lose_l1`."""
        self._freed: dict[int, list[HostRun]] = {}
        """Clusters that lose their last reference, by block."""

    async def pause(self) -> None:
        """Let others run, if this task has run for :data:`STEP_SECONDS`. Raises CorruptImageError if they found
        corruption."""
        if time.monotonic() < self._pause_at:
            return
        if not self.gives_way:
            await trio.lowlevel.checkpoint()
        else:
            await self._give_way()
        self._pause_at = time.monotonic() + STEP_SECONDS

    async def _give_way(self) -> None:
        self.image.mutex.release()
        await self.run_others()
        await self.image.mutex.acquire()
        if not self.image.writable:
            raise CorruptImageError(f"'{self.image.filename}' was found to be corrupt meanwhile.")
        self.follow_file()

    async def run_others(self) -> None:
        """Let other tasks run and take the mutex."""
        await trio.lowlevel.checkpoint()

    def follow_file(self) -> None:
        """Take note that the file, its refcount table or its L1 table has grown. Call it whenever the mutex was
        taken."""
        clusters = self.geometry.clusters(self.image.storage.node.length)
        self.gained.grow(clusters)
        self.lost.grow(clusters)
        if self._old_table != self._header_table():
            self._leave_table()
        if self._old_l1 is not None:
            self.lose_l1()

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
        run = await self._allocate(self.geometry.clusters(8 * len(l1)), pause=self.pause)
        offset = run.first << self.geometry.cluster_bits
        size = max(_L1_BYTES_AT_ONCE, self.geometry.cluster_size)
        for start in range(0, run.clusters << self.geometry.cluster_bits, size):
            piece = l1[start // 8 : (start + size) // 8]
            piece.frombytes(bytes(-8 * len(piece) % self.geometry.cluster_size))
            await self.image.put_new_table(offset + start, encode_table(piece))
            await self.pause()
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

    async def _allocate(self, clusters: int, *, exact: bool = True, pause: Pause | None = None) -> HostRun:
        """Clusters for tables, also where a part of :attr:`Image.l2` was before."""
        run = await self.refcounts.allocate(clusters, exact=exact, pause=pause)
        self._new |= dict.fromkeys(range(run.first, run.first + run.clusters), 1)
        bits = self.geometry.cluster_bits
        self.image.l2.drop_all(range(run.first << bits, run.first + run.clusters << bits))
        return run

    def count_table(self, offset: int, change: int, *, take_back: bool = False) -> None:
        """Count a change in the number of L1 entries that lead to an L2 table, or take back that it was counted. Raises
        ImageError for a table outside of the file."""
        if not change:
            return
        cluster, weight = offset >> self.geometry.cluster_bits, abs(change)
        counts = self.gained if change > 0 else self.lost
        if counts.add([cluster], -weight if take_back else weight):
            raise ImageError(
                f"'{self.image.filename}' has an L2 table at {offset}, behind the end of the file; "
                "'fusedisk check -r all' may repair it."
            )
        if change < 0:
            self.changed_l2.add(offset)
        self.touch([cluster // self.geometry.block_entries])

    def give_back(self, offset: int, clusters: int = 1) -> None:
        """Free a new table that is not needed after all. Synchronous."""
        first = offset >> self.geometry.cluster_bits
        references = {cluster: self._new.pop(cluster) for cluster in range(first, first + clusters)}
        self.refcounts.freed.add((), references=references)

    def lose_table(self, offset: int, length: int) -> None:
        """Note that the new state does not use a table. Raises ImageError if the table is invalid."""
        first, count = offset >> self.geometry.cluster_bits, self.geometry.clusters(length)
        if first + count > self.lost.clusters:
            raise ImageError(
                f"'{self.image.filename}' has a table of {length} bytes at {offset}, behind the end of the file; "
                "'fusedisk check -r all' may repair it."
            )
        self.lost.add_run(first, count)

    def lose_l1(self) -> None:
        """Note that the new state does not use the image's L1 table: a request that moved it has freed the old one."""
        header = self.image.header
        place = header.l1_table_offset, self.geometry.clusters(header.l1_size * 8)
        if place != self._old_l1:
            if self._old_l1 is not None:
                self._lose_clusters(self._old_l1, -1)
            self._lose_clusters(place, 1)
            self._old_l1 = place

    def undo(self) -> None:
        """Give the new clusters back. Synchronous."""
        self.close()
        self.refcounts.freed.add((), references=dict(sorted(self._new.items())))
        self._new.clear()

    def close(self) -> None:
        """Follow changes no longer. Synchronous."""
        self.refcounts.changed = None

    # --- new refcounts ----------------------------------------------------------------------------------

    async def new_refcounts(self, block_index: int) -> array[int]:
        """The refcounts of one block in the new state, as far as it was collected.

        Raises ImageError where one is too large for its width, CorruptImageError where one would be below zero.
        """
        geometry = self.geometry
        first, count = block_index * geometry.block_entries, geometry.block_entries
        values = self.codec.decode(await self.refcounts.blocks.load(self._block_offset(block_index)))
        gained, lost = self.gained.part(first, count), self.lost.part(first, count)
        if gained is lost is None:
            return values
        try:
            return balance(values, gained, lost, geometry.refcount_bits)
        except RefcountUnderflow:
            raise await self.image.mark_corrupt(
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

    @property
    def stale_blocks(self) -> int:
        """How many blocks may have to be written again."""
        return len(self._stale or ())

    def follows_blocks(self) -> bool:
        """Whether blocks that change are to be told to :meth:`touch`."""
        return self._stale is not None

    def touch(self, blocks: Iterable[int]) -> None:
        """Note that other changes were collected for these blocks."""
        if self._stale is not None:
            self._stale.update(blocks)

    async def begin_blocks(self) -> None:
        """Find the blocks that change, as far as was collected."""
        stale = self._stale = self.refcounts.changed = set()
        stale.update(await self._touched_blocks())

    async def put_blocks(self, *, discard: bool) -> None:
        """Write the new versions of blocks that changed since the last time. That changes a few others.

        A block that changes is given a new cluster, and loses its old one."""
        assert self._stale is not None
        await self._place_table()
        todo = sorted(self._stale)
        self._stale.clear()
        for start in range(0, len(todo), _BLOCKS_AT_ONCE):
            for index in todo[start : start + _BLOCKS_AT_ONCE]:
                if index not in self._places and self._changes(index):
                    await self._place_block(index)
            await self.pause()
        for number, index in enumerate(index for index in todo if index in self._places):
            self._stale.discard(index)
            values = await self.new_refcounts(index)
            await self.image.announce("refblock_alloc_write_blocks")
            await self.image.put_new_table(self._places[index], self.codec.encode(values))
            if discard:
                self._freed[index] = list(self._freed_in(index, values))
            if number % self.blocks_at_once == 0:
                await self.pause()

    async def _place_block(self, index: int) -> None:
        bits, per_block = self.geometry.cluster_bits, self.geometry.block_entries
        old = self._block_offset(index)
        if not old:
            raise await self.image.mark_corrupt(
                f"clusters from {index * per_block << bits} on are in use, but have no refcounts"
            )
        self._places[index] = (await self._allocate(1)).first << bits
        self.lost.grow((old >> bits) + 1)
        self.lost.add_run(old >> bits, 1)
        self.touch([(old >> bits) // per_block])

    async def _place_table(self) -> None:
        """Give new clusters to the refcount table, which loses the old ones; again if it has moved since."""
        while self._old_table != self._header_table():
            self._leave_table()
            self._old_table = self._header_table()
            self._lose_clusters(self._old_table, 1)
            self._table = await self._allocate(self._old_table[1])

    def _leave_table(self) -> None:
        """Undo :meth:`_place_table`: a request that moved the table has freed the old one."""
        self._lose_clusters(self._old_table, -1)
        self._old_table = (0, 0)
        self.give_back(self._table.first << self.geometry.cluster_bits, self._table.clusters)
        self._table = HostRun(0, 0)

    def _lose_clusters(self, table: tuple[int, int], weight: int) -> None:
        per_block = self.geometry.block_entries
        first, clusters = table[0] >> self.geometry.cluster_bits, table[1]
        self.lost.grow(first + clusters)
        self.lost.add_run(first, clusters, weight)
        self.touch(cluster // per_block for cluster in range(first, first + clusters))

    def _header_table(self) -> tuple[int, int]:
        header = self.image.header
        return header.refcount_table_offset, header.refcount_table_clusters

    async def _touched_blocks(self) -> list[int]:
        """The blocks whose refcounts change, as far as was collected."""
        per_block = self.geometry.block_entries
        touched = sorted(self.gained.touched(per_block) | self.lost.touched(per_block))
        found: list[int] = []
        for start in range(0, len(touched), _BLOCKS_AT_ONCE):
            found += filter(self._changes, touched[start : start + _BLOCKS_AT_ONCE])
            await self.pause()
        return found

    def _changes(self, block_index: int) -> bool:
        first, count = block_index * self.geometry.block_entries, self.geometry.block_entries
        return any(counts.part(first, count) is not None for counts in (self.gained, self.lost))

    # --- switching --------------------------------------------------------------------------------------

    async def commit(
        self, state: State, hold_back: HoldBack, *, discard: bool, l2_places: array[int] | None = None
    ) -> None:
        """Put the file and memory into the new state, within ``hold_back``. ``discard``: give unused host space back,
        see :meth:`discard`. ``l2_places``: of the new L1 table, see :meth:`Image.sorted_l2`.

        Raises what writing raises, with nothing changed, unless the image is fenced.
        """
        image, refcounts = self.image, self.refcounts
        if self._stale is None:
            await self.begin_blocks()
        while self._stale or self._old_table != self._header_table():
            await self.put_blocks(discard=discard)
        table = array("Q", refcounts.table)
        for index, offset in self._places.items():
            table[index] = offset
        table_offset = self._table.first << self.geometry.cluster_bits
        await image.announce("refblock_alloc_write_table")
        await image.put_new_table(table_offset, encode_table(table))
        # Blocks that only new clusters are in: in the old state these are leaks at worst.
        await refcounts.write_blocks()
        if l2_places is None:
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
        self.close()
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

    def _freed_in(self, block_index: int, values: array[int]) -> Iterator[HostRun]:
        """Clusters of a block that lose their last reference."""
        first = block_index * self.geometry.block_entries
        lost = self.lost.part(first, len(values))
        if lost is None:
            return
        for start, end in _stretches(are_zero(values), 1):
            # Nothing is left, and here something was lost.
            for low, high in _stretches(are_zero(lost[start:end]), 0):
                yield HostRun(first + start + low, high - low)

    async def discard(self) -> None:
        """Free host space that the new state has no use for and that nobody has taken since. Not under the mutex. A
        failure is only logged, since the operation itself is done."""
        runs = [run for index in sorted(self._freed) for run in self._freed[index]]
        try:
            for start in range(0, len(runs), _RUNS_AT_ONCE):
                async with self.image.mutex:
                    await self._discard_unused(runs[start : start + _RUNS_AT_ONCE])
                await self.run_others()
        except FusediskError as exc:
            log.warning("%s: freed space stays in the file: %s", self.image.filename, exc)

    async def _discard_unused(self, runs: list[HostRun]) -> None:
        bits, per_block = self.geometry.cluster_bits, self.geometry.block_entries
        unused: list[HostRun] = []
        for index, part in itertools.groupby(runs, lambda run: run.first // per_block):
            unused += await self._unused(index, part)
        ranges: list[tuple[int, int]] = []
        for run in _joined(unused):
            start, end = run.first << bits, run.first + run.clusters << bits
            # Hosts give back whole blocks only, and small clusters are many.
            if end - start >= _HOST_BLOCK or start // _HOST_BLOCK != (end - 1) // _HOST_BLOCK:
                ranges.append((start, end - start))
        await space.discard_ranges(self.image.storage.node, ranges)

    async def _unused(self, block_index: int, runs: Iterable[HostRun]) -> list[HostRun]:
        """The parts of runs in one block that have no references now."""
        base = block_index * self.geometry.block_entries
        block = await self.refcounts.blocks.load(self._block_offset(block_index))
        unused: list[HostRun] = []
        for first, clusters, _ in runs:
            index, end = first - base, first - base + clusters
            while index < end:
                count = self.codec.free_run(block, index, end - index)
                if count:
                    unused.append(HostRun(base + index, count))
                index += count + 1
        return unused


def _stretches(flags: bytes, flag: int) -> Iterator[tuple[int, int]]:
    """Where flags, which are 0 or 1, are ``flag``: starts and ends."""
    end = 0
    while (start := flags.find(flag, end)) >= 0:
        end = flags.find(1 - flag, start)
        end = end if end >= 0 else len(flags)
        yield start, end


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
