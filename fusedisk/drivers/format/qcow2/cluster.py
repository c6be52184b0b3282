"""Mapping of guest clusters: looks up the active L1 and L2 tables, without changing them.

Why this is safe beside requests that change the mapping: lookups take no lock, use a table between two awaits
only, and tables change between awaits only. A cluster that may be overwritten in place (COPIED) is answered
without a lock too: only a request that is serialised against all others over the same guest range frees or moves it.

Source: docs/interop/qcow2.txt, "Cluster mapping".
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

from fusedisk.block.model.extent import DATA, SPECIAL, UNALLOCATED, ZERO, Extent, WriteExtent
from fusedisk.core.errors import CorruptImageError
from fusedisk.drivers.format.qcow2 import entries as bits
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK
from fusedisk.drivers.format.qcow2.image import Image

MAX_SPARSE_TABLES = 4096
"""The most L1 entries without a table that one lookup covers."""

Transform = Callable[[int], int]
"""Turns an L2 entry into its replacement: unallocated or zeroes, with or without its host cluster."""

_new = tuple.__new__


class Guard(Protocol):
    """Where metadata lies in the file that guest data goes to; see :class:`.image.Image`."""

    scattered: array[int]
    l2_places: array[int]
    fixed_end: int

    def occupied_at(self, start: int, length: int) -> str | None:
        """Return the name of the metadata that a host range touches."""

    def fixed_at(self, start: int, length: int) -> str | None:
        """The same for metadata that does not move."""


class ClusterMap:
    """The active mapping of one image, whose L1 table is loaded."""

    def __init__(self, image: Image) -> None:
        geometry = image.geometry
        self.image = image
        self.guard: Guard = image
        """Knows the host ranges that must not hold guest data."""
        self.edge = image.storage
        self._l1 = image.l1
        self._tables = image.l2.tables
        self._touch = image.l2.tables.move_to_end
        self._cluster_bits = geometry.cluster_bits
        self._cluster_size = geometry.cluster_size
        self._cluster_mask = geometry.cluster_mask
        self._span_bits = geometry.span_bits
        self._l2_mask = geometry.l2_mask
        self._bad = geometry.l2_bad
        self._unusual = geometry.l2_bad | COMPRESSED | bits.ZERO
        self.recurse = False
        """Whether clusters may be holes in the file, which block status should look for."""

    # --- looking up -------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Extent | None:
        """Return the extent at ``offset`` if that takes no I/O; None if the L2 table is not cached or the entry is
        corrupt.
        """
        l2_offset = self._l1[offset >> self._span_bits] & OFFSET_MASK
        table = self._tables.get(l2_offset)
        if table is None:
            return None if l2_offset else self._without_table(offset, length)
        self._touch(l2_offset)
        index = offset >> self._cluster_bits & self._l2_mask
        entry = table[index]
        host = entry & OFFSET_MASK
        inside = offset & self._cluster_mask
        if not host or entry & self._unusual:
            if not entry and inside + length <= self._cluster_size:
                return _new(Extent, (UNALLOCATED, length, None, 0, False, False, None))
            return self._unusual_extent(table, index, offset, length)
        if inside + length > self._cluster_size:
            length = self._run(table, index, inside, length, self._cluster_size)
        # Extent() itself costs twice as much.
        return _new(Extent, (DATA, length, self.edge, host + inside, self.recurse, False, None))

    def _run(self, table: array[int], index: int, inside: int, length: int, step: int) -> int:
        """Return how many of ``length`` bytes lie in entries that continue the one at ``index``, each ``step`` more
        than the one before it."""
        covered = self._cluster_size - inside
        expected = table[index]
        for entry in table[index + 1 : index + (inside + length + self._cluster_mask >> self._cluster_bits)]:
            expected += step
            if entry != expected:
                return covered
            covered += self._cluster_size
        return min(covered, length)

    def _unusual_extent(self, table: array[int], index: int, offset: int, length: int) -> Extent | None:
        """Return the extent of an entry that is not plain data; None if it is corrupt."""
        entry = table[index]
        inside = offset & self._cluster_mask
        if entry & COMPRESSED:
            end = index + (inside + length + self._cluster_mask >> self._cluster_bits)
            return self._compressed_extent(table[index:end], inside, length)
        if entry & self._bad:
            return None
        host = entry & OFFSET_MASK
        count = self._run(table, index, inside, length, self._cluster_size if host else 0)
        if not entry & bits.ZERO:
            return Extent(UNALLOCATED, count)
        return Extent(ZERO, count, self.edge, host + inside) if host else Extent(ZERO, count)

    def _compressed_extent(self, entries: array[int], inside: int, length: int) -> Extent:
        """Return the extent of a compressed cluster and of the compressed ones that follow it. Its token is their
        entries."""
        if not (min(entries) >= COMPRESSED and max(entries) < COPIED):  # the short way for most
            for count, entry in enumerate(entries):
                if not entry & COMPRESSED:
                    entries = entries[:count]
                    break
        length = min(length, (len(entries) << self._cluster_bits) - inside)
        place = entries[0] & self.image.geometry.compressed_offset_mask
        return Extent(SPECIAL, length, self.edge, place, False, True, entries)

    def _without_table(self, offset: int, length: int) -> Extent:
        """Return an extent over all adjacent L1 entries without an L2 table."""
        l1, span_bits = self._l1, self._span_bits
        index = offset >> span_bits
        stop = min(offset + length - 1 >> span_bits, index + MAX_SPARSE_TABLES)
        while index < stop and not l1[index + 1] & OFFSET_MASK:
            index += 1
        return Extent(UNALLOCATED, min(length, (index + 1 << span_bits) - offset))

    async def map(self, offset: int, length: int) -> Extent:
        """Return the extent at ``offset``. Raises CorruptImageError, after fencing the image, for invalid entries."""
        while True:
            extent = self.lookup(offset, length)
            if extent is not None:
                return extent
            await self.table_at(offset >> self._span_bits)
            await self.check_entry(offset)

    async def table_at(self, l1_index: int) -> array[int] | None:
        """Return the L2 table of an L1 entry, for use before the next await; None if there is none."""
        while True:
            entry = self._l1[l1_index]
            offset = entry & OFFSET_MASK
            if entry & bits.L1_RESERVED or offset & self._cluster_mask:
                raise await self.image.mark_corrupt(
                    f"L1 entry {l1_index} is {entry:#018x}, expected a multiple of {self._cluster_size}"
                )
            if not offset:
                return None
            table = await self.image.l2.load(offset)
            if self._l1[l1_index] & OFFSET_MASK == offset:
                return table

    async def check_entry(self, offset: int) -> None:
        """Raise CorruptImageError, after fencing the image, if the cached L2 entry for a guest offset is invalid."""
        table = self._tables.get(self._l1[offset >> self._span_bits] & OFFSET_MASK)
        entry = table[offset >> self._cluster_bits & self._l2_mask] if table is not None else 0
        if not entry & COMPRESSED and entry & self._bad:
            raise await self.bad_entry(offset, array("Q", [entry]))

    async def bad_entry(self, offset: int, words: array[int]) -> CorruptImageError:
        """Fence the image because of an invalid L2 entry, ``words``; returns the error to raise."""
        entry = words[0]
        return await self.image.mark_corrupt(
            f"the L2 entry for guest offset {offset & ~self._cluster_mask} is {entry:#018x}, expected a multiple of "
            f"{self._cluster_size} without reserved bits"
        )

    def find_bad(self, words: array[int]) -> int | None:
        """Return the index of the first invalid L2 entry; None if all are valid."""
        for entry in set(words):
            if entry & self._bad and not entry & COMPRESSED:
                return words.index(entry)
        return None

    def transformed(self, words: array[int], transform: Transform) -> array[int]:
        """Return L2 entries with ``transform`` applied to each."""
        known = {entry: transform(entry) for entry in set(words)}
        return array("Q", map(known.__getitem__, words))

    def with_bitmaps(self, entries: array[int], words: array[int]) -> array[int]:
        """Combine new L2 entries with the subcluster bitmaps of the old ones, ``words``: subclusters without data stay
        without."""
        return entries

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent | None:
        """Return where to overwrite a prefix of the range without changing the mapping; None if that needs I/O, an
        allocation or an error message.
        """
        l1_entry = self._l1[offset >> self._span_bits]
        l2_offset = l1_entry & OFFSET_MASK
        table = self._tables.get(l2_offset)
        if table is None or not l1_entry & COPIED:
            return None  # the table is missing, not in memory, or shared with a snapshot
        self._touch(l2_offset)
        index = offset >> self._cluster_bits & self._l2_mask
        entry = table[index]
        host = entry & OFFSET_MASK
        if not entry & COPIED or not host or entry & self._unusual:
            return None  # the cluster is shared, unallocated, zero, compressed or invalid
        inside = offset & self._cluster_mask
        if inside + length > self._cluster_size:
            length = self._run(table, index, inside, length, self._cluster_size)
        # The same test as occupied_at(), but nearly always without a call.
        image, end = self.guard, host + inside + length
        scattered, l2_places = image.scattered, image.l2_places
        block, l2 = bisect_left(scattered, host), bisect_left(l2_places, host)
        if (
            (l2 < len(l2_places) and l2_places[l2] < end)
            or (block < len(scattered) and scattered[block] < end)
            or (host < image.fixed_end and image.fixed_at(host, end - host))
        ):
            length = min(length, self._cluster_size - inside)
            if image.occupied_at(host, self._cluster_size):
                return None  # the cluster holds metadata, which map_write() reports
        # Up to where host clusters are adjacent; the first cluster alone if there is metadata in a later one.
        return _new(WriteExtent, (length, self.edge, host + inside, None, 0, 0))
