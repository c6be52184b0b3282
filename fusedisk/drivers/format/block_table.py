"""A block table: which block of the disk lies where in the file. Formats compose it; most add little else.

A table is flat (:class:`~fusedisk.drivers.format.block_storage.Flat`: VDI, VHDX, VHD, Parallels, Bochs) or has two
levels (:class:`~fusedisk.drivers.format.block_storage.Tree`: VMDK, QCOW, QED). What its entries say is an
:class:`~fusedisk.drivers.format.block_entries.Entries`.

**Order of writes.** Guest data goes to its place at once, entries change in memory only. :meth:`BlockTable.write_out`
(every flush, close, and now and then) puts a barrier, a flush of the file, between what entries lead to and the
entries: data, a second-level table, the directory. So whenever the power goes, an entry on disk leads to what was
written there. A block that is freed is used again only when the entry that led to it is gone from the disk. A crash
leaves leaks at most: space in the file that no entry leads to.

**Requests at the same time.** The first writer of a block registers it; others of the same block wait until it is
published or abandoned. Everything else happens between two awaits. Requests that free space run alone on their blocks,
which the core sees to.

**A bitmap for each block** (VHD; VHDX's partially present blocks) is a :class:`Parts`: given one, the table asks it
about each block with data, copies no more than whole sectors around a first write, and tells it what was written.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple, Protocol

import trio

from fusedisk.block.model.edge import Child
from fusedisk.block.model.extent import DATA, SPECIAL, UNALLOCATED, ZERO, Extent, WriteExtent
from fusedisk.block.model.node import Node
from fusedisk.block.request import io, transfer
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import NotSupportedError
from fusedisk.core.locks import Mutex
from fusedisk.drivers.format.block_entries import Table
from fusedisk.drivers.format.block_storage import Flat, Level, Space, Tree

MAX_RUN = 4096
"""The most blocks in one answer."""
MAX_NEW_BYTES = 16 << 20
"""The most bytes of new blocks in one answer, unless a block is longer."""
MAX_WAITING = 1024
"""Freed blocks that are not to be used yet, before tables are written without being asked."""


class Parts(Protocol):
    """Which sectors of a block are present: a format's bitmaps. A sector that is not has its content from below."""

    unit: int
    """Bytes that one bit stands for."""

    def lookup(self, block: int, place: int, inside: int, length: int) -> tuple[int, int] | None:
        """Return the status of a prefix of a range in a block with data, and its length. None: ``load`` it first."""

    async def load(self, block: int, place: int) -> None:
        """Read the bitmap of a block."""

    async def wrote(self, block: int, place: int, inside: int, length: int, *, new: bool) -> None:
        """Note that a range, whole units, is present now. ``new``: the block is new, nothing else of it is."""

    def changed(self) -> list[Level]:
        """Return the bitmaps with changes. They are written behind the data, and before an entry leads to them."""


class Allocation:
    """Blocks whose first data is on its way."""

    __slots__ = ("block", "count", "done", "inside", "length", "new", "place")

    def __init__(self, block: int, count: int) -> None:
        self.block, self.count = block, count
        self.place = -1
        """Host offset of the first block, -1 as long as it has none."""
        self.new = True
        """False: the block is in the table already, but some sectors of it are not present."""
        self.inside = self.length = 0
        """What is written of it, if the format has bitmaps."""
        self.done: trio.Event | None = None


class _Found(NamedTuple):
    kind: int
    table: Table
    first: int
    """The block's index in the table."""
    length: int
    """Blocks of the same kind, side by side if they have data."""


