"""The active disk's L1 and L2 tables in the state after a snapshot was made or deleted, while requests change them.

All tables are gone through once, in pieces, and what the new state needs is written to new clusters: references are
counted (:class:`.Switch`), L2 tables whose COPIED flags change are copied, and so is the L1 table. Meanwhile the image
tells of each change of a table just before it (:class:`.MappingWatcher`), all under the mutex. What was counted of that
table is taken back at once, from its old content, and the table is gone through again in the next round. So at each
instant in which somebody else runs, exactly the tables that are done are counted, as they are. Each round is shorter
than the one before it; the last one runs while no request changes anything.

A change never makes wrong what was found of other tables:

* A new cluster has one reference, from the active disk, and its entry the COPIED flag: so it is in the new state too
  when a snapshot is deleted, and when one is made its table is done again and so counted.
* A cluster that loses the active disk's reference has its entry in a table that is done again. Whether its other
  references are of the snapshot that is deleted, or of others, decides on no flag: no entry of the active disk leads
  there any longer.
* Tables of snapshots do not change.
"""

from __future__ import annotations

import abc
import sys
from array import array
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fusedisk.core.progress import Progress
from fusedisk.drivers.format.qcow2.entries import (
    COPIED,
    ENTRIES_AT_ONCE,
    OFFSET_MASK,
    empty_table,
    encode_table,
    used_pieces,
)
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.snapshots.references import L2Table, Ones, l2_offsets, rewritten
from fusedisk.drivers.format.qcow2.snapshots.switch import NewTable, Switch

_PATCH = 64
"""L1 entries that are written again together: the fewest that fill a cluster."""
_MOST_ROUNDS = 8


