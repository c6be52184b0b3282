"""L1 and L2 entries: their bits, tables as arrays, and the sizes that follow from the header. Bytes only, no
I/O.

Source: docs/interop/qcow2.txt, "Cluster mapping".
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fusedisk.drivers.format.qcow2.layout import EXTENDED_L2, SECTOR, Header

COPIED = 1 << 63
"""The refcount of what the entry points to is exactly one: it may be overwritten in place."""
COMPRESSED = 1 << 62
ZERO = 1 << 0
"""L2, version 3: reads as zeroes, whatever the host offset."""
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
SUBCLUSTERS = 32
"""Parts of a cluster that an extended L2 entry maps on their own."""
ALL_ALLOCATED = (1 << SUBCLUSTERS) - 1
"""The bitmap of an extended L2 entry whose subclusters all have data: the lower half, bit by bit."""
ALL_ZEROES = ALL_ALLOCATED << SUBCLUSTERS
"""The bitmap of an extended L2 entry whose subclusters all read as zeroes: the upper half."""
FIRST_CLUSTER = 1 << 55
"""In memory, the host offset of guest offset 0 in an external data file; see :mod:`.space`."""
MAX_HOST_OFFSET = 1 << 56
"""Host offsets of clusters are below this."""

ENTRIES_AT_ONCE = 1 << 14
"""Entries that one step works on at most, before others run."""
_ZEROES_AT_ONCE = 4096
_ZEROES = bytes(8 * _ZEROES_AT_ONCE)
_SWAP = sys.byteorder == "little"


class Geometry:
    """Sizes derived from one header; constant while the image is open."""

    __slots__ = (
        "block_entries",
        "cluster_bits",
        "cluster_mask",
        "cluster_size",
        "compressed_offset_mask",
        "compressed_size_shift",
        "entry_words",
        "extended_l2",
        "l2_bad",
        "l2_bits",
        "l2_entries",
        "l2_mask",
        "l2_words",
        "refcount_bits",
        "span_bits",
        "subcluster_bits",
        "subcluster_size",
        "version",
    )

    def __init__(self, header: Header) -> None:
        bits = header.cluster_bits
        self.version = header.version
        self.cluster_bits = bits
        self.cluster_size = 1 << bits
        self.cluster_mask = self.cluster_size - 1
        self.extended_l2 = bool(header.incompatible_features & EXTENDED_L2)
        self.entry_words = 2 if self.extended_l2 else 1
        """Numbers in an L2 entry: an extended one has a bitmap behind what an ordinary one has."""
        self.subcluster_bits = bits - 5 if self.extended_l2 else bits
        self.subcluster_size = 1 << self.subcluster_bits
        """Bytes that are mapped on their own; without extended L2 entries that is a cluster."""
        self.l2_words = self.cluster_size >> 3
        """Numbers in an L2 table."""
        self.l2_bits = bits - 2 - self.entry_words
        self.l2_entries = 1 << self.l2_bits
        self.l2_mask = self.l2_entries - 1
        self.span_bits = bits + self.l2_bits
        """Guest bytes that one L2 table maps, as a power of two."""
        self.refcount_bits = 1 << header.refcount_order
        self.block_entries = self.cluster_size * 8 >> header.refcount_order
        """Refcounts in one refcount block."""
        self.compressed_size_shift = 62 - (bits - 8)
        self.compressed_offset_mask = (1 << self.compressed_size_shift) - 1
        self.l2_bad = L2_RESERVED | self.cluster_mask & OFFSET_MASK | (ZERO if header.version == 2 else 0)
        """Bits that no entry of an uncompressed cluster may have."""

    def clusters(self, length: int) -> int:
        """Clusters that ``length`` bytes take."""
        return (length + self.cluster_mask) >> self.cluster_bits

    def descriptors(self, words: array[int]) -> array[int]:
        """The entries proper of an L2 table, or of whole entries of one, without their bitmaps."""
        return words[::2] if self.extended_l2 else words

    def compressed_range(self, entry: int) -> tuple[int, int]:
        """Host offset and length in bytes of a compressed cluster's data; the length is an upper bound, in
        whole sectors of
        the host file."""
        offset = entry & self.compressed_offset_mask
        sectors = (entry & (COMPRESSED - 1)) >> self.compressed_size_shift
        return offset, (sectors + 1) * SECTOR - (offset & (SECTOR - 1))

    def compressed_ranges(self, entries: Iterable[int]) -> list[tuple[int, int, int]]:
        """The same for each of many, and the entry itself."""
        return [(*self.compressed_range(entry), entry) for entry in entries]


class HostRun(NamedTuple):
    """Neighbouring host clusters, by number."""

    first: int
    clusters: int
    fresh: bool = False
    """Behind everything that was ever written: reads as zeroes."""


def swap_table(table: array[int]) -> None:
    """Turn big-endian entries, as a table's bytes were read into it, into numbers in place, or back."""
    if _SWAP:
        table.byteswap()


def encode_table(table: array[int]) -> memoryview:
    """The bytes of a table, or of a slice of one."""
    table = table[:]
    swap_table(table)
    return memoryview(table).cast("B")


def decode_table(data: bytes | bytearray) -> array[int]:
    """The entries of a table, from its bytes."""
    table = array("Q", data)
    swap_table(table)
    return table


def empty_table(entries: int) -> array[int]:
    """A table of zeroes."""
    return array("Q", [0]) * entries


def next_entry(table: array[int], start: int, end: int) -> int:
    """The index of the first entry that is not 0, from ``start`` on; ``end`` where there is none before."""
    while start < end:
        stop = min(start + _ZEROES_AT_ONCE, end)
        part = table[start:stop].tobytes()
        if not _ZEROES.startswith(part):
            return start + (len(part) - len(part.lstrip(b"\0"))) // 8
        start = stop
    return end


def used_pieces(table: array[int]) -> Iterator[tuple[int, array[int]]]:
    """A table in pieces that are not empty, each with the index of its first entry. Callers let others run between: a
    table may have four million entries."""
    for start in range(0, len(table), ENTRIES_AT_ONCE):
        stop = min(start + ENTRIES_AT_ONCE, len(table))
        first = next_entry(table, start, stop)
        if first < stop:
            yield first, table[first:stop]


def plain_runs(entries: Iterable[int], geometry: Geometry) -> list[HostRun]:
    """The host clusters of L2 entries that are not compressed, neighbours joined."""
    runs: list[HostRun] = []
    first = count = 0
    for entry in entries:
        cluster = (entry & OFFSET_MASK) >> geometry.cluster_bits
        if not cluster or entry & COMPRESSED:
            continue
        if count and cluster == first + count:
            count += 1
            continue
        if count:
            runs.append(HostRun(first, count))
        first, count = cluster, 1
    if count:
        runs.append(HostRun(first, count))
    return runs


def compressed_references(entries: Iterable[int], geometry: Geometry) -> dict[int, int]:
    """How often compressed L2 entries refer to each host cluster, by its number, lowest first."""
    references: dict[int, int] = {}
    bits = geometry.cluster_bits
    for entry in entries:
        if entry & COMPRESSED:
            offset, length = geometry.compressed_range(entry)
            for cluster in range(offset >> bits, (offset + length - 1 >> bits) + 1):
                references[cluster] = references.get(cluster, 0) + 1
    return dict(sorted(references.items()))
