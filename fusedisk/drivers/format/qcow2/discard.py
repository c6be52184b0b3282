"""Making whole clusters read as zeroes: write-zeroes and discard.

The caller's request is serialised against all others over its guest range, so nothing in it is in flight, and
host clusters may be freed. One L2 table is changed at a time under the image's mutex, so an interrupted request
leaves a prefix done.

What QEMU does, done here: version 3 uses zero entries; version 2 has none, so its clusters can only be
dropped, and only where no backing file would show through.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import trio

from fusedisk.core.errors import NotSupportedError
from fusedisk.drivers.format.qcow2.allocation import Allocator
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, OFFSET_MASK, ZERO, compressed_references, plain_runs
from fusedisk.drivers.format.qcow2.refcount import Reason

_SKIPS_AT_ONCE = 1024
"""L1 entries without a table that one step skips."""

Transform = Callable[[int], int]
"""From an L2 entry to what it shall become."""


async def write_zeroes(allocator: Allocator, offset: int, length: int, *, may_unmap: bool, has_backing: bool) -> None:
    """Make whole clusters read as zeroes; ``length`` may end at the disk's end instead.

    Their host space is kept unless ``may_unmap``. Raises NotSupportedError for version 2 with a backing file.
    """
    if allocator.geometry.version < 3:
        _check_no_backing(allocator, has_backing)
        await change(allocator, offset, length, _unallocated, allocate=False)
    elif may_unmap:
        await change(allocator, offset, length, _plain_zero, allocate=True)
    else:
        await change(allocator, offset, length, _zero_in_place, allocate=True)


async def discard(allocator: Allocator, offset: int, length: int, *, has_backing: bool) -> None:
    """Give whole clusters back; they read as zeroes afterwards. ``length`` may end at the disk's end instead.

    Raises NotSupportedError for version 2 with a backing file.
    """
    if allocator.geometry.version < 3:
        _check_no_backing(allocator, has_backing)
        await change(allocator, offset, length, _unallocated, allocate=False)
    elif has_backing:
        await change(allocator, offset, length, _plain_zero, allocate=True)
    else:
        await change(allocator, offset, length, _zero_if_allocated, allocate=False)


def _check_no_backing(allocator: Allocator, has_backing: bool) -> None:
    if has_backing:
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


def _zero_if_allocated(entry: int) -> int:
    return ZERO if entry else 0


async def change(allocator: Allocator, offset: int, length: int, transform: Transform, *, allocate: bool) -> None:
    """Replace the entries of whole clusters by ``transform(entry)`` and free what is no longer referred to.

    ``allocate``: make L2 tables where there are none.
    """
    geometry, l1 = allocator.geometry, allocator.image.l1
    cluster = offset >> geometry.cluster_bits
    end = geometry.clusters(offset + length)
    while cluster < end:
        l1_index = cluster >> geometry.l2_bits
        table_end = min(end, l1_index + 1 << geometry.l2_bits)
        worked = allocate or l1[l1_index] & OFFSET_MASK
        if worked:
            await allocator.committer.relieve()
            async with allocator.image.mutex:
                await _change_table(allocator, l1_index, cluster, table_end, transform)
        if table_end < end and (worked or not l1_index % _SKIPS_AT_ONCE):
            # A large request must not keep everybody else from running.
            await trio.lowlevel.checkpoint()
        cluster = table_end


async def _change_table(allocator: Allocator, l1_index: int, cluster: int, end: int, transform: Transform) -> None:
    """Change entries of one L2 table. Checks are made once for each different entry, as tables hold long runs."""
    geometry, image = allocator.geometry, allocator.image
    base = l1_index << geometry.l2_bits
    index, stop = cluster - base, end - base
    table = await allocator.clusters.table_at(l1_index)
    if table is not None:
        different = set(table[index:stop])
        for entry in different:
            if entry & geometry.l2_bad and not entry & COMPRESSED:
                guest = base + table.index(entry, index) << geometry.cluster_bits
                raise await allocator.clusters.bad_entry(guest, entry)
        if all(transform(entry) == entry for entry in different):
            return
    table = await allocator.table_for_write(l1_index)
    old = table[index:stop]
    new = array("Q", map(transform, old))
    differing = [i for i, entry in enumerate(old) if entry != new[i]]
    if not differing:
        return
    dropped = [old[i] for i in differing if _loses_reference(old[i], new[i])]
    await _check_dropped(allocator, dropped)
    first, last = differing[0], differing[-1] + 1
    await image.put_l2_entries(l1_index, index + first, new[first:last], ordered=False)
    allocator.refcounts.free_entries(dropped, reason=Reason.REQUEST)


async def _check_dropped(allocator: Allocator, dropped: list[int]) -> None:
    """Refuse to free metadata, and maybe punch holes into it, because an entry leads there."""
    geometry, image = allocator.geometry, allocator.image
    places = [(run.first << geometry.cluster_bits, run.clusters) for run in plain_runs(dropped, geometry)]
    places += [(cluster << geometry.cluster_bits, 1) for cluster in compressed_references(dropped, geometry)]
    for start, clusters in places:
        what = image.occupied_at(start, clusters << geometry.cluster_bits)
        if what is not None:
            raise await image.corruption(f"L2 entries lead to {clusters} clusters at {start}, where its {what} lies")


def _loses_reference(old: int, new: int) -> bool:
    if old & COMPRESSED:
        return True
    return bool(old & OFFSET_MASK) and not new & OFFSET_MASK
