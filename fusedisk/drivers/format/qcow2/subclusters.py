"""Mapping with extended L2 entries: every cluster has 32 subclusters, which are mapped on their own.

An entry is two numbers of its table: the descriptor, which is an ordinary entry whose zero flag says nothing, and a
bitmap that tells for each subcluster whether it has data in the host cluster (lower half) or reads as zeroes (upper
half). What has neither bit is unallocated, whether the entry has a host cluster or not. Compressed clusters have no
subclusters; their bitmap is 0.

Why this is safe beside requests that change the mapping: as in :mod:`.cluster`. A subcluster that is written for the
first time has no data bit until it is published, so nobody reads it or writes to it in place before.

Source: docs/interop/qcow2.txt, "Extended L2 Entries".
"""

from __future__ import annotations

from array import array

from fusedisk.block.model.extent import DATA, UNALLOCATED, ZERO, Extent, WriteExtent
from fusedisk.core.errors import CorruptImageError
from fusedisk.drivers.format.qcow2 import entries as bits
from fusedisk.drivers.format.qcow2.cluster import ClusterMap, Transform
from fusedisk.drivers.format.qcow2.entries import (
    ALL_ALLOCATED,
    ALL_ZEROES,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    SUBCLUSTERS,
)
from fusedisk.drivers.format.qcow2.image import Image

_new = tuple.__new__


