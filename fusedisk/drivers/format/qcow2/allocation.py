"""Writing to guest clusters that have no host clusters of their own yet: allocating, copying on write,
publishing.

Why concurrent requests are safe
--------------------------------
1. Everything here runs under the image's mutex, except :meth:`Allocator.abandon`, which is synchronous.
2. An allocation is *in flight* from ``map_write`` until ``publish`` or ``abandon``. Other writes to its guest clusters
   wait, since the rest of the clusters is being copied. A request that waits for an allocation holds neither the mutex
   nor an allocation, so there is no deadlock.
3. Copying a cluster on write never drops a refcount to zero under a reader: a cluster that is not COPIED although its
   refcount is one (an interrupted snapshot deletion leaves that) is taken over in place. Compressed clusters
   are the exception, so their readers look at the entry again after reading (:mod:`.compressed`).

Metadata changes in memory; :mod:`.commit` writes it in a safe order.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import trio

from fusedisk.block.model.extent import WriteExtent
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.drivers.format.qcow2 import entries as bits
from fusedisk.drivers.format.qcow2.cluster import ClusterMap
from fusedisk.drivers.format.qcow2.commit import Committer
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, HostRun, empty_table
from fusedisk.drivers.format.qcow2.refcount import Refcounts
from fusedisk.drivers.format.qcow2.space import Space


class Allocation:
    """New host clusters of a write request that are not in the L2 table yet."""

    __slots__ = ("_done", "count", "first", "fresh", "host", "old", "owned")

    def __init__(self, first: int, host: int, old: array[int], *, owned: bool = False, fresh: bool = False) -> None:
        self.first = first
        """First guest cluster, by number."""
        self.count = len(old)
        self.host = host
        """Host offset of the first cluster."""
        self.old = old
        """The L2 entries that this will replace."""
        self.owned = owned
        """The L2 table refers to the host clusters already (preallocated zeroes)."""
        self.fresh = fresh
        """The host clusters read as zeroes."""
        self._done: trio.Event | None = None

    async def wait(self) -> None:
        """Wait until it is published or abandoned."""
        refuse_to_wait()
        if self._done is None:
            self._done = trio.Event()
        await self._done.wait()

    def finish(self) -> None:
        """Wake the requests that waited."""
        if self._done is not None:
            self._done.set()


class Allocator:
    """Allocations of one writable image."""

    def __init__(
        self,
        clusters: ClusterMap,
        refcounts: Refcounts,
        committer: Committer,
        space: Space,
        backing_length: Callable[[], int] = lambda: 0,
    ) -> None:
        """``backing_length`` returns the current length of the backing file, 0 without one."""
        self.clusters = clusters
        self.refcounts = refcounts
        self.space = space
        self.committer = committer
        self.image = clusters.image
        self.geometry = self.image.geometry
        self.backing_length = backing_length
        self.keeps_discarded = False
        """The option discard-no-unref."""
        self.end_settled = False
        """Nothing behind the disk's end has changed since the last barrier. Not known of an image just opened."""
        self._in_flight: list[Allocation] = []
        self._blank = bits.ZERO if self.geometry.version >= 3 else 0
        """Entries up to this have no host cluster."""

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        """Return where to write a prefix of the range; allocate. See ``Driver.map_write``."""
        await self.committer.relieve()
        while True:
            async with self.image.mutex:
                conflict, length = self._in_flight_at(offset, length)
                if conflict is None:
                    return await self._prepare(offset, length)
            await conflict.wait()

    def _in_flight_at(self, offset: int, length: int) -> tuple[Allocation | None, int]:
        """Return the allocation in flight over the first cluster, or the number of bytes before the next one."""
        first = offset >> self.geometry.cluster_bits
        for allocation in self._in_flight:
            if allocation.first <= first < allocation.first + allocation.count:
                return allocation, length
            if allocation.first > first:
                length = min(length, (allocation.first << self.geometry.cluster_bits) - offset)
        return None, length

    async def _prepare(self, offset: int, length: int) -> WriteExtent:
        """Allocate for a prefix of the range, in which nothing is in flight."""
        geometry = self.geometry
        l1_index = offset >> geometry.span_bits
        table = await self.table_for_write(l1_index)
        extent = self.clusters.lookup_in_place(offset, length)
        if extent is not None:
            return extent
        first = offset >> geometry.cluster_bits
        index = first & geometry.l2_mask
        entry = table[index]
        await self._check_entry(offset, table[index : index + 1])
        if not entry & COMPRESSED and entry & OFFSET_MASK and await self._is_ours(entry):
            if not entry & bits.ZERO:
                return await self._adopt(offset, length, entry)
            count = _owned_zeroes(table, index, self._end(offset, length), geometry.cluster_size)
            allocation = Allocation(first, entry & OFFSET_MASK, table[index : index + count], owned=True)
        else:
            count = await self._count_new(table, index, self._end(offset, length))
            run = await self.space.allocate(first, count)
            old = table[index : index + run.clusters]
            allocation = Allocation(first, run.first << geometry.cluster_bits, old, fresh=run.fresh)
        start = first << geometry.cluster_bits
        end = start + (allocation.count << geometry.cluster_bits)
        return await self._register(offset, length, allocation, start, end)

    def map_write_now(self, offset: int, length: int) -> WriteExtent | None:
        """Do as :meth:`map_write` for the commonest case, in which nothing has to wait: the L2 table is in memory and
        ours, and nothing is mapped yet. None otherwise. The caller goes on to :meth:`publish_now` or :meth:`abandon`
        before anything else runs."""
        image, geometry = self.image, self.geometry
        if image.mutex.locked or image.watcher is not None or self.committer.holds_much:
            return None
        if self._in_flight:
            conflict, length = self._in_flight_at(offset, length)
            if conflict is not None:
                return None
        l1_entry = image.l1[offset >> geometry.span_bits]
        table_offset = l1_entry & OFFSET_MASK
        table = image.l2.get(table_offset)
        if table is None or not l1_entry & COPIED or image.metadata_at(table_offset, geometry.cluster_size):
            return None
        return self._prepare_now(table, offset, length)

    def _prepare_now(self, table: array[int], offset: int, length: int) -> WriteExtent | None:
        geometry = self.geometry
        first = offset >> geometry.cluster_bits
        index = first & geometry.l2_mask
        old = table[index : self._end(offset, length)]
        if max(old) > self._blank:
            if old[0] > self._blank:
                return None
            del old[next(at for at, entry in enumerate(old) if entry > self._blank) :]
        start = first << geometry.cluster_bits
        if start + (len(old) << geometry.cluster_bits) > self.image.header.size:
            return None  # bytes behind the disk's end may have to be zeroed
        run = self.space.allocate_now(first, len(old))
        if run is None:
            return None
        allocation = Allocation(first, run.first << geometry.cluster_bits, old[: run.clusters], fresh=run.fresh)
        return self._begin(offset, length, allocation, start, start + (run.clusters << geometry.cluster_bits))

    def _end(self, offset: int, length: int) -> int:
        """Index in the L2 table behind the range, or behind the table."""
        geometry = self.geometry
        inside = offset & geometry.cluster_mask
        index = offset >> geometry.cluster_bits & geometry.l2_mask
        return min(index + geometry.clusters(inside + length), geometry.l2_entries)

    async def _check_entry(self, offset: int, words: array[int]) -> None:
        """Raise CorruptImageError, after fencing the image, unless the cluster of the entry ``words`` may be replaced
        or overwritten.
        """
        entry = words[0]
        await self.clusters.check_entry(offset)
        if self.clusters.find_bad(words) is not None:
            raise await self.clusters.bad_entry(offset, words)
        if entry & COMPRESSED:
            return
        host = entry & OFFSET_MASK
        what = self.clusters.guard.occupied_at(host, self.geometry.cluster_size) if host else None
        if what is not None:
            raise await self.image.mark_corrupt(
                f"the L2 entry for guest offset {offset & ~self.geometry.cluster_mask} leads to {host}, "
                f"where its {what} lies"
            )

    async def _is_ours(self, entry: int) -> bool:
        """Whether only this L2 entry refers to its host cluster."""
        if entry & COPIED:
            return True
        host = entry & OFFSET_MASK
        refcount = await self.space.refcount(host >> self.geometry.cluster_bits)
        if not refcount:
            raise await self.image.mark_corrupt(f"the host cluster at {host} is in use, but its refcount is 0")
        return refcount == 1

    async def _adopt(self, offset: int, length: int, entry: int) -> WriteExtent:
        """Set the missing COPIED flag of a cluster that is ours alone, and overwrite the cluster in place."""
        geometry = self.geometry
        index = offset >> geometry.cluster_bits & geometry.l2_mask
        await self.image.put_l2_entries(offset >> geometry.span_bits, index, array("Q", [entry | COPIED]))
        inside = offset & geometry.cluster_mask
        count = min(length, geometry.cluster_size - inside)
        return WriteExtent(count, self.clusters.edge, self.space.place((entry & OFFSET_MASK) + inside))

    async def _count_new(self, table: array[int], index: int, end: int) -> int:
        """Return how many entries from ``index`` on need a new host cluster; the first does."""
        at = index + 1
        while at < end:
            entry = table[at]
            if not entry & COMPRESSED:
                if entry & self.geometry.l2_bad:
                    break
                if entry & OFFSET_MASK and await self._is_ours(entry):
                    break
            at += 1
        return at - index

    async def _register(self, offset: int, length: int, allocation: Allocation, start: int, end: int) -> WriteExtent:
        """Put an allocation in flight. Its clusters will hold the guest range from ``start`` to ``end``; the answer
        tells how much of that to copy.

        Nothing is copied if the written part is surrounded by zeroes and the host clusters read as zeroes.
        """
        size = self.image.header.size
        base = allocation.host - (allocation.first << self.geometry.cluster_bits)
        if end > size and not allocation.fresh:
            # Bytes behind the disk's end must be zeroes, since the disk may grow later.
            behind = max(size, start)
            try:
                await self.space.zero(base + behind, end - behind)
            except BaseException:
                self._take_back(allocation)
                raise
        return self._begin(offset, length, allocation, start, end)

    def _begin(self, offset: int, length: int, allocation: Allocation, start: int, end: int) -> WriteExtent:
        size = self.image.header.size
        base = allocation.host - (allocation.first << self.geometry.cluster_bits)
        stop = min(offset + length, end)
        head = offset - start
        tail = max(min(end, size) - stop, 0)
        if allocation.fresh:
            if head and self._reads_as_zeroes(allocation, 0, start):
                head = 0
            if tail and self._reads_as_zeroes(allocation, -1, stop):
                tail = 0
        self._in_flight.append(allocation)
        return WriteExtent(stop - offset, self.clusters.edge, self.space.place(base + offset), allocation, head, tail)

    def _reads_as_zeroes(self, allocation: Allocation, index: int, offset: int) -> bool:
        """Whether the part to copy of the first or last cluster, from guest ``offset`` on, is known to be zero."""
        entry = allocation.old[index]
        if entry & COMPRESSED:
            return False
        if entry & bits.ZERO:
            return True
        return not entry & OFFSET_MASK and self.backing_length() <= offset

    def abandon(self, allocation: Allocation) -> None:
        """Return the clusters, whose data could not be written, to the next allocation. Nothing refers to them."""
        self._in_flight.remove(allocation)
        self._take_back(allocation)
        allocation.finish()

    def _take_back(self, allocation: Allocation) -> None:
        if not allocation.owned:
            self.space.return_unused(HostRun(allocation.host >> self.geometry.cluster_bits, allocation.count))

    async def publish(self, allocation: Allocation) -> None:
        """Make the L2 table refer to the written clusters, and drop the references to what they replace."""
        geometry = self.geometry
        try:
            await self.image.mutex.acquire()
        except BaseException:
            self.abandon(allocation)
            raise
        try:
            l1_index = allocation.first >> geometry.l2_bits
            entries = self._new_entries(allocation)
            await self.image.put_l2_entries(l1_index, allocation.first & geometry.l2_mask, entries)
            if not allocation.owned and max(allocation.old) > bits.ZERO:
                self.space.free_entries(allocation.old)
        finally:
            self.image.mutex.release()
            self._in_flight.remove(allocation)
            allocation.finish()

    def publish_now(self, allocation: Allocation) -> None:
        """Publish what :meth:`map_write_now` has allocated."""
        image, geometry = self.image, self.geometry
        table_offset = image.l1[allocation.first >> geometry.l2_bits] & OFFSET_MASK
        index, entries = allocation.first & geometry.l2_mask, self._new_entries(allocation)
        image.put_entries_now(table_offset, image.l2.tables[table_offset], index, entries)
        self._in_flight.remove(allocation)

    async def replaceable(self, offset: int) -> array[int]:
        """Return the L2 entry for a guest offset, in a table that may be changed. Under the mutex. Raises
        CorruptImageError, after fencing the image, if the entry is invalid."""
        geometry = self.geometry
        table = await self.table_for_write(offset >> geometry.span_bits)
        at = (offset >> geometry.cluster_bits & geometry.l2_mask) * geometry.entry_words
        words = table[at : at + geometry.entry_words]
        await self._check_entry(offset, words)
        return words

    async def replace(self, offset: int, words: array[int]) -> None:
        """Replace the entry of the guest cluster at ``offset``, and drop what the old one refers to.

        The caller's request is serialised against all others over the cluster, so no allocation is in flight there.
        """
        geometry = self.geometry
        async with self.image.mutex:
            old = await self.replaceable(offset)
            index = offset >> geometry.cluster_bits & geometry.l2_mask
            await self.image.put_l2_entries(offset >> geometry.span_bits, index, words)
            self.refcounts.freed.add_entries(old[:1])

    def _new_entries(self, allocation: Allocation) -> array[int]:
        """Return the L2 entries that replace the old ones."""
        size, first = self.geometry.cluster_size, allocation.host | COPIED
        return array("Q", range(first, first + allocation.count * size, size))

    # --- L2 tables --------------------------------------------------------------------------------------

    async def table_for_write(self, l1_index: int) -> array[int]:
        """Return the L2 table of an L1 entry, cached and not shared with a snapshot; allocate or copy it if needed.

        Under the mutex. For use before the next await.
        """
        image, geometry = self.image, self.geometry
        await image.before_change(l1_index << geometry.span_bits < image.header.size)
        table = await self.clusters.table_at(l1_index)
        entry = image.l1[l1_index]
        if table is not None:
            offset = entry & OFFSET_MASK
            what = image.metadata_at(offset, geometry.cluster_size)
            if what is not None:
                raise await image.mark_corrupt(f"L1 entry {l1_index} leads to {offset}, where its {what} lies")
            if entry & COPIED:
                return table
            if await self._is_ours(entry):
                image.put_l1_entry(l1_index, entry | COPIED)
                return await image.l2.load(offset)
        copy = table[:] if table is not None else empty_table(geometry.l2_words)
        if max(copy) & COPIED:
            # Clusters of a shared table are shared as well, whatever their flags say.
            copy[:: geometry.entry_words] = array("Q", [item & ~COPIED for item in geometry.descriptors(copy)])
        run = await self.refcounts.allocate(1)
        offset = run.first << geometry.cluster_bits
        try:
            await image.put_new_l2(offset, copy)
        except BaseException:
            self.refcounts.return_unused(run)
            raise
        if image.watcher is not None and table is not None:
            image.watcher.table_changes(l1_index, copy)
        image.put_l1_entry(l1_index, offset | COPIED)
        if entry & OFFSET_MASK:
            self.refcounts.freed.add([HostRun((entry & OFFSET_MASK) >> geometry.cluster_bits, 1)])
        return copy


def _owned_zeroes(table: array[int], index: int, end: int, cluster_size: int) -> int:
    """Return how many preallocated zero clusters from ``index`` on are known to be ours and adjacent in the file."""
    entry = table[index]
    at = index + 1
    if entry & COPIED:
        while at < end and table[at] == entry + (at - index) * cluster_size:
            at += 1
    return at - index
