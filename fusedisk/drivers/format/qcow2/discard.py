"""Making whole clusters read as zeroes: write-zeroes and discard.

The caller's request is serialised against all others over its guest range, so nothing in it is in flight, and
host clusters may be freed. A part of one L2 table is changed at a time under the image's mutex, so an interrupted
request leaves a prefix done.

Ranges that read as zeroes already and have no host cluster stay as they are: such a request makes no L2 table, changes
no refcount, and is no first write. Whole stretches without L2 tables are skipped.

What QEMU does, done here: version 3 uses zero entries; version 2 has none, so its clusters can only be
dropped, and only where no data of a backing file would show through.
"""

from __future__ import annotations

from array import array

import trio

from fusedisk.block.model.node import Node
from fusedisk.block.request import space
from fusedisk.block.request.status import chain_status
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import FusediskError, NotSupportedError
from fusedisk.drivers.format.qcow2.allocation import Allocator
from fusedisk.drivers.format.qcow2.cluster import Transform
from fusedisk.drivers.format.qcow2.entries import (
    ALL_ALLOCATED,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
    ZERO,
    compressed_references,
    next_entry,
    plain_runs,
)
from fusedisk.drivers.format.qcow2.freed import Reason

_SKIPS_AT_ONCE = 1 << 16
"""The most L1 entries without a table that one step skips."""
_ENTRIES_AT_ONCE = 8192
"""The most L2 entries that one step changes."""
_EVERYTHING = 1 << 63
_LOOKUPS_AT_ONCE = 64


class Backing:
    """The backing file of one image, as it is now: the content of the disk where the image has no data.

    ``node`` is the open one. ``named``: the header names one; where it is not open nothing is known of it, and all of
    it might show through later.
    """

    def __init__(self, node: Node | None, *, named: bool) -> None:
        self._node = node
        self.end = node.length if node is not None else _EVERYTHING if named else 0
        """Behind this guest offset there are zeroes."""

    async def zero_until(self, offset: int, end: int) -> int:
        """Up to where from ``offset`` on nothing but zeroes shows through, as far as that is known without reading
        data; ``end`` at most."""
        lookups = 0
        while offset < min(end, self.end):
            if self._node is None:
                return offset
            try:
                status = await chain_status(self._node, offset, min(end, self.end) - offset)
            except FusediskError:
                return offset  # reading it reports the error
            if not status.zero:
                return offset
            offset += status.length
            lookups += 1
            if lookups % _LOOKUPS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return end


NO_BACKING = Backing(None, named=False)


async def write_zeroes(allocator: Allocator, offset: int, length: int, *, may_unmap: bool, backing: Backing) -> None:
    """Make whole clusters, or whole subclusters of one cluster, read as zeroes; ``length`` may end at the disk's end
    instead.

    Their host space is kept unless ``may_unmap``. Raises NotSupportedError for version 2 where data of the backing file
    would show through, and for a part of a compressed cluster.
    """
    if _is_part(allocator, offset, length):
        await zero_subclusters(allocator, offset, length, may_unmap=may_unmap, backing=backing)
        return
    transform = _plain_zero if may_unmap else _zero_in_place
    if allocator.geometry.version < 3:
        await _check_nothing_shows(allocator, offset, length, backing)
        transform, backing = _unallocated, NO_BACKING
    await change(allocator, offset, length, transform, backing=backing)


async def discard(allocator: Allocator, offset: int, length: int, *, backing: Backing) -> None:
    """Give whole clusters back; they read as zeroes afterwards. ``length`` may end at the disk's end instead.

    With ``discard-no-unref`` the image keeps clusters that are its alone, for the same guest offsets, and only the host
    gets the space. Raises NotSupportedError for version 2 where data of the backing file would show through.
    """
    keeps = allocator.keeps_discarded
    transform = _kept_or_zero if keeps else _plain_zero
    if allocator.geometry.version < 3:
        await _check_nothing_shows(allocator, offset, length, backing)
        transform, backing, keeps = _unallocated, NO_BACKING, False
    await change(allocator, offset, length, transform, backing=backing, discard_kept=keeps)


def _is_part(allocator: Allocator, offset: int, length: int) -> bool:
    """Whether a range is less than a cluster."""
    mask, end = allocator.geometry.cluster_mask, offset + length
    return bool(offset & mask or (end & mask and end != allocator.image.header.size))


