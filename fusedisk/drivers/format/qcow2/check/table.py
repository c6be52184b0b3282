"""Looking at the entries of one L2 table.

Entries are taken in strips. A strip whose entries continue each other, which is how most images are, takes a few
operations on whole byte strings; a strip of ordinary entries takes a few passes in C; only what is out of the
ordinary (compressed clusters, anything wrong) is looked at entry by entry.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from operator import itemgetter, sub
from typing import NamedTuple

from fusedisk.drivers.format.qcow2.check.image import CheckedImage
from fusedisk.drivers.format.qcow2.counts import UNKNOWN, Counts, DiskRefcounts
from fusedisk.drivers.format.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
    decode_table,
    encode_table,
)

ALLOCATED_SUBCLUSTERS = (1 << 32) - 1
"""The half of an extended entry's bitmap that tells which subclusters have data; the other one tells zeroes."""

_STRIP = 512
_TOP_BIT = bytes(byte >> 7 for byte in range(256))

Note = Callable[[str], None]


class TableFindings:
    """The sums of the findings in tables."""

    def __init__(self) -> None:
        self.corruptions = 0
        """Invalid entries, counted once for each thing that is wrong."""
        self.miscopied = 0
        """Entries whose COPIED flag does not agree with the refcount."""
        self.allocated = 0
        self.fragmented = 0
        self.compressed = 0

    def add(self, table: TableFindings, weight: int, active: int) -> None:
        """Add what was found in a table that ``weight`` L1 entries lead to, ``active`` of them active."""
        self.corruptions += table.corruptions * weight
        self.miscopied += table.miscopied * active
        self.allocated += table.allocated * active
        self.fragmented += table.fragmented * active
        self.compressed += table.compressed * active


class _Strip(NamedTuple):
    """Neighbouring entries."""

    start: int
    """Index in the table."""
    raw: bytes
    """The entries proper, 8 bytes each."""
    bitmaps: array[int] | None
    """The bitmaps of extended entries."""