class ActiveTables(abc.ABC):
    """The active disk's tables. Everything here runs under the mutex."""

    def __init__(self, image: Image, switch: Switch) -> None:
        self.image = image
        self.switch = switch
        self.tables_at_once = max(ENTRIES_AT_ONCE // image.geometry.l2_entries, 1)
        self.l1: array[int] = array("Q")
        """The L1 table of the new state."""
        self.l1_offsets: list[int] = []
        """Host offsets of its copies in the file."""
        self.l2_places: array[int] = array("Q")
        """Of the new state, see :attr:`Image.l2_places`."""
        self.weights: Counter[int] = Counter()
        """How many L1 entries lead to each L2 table, by its host offset."""
        self._counted = 0
        """How many L1 entries are in ``weights``, from the first on; finally all, also those that are added."""
        self._own: set[int] = set()
        """Tables that have changed, which the active disk alone refers to."""
        self._places: dict[int, int] = {}
        """Where the new versions of tables are; their own places for tables that stay and are counted."""
        self._done: set[int] = set()
        """Tables that are counted, and in the file where they have new versions."""
        self._pending: set[int] = set()
        """Tables for the next round."""
        self._moved: set[int] = set()
        """L1 entries, by index, whose new ones may be out of date."""
        self._all_moved = False
        """All of them may be."""

    # --- what the new state is --------------------------------------------------------------------------

    @abc.abstractmethod
    def leads_to(self, entry: int) -> int:
        """The L1 entry of the new state for one that is not empty."""

    @abc.abstractmethod
    def take(self, table: L2Table, weight: int) -> bytearray | None:
        """Count a table to which ``weight`` L1 entries lead; returns its new version, None where it can stay."""

    @abc.abstractmethod
    def take_back(self, table: L2Table, weight: int) -> None:
        """Undo the counting of :meth:`take`."""

    stays: int
    """The references that a table gains for each L1 entry where it stays."""
    copies: int
    """The references that a new version has for each L1 entry."""

    # --- following --------------------------------------------------------------------------------------

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow what others change."""
        self.image.watcher = self
        try:
            yield
        finally:
            self.image.watcher = None

    def table_changes(self, l1_index: int, table: array[int]) -> None:
        """See :class:`.MappingWatcher`."""
        entry = self.image.l1[l1_index]
        offset = entry & OFFSET_MASK
        self.switch.runs.pop(offset, None)
        self._moved.add(l1_index)
        self._pending.add(offset)
        if entry & COPIED:
            self._own.add(offset)
        if offset in self._done:
            self._done.discard(offset)
            old = L2Table(self.image, offset, bytearray(encode_table(table)))
            self._touch(old)
            self.take_back(old, self.weights[offset])

    def entry_changes(self, l1_index: int, old: int, new: int) -> None:
        """See :class:`.MappingWatcher`."""
        if new:
            self._own.add(new)
        if l1_index >= self._counted:
            return
        self._moved.add(l1_index)
        if old:
            self._leave_place(old)
            self.weights[old] -= 1
            self._pending.add(old)
            self._all_moved |= self.weights[old] > 0
        if new:
            self.weights[new] += 1
            self._pending.add(new)

    def _leave_place(self, offset: int) -> None:
        place = self._places.pop(offset, None)
        weight = self.weights[offset]
        if place == offset:
            self.switch.count_table(offset, self.stays * weight, take_back=True)
        elif place is not None:
            self.switch.count_table(offset, -weight, take_back=True)
            self.switch.give_back(place)

    def _touch(self, table: L2Table) -> None:
        if self.switch.follows_blocks():
            self.switch.touch(table.blocks())

    # --- rounds -----------------------------------------------------------------------------------------

    async def count(self, progress: Progress) -> None:
        """Go through all tables for the first time."""
        image, switch, size = self.image, self.switch, len(self.image.l1)
        for first, piece in used_pieces(image.l1):
            self._count_l1(first, piece)
            await switch.pause()
        self._count_l1(size, image.l1[size:])  # it may have grown
        self._counted = sys.maxsize
        await self._update(array("Q", self.weights), progress)

    def _count_l1(self, first: int, piece: array[int]) -> None:
        self._counted = first + len(piece)
        if piece:
            self.weights.update(l2_offsets(self.image, piece, first, "its L1 table"))

    async def write(self, copies: int, *, discard: bool) -> None:
        """Write the L1 table so many times, and the refcount blocks, and follow what changes until little is left."""
        image, switch = self.image, self.switch
        await self._write_l1(copies)
        self.l2_places = await image.sorted_l2(self.l1, switch.pause)
        await switch.begin_blocks()
        for _ in range(_MOST_ROUNDS):
            await self.follow()
            await switch.put_blocks(discard=discard)
            if self.behind <= self.tables_at_once and switch.stale_blocks <= switch.blocks_at_once:
                break

    async def follow(self) -> None:
        """Go through what has changed since the last time."""
        while self._pending or self._moved or len(self.l1) < len(self.image.l1):
            # What changes meanwhile is for the next round, entries together with their tables.
            pending, self._pending = self._pending, set()
            moved, self._moved = self._moved, set()
            await self._lengthen_l1()
            await self._update(array("Q", sorted(pending)))
            await self._patch_l1(moved)
            if self.switch.gives_way:
                break

    @property
    def behind(self) -> int:
        """How many tables have to be gone through again."""
        return len(self._pending)

    async def _update(self, offsets: array[int], progress: Progress | None = None) -> None:
        for start in range(0, len(offsets), self.tables_at_once):
            if progress is not None:
                progress(start, len(offsets))
            part = offsets[start : start + self.tables_at_once]
            await self._update_part(
                [offset for offset in part if offset not in self._done and self.weights[offset] > 0]
            )
            await self.switch.pause()

    async def _update_part(self, offsets: Sequence[int]) -> None:
        image, switch = self.image, self.switch
        new: list[NewTable] = []
        for offset in offsets:
            weight, place = self.weights[offset], self._places.get(offset)
            table = await L2Table.read(image, offset, switch.runs.get(offset))
            data = self.take(table, weight)
            self._touch(table)
            if place not in (None, offset):
                await image.put_new_table(place, table.raw if data is None else data)
            elif data is not None:
                if place is not None:
                    self._leave_place(offset)
                new.append(NewTable(offset, data, self.copies * weight))
                switch.count_table(offset, -weight)
            elif place is None:
                self._places[offset] = offset
                switch.count_table(offset, self.stays * weight)
            self._done.add(offset)
            if weight > 1 and self.l1:
                self._all_moved = True
        self._places |= await switch.new_tables(new)

    # --- the L1 table -----------------------------------------------------------------------------------

    async def _write_l1(self, copies: int) -> None:
        """Write the L1 table. What changes meanwhile is in ``_moved``."""
        self.l1 = await rewritten(self.image.l1, self.leads_to, self.switch.pause)
        for _ in range(copies):
            self.l1_offsets.append(await self.switch.new_l1(self.l1))

    async def _lengthen_l1(self) -> None:
        """Make the L1 table as long as the image's, with empty entries, and if need be write it to other clusters."""
        image, switch, old = self.image, self.switch, len(self.l1)
        self.l1.extend(empty_table(len(image.l1) - old))
        clusters = image.geometry.clusters(8 * old)
        if image.geometry.clusters(8 * len(self.l1)) == clusters:
            return
        copies, self.l1_offsets = self.l1_offsets, []
        for offset in copies:
            switch.give_back(offset, clusters)
        for _ in copies:
            self.l1_offsets.append(await switch.new_l1(self.l1))

    async def _patch_l1(self, moved: set[int]) -> None:
        """Write the entries that have changed."""
        if self._all_moved:
            # Several entries lead to one table: rare, and not worth an index.
            moved.update(range(len(self.l1)))
            self._all_moved = bool(self._pending)
        pieces: dict[int, None] = {}
        for index in sorted(moved):
            entry = self.image.l1[index]
            new = self.leads_to(entry) if entry else 0
            if new != self.l1[index]:
                self._place_l2(self.l1[index] & OFFSET_MASK, new & OFFSET_MASK)
                self.l1[index] = new
                pieces[index // _PATCH] = None
        for piece in pieces:
            data = encode_table(self.l1[piece * _PATCH : (piece + 1) * _PATCH])
            for offset in self.l1_offsets:
                await self.image.put_bytes(offset + 8 * piece * _PATCH, data)

    def _place_l2(self, old: int, new: int) -> None:
        if old == new or not self.image.guards_scattered:
            return
        if old:
            del self.l2_places[bisect_left(self.l2_places, old)]
        if new:
            insort(self.l2_places, new)


class SharedTables(ActiveTables):
    """The new state shares everything with a new snapshot."""

    stays = 1
    copies = 2

    def leads_to(self, entry: int) -> int:
        offset = entry & OFFSET_MASK
        return self._places.get(offset, offset)

    def take(self, table: L2Table, weight: int) -> bytearray | None:
        table.count(self.switch.gained, weight)
        return table.without_copied()

    def take_back(self, table: L2Table, weight: int) -> None:
        table.count(self.switch.gained, -weight)


class FlaggedTables(ActiveTables):
    """In the new state a snapshot is gone, and what only the active disk refers to has COPIED flags."""

    stays = 0
    copies = 1

    def __init__(self, image: Image, switch: Switch) -> None:
        super().__init__(image, switch)
        self.ones = Ones(image.geometry)
        """Which clusters have one reference without the snapshot, as it was at some time since changes are followed."""

    def _is_own(self, offset: int) -> bool:
        return offset in self._own or bool(self.ones.of(offset >> self.image.geometry.cluster_bits))

    def leads_to(self, entry: int) -> int:
        offset = entry & OFFSET_MASK
        return self._places.get(offset, offset) | (COPIED if offset and self._is_own(offset) else 0)

    def take(self, table: L2Table, weight: int) -> bytearray | None:
        if not self._is_own(table.offset):
            return None  # shared, and so is all that it leads to
        return table.with_copied(self.ones, keep=table.offset in self._own)

    def take_back(self, table: L2Table, weight: int) -> None:
        """Nothing was counted: only what the snapshot refers to loses references."""