class SubclusterMap(ClusterMap):
    """The active mapping of an image with extended L2 entries."""

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self._subcluster_bits = image.geometry.subcluster_bits
        self._unusual = self._bad | COMPRESSED

    # --- looking up -------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Extent | None:
        """See :meth:`ClusterMap.lookup`."""
        l2_offset = self._l1[offset >> self._span_bits] & OFFSET_MASK
        table = self._tables.get(l2_offset)
        if table is None:
            return None if l2_offset else self._without_table(offset, length)
        self._touch(l2_offset)
        at = (offset >> self._cluster_bits & self._l2_mask) << 1
        entry, bitmap = table[at], table[at + 1]
        host = entry & OFFSET_MASK
        inside = offset & self._cluster_mask
        if bitmap != ALL_ALLOCATED or not host or entry & self._unusual:
            return self._mixed_extent(table, at, offset, length)
        if inside + length > self._cluster_size:
            length = self._status_run(table, at, inside, length, DATA)
        return _new(Extent, (DATA, length, self.edge, host + inside, self.recurse, False, None))

    def _mixed_extent(self, table: array[int], at: int, offset: int, length: int) -> Extent | None:
        """The extent of an entry whose subclusters do not all have data; None where it is corrupt."""
        entry, bitmap = table[at], table[at + 1]
        inside = offset & self._cluster_mask
        if self._is_bad(entry, bitmap):
            return None
        if entry & COMPRESSED:
            end = at + (inside + length + self._cluster_mask >> self._cluster_bits << 1)
            entries, bitmaps = table[at:end:2], table[at + 1 : end : 2]
            if any(bitmaps):
                # The entry is invalid.
                del entries[next(count for count, found in enumerate(bitmaps) if found) :]
            return self._compressed_extent(entries, inside, length)
        status = _status(bitmap, inside >> self._subcluster_bits)
        length = self._status_run(table, at, inside, length, status)
        host = entry & OFFSET_MASK
        if not host:
            return Extent(status, length)
        return Extent(status, length, self.edge, host + inside, status == DATA and self.recurse)

    def _status_run(self, table: array[int], at: int, inside: int, length: int, status: int) -> int:
        """How many of ``length`` bytes, from ``inside`` the cluster at ``at`` on, are of one status and continue each
        other in the host file."""
        entry = table[at]
        step = self._cluster_size if entry & OFFSET_MASK else 0
        first = inside >> self._subcluster_bits
        end = first + _ones(_subclusters_of(table[at + 1], status), first) << self._subcluster_bits
        covered = end - inside
        while end == self._cluster_size and covered < length:
            at += 2
            if at == len(table):
                break
            entry += step
            found, bitmap = table[at], table[at + 1]
            if found != entry or self._is_bad(found, bitmap) or found & COMPRESSED:
                break
            end = _ones(_subclusters_of(bitmap, status), 0) << self._subcluster_bits
            covered += end
        return min(covered, length)

    def _is_bad(self, entry: int, bitmap: int) -> bool:
        """Whether an entry is invalid."""
        if entry & COMPRESSED:
            return bool(bitmap)
        return bool(entry & self._bad or bitmap >> SUBCLUSTERS & bitmap) or (
            not entry & OFFSET_MASK and bool(bitmap & ALL_ALLOCATED)
        )

    async def check_entry(self, offset: int) -> None:
        """See :meth:`ClusterMap.check_entry`."""
        table = self._tables.get(self._l1[offset >> self._span_bits] & OFFSET_MASK)
        if table is not None:
            at = (offset >> self._cluster_bits & self._l2_mask) << 1
            if self._is_bad(table[at], table[at + 1]):
                raise await self.bad_entry(offset, table[at : at + 2])

    async def bad_entry(self, offset: int, words: array[int]) -> CorruptImageError:
        """See :meth:`ClusterMap.bad_entry`."""
        entry, bitmap = words
        if entry & self._bad and not entry & COMPRESSED:
            return await super().bad_entry(offset, words)
        wanted = (
            "no bitmap, as the cluster is compressed,"
            if entry & COMPRESSED
            else "subclusters that are not both data and zeroes"
            if entry & OFFSET_MASK
            else "no subclusters with data, as it has no cluster,"
        )
        return await self.image.mark_corrupt(
            f"the L2 entry for guest offset {offset & ~self._cluster_mask} is {entry:#018x} with the bitmap "
            f"{bitmap:#018x}, expected {wanted}"
        )

    # --- writing in place -------------------------------------------------------------------------------

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent | None:
        """See :meth:`ClusterMap.lookup_in_place`."""
        l1_entry = self._l1[offset >> self._span_bits]
        l2_offset = l1_entry & OFFSET_MASK
        table = self._tables.get(l2_offset)
        if table is None or not l1_entry & COPIED:
            return None
        self._touch(l2_offset)
        at = (offset >> self._cluster_bits & self._l2_mask) << 1
        entry, bitmap = table[at], table[at + 1]
        host = entry & OFFSET_MASK
        if not entry & COPIED or not host or entry & self._unusual:
            return None
        inside = offset & self._cluster_mask
        if bitmap != ALL_ALLOCATED:
            if not bitmap >> (inside >> self._subcluster_bits) & 1 or bitmap >> SUBCLUSTERS & bitmap:
                return None
            length = self._status_run(table, at, inside, length, DATA)
        elif inside + length > self._cluster_size:
            length = self._status_run(table, at, inside, length, DATA)
        if self.guard.occupied_at(host, inside + length):
            length = min(length, self._cluster_size - inside)
            if self.guard.occupied_at(host, self._cluster_size):
                return None
        return _new(WriteExtent, (length, self.edge, host + inside, None, 0, 0))

    def unallocated_run(self, table: array[int], index: int, inside: int, length: int) -> int:
        """How many of ``length`` bytes lie in subclusters without data of host clusters that continue each other and
        are all marked as ours, from ``inside`` the cluster of entry ``index`` on."""
        at, covered = 2 * index, -inside
        entry, first = table[at], inside >> self._subcluster_bits
        while True:
            end = first + _ones(~table[at + 1] & ALL_ALLOCATED, first) << self._subcluster_bits
            at += 2
            if end < self._cluster_size or covered + end >= length or not entry & COPIED or at == len(table):
                return min(covered + end, length)
            entry += self._cluster_size
            if table[at] != entry or self._is_bad(entry, table[at + 1]):
                return min(covered + end, length)
            covered, first = covered + self._cluster_size, 0

    # --- whole entries ----------------------------------------------------------------------------------

    def find_bad(self, words: array[int]) -> int | None:
        """See :meth:`ClusterMap.find_bad`."""
        bad = {pair for pair in set(zip(words[::2], words[1::2], strict=True)) if self._is_bad(*pair)}
        if not bad:
            return None
        return next(i for i in range(len(words) // 2) if (words[2 * i], words[2 * i + 1]) in bad)

    def transformed(self, words: array[int], transform: Transform) -> array[int]:
        """See :meth:`ClusterMap.transformed`. A bitmap is all zeroes afterwards where the transform asks for a zero
        cluster, and empty elsewhere."""
        known = {
            pair: _words_of(transform(pair[0] & ~bits.ZERO | (bits.ZERO if pair[1] >> SUBCLUSTERS else 0)))
            for pair in set(zip(words[::2], words[1::2], strict=True))
        }
        new = array("Q")
        for pair in zip(words[::2], words[1::2], strict=True):
            new.extend(known[pair])
        return new

    def with_bitmaps(self, entries: array[int], words: array[int]) -> array[int]:
        """See :meth:`ClusterMap.with_bitmaps`: what was unallocated stays so, and does not hide the backing file."""
        words = words[:]
        words[::2] = array("Q", [entry & ~bits.ZERO for entry in entries])
        return words


def _words_of(entry: int) -> tuple[int, int]:
    """An extended entry that says of a whole cluster what an ordinary one says."""
    return entry & ~bits.ZERO, ALL_ZEROES if entry & bits.ZERO else 0


def _status(bitmap: int, subcluster: int) -> int:
    """DATA, ZERO or UNALLOCATED."""
    if bitmap >> subcluster & 1:
        return DATA
    return ZERO if bitmap >> SUBCLUSTERS + subcluster & 1 else UNALLOCATED


def _subclusters_of(bitmap: int, status: int) -> int:
    """The subclusters that have a status, one bit for each."""
    if status == DATA:
        return bitmap & ALL_ALLOCATED
    if status == ZERO:
        return bitmap >> SUBCLUSTERS
    return ~(bitmap | bitmap >> SUBCLUSTERS) & ALL_ALLOCATED


def _ones(mask: int, first: int) -> int:
    """How many bits of a 32-bit ``mask`` are set from bit ``first`` on without a gap."""
    rest = ~(mask >> first)
    return (rest & -rest).bit_length() - 1