class TableScanner:
    """Counts what L2 tables of one image refer to, and finds what is wrong in them."""

    def __init__(self, image: CheckedImage, disk: DiskRefcounts, counts: Counts, note: Note) -> None:
        self.image = image
        self.disk = disk
        self.counts = counts
        self.note = note
        self._bad = COMPRESSED | L2_RESERVED | image.cluster_mask & OFFSET_MASK
        entries = min(_STRIP, image.table_entries)
        self._strip_size = 8 * entries
        self._zeroes = bytes(self._strip_size)
        self._sequences = {count: _sequence(count, image.cluster_bits) for count in (entries, image.table_entries)}
        """By the number of entries: a 1 in each of them, and how much each is more than the first."""
        self._allowed = _allowed_bytes(self._bad)
        self._next_offset = 0
        """The offset of the next entry's cluster if the image is not fragmented; 0 before the first entry."""

    async def scan(self, offset: int, raw: bytearray, weight: int, *, copied: bool) -> TableFindings:
        """Check the table ``raw``, which lies at ``offset``, and count its references ``weight`` times.

        ``copied``: look at the COPIED flags too.
        """
        found = TableFindings()
        self._next_offset = 0
        bitmaps = None
        entries: bytes | bytearray = raw
        if self.image.extended_l2:
            words = decode_table(raw)
            entries, bitmaps = bytes(encode_table(words[0::2])), words[1::2]
        whole = _Strip(0, bytes(entries), bitmaps)
        if int.from_bytes(entries[:8], "big") and await self._scan_sequence(whole, weight, copied, found):
            return found
        for at in range(0, len(entries), self._strip_size):
            start, end = at // 8, (at + self._strip_size) // 8
            part = bytes(entries[at : at + self._strip_size])
            strip = _Strip(start, part, bitmaps[start:end] if bitmaps is not None else None)
            if part == self._zeroes:
                if strip.bitmaps is None or not any(bitmap & ALLOCATED_SUBCLUSTERS for bitmap in set(strip.bitmaps)):
                    continue
            elif await self._scan_sequence(strip, weight, copied, found):
                continue
            elif self._is_plain(strip):
                await self._scan_plain(strip, offset, weight, copied, found)
                continue
            await self._scan_each(strip, offset, weight, copied, found)
        return found

    # --- a strip whose entries continue each other ------------------------------------------------------

    async def _scan_sequence(self, strip: _Strip, weight: int, copied: bool, found: TableFindings) -> bool:
        """Do it and return True, or return False where the strip is not like that."""
        image, raw = self.image, strip.raw
        first, last = int.from_bytes(raw[:8], "big"), int.from_bytes(raw[-8:], "big")
        count = len(raw) // 8
        host = first & OFFSET_MASK
        if (first | last) & self._bad or not host or last - first != count - 1 << image.cluster_bits:
            return False
        ones_each, steps = self._sequences[count]
        if (ones_each * first + steps).to_bytes(len(raw), "big") != raw or not _bitmaps_fit(strip.bitmaps):
            return False
        cluster = host >> image.cluster_bits
        if image.data_file:
            found.miscopied += count if copied and not first & COPIED else 0
        elif cluster + count > self.counts.clusters:
            return False
        else:
            self.counts.add_run(cluster, count, weight)
            if copied:
                ones = await self.disk.ones_of(cluster, count)
                found.miscopied += ones.count(0 if first & COPIED else 1)
        found.allocated += count
        found.fragmented += self._next_offset not in (0, host)
        self._next_offset = (last & OFFSET_MASK) + image.cluster_size
        return True

    # --- a strip of ordinary entries --------------------------------------------------------------------

    def _is_plain(self, strip: _Strip) -> bool:
        """Whether every entry is unallocated, zero, or an aligned cluster of this file."""
        if self.image.data_file:
            return False
        raw, bitmaps = strip.raw, strip.bitmaps
        if any(raw[plane::8].strip(allowed) for plane, allowed in self._allowed):
            return False
        return _bitmaps_fit(bitmaps)

    async def _scan_plain(self, strip: _Strip, table: int, weight: int, copied: bool, found: TableFindings) -> None:
        bits = self.image.cluster_bits
        clusters = [(entry & OFFSET_MASK) >> bits for entry in decode_table(strip.raw)]
        allocated = list(filter(None, clusters))
        ones = None
        if copied and self.disk.ones is not None:
            try:
                ones = bytes(itemgetter(*clusters)(self.disk.ones))
            except IndexError:
                pass
        homeless = strip.bitmaps is not None and any(
            bitmap & ALLOCATED_SUBCLUSTERS and not cluster
            for cluster, bitmap in zip(clusters, strip.bitmaps, strict=True)
        )
        if homeless or max(clusters) >= self.counts.clusters or (copied and ones is None):
            await self._scan_each(strip, table, weight, copied, found)
            return
        if not allocated:
            return
        self.counts.add(allocated, weight)
        if ones is not None:
            flags = strip.raw[0::8].translate(_TOP_BIT)
            if ones != flags:
                triples = zip(clusters, ones, flags, strict=True)
                found.miscopied += sum(one not in (flag, UNKNOWN) for cluster, one, flag in triples if cluster)
        found.allocated += len(allocated)
        found.fragmented += len(allocated) - 1 - list(map(sub, allocated[1:], allocated)).count(1)
        found.fragmented += self._next_offset not in (0, allocated[0] << bits)
        self._next_offset = allocated[-1] + 1 << bits

    # --- entry by entry ---------------------------------------------------------------------------------

    async def _scan_each(self, strip: _Strip, table: int, weight: int, copied: bool, found: TableFindings) -> None:
        for index, entry in enumerate(decode_table(strip.raw)):
            bitmap = strip.bitmaps[index] if strip.bitmaps is not None else 0
            if entry & COMPRESSED:
                wrong = self._scan_compressed(entry, bitmap, weight, found)
            elif entry & OFFSET_MASK or self._is_at_zero(entry):
                wrong = self._scan_cluster(entry, bitmap, weight, found)
                if copied:
                    await self._check_copied(entry, found)
            else:
                wrong = ["reserved bits are set"] if entry & L2_RESERVED else []
                if bitmap & ALLOCATED_SUBCLUSTERS:
                    wrong.append("it has no cluster, but subclusters with data")
            found.corruptions += len(wrong)
            for what in wrong:
                self.note(f"L2 table at {table:#x}, entry {strip.start + index} ({entry:#x}): {what}.")

    def _is_at_zero(self, entry: int) -> bool:
        """Whether an entry without an offset leads to the start of the external data file."""
        zero = entry & ZERO and not self.image.extended_l2
        return self.image.data_file and bool(entry & COPIED) and not zero

    def _scan_compressed(self, entry: int, bitmap: int, weight: int, found: TableFindings) -> list[str]:
        wrong = ["a compressed cluster has the COPIED flag"] if entry & COPIED else []
        if self.image.data_file:
            return [*wrong, "a compressed cluster with an external data file"]
        if bitmap:
            return [*wrong, "a compressed cluster has a bitmap of subclusters"]
        wrong += self.count_region(*self.image.compressed_region(entry), weight)
        found.allocated += 1
        found.compressed += 1
        found.fragmented += 1
        return wrong

    def _scan_cluster(self, entry: int, bitmap: int, weight: int, found: TableFindings) -> list[str]:
        image = self.image
        host = entry & OFFSET_MASK
        wrong = ["reserved bits are set"] if entry & L2_RESERVED else []
        if bitmap >> 32 & bitmap:
            wrong.append("subclusters are both data and zeroes")
        if host & image.cluster_mask:
            wrong.append("its offset is not a multiple of the cluster size")
        found.allocated += 1
        found.fragmented += self._next_offset not in (0, host)
        self._next_offset = host + image.cluster_size
        if not image.data_file:
            wrong += self.count_region(host, image.cluster_size, weight)
        return wrong

    def count_region(self, offset: int, length: int, weight: int = 1) -> list[str]:
        """Count references to the clusters that a region of the file touches; returns what is wrong about it.

        Nothing is counted where the region goes past the end of the file by a cluster or more.
        """
        image = self.image
        if length <= 0:
            return []
        if not image.has_region(offset, length):
            return [f"{length} bytes at {offset:#x} go past the end of the file"]
        first = offset >> image.cluster_bits
        last = offset + length - 1 >> image.cluster_bits
        self.counts.add_run(first, last - first + 1, weight)
        return []

    async def _check_copied(self, entry: int, found: TableFindings) -> None:
        if self.image.data_file:
            refcount: int | None = 1
        else:
            refcount = await self.disk.get((entry & OFFSET_MASK) >> self.image.cluster_bits)
        if refcount is not None and (refcount == 1) != bool(entry & COPIED):
            found.miscopied += 1


def _sequence(count: int, cluster_bits: int) -> tuple[int, int]:
    """See ``_sequences``; a table's bytes are taken as one number."""
    steps = array("Q", range(0, count << cluster_bits, 1 << cluster_bits))
    return int.from_bytes((1).to_bytes(8, "big") * count, "big"), int.from_bytes(encode_table(steps), "big")


def _bitmaps_fit(bitmaps: array[int] | None) -> bool:
    """Whether no subcluster of a strip is both data and zeroes."""
    return bitmaps is None or not any(bitmap >> 32 & bitmap for bitmap in set(bitmaps))


def _allowed_bytes(bad: int) -> list[tuple[int, bytes]]:
    """For each byte of an entry that may not be just anything, its place and the bytes without ``bad`` bits."""
    found = []
    for plane in range(8):
        wrong = bad >> 8 * (7 - plane) & 0xFF
        if wrong:
            found.append((plane, bytes(byte for byte in range(256) if not byte & wrong)))
    return found
