"""Writing to subclusters that have no data yet.

A cluster that is ours and has subclusters without data is written to in place; what changes is its bitmap. Otherwise
there is a new cluster, which takes over from the old one what lies from the first subcluster with data to the last.
Either way only the subclusters at the edges of what is written are filled up with old data. Why concurrent requests
are safe: see :mod:`.allocation`; allocations in flight exclude each other by whole clusters.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from fusedisk.block.model.edge import Child
from fusedisk.block.model.extent import WriteExtent
from fusedisk.drivers.format.qcow2.allocation import Allocation, Allocator
from fusedisk.drivers.format.qcow2.cluster import ClusterMap
from fusedisk.drivers.format.qcow2.commit import Committer
from fusedisk.drivers.format.qcow2.entries import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
)
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.refcount import Refcounts
from fusedisk.drivers.format.qcow2.space import (
    ExternalClusterMap,
    ExternalSpace,
    ExternalSubclusterMap,
    OwnSpace,
)
from fusedisk.drivers.format.qcow2.subclusters import SubclusterMap


class SubclusterAllocation(Allocation):
    """An allocation of which the subclusters from guest offset ``start`` to ``end`` get data."""

    __slots__ = ("bitmaps", "end", "start")

    def __init__(self, first: int, host: int, words: array[int], *, owned: bool = False, fresh: bool = False) -> None:
        super().__init__(first, host, words[::2], owned=owned, fresh=fresh)
        self.bitmaps = words[1::2]
        """The bitmaps of the entries that this will replace."""
        self.start = self.end = 0


class SubclusterAllocator(Allocator):
    """Allocations of an image with extended L2 entries."""

    clusters: SubclusterMap

    async def _prepare(self, offset: int, length: int) -> WriteExtent:
        geometry = self.geometry
        table = await self.table_for_write(offset >> geometry.span_bits)
        extent = self.clusters.lookup_in_place(offset, length)
        if extent is not None:
            return extent
        first = offset >> geometry.cluster_bits
        index = first & geometry.l2_mask
        words = table[2 * index : 2 * index + 2]
        await self._check_entry(offset, words)
        entry, bitmap = words
        if not entry & COMPRESSED and entry & OFFSET_MASK and await self._is_ours(entry):
            if bitmap >> self._subcluster(offset) & 1:
                return await self._adopt(offset, length, entry)
            return await self._fill(table, index, offset, length)
        end = self._end(offset, length)
        count = await self._count_new(table, index, end)
        run = await self.space.allocate(first, count)
        old = table[2 * index : 2 * (index + run.clusters)]
        allocation = SubclusterAllocation(first, run.first << geometry.cluster_bits, old, fresh=run.fresh)
        self._place(allocation, offset, length)
        return await self._register(offset, length, allocation, allocation.start, allocation.end)

    def _subcluster(self, offset: int) -> int:
        """The number of a guest offset's subcluster in its cluster."""
        return (offset & self.geometry.cluster_mask) >> self.geometry.subcluster_bits

    async def _adopt(self, offset: int, length: int, entry: int) -> WriteExtent:
        geometry = self.geometry
        l1_index, index = offset >> geometry.span_bits, offset >> geometry.cluster_bits & geometry.l2_mask
        table = await self.clusters.table_at(l1_index)
        assert table is not None
        await self.image.put_l2_entries(l1_index, index, array("Q", (entry | COPIED, table[2 * index + 1])))
        extent = self.clusters.lookup_in_place(offset, length)
        assert extent is not None
        return extent

    def _prepare_now(self, table: array[int], offset: int, length: int) -> WriteExtent | None:
        geometry, clusters = self.geometry, self.clusters
        first = offset >> geometry.cluster_bits
        index = first & geometry.l2_mask
        words = table[2 * index : 2 * self._end(offset, length)]
        entry, bitmap = words[0], words[1]
        if entry:
            host = entry & OFFSET_MASK
            if (
                entry & COMPRESSED
                or not entry & COPIED
                or clusters.find_bad(words[:2]) is not None
                or bitmap >> self._subcluster(offset) & 1
                or clusters.guard.occupied_at(host, geometry.cluster_size)
            ):
                return None
            allocation, length = self._filling(table, index, offset, length)
            if allocation.end > self.image.header.size:
                return None
            return self._begin(offset, length, allocation, allocation.start, allocation.end)
        for at in range(0, len(words), 2):
            if words[at] or words[at + 1] & ALL_ALLOCATED:
                del words[at:]
                break
        if not words or (first << geometry.cluster_bits) + (len(words) // 2 << geometry.cluster_bits) > (
            self.image.header.size
        ):
            return None
        run = self.space.allocate_now(first, len(words) // 2)
        if run is None:
            return None
        host = run.first << geometry.cluster_bits
        new = SubclusterAllocation(first, host, words[: 2 * run.clusters], fresh=run.fresh)
        self._place(new, offset, length)
        return self._begin(offset, length, new, new.start, new.end)

    async def _fill(self, table: array[int], index: int, offset: int, length: int) -> WriteExtent:
        """Write to subclusters without data in place, in this cluster and in those that continue it."""
        allocation, count = self._filling(table, index, offset, length)
        return await self._register(offset, count, allocation, allocation.start, allocation.end)

    def _filling(self, table: array[int], index: int, offset: int, length: int) -> tuple[SubclusterAllocation, int]:
        """Return the allocation of :meth:`_fill`, and how much of the range it is for."""
        geometry = self.geometry
        inside, size = offset & geometry.cluster_mask, geometry.subcluster_size
        count = self.clusters.unallocated_run(table, index, inside, length)
        clusters = geometry.clusters(inside + count)
        words = table[2 * index : 2 * (index + clusters)]
        host, first = words[0] & OFFSET_MASK, offset >> geometry.cluster_bits
        allocation = SubclusterAllocation(first, host, words, owned=True)
        allocation.start = offset & -size
        allocation.end = -(-(offset + count) // size) * size
        return allocation, count

    async def _count_new(self, table: array[int], index: int, end: int) -> int:
        at = index + 1
        while at < end:
            words = table[2 * at : 2 * at + 2]
            entry = words[0]
            if self.clusters.find_bad(words) is not None:
                break
            if not entry & COMPRESSED and entry & OFFSET_MASK and await self._is_ours(entry):
                break
            at += 1
        return at - index

    def _place(self, allocation: SubclusterAllocation, offset: int, length: int) -> None:
        """Set what new clusters will hold: what is written, and what their old ones have data for."""
        geometry = self.geometry
        base = allocation.first << geometry.cluster_bits
        if allocation.count == 1 and not (allocation.bitmaps[0] & ALL_ALLOCATED or allocation.old[0] & COMPRESSED):
            # The commonest case: a small write to a cluster without data.
            size = geometry.subcluster_size
            stop = min(offset + length, base + geometry.cluster_size)
            allocation.start, allocation.end = offset & -size, stop + -stop % size
            return
        last_base = base + (allocation.count - 1 << geometry.cluster_bits)
        stop = min(offset + length, last_base + geometry.cluster_size)
        lowest = min(self._subcluster(offset), _kept(allocation, 0)[0])
        highest = max(self._subcluster(stop - 1) + 1, _kept(allocation, -1)[1])
        allocation.start = base + (lowest << geometry.subcluster_bits)
        allocation.end = last_base + (highest << geometry.subcluster_bits)

    def _reads_as_zeroes(self, allocation: Allocation, index: int, offset: int) -> bool:
        assert isinstance(allocation, SubclusterAllocation)
        if allocation.old[index] & COMPRESSED or allocation.bitmaps[index] & ALL_ALLOCATED:
            return False
        if allocation.bitmaps[index] >> SUBCLUSTERS >> self._subcluster(offset) & 1:
            return True
        return self.backing_length() <= offset

    def _new_entries(self, allocation: Allocation) -> array[int]:
        assert isinstance(allocation, SubclusterAllocation)
        geometry = self.geometry
        words, size, bits = array("Q"), geometry.cluster_size, geometry.subcluster_bits
        guest, host = allocation.first << geometry.cluster_bits, allocation.host | COPIED
        if allocation.count == 1:
            written = (1 << (allocation.end - guest >> bits)) - (1 << (allocation.start - guest >> bits))
            return array("Q", (host, (allocation.bitmaps[0] | written) & ~(written << SUBCLUSTERS)))
        for bitmap in allocation.bitmaps:
            low = max(allocation.start - guest, 0) >> bits
            high = min(allocation.end - guest, size) >> bits
            written = (1 << high) - (1 << low)
            words.extend((host, (bitmap | written) & ~(written << SUBCLUSTERS)))
            guest, host = guest + size, host + size
        return words


def cluster_map(image: Image, data_file: Child | None) -> ClusterMap:
    """The mapping of an image, by the kind of its L2 entries and by where its data lies."""
    if data_file is None:
        return SubclusterMap(image) if image.geometry.extended_l2 else ClusterMap(image)
    external = ExternalSubclusterMap(image) if image.geometry.extended_l2 else ExternalClusterMap(image)
    external.use(data_file)
    return external


def new_allocator(
    clusters: ClusterMap,
    refcounts: Refcounts,
    committer: Committer,
    data_file: Child | None,
    backing_length: Callable[[], int] = lambda: 0,
) -> Allocator:
    """The allocator that goes with a mapping; ``backing_length``: how long the backing file is now, 0 without one."""
    image = clusters.image
    space = OwnSpace(image, refcounts) if data_file is None else ExternalSpace(image, refcounts, data_file)
    kind = SubclusterAllocator if isinstance(clusters, SubclusterMap) else Allocator
    return kind(clusters, refcounts, committer, space, backing_length)


def _kept(allocation: SubclusterAllocation, index: int) -> tuple[int, int]:
    """The first subcluster with data of an old cluster, and the one behind the last."""
    if allocation.old[index] & COMPRESSED:
        return 0, SUBCLUSTERS
    data = allocation.bitmaps[index] & ALL_ALLOCATED
    return ((data & -data).bit_length() - 1, data.bit_length()) if data else (SUBCLUSTERS, 0)
