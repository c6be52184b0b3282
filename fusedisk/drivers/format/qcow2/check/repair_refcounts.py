"""Making refcounts agree with the references that were counted.

Moves: a snapshot table that must be rewritten, and copies of clusters with more references than their refcount can
count. They are written first, counted next, and only then referred to.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush

from fusedisk.core.errors import ImageError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.check.check import Analysis
from fusedisk.drivers.format.qcow2.check.image import CheckedImage, Region
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, HostRun, encode_table
from fusedisk.drivers.format.qcow2.snapshots.table import Snapshot, encode_snapshots

_ENTRIES_IN_WHOLE_BYTES = 8


async def raise_refcounts(analysis: Analysis) -> None:
    """Raise refcounts that are lower than the references. The analysis is out of date then."""
    if _needs_rebuild(analysis):
        await _Rebuild(analysis).run()
    elif analysis.too_low:
        await _change(analysis, max)
    await analysis.image.flush()


async def lower_refcounts(analysis: Analysis) -> None:
    """Lower refcounts that are higher than the references. The analysis is out of date then."""
    if analysis.leaks:
        await _change(analysis, min)
        await analysis.image.flush()


def _needs_rebuild(analysis: Analysis) -> bool:
    """Whether the refcount structure must be moved."""
    if analysis.rebuild or analysis.walk.block_corruptions:
        return True
    image, region = analysis.image, analysis.image.refcount_table_region
    if not region.length or not image.has_region(*region):
        return True
    first, last = region.offset >> image.cluster_bits, region.offset + region.length - 1 >> image.cluster_bits
    return any(analysis.counts[cluster] > 1 for cluster in range(first, last + 1))


async def _change(analysis: Analysis, choose: Callable[[int, int], int]) -> None:
    """Set each refcount to what ``choose`` returns for it and the references."""
    image, disk = analysis.image, analysis.disk
    size, end = image.block_entries, analysis.counts.end()
    for number in range(min(-(-end // size), len(disk.table))):
        offset = disk.offset(number)
        block = await disk.block(number) if offset else None
        if block is None:
            continue
        count = min(size, end - number * size)
        new = array("I", map(choose, block[:count], analysis.wanted(number)[:count])) + block[count:]
        if new == block:
            continue
        changed = [index for index, (before, after) in enumerate(zip(block, new, strict=True)) if before != after]
        first = changed[0] // _ENTRIES_IN_WHOLE_BYTES * _ENTRIES_IN_WHOLE_BYTES
        last = -(-(changed[-1] + 1) // _ENTRIES_IN_WHOLE_BYTES) * _ENTRIES_IN_WHOLE_BYTES
        await image.write(offset + first * image.refcount_bits // 8, disk.codec.encode(new[first:last]))


class _Rebuild:
    """A new refcount structure, in clusters that nothing refers to.

    Free clusters are taken first fit, as QEMU does; where entries were dropped, only from behind everything in use, so
    that nothing is overwritten that somebody may still want to look for.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.image = analysis.image
        self.counts = analysis.counts
        self._floor = max(analysis.end, self.counts.end()) if analysis.broken else 0
        self._blocks: dict[int, int] = {}
        """Clusters of refcount blocks by their number."""

    async def run(self) -> None:
        """Write it and make it active."""
        size = self.image.block_entries
        self._cover(number for number in self.counts.touched(size) if any(self.analysis.wanted(number)))
        table_cluster, clusters = self._place_table()
        for number, cluster in self._blocks.items():
            block = self.analysis.disk.codec.encode(self.analysis.wanted(number))
            await self.image.write(cluster << self.image.cluster_bits, block)
        table = array("Q", bytes(clusters << self.image.cluster_bits))
        for number, cluster in self._blocks.items():
            table[number] = cluster << self.image.cluster_bits
        await self.image.write(table_cluster << self.image.cluster_bits, encode_table(table))
        await self.image.flush()
        await self._activate(table_cluster << self.image.cluster_bits, clusters)

    def _cover(self, numbers: Iterable[int]) -> None:
        """Add the blocks with these numbers, and the blocks that count them."""
        size = self.image.block_entries
        pending = list(numbers)
        heapify(pending)
        while pending:
            number = heappop(pending)
            if number not in self._blocks:
                cluster = self._blocks[number] = self._take(number * size, 1)
                heappush(pending, cluster // size)

    def _place_table(self) -> tuple[int, int]:
        """Clusters for the table: the first, and how many."""
        size = self.image.block_entries
        while True:
            clusters = -(-(max(self._blocks) + 1) * 8 // self.image.cluster_size)
            if clusters << self.image.cluster_bits > layout.MAX_REFCOUNT_TABLE_SIZE:
                raise ImageError(
                    f"'{self.image.filename}' is not repaired: it would need a refcount table of {clusters} clusters, "
                    "which is more than is possible."
                )
            first = self._take(0, clusters)
            self._cover(range(first // size, (first + clusters - 1) // size + 1))
            if (max(self._blocks) + 1) * 8 <= clusters << self.image.cluster_bits:
                return first, clusters

    def _take(self, start: int, count: int) -> int:
        first = self.counts.first_free(max(start, self._floor), count)
        self.counts.grow(first + count)
        self.counts.add_run(first, count)
        return first

    async def _activate(self, offset: int, clusters: int) -> None:
        fields = offset.to_bytes(8, "big") + clusters.to_bytes(4, "big")
        await self.image.write(layout.REFCOUNT_TABLE_FIELDS, fields)
        self.image.header.refcount_table_offset = offset
        self.image.header.refcount_table_clusters = clusters


# --- moves --------------------------------------------------------------------------------------------

_SNAPSHOT_FIELDS = 60
"""nb_snapshots (4 bytes), snapshots_offset (8)."""


@dataclasses.dataclass(slots=True)
class Moves:
    """The moves and changes of one round."""

    image: CheckedImage
    next_cluster: int
    """The first cluster behind everything in use."""
    reserved: list[HostRun] = dataclasses.field(default_factory=list)
    copies: list[tuple[Region, int]] = dataclasses.field(default_factory=list)
    """What to copy, and to which host offset."""
    tables: list[tuple[int, bytes]] = dataclasses.field(default_factory=list)
    """New content by host offset."""
    switches: list[tuple[int, bytes]] = dataclasses.field(default_factory=list)
    """Entries and header fields to change at last, by host offset."""

    @property
    def needed(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.switches)

    def place(self, length: int) -> int:
        """Host offset of new clusters for ``length`` bytes."""
        count = -(-length // self.image.cluster_size)
        self.reserved.append(HostRun(self.next_cluster, count))
        self.next_cluster += count
        return self.reserved[-1].first << self.image.cluster_bits

    async def write_copies(self) -> None:
        """Write the copies, to which nothing refers yet."""
        image = self.image
        for source, target in self.copies:
            await image.write(target, await image.read(*source))
        for target, content in self.tables:
            await image.write(target, content)
        if self.reserved:
            # The last of the new clusters is there as a whole, so that it is not taken for one behind the end.
            end = self.next_cluster << image.cluster_bits
            if image.length < end:
                await image.write(end - 1, b"\0")
        await image.flush()

    async def switch(self) -> None:
        """Make entries and header refer to the copies."""
        for offset, content in self.switches:
            await self.image.write(offset, content)
        await self.image.flush()


async def plan_moves(analysis: Analysis) -> Moves:
    """Return what has to be moved now. Tables are copied first; what they refer to is left to a later round."""
    image = analysis.image
    moves = Moves(image, max(image.clusters, analysis.counts.end()))
    _rewrite_snapshots(analysis, moves)
    if analysis.crowded:
        crowded = dict(analysis.crowded)
        await _copy_tables(analysis, crowded, moves)
        if not moves.copies and image.crypto is None:
            await _copy_clusters(analysis, crowded, moves)
    return moves


# --- snapshots ------------------------------------------------------------------------------------------


def _rewrite_snapshots(analysis: Analysis, moves: Moves) -> None:
    image, table = analysis.image, analysis.snapshots
    kept = [snapshot for snapshot in table.snapshots if _is_possible(image, snapshot)]
    unplaced = not image.has_region(image.header.snapshots_offset, table.length) or not image.header.snapshots_offset
    whole = len(kept) == len(table.snapshots) and not table.dropped and not table.shortened
    if not table.snapshots and not table.dropped:
        return
    if whole and not analysis.incomplete_snapshots and not unplaced:
        return
    content = encode_snapshots(kept, image.filename)
    offset = moves.place(len(content)) if content else 0
    if content:
        moves.tables.append((offset, content))
    moves.switches.append((_SNAPSHOT_FIELDS, len(kept).to_bytes(4, "big") + offset.to_bytes(8, "big")))


def _is_possible(image: CheckedImage, snapshot: Snapshot) -> bool:
    if image.wrong_l1(snapshot) is not None:
        return False
    if not snapshot.l1_size:
        return bool(snapshot.raw_id or snapshot.raw_name)
    return image.cluster_size <= snapshot.l1_table_offset < image.length


# --- crowded clusters -----------------------------------------------------------------------------------


async def _copy_tables(analysis: Analysis, crowded: dict[int, int], moves: Moves) -> None:
    """New L2 tables for L1 entries that are one too many for their table's refcount."""
    image = analysis.image
    for table in analysis.walk.l1_tables:
        entries = await image.read_table(image.inside(table.region))
        for index, entry in enumerate(entries):
            offset = entry & OFFSET_MASK
            cluster = offset >> image.cluster_bits
            if not offset or crowded.get(cluster, 0) <= 0 or analysis.is_shared(table, index):
                continue
            crowded[cluster] -= 1
            target = moves.place(image.cluster_size)
            moves.copies.append((Region(offset, image.cluster_size), target))
            moves.switches.append((table.region.offset + 8 * index, target.to_bytes(8, "big")))


async def _copy_clusters(analysis: Analysis, crowded: dict[int, int], moves: Moves) -> None:
    """New clusters for L2 entries that are one too many for their cluster's refcount."""
    image = analysis.image
    words = image.entry_size // 8
    for offset, use in analysis.walk.uses.items():
        if offset >= image.length:
            continue
        table = await image.read_table(Region(offset, image.cluster_size))
        for index, entry in enumerate(table[::words]):
            region = _region(image, entry)
            if region is None:
                continue
            first, last = region.offset >> image.cluster_bits, region.offset + region.length - 1 >> image.cluster_bits
            clusters = range(first, last + 1)
            if all(crowded.get(cluster, 0) <= 0 for cluster in clusters):
                continue
            for cluster in clusters:
                crowded[cluster] = crowded.get(cluster, 0) - use.weight
            target = moves.place(region.length)
            moves.copies.append((region, target))
            moved = _moved_entry(image, entry, region, target)
            moves.switches.append((offset + image.entry_size * index, moved.to_bytes(8, "big")))


def _region(image: CheckedImage, entry: int) -> Region | None:
    """Return the host offset of an entry's cluster; None if it has none."""
    if entry & COMPRESSED:
        return image.compressed_region(entry)
    return Region(entry & OFFSET_MASK, image.cluster_size) if entry & OFFSET_MASK else None


def _moved_entry(image: CheckedImage, entry: int, region: Region, target: int) -> int:
    if entry & COMPRESSED:
        return image.compressed_entry(Region(target, region.length))
    return entry & ~(OFFSET_MASK | COPIED) | target