class BlockTable:
    """The mapping of one node. Its methods do what those of :class:`~fusedisk.block.model.driver.Driver` with the same
    name promise."""

    def __init__(
        self, node: Node, edge: Child, tables: Flat | Tree, space: Space, *, parts: Parts | None = None
    ) -> None:
        """``edge`` leads to the file that tables and data lie in."""
        self.node, self.edge = node, edge
        self.tables, self.space = tables, space
        self.entries = tables.entries
        self.size = block_size = space.area.size
        self.parts = parts
        adjacent = not space.area.lead and parts is None and block_size % self.entries.unit == 0
        self._step = block_size // self.entries.unit if adjacent else 0
        """The difference between the entries of neighbouring blocks that lie side by side; 0 if they never do."""
        self._in_flight: dict[int, Allocation] = {}
        self._writing = Mutex()

    @property
    def busy(self) -> bool:
        """Whether there are allocations in flight."""
        return bool(self._in_flight)

    # --- looking up -------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Extent | None:
        """Return where a prefix of the range lies, None if a table must be loaded for that."""
        size = self.size
        block = offset // size
        inside = offset - block * size
        part = self.tables.part(block)
        if part is None:
            return None
        if inside + length <= size and self.parts is None:
            # Most requests: data within one block.
            entry, entries = part[0][part[1]], self.entries
            if entry & entries.kind_mask not in entries.kinds and not entry & entries.special:
                place = entries.base + (entry & entries.place_mask) * entries.unit
                return Extent(DATA, length, self.edge, place + inside)
        found = self._find(block, -(-(inside + length) // size))
        assert found is not None
        kind, table, index, count = found
        length = min(count * size - inside, length)
        if kind == DATA:
            place = self.entries.place(table[index])
            if self.parts is not None:
                present = self.parts.lookup(block, place, inside, length)
                if present is None:
                    return None
                kind, length = present
            return Extent(kind, length, self.edge if kind == DATA else None, place + inside if kind == DATA else 0)
        if kind == SPECIAL:
            token = array(self.entries.code, table[index : index + count].tobytes())
            return Extent(SPECIAL, length, compressed=True, token=token)
        return Extent(kind, length)

    async def map(self, offset: int, length: int) -> Extent:
        """Return where a prefix of the range lies."""
        while (found := self.lookup(offset, length)) is None:
            await self._load(offset // self.size)
        return found

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent | None:
        """Return where to write a prefix of the range, if it is there already and no table must be loaded."""
        found = self.lookup(offset, length)
        if found is None or found.status != DATA:
            return None
        assert found.child is not None
        return WriteExtent(found.length, found.child, found.offset)

    def _find(self, block: int, wanted: int) -> _Found | None:
        """Return what is known of a block and of up to ``wanted`` of the same kind from there on."""
        part = self.tables.part(block)
        if part is None:
            return None
        table, index, end = part
        entry = table[index]
        kind = self.entries.kind(entry)
        step = self._step if kind == DATA else 0
        end = min(end, index + wanted, index + MAX_RUN)
        after = index + 1
        if kind == DATA and not step:
            end = after
        if kind == SPECIAL:
            while after < end and self.entries.kind(table[after]) == SPECIAL:
                after += 1
        else:
            expected = entry + step
            while after < end and table[after] == expected:
                after += 1
                expected += step
        return _Found(kind, table, index, after - index)

    async def _load(self, block: int) -> None:
        """Load what a lookup of the block lacks."""
        await self.tables.load(block)
        if self.parts is not None:
            found = self._find(block, 1)
            if found is not None and found.kind == DATA:
                await self.parts.load(block, self.entries.place(found.table[found.first]))

    # --- writing ----------------------------------------------------------------------------------------

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        """Return where to write a prefix of the range, in new blocks where there are none."""
        block = offset // self.size
        if self.tables.full or self.space.waiting > MAX_WAITING:
            await self.write_out(settle=True)
        while True:
            pending = self._in_flight.get(block)
            if pending is not None:
                refuse_to_wait()
                if pending.done is None:
                    pending.done = trio.Event()
                await pending.done.wait()
                continue
            found = self.lookup(offset, length)
            if found is None:
                await self._load(block)
                continue
            break
        if found.status == DATA:
            assert found.child is not None
            return WriteExtent(found.length, found.child, found.offset)
        known = self._find(block, 1)
        assert known is not None
        if known.kind == DATA:  # but not these sectors of it
            return self._fill_in(block, offset, found.length, self.entries.place(known.table[known.first]))
        return await self._allocate(block, offset, length)

    def _fill_in(self, block: int, offset: int, length: int, place: int) -> WriteExtent:
        """Answer a write to sectors of a block that are not present yet."""
        assert self.parts is not None
        allocation = Allocation(block, 1)
        allocation.new, allocation.place = False, place
        self._in_flight[block] = allocation
        return self._extent(allocation, offset, length, self.parts.unit, zero_head=False, zero_tail=False)

    async def _allocate(self, block: int, offset: int, length: int) -> WriteExtent:
        """Answer a write to blocks without data with new space, blocks side by side if possible."""
        count = self._without_data(block, offset + length)
        allocation = Allocation(block, count)
        for each in range(block, block + count):
            self._in_flight[each] = allocation
        # Asked now: the table may leave the cache while there is no space yet.
        head, tail = self._reads_zero(block), self._reads_zero(block + count - 1)
        try:
            place, taken, zeroes = await self.space.take(count)
        except BaseException:
            self._release(allocation)
            raise
        for each in range(block + taken, block + count):
            del self._in_flight[each]
        allocation.place, allocation.count = place, taken
        length = min(length, (block + taken) * self.size - offset)
        unit = self.size if self.parts is None else self.parts.unit
        # Blocks that read as zeroes are taken at the end of the file only, and then all of them.
        zeroes = zeroes and taken == count and self.parts is None
        return self._extent(allocation, offset, length, unit, zero_head=zeroes and head, zero_tail=zeroes and tail)

    def _without_data(self, block: int, end: int) -> int:
        """Return how many blocks from this one on, up to the disk offset ``end``, are to be allocated together."""
        if not self._step:
            return 1
        part = self.tables.part(block)
        assert part is not None
        table, index, stop = part
        most = min(-(-end // self.size) - block, max(MAX_NEW_BYTES // self.size, 1), stop - index)
        count = 1
        while count < most and block + count not in self._in_flight:
            if self.entries.kind(table[index + count]) == DATA:
                break
            count += 1
        return count

    def _reads_zero(self, block: int) -> bool:
        """Whether a block without data reads as zeroes, also from below."""
        kind, backing = self._kind(block), self.node.backing
        if kind == UNALLOCATED:
            return backing is None or backing.node.length <= block * self.size
        return kind == ZERO

    def _extent(
        self, allocation: Allocation, offset: int, length: int, unit: int, *, zero_head: bool, zero_tail: bool
    ) -> WriteExtent:
        inside = offset - allocation.block * self.size
        head = 0 if zero_head else inside % unit
        end = offset + length
        tail = 0 if zero_tail else max(min(-(-end // unit) * unit, self.node.length) - end, 0)
        allocation.inside, allocation.length = inside - head, -(-(head + length + tail) // unit) * unit
        return WriteExtent(length, self.edge, allocation.place + inside, allocation, head, tail)

    async def publish(self, allocation: object) -> None:
        """Let the entries lead to the new blocks, in memory."""
        assert isinstance(allocation, Allocation)
        try:
            block, place = allocation.block, allocation.place
            if self.parts is not None:
                await self.parts.wrote(block, place, allocation.inside, allocation.length, new=allocation.new)
            if allocation.new:
                level = await self.tables.change(block)
                part = self.tables.part(block)
                assert part is not None
                first = part[1]
                for number in range(allocation.count):
                    level.table[first + number] = self.entries.entry(place + number * self.size)
                level.mark(first, allocation.count)
        except BaseException:
            self.abandon(allocation)
            raise
        self.node.change_mapping()
        self._release(allocation)

    def abandon(self, allocation: object) -> None:
        """Drop an allocation; its space is used for the next one."""
        assert isinstance(allocation, Allocation)
        if allocation.new:
            for number in range(allocation.count):
                self.space.give_back(allocation.place + number * self.size)
        self._release(allocation)

    def _release(self, allocation: Allocation) -> None:
        for block in range(allocation.block, allocation.block + allocation.count):
            del self._in_flight[block]
        if allocation.done is not None:
            allocation.done.set()

    # --- zeroes, discard, resize ------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Free whole blocks; they read as zeroes. Raises NotSupportedError for formats that cannot say so."""
        await self._clear(offset, length, "write-zeroes operation")

    async def discard(self, offset: int, length: int) -> None:
        """Free whole blocks; they read as zeroes. Raises NotSupportedError for formats that cannot say so."""
        await self._clear(offset, length, "discard operation")

    async def _clear(self, offset: int, length: int, what: str) -> None:
        shows_through = self.node.backing is not None
        if not self.space.reuses or (shows_through and self.entries.zero is None):
            raise NotSupportedError(f"'{self.node.filename}' has no {what}.")
        entry = self.entries.unallocated
        if shows_through:
            assert self.entries.zero is not None
            entry = self.entries.zero
        await self._set(offset // self.size, -(-(offset + length) // self.size), entry)

    async def _set(self, block: int, end: int, entry: int) -> None:
        """Give all blocks up to ``end`` the same entry, one without data; free those that had some."""
        while block < end:
            if self.tables.part(block) is None:
                await self.tables.load(block)
            found = self._find(block, end - block)
            if found is None:
                continue
            kind, table, index, count = found
            if table[index] != entry:
                level = await self.tables.change(block)
                for number in range(index, index + count):
                    if kind == DATA:
                        self.space.free(self.entries.place(level.table[number]))
                    level.table[number] = entry
                level.mark(index, count)
                self.node.change_mapping()
            block += count

    async def resize(self, old: int, new: int, *, zero_new: bool) -> None:
        """Prepare for a new length, before the format writes it if it grows, afterwards if it shrinks. What is added
        reads as zeroes. Raises NotSupportedError, with nothing changed, if there are no entries for it."""
        size = self.size
        if new > self.tables.blocks * size:
            raise NotSupportedError(
                f"'{self.node.filename}' has room for a disk of {self.tables.blocks * size} bytes at most, "
                f"and {new} were asked for."
            )
        if new < old:
            await self._set(-(-new // size), -(-old // size), self.entries.unallocated)
            return
        entry = self.entries.unallocated
        if zero_new and self.node.backing is not None:
            if self.entries.zero is None:
                raise NotSupportedError(f"'{self.node.filename}' cannot hide what its backing file has past its end.")
            entry = self.entries.zero
        await self._set(-(-old // size), -(-new // size), entry)
        if old % size:
            await self._zero_tail(old, min(new, -(-old // size) * size))

    async def _zero_tail(self, start: int, end: int) -> None:
        """Zero what the last block holds past the old end, its own bytes or those from below. No request runs."""
        size = self.size
        block = start // size
        await self.map(start, end - start)
        if self._reads_zero(block):
            return
        first = start
        if self._kind(block) != DATA:  # its part in front of the old end moves along
            first = block * size
        content = memoryview(bytearray(end - first))
        # Below the door, where the change of the length waits.
        await transfer.read(self.node, first, content[: start - first])
        while content:
            target = await self.map_write(first, len(content))
            await io.write(self.edge.node, target.offset, (content[: target.length],))
            if target.allocation is not None:
                await self.publish(target.allocation)
            first, content = first + target.length, content[target.length :]

    def _kind(self, block: int) -> int:
        """Return what a block is whose table is loaded."""
        found = self._find(block, 1)
        assert found is not None
        return found.kind

    # --- writing the tables -----------------------------------------------------------------------------

    async def write_out(self, *, settle: bool = False) -> None:
        """Write all changes of the tables, each behind a barrier after what it leads to. ``settle``: flush afterwards,
        so that freed blocks may be used again."""
        async with self._writing:
            await self._write_out()
            if settle:
                await self._write_out()

    async def _write_out(self) -> None:
        gone, freed = self.space.begin()
        passes = [self.parts.changed()] if self.parts is not None else []
        passes += self.tables.changed()
        # As they are now: what is published from here on may lead to data behind the barrier.
        pieces = [[piece for level in levels for piece in level.pieces()] for levels in passes]
        taken = [(level, level.dirty) for levels in passes for level in levels]
        for level, _ in taken:
            level.dirty = set()
        try:
            if gone:
                await io.flush(self.edge.node)
            for each in pieces:
                if each:
                    await io.flush(self.edge.node)
                for place, data in each:
                    await io.write(self.edge.node, place, (data,))
        except BaseException:
            for level, dirty in taken:
                level.dirty |= dirty
            self.space.again(gone, freed)
            raise
        self.space.settle(gone, freed)

    async def finish(self) -> None:
        """Write all changes, and cut off what the file has grown by in vain. No request is in flight."""
        await self.write_out(settle=True)
        await self.space.trim()
