"""Making refcounts agree with the references that were counted."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush

from fusedisk.core.errors import ImageError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.check_analysis import Analysis
from fusedisk.drivers.format.qcow2.entries import encode_table

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
