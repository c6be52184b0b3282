"""Moves in a repair: a snapshot table that must be rewritten, and copies of clusters with more references
than their refcount can count. Written first, counted next, and only then referred to.
"""

from __future__ import annotations

import dataclasses

from fusedisk.drivers.format.qcow2.check_analysis import Analysis
from fusedisk.drivers.format.qcow2.check_open import CheckedImage, Region
from fusedisk.drivers.format.qcow2.check_snapshots import SnapshotEntry
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, HostRun

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
    kept = [entry for entry in table.entries if _is_possible(image, entry)]
    unplaced = not image.has_region(image.header.snapshots_offset, table.length) or not image.header.snapshots_offset
    whole = len(kept) == len(table.entries) and not table.dropped and not table.shortened
    if not table.entries and not table.dropped:
        return
    if whole and not analysis.incomplete_snapshots and not unplaced:
        return
    content = b"".join(entry.encode(image.header.size) for entry in kept)
    offset = moves.place(len(content)) if content else 0
    if content:
        moves.tables.append((offset, content))
    moves.switches.append((_SNAPSHOT_FIELDS, len(kept).to_bytes(4, "big") + offset.to_bytes(8, "big")))


def _is_possible(image: CheckedImage, entry: SnapshotEntry) -> bool:
    if entry.wrong_l1(image) is not None:
        return False
    if not entry.l1.length:
        return bool(entry.id or entry.name)
    return image.cluster_size <= entry.l1.offset < image.length


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
