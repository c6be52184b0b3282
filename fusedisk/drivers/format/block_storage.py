"""The tables of a block table in memory and in the file, and the file's space for blocks.

A table is read whole; what changes is noted sector by sector and written later, in the order that
:meth:`fusedisk.drivers.format.block_table.BlockTable.write_out` decides. The numbers may lie in any writable buffer, so
that another process can find them.
"""

from __future__ import annotations

import contextlib
import heapq
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fusedisk.block.model.check_result import CheckResult
from fusedisk.block.model.extent import UNALLOCATED
from fusedisk.block.model.node import Node
from fusedisk.block.request import io, space
from fusedisk.core.errors import NoSpaceError, NotSupportedError
from fusedisk.core.locks import Mutex
from fusedisk.drivers.format.block_entries import Area, Entries, Table
from fusedisk.drivers.format.table_cache import TableCache

SECTOR = 512
"""Changes are written in units of this: a disk writes a sector whole or not at all, and no entry lies in two."""
MIN_AHEAD, MAX_AHEAD = 64 << 10, 4 << 20
"""Bytes by which the file grows at once: an eighth of its length between these."""

Allocate = Callable[[int], bytearray | memoryview]
"""Returns a writable buffer of so many bytes for a table."""


class Piece(NamedTuple):
    """Bytes of a table that are to be written."""

    place: int
    data: memoryview