async def _check_nothing_shows(allocator: Allocator, offset: int, length: int, backing: Backing) -> None:
    end = offset + length
    if await backing.zero_until(offset, end) < end:
        raise NotSupportedError(
            f"'{allocator.image.filename}' is qcow2 of version 2, which cannot hide its backing file behind zeroes; "
            f"version 3 (compat=1.1) can."
        )


def _unallocated(entry: int) -> int:
    return 0


def _plain_zero(entry: int) -> int:
    return ZERO


def _zero_in_place(entry: int) -> int:
    return ZERO if entry & COMPRESSED else entry | ZERO


def _kept_or_zero(entry: int) -> int:
    ours = entry & COPIED and entry & OFFSET_MASK and not entry & COMPRESSED
    return entry | ZERO if ours else ZERO


def _with_empty(transform: Transform, empty: int) -> Transform:
    """``transform``, but for entries of 0, which become ``empty``."""
    return lambda entry: transform(entry) if entry else empty


async def change(
    allocator: Allocator,
    offset: int,
    length: int,
    transform: Transform,
    *,
    backing: Backing = NO_BACKING,
    discard_kept: bool = False,
) -> bool:
    """Replace the entries of whole clusters by ``transform(entry)`` and free what is no longer referred to. Returns
    whether any entry changed.

    Empty entries stay empty, but for those over a backing file: these become zero entries, in a new L2 table where
    there is none, unless the backing file reads as zeroes for the whole of such a table. ``discard_kept``: what is
    referred to still has no data; the host gets its space.
    """
    bits, l2_bits = allocator.geometry.cluster_bits, allocator.geometry.l2_bits
    cluster, end = offset >> bits, allocator.geometry.clusters(offset + length)
    covered = allocator.geometry.clusters(backing.end)
    changed = False
    while (cluster := await _skip_empty(allocator, cluster, end, backing)) < end:
        stop = min(end, (cluster >> l2_bits) + 1 << l2_bits, cluster + _ENTRIES_AT_ONCE)
        if cluster < covered:
            stop = min(stop, covered)
        change_entry = _with_empty(transform, ZERO if cluster < covered else 0)
        changed |= await _change_part(allocator, cluster, stop, change_entry, discard_kept=discard_kept)
        cluster = stop
        if cluster < end:
            # A large request must not keep other tasks from running.
            refuse_to_wait()
            await trio.lowlevel.checkpoint()
    return changed


async def _skip_empty(allocator: Allocator, cluster: int, end: int, backing: Backing) -> int:
    """The first guest cluster from ``cluster`` on that has an L2 table, or needs one to hide the backing file; ``end``
    if there is none before."""
    geometry, l1 = allocator.geometry, allocator.image.l1
    while cluster < end:
        first, last = cluster >> geometry.l2_bits, (end - 1 >> geometry.l2_bits) + 1
        used = next_entry(l1, first, min(last, first + _SKIPS_AT_ONCE))
        stop = min(used << geometry.l2_bits, end)
        if stop <= cluster:
            return cluster
        zero_end = await backing.zero_until(cluster << geometry.cluster_bits, stop << geometry.cluster_bits)
        if zero_end < stop << geometry.cluster_bits:
            return max(cluster, zero_end >> geometry.span_bits << geometry.l2_bits)
        cluster = stop
        if cluster < end:
            refuse_to_wait()
            await trio.lowlevel.checkpoint()
    return end


async def _change_part(
    allocator: Allocator, cluster: int, end: int, transform: Transform, *, discard_kept: bool
) -> bool:
    """Change entries of one L2 table, if any is to change; returns whether one did."""
    geometry, clusters, words = allocator.geometry, allocator.clusters, allocator.geometry.entry_words
    l1_index = cluster >> geometry.l2_bits
    base = l1_index << geometry.l2_bits
    part = slice((cluster - base) * words, (end - base) * words)
    table = await clusters.table_at(l1_index)
    if table is not None:
        old = table[part]
        bad = clusters.find_bad(old)
        if bad is not None:
            raise await clusters.bad_entry(cluster + bad << geometry.cluster_bits, old[bad * words : (bad + 1) * words])
        if clusters.transformed(old, transform) == old:
            return False
    await allocator.committer.relieve()
    async with allocator.image.mutex:
        # Read again: the table may have been copied just now, with other flags.
        old = (await allocator.table_for_write(l1_index))[part]
        new = clusters.transformed(old, transform)
        differing = [i // words for i, word in enumerate(old) if word != new[i]]
        if not differing:  # another request was faster
            return False
        first, last = differing[0], differing[-1] + 1
        part = slice(first * words, last * words)
        await _replace(allocator, l1_index, cluster - base + first, old[part], new[part])
        if discard_kept and Reason.REQUEST in allocator.refcounts.freed.pass_discard:
            await _discard_kept(allocator, [new[i * words] for i in differing])
    return True


async def _discard_kept(allocator: Allocator, entries: list[int]) -> None:
    """Give the host the space of clusters that only entries of zeroes refer to.

    Immediately, without waiting for a commit: the guest discarded them, so zeroes after a power cut are fine.
    """
    bits, clusters = allocator.geometry.cluster_bits, allocator.space
    for run in plain_runs(entries, allocator.geometry):
        await space.discard(clusters.edge.node, clusters.place(run.first << bits), run.clusters << bits)


async def zero_subclusters(
    allocator: Allocator, offset: int, length: int, *, may_unmap: bool, backing: Backing
) -> None:
    """Make whole subclusters of one cluster read as zeroes; ``length`` may end at the disk's end instead. The cluster
    stays, unless ``may_unmap`` and nothing else of it has data.

    Raises NotSupportedError where the cluster is compressed, as that has no subclusters.
    """
    geometry = allocator.geometry
    first = (offset & geometry.cluster_mask) >> geometry.subcluster_bits
    count = -(-length >> geometry.subcluster_bits)
    asked = (1 << count) - 1 << first
    l1_index = offset >> geometry.span_bits
    index = offset >> geometry.cluster_bits & geometry.l2_mask
    table = await allocator.clusters.table_at(l1_index)
    old = table[2 * index : 2 * index + 2] if table is not None else array("Q", (0, 0))
    if not any(old) and await backing.zero_until(offset, offset + length) == offset + length:
        return
    if await _zeroed(allocator, offset, old, asked, may_unmap=may_unmap) == old:
        return
    await allocator.committer.relieve()
    async with allocator.image.mutex:
        old = (await allocator.table_for_write(l1_index))[2 * index : 2 * index + 2]
        await _replace(
            allocator, l1_index, index, old, await _zeroed(allocator, offset, old, asked, may_unmap=may_unmap)
        )


async def _zeroed(allocator: Allocator, offset: int, old: array[int], asked: int, *, may_unmap: bool) -> array[int]:
    """The extended entry ``old`` with the subclusters in the bits of ``asked`` as zeroes."""
    if allocator.clusters.find_bad(old) is not None:
        raise await allocator.clusters.bad_entry(offset, old)
    entry, bitmap = old
    if entry & COMPRESSED:
        raise NotSupportedError(
            f"'{allocator.image.filename}' has a compressed cluster at {offset & ~allocator.geometry.cluster_mask}, "
            "no part of which can be a zero subcluster."
        )
    bitmap = bitmap & ~asked | asked << SUBCLUSTERS
    if may_unmap and not bitmap & ALL_ALLOCATED:
        entry = 0
    return array("Q", (entry, bitmap))


async def _replace(allocator: Allocator, l1_index: int, index: int, old: array[int], new: array[int]) -> None:
    """Replace entries and free what they no longer refer to. Under the mutex."""
    if new == old:
        return
    geometry = allocator.geometry
    pairs = zip(geometry.descriptors(old), geometry.descriptors(new), strict=True)
    dropped = [before for before, after in pairs if _loses_reference(before, after)]
    await check_dropped(allocator, dropped)
    await allocator.image.put_l2_entries(l1_index, index, new, ordered=False)
    allocator.space.free_entries(dropped, reason=Reason.REQUEST)


async def check_dropped(allocator: Allocator, dropped: list[int]) -> None:
    """Refuse to free metadata, and maybe punch holes into it, because an entry leads there."""
    geometry, image = allocator.geometry, allocator.image
    places = [(run.first << geometry.cluster_bits, run.clusters) for run in plain_runs(dropped, geometry)]
    places += [(cluster << geometry.cluster_bits, 1) for cluster in compressed_references(dropped, geometry)]
    for start, clusters in places:
        what = allocator.clusters.guard.occupied_at(start, clusters << geometry.cluster_bits)
        if what is not None:
            raise await image.mark_corrupt(f"L2 entries lead to {clusters} clusters at {start}, where its {what} lies")


def _loses_reference(old: int, new: int) -> bool:
    if old & COMPRESSED:
        return True
    return bool(old & OFFSET_MASK) and not new & OFFSET_MASK