class Level:
    """One table: its numbers, where it lies in the file (more than once, if there are copies), what has changed."""

    def __init__(
        self, storage: Node, entries: Entries, count: int, places: Sequence[int], allocate: Allocate = bytearray
    ) -> None:
        self.entries = entries
        self.places = tuple(places)
        self.table: Table = entries.table(allocate(count * entries.width), count)
        self.dirty: set[int] = set()
        """Numbers of changed sectors, counted from the start of the table."""
        self._storage = storage

    async def read(self) -> None:
        """Read the table from its first place. Raises HostError."""
        self.entries.decode(await self._read(self.places[0]), self.table)

    async def _read(self, place: int) -> memoryview:
        return memoryview(await io.read_bytes(self._storage, place, len(self.table) * self.entries.width))

    async def same(self) -> bool:
        """Read the table from all its places, the first one last; tell whether it is the same everywhere."""
        found = []
        for place in reversed(self.places):
            raw = await self._read(place)
            self.entries.decode(raw, self.table)
            found.append(raw)
        return all(raw == found[0] for raw in found)

    def mark(self, first: int, count: int = 1) -> None:
        """Note that entries have changed."""
        width = self.entries.width
        self.dirty.update(range(first * width // SECTOR, ((first + count) * width - 1) // SECTOR + 1))

    def pieces(self) -> Iterator[Piece]:
        """Yield the changed parts as they are now, neighbours joined, for each place of the table."""
        per_sector = SECTOR // self.entries.width
        runs: list[list[int]] = []
        for sector in sorted(self.dirty):
            if runs and runs[-1][1] == sector:
                runs[-1][1] += 1
            else:
                runs.append([sector, sector + 1])
        for first, end in runs:
            data = self.entries.encode(self.table[first * per_sector : end * per_sector])
            for place in self.places:
                yield Piece(place + first * SECTOR, data)


class Flat:
    """A block table of one level, all of it in memory.

    ``interleave``: after so many entries of blocks comes one of another kind, which is the format's own (VHDX).
    """

    full = False
    """Whether changed tables take up too much memory."""

    def __init__(self, level: Level, area: Area, interleave: int = 0) -> None:
        self.level = level
        self.area = area
        self.entries = level.entries
        self._table = level.table
        self._interleave = interleave

    @property
    def blocks(self) -> int:
        """The number of blocks that there are entries for."""
        count, chunk = len(self._table), self._interleave
        return count - count // (chunk + 1) if chunk else count

    def block_entries(self) -> Table:
        """Return the entries of blocks, without those of another kind."""
        chunk = self._interleave
        if not chunk:
            return self._table
        kept = array(self.entries.code, self._table.tobytes())
        del kept[chunk :: chunk + 1]
        return memoryview(kept)

    def part(self, block: int) -> tuple[Table, int, int] | None:
        """Return a table with the block's entry, the entry's index, and the index where the blocks behind it end. None:
        the table must be loaded first."""
        chunk = self._interleave
        if not chunk:
            return self._table, block, len(self._table)
        number, inside = divmod(block, chunk)
        index = block + number
        return self._table, index, min(index + chunk - inside, len(self._table))

    async def load(self, block: int) -> None:
        """Read the table of the block."""

    async def change(self, block: int) -> Level:
        """Return the table of the block, which is about to change; make it if there is none."""
        return self.level

    async def check(self, result: CheckResult) -> list[int]:
        """Count what is wrong with all entries, and what leaks. Return a block of each table whose copies differ."""
        self.area.check(self.entries.places(self.block_entries()), 0, result)
        if await self.level.same():
            return []
        result.corruptions += 1
        result.note("the block table differs from its copy.")
        return [0]

    def changed(self) -> list[list[Level]]:
        """Return the tables with changes, in the order in which they must reach the disk."""
        return [[self.level] if self.level.dirty else []]


class Tree:
    """A block table of two levels: a directory in memory, whose entries lead to tables, of which some are cached.

    With several directories, each leads to tables of its own with the same content, which are kept in step (VMDK).
    """

    def __init__(
        self,
        storage: Node,
        directories: Sequence[Level],
        entries: Entries,
        per_table: int,
        space: Space,
        *,
        cache_size: int,
        allocate: Allocate = bytearray,
    ) -> None:
        """``per_table``: entries in a table. ``cache_size``: bytes of tables in memory; changed ones may exceed it."""
        self.entries = entries
        self._storage = storage
        self._directories = directories
        self._per_table = per_table
        self._table_size = -(-per_table * entries.width // SECTOR) * SECTOR
        self._space = space
        self.area = space.area
        self._allocate = allocate
        self._empty = entries.table(bytearray(per_table * entries.width), per_table).toreadonly()
        self._cache: TableCache[Level] = TableCache(self._read, per_table * entries.width, 2)
        self._cache.set_size(cache_size)
        self._changed: dict[int, Level] = {}
        self._mending: set[int] = set()
        """Tables that get copies: they stay in memory."""
        self._cache.is_pinned = lambda number: number in self._changed or number in self._mending
        self._making = Mutex()

    @property
    def blocks(self) -> int:
        """The number of blocks that there are entries for."""
        return len(self._directories[0].table) * self._per_table

    @property
    def full(self) -> bool:
        """Whether changed tables take up too much memory."""
        return len(self._changed) > self._cache.capacity // 2

    def part(self, block: int) -> tuple[Table, int, int] | None:
        """See :meth:`Flat.part`."""
        number, index = divmod(block, self._per_table)
        level = self._cache.get(number)
        if level is not None:
            return level.table, index, self._per_table
        directory = self._directories[0]
        if directory.entries.kind(directory.table[number]) == UNALLOCATED:
            return self._empty, index, self._per_table
        return None

    async def load(self, block: int) -> None:
        """Read the table of the block. Raises CorruptImageError, HostError."""
        await self._cache.load(block // self._per_table)

    async def _read(self, number: int) -> Level:
        level = Level(self._storage, self.entries, self._per_table, self._places(number), self._allocate)
        await level.read()
        self.area.require(self.entries.places(level.table), self._storage.filename)
        return level

    async def check(self, result: CheckResult) -> list[int]:
        """See :meth:`Flat.check`; also compare the copies of each table. A crash may leave them different: the first is
        the right one."""
        found: list[int] = []
        stale: list[int] = []
        used = 0
        tables = Area(0, self._storage.length, size=self._per_table * self.entries.width)
        for number in range(len(self._directories[0].table)):
            places = self._places(number)
            if not places:
                if any(each.entries.kind(each.table[number]) != UNALLOCATED for each in self._directories[1:]):
                    stale.append(number * self._per_table)
                    result.corruptions += 1
                    result.note(f"table {number} exists only as a copy.")
                continue
            for wrong in (wrongs := list(tables.wrong(places))):
                result.corruptions += 1
                result.note(f"table {number} lies {wrong}.")
            if wrongs:
                continue
            level = Level(self._storage, self.entries, self._per_table, places)
            if not await level.same() or len(places) < len(self._directories):
                stale.append(number * self._per_table)
                result.corruptions += 1
                result.note(f"table {number} has a copy that is missing or differs from it.")
            found += self.entries.places(level.table)
            used = max(used, max(places) + tables.size)
        self.area.check(found, used, result)
        return stale

    def _places(self, number: int) -> list[int]:
        """Return where a table lies, the first copy first; nothing for a table that does not exist."""
        places = [
            each.entries.place(each.table[number])
            for each in self._directories
            if each.entries.kind(each.table[number]) != UNALLOCATED
        ]
        first = self._directories[0]
        return places if first.entries.kind(first.table[number]) != UNALLOCATED else []

    async def change(self, block: int) -> Level:
        """Return the table of the block, which is about to change; make it if there is none. Nothing is awaited after
        the table is found, so the caller changes what :meth:`changed` will find."""
        number = block // self._per_table
        while True:
            if self.part(block) is None:
                await self.load(block)
            level = self._cache.get(number)
            if level is None or len(level.places) < len(self._directories):
                async with self._making:
                    await self._complete(number)
                continue
            if number not in self._changed:
                self._changed[number] = level
                if len(level.places) > 1:  # after a crash a copy may be older
                    level.mark(0, self._per_table)
            return level

    async def _complete(self, number: int) -> None:
        """Make a table that does not exist, or the copies that a crash has left out."""
        level = self._cache.get(number)
        if level is None:
            if not self._places(number):
                await self._make(number)
            return
        self._mending.add(number)
        try:
            for directory in self._directories[len(level.places) :]:
                place = await self._space.take_bytes(self._table_size)
                level.places = (*level.places, place)
                directory.table[number] = directory.entries.entry(place)
                directory.mark(number)
                level.mark(0, self._per_table)
                self._changed[number] = level
        finally:
            self._mending.discard(number)

    async def _make(self, number: int) -> None:
        """Give a new table space in the file. Until the directory is written, nothing on disk leads there."""
        places = [await self._space.take_bytes(self._table_size) for _ in self._directories]
        level = Level(self._storage, self.entries, self._per_table, places, self._allocate)
        level.mark(0, self._per_table)
        for directory, place in zip(self._directories, places, strict=True):
            directory.table[number] = directory.entries.entry(place)
            directory.mark(number)
        self._changed[number] = level
        self._cache.put(number, level)

    def changed(self) -> list[list[Level]]:
        """See :meth:`Flat.changed`: tables first, then the directories that lead to them."""
        for number, level in list(self._changed.items()):
            if not level.dirty:
                del self._changed[number]
        return [list(self._changed.values()), [each for each in self._directories if each.dirty]]


class Space:
    """Host space for blocks and tables: freed blocks first, then at the end of the file, which grows in large steps.

    A block that is freed may be used again when its old entry is gone from the disk for sure. Formats with something
    behind their blocks (the footer of VHD) override ``grow`` and ``trim``.
    """

    def __init__(self, storage: Node, area: Area, *, end: int, free: Sequence[int] = (), reuses: bool = True) -> None:
        """``end``: where new blocks go if ``free`` has none. ``reuses`` False: freed blocks are lost (VDI)."""
        self.storage = storage
        self.area = area
        self.reuses = reuses
        self.end = end
        self._zero_from = storage.length
        self._free = sorted(free)
        self._freed: list[int] = []
        """Their entries are gone from memory."""
        self._gone: list[int] = []
        """Their entries are gone from the file, but maybe not from the disk."""
        self._growing = Mutex()
        self._changed = False
        """Whether the file has grown, or blocks were freed."""

    @property
    def waiting(self) -> int:
        """The number of blocks that are freed, but not to be used yet."""
        return len(self._freed) + len(self._gone)

    async def take(self, count: int) -> tuple[int, int, bool]:
        """Return the host offset of free blocks side by side, their number (at most ``count``), and whether they read
        as zeroes. Raises NoSpaceError, HostError."""
        stride = self.area.lead + self.area.size
        if self._free:
            place = heapq.heappop(self._free)
            taken = 1
            while taken < count and self._free and self._free[0] == place + taken * stride:
                heapq.heappop(self._free)
                taken += 1
            return place, taken, False
        start = await self._take_end(count * stride, self.area.align)
        return start + self.area.lead, count, start >= self._zero_from

    async def take_bytes(self, size: int) -> int:
        """Return the host offset of space for a table, which reads as anything."""
        return await self._take_end(size, max(self.area.align, SECTOR))

    async def _take_end(self, size: int, align: int) -> int:
        async with self._growing:
            self._changed = True
            start = self.area.first + -(-(self.end - self.area.first) // align) * align
            if start + size > self.storage.length:
                await self.grow(start + size)
            self.end = start + size
        self.area.end = max(self.area.end, self.end)
        return start

    async def grow(self, end: int) -> None:
        """Make the file long enough for blocks up to ``end``. No guest data is on its way to what lies behind it."""
        step = min(max(end // 8, MIN_AHEAD), MAX_AHEAD)
        try:
            await space.truncate(self.storage, end + step)
        except NoSpaceError:
            await space.truncate(self.storage, end)
        except NotSupportedError:
            pass  # the data itself makes it longer

    async def trim(self) -> None:
        """Cut off what is unused at the end of the file, when all entries are written and flushed. What an image has
        there that was not changed is left alone."""
        if not self._changed:
            return
        stride = self.area.lead + self.area.size
        unused = sorted(self._free)
        while unused and unused[-1] + self.area.size == self.end:
            unused.pop()
            self.end -= stride
        self._free = unused
        if self.end < self.storage.length:
            with contextlib.suppress(NotSupportedError):
                await space.truncate(self.storage, self.end)

    def give_back(self, place: int) -> None:
        """Take back a block that no entry has ever led to."""
        heapq.heappush(self._free, place)

    def free(self, place: int) -> None:
        """Take back a block whose entry has just changed in memory."""
        if self.reuses:
            self._changed = True
            self._freed.append(place)

    def begin(self) -> tuple[list[int], list[int]]:
        """Return the blocks that are free once the disk is flushed, and those after the changes so far are written."""
        gone, freed = self._gone, self._freed
        self._gone, self._freed = [], []
        return gone, freed

    def settle(self, gone: list[int], freed: list[int]) -> None:
        """Move the blocks on: ``gone`` may be used from now on, the entries of ``freed`` are gone from the file."""
        for place in gone:
            heapq.heappush(self._free, place)
        self._gone += freed

    def again(self, gone: list[int], freed: list[int]) -> None:
        """Undo ``begin`` after an error."""
        self._gone += gone
        self._freed += freed
