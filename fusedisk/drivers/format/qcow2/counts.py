"""Counting references to host clusters, in memory that follows what is referred to rather than the file's length.

The refcounts in the file are read as such counters, too. A counter that arrives at the largest number stays there.

A sparse file can be a million times longer than what it holds, so counters of a large file come in small chunks that
are made when something in them is first referred to.
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fusedisk.core.errors import FusediskError
from fusedisk.drivers.format.qcow2.refcount_block import COUNTER, COUNTER_BYTES, LARGEST, refcount_codec

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.check.image import CheckedImage

WHOLE = 1 << 24
"""Files with up to this many clusters have one chunk, which is fastest: 64 MiB."""
_SMALL_CHUNK_BITS = 6
_ONE_CHUNK_BITS = 40
"""More clusters than any file has."""
_RUN_AT_ONCE = 1 << 16
"""The most counters that one step of a run changes; arrays of at most this length are reused."""


@functools.lru_cache(maxsize=8)
def _filled(value: int, count: int) -> array[int]:
    """Counters that are all the same; not to be changed."""
    return array(COUNTER, [value]) * count


def are_same(counters: array[int]) -> bool:
    """Whether all of some counters are the same; there is at least one."""
    return counters[0] == counters[-1] and counters == _filled(counters[0], len(counters))


class Counts:
    """How often each of ``clusters`` host clusters is referred to."""

    def __init__(self, clusters: int, *, whole: int = WHOLE) -> None:
        self.clusters = clusters
        self._one_chunk = clusters <= whole
        self._chunk_bits = _ONE_CHUNK_BITS if self._one_chunk else _SMALL_CHUNK_BITS
        self._chunk_size = 1 << self._chunk_bits
        self._chunks: dict[int, array[int]] = {}
        self._behind = 0
        """Of the cluster behind the last one: what is not aligned may reach into it."""

    def empty(self) -> Counts:
        """Counters of the same clusters that have counted nothing yet."""
        return Counts(self.clusters, whole=self.clusters if self._one_chunk else 0)

    # --- counting ---------------------------------------------------------------------------------------

    def add_run(self, first: int, count: int, weight: int = 1) -> None:
        """Count ``weight`` references to each of ``count`` neighbours, of which one may lie behind the file's end. What
        was counted before can be taken back with a negative ``weight``."""
        end = first + count
        if end > self.clusters:
            self._behind += weight
            end = self.clusters
        while first < end:
            chunk = self._chunk(first >> self._chunk_bits)
            low = first & self._chunk_size - 1
            high = min(low + end - first, self._chunk_size, len(chunk), low + _RUN_AT_ONCE)
            first += high - low
            part = chunk[low:high]
            if are_same(part):
                chunk[low:high] = _filled(min(part[0] + weight, LARGEST), len(part))
            else:
                chunk[low:high] = array(COUNTER, [min(value + weight, LARGEST) for value in part])

    def add(self, clusters: Iterable[int], weight: int = 1) -> int:
        """Count ``weight`` references to each of the clusters; returns how many of them the file does not have."""
        if self._one_chunk:
            return self._add_whole(iter(clusters), weight)
        missing = 0
        for cluster in clusters:
            if cluster >= self.clusters:
                missing += 1
                continue
            chunk = self._chunk(cluster >> self._chunk_bits)
            index = cluster & self._chunk_size - 1
            chunk[index] = min(chunk[index] + weight, LARGEST)
        return missing

    def _add_whole(self, clusters: Iterator[int], weight: int) -> int:
        counters = self._chunk(0)
        missing = cluster = 0
        while True:
            try:
                for cluster in clusters:
                    counters[cluster] += weight
                return missing
            except IndexError:
                missing += 1
            except OverflowError:
                counters[cluster] = LARGEST

    def _chunk(self, number: int) -> array[int]:
        chunk = self._chunks.get(number)
        if chunk is None:
            size = min(self._chunk_size, self.clusters - (number << self._chunk_bits))
            chunk = self._chunks[number] = array(COUNTER, bytes(COUNTER_BYTES * size))
        return chunk

    def grow(self, clusters: int) -> None:
        """Let there be more clusters; the file has grown."""
        if clusters <= self.clusters:
            return
        old, behind = self.clusters, self._behind
        self.clusters, self._behind = clusters, 0
        for number, chunk in self._chunks.items():
            missing = min(self._chunk_size, clusters - (number << self._chunk_bits)) - len(chunk)
            chunk.frombytes(bytes(COUNTER_BYTES * missing))
        if behind:
            self.add_run(old, 1, behind)

    # --- looking ----------------------------------------------------------------------------------------

    def end(self) -> int:
        """Behind the last cluster that may have references: the file's end, or one more."""
        return self.clusters + bool(self._behind)

    def __getitem__(self, cluster: int) -> int:
        if cluster >= self.clusters:
            return self._behind if cluster == self.clusters else 0
        chunk = self._chunks.get(cluster >> self._chunk_bits)
        return chunk[cluster & self._chunk_size - 1] if chunk is not None else 0

    def part(self, first: int, count: int) -> array[int] | None:
        """The counters of ``count`` neighbours, zeroes behind :meth:`end`; None where all are zero."""
        found = self._part(first, count)
        return None if found is None or found == _filled(0, count) else found

    def _part(self, first: int, count: int) -> array[int] | None:
        numbers = range(first >> self._chunk_bits, (first + count - 1 >> self._chunk_bits) + 1)
        reaches_behind = self._behind and first <= self.clusters < first + count
        if not reaches_behind and not any(number in self._chunks for number in numbers):
            return None
        found: array[int] = array(COUNTER)
        for number in numbers:
            start = number << self._chunk_bits
            low = max(first - start, 0)
            high = min(first + count - start, self._chunk_size)
            chunk = self._chunks.get(number)
            piece = chunk[low:high] if chunk is not None else found[:0]
            found.extend(piece)
            found.frombytes(bytes(COUNTER_BYTES * (high - low - len(piece))))
        if reaches_behind:
            found[self.clusters - first] = min(self._behind, LARGEST)
        return found

    def touched(self, size: int) -> set[int]:
        """Which stretches of ``size`` clusters (a power of two), by number, may have references."""
        if self._chunk_size >= size:
            per_chunk = self._chunk_size // size
            last = -(-self.clusters // size)
            found = {
                stretch
                for number in self._chunks
                for stretch in range(number * per_chunk, min((number + 1) * per_chunk, last))
            }
        else:
            found = {(number << self._chunk_bits) // size for number in self._chunks}
        if self._behind:
            found.add(self.clusters // size)
        return found

    def first_free(self, start: int, count: int) -> int:
        """The first of ``count`` neighbours without references, from ``start`` on; may lie behind the file's end."""
        first = start
        while first < self.end():
            first = self._next_free(first)
            used = self._last_used(first, count)
            if used is None:
                return first
            first = used + 1
        return first

    def _next_free(self, cluster: int) -> int:
        while cluster < self.clusters:
            number = cluster >> self._chunk_bits
            chunk = self._chunks.get(number)
            if chunk is None:
                return cluster
            try:
                return (number << self._chunk_bits) + chunk.index(0, cluster & self._chunk_size - 1)
            except ValueError:
                cluster = number + 1 << self._chunk_bits
        return self.end()

    def _last_used(self, first: int, count: int) -> int | None:
        """The last of ``count`` neighbours that has references; None where none has."""
        part = self.part(first, count)
        if part is None:
            return None
        used = len(part.tobytes().rstrip(b"\0"))
        return first + (used - 1) // COUNTER_BYTES if used else None


# --- the refcounts in the file -------------------------------------------------------------------------

REFCOUNT_TABLE_RESERVED = 0x1FF
REFCOUNT_OFFSET_MASK = (1 << 64) - 1 & ~REFCOUNT_TABLE_RESERVED

_BIG_ENDIAN = sys.byteorder == "big"
_CACHED_BYTES = 64 << 20

UNKNOWN = 2
"""In :attr:`DiskRefcounts.ones`: the refcount could not be read."""


class DiskRefcounts:
    """The refcount table and blocks of one image, as they were when it was loaded."""

    def __init__(self, image: CheckedImage) -> None:
        self.image = image
        self.codec = refcount_codec(image.refcount_bits, image.block_entries)
        self.table: array[int] = array("Q")
        """The refcount table, byte for byte."""
        self.ones: bytearray | None = None
        """For each cluster whether its refcount is 1 (never for cluster 0), or UNKNOWN. None in large files."""
        self._blocks: OrderedDict[int, array[int] | None] = OrderedDict()
        self._cached_blocks = max(_CACHED_BYTES // (image.block_entries * COUNTER_BYTES), 2)

    async def load(self, *, whole: int) -> None:
        """Read the table, and where the file has up to ``whole`` clusters, :attr:`ones`. Raises HostError."""
        image = self.image
        self.table = await image.read_table(image.refcount_table_region)
        clusters = image.clusters
        if clusters > whole:
            return
        ones = bytearray(clusters)
        for number in range(min(len(self.table), -(-clusters // image.block_entries))):
            if not self.offset(number):
                continue
            block = await self.block(number)
            first = number * image.block_entries
            count = min(image.block_entries, clusters - first)
            ones[first : first + count] = bytes([UNKNOWN]) * count if block is None else are_one(block[:count])
        if ones:
            ones[0] = 0
        self.ones = ones

    def offset(self, number: int) -> int:
        """Host offset of a refcount block; 0 where there is none."""
        return self.table[number] & REFCOUNT_OFFSET_MASK if number < len(self.table) else 0

    async def block(self, number: int) -> array[int] | None:
        """The refcounts of a block that the table has; None where it cannot be read."""
        offset = self.offset(number)
        if offset in self._blocks:
            self._blocks.move_to_end(offset)
            return self._blocks[offset]
        found = await self._read_block(offset)
        self._blocks[offset] = found
        if len(self._blocks) > self._cached_blocks:
            self._blocks.popitem(last=False)
        return found

    async def _read_block(self, offset: int) -> array[int] | None:
        if offset & self.image.cluster_mask:
            return None
        try:
            return self.codec.decode(await self.image.read(offset, self.image.cluster_size))
        except FusediskError:
            return None

    async def get(self, cluster: int) -> int | None:
        """One refcount; None where it cannot be read."""
        number, index = divmod(cluster, self.image.block_entries)
        if not self.offset(number):
            return 0
        block = await self.block(number)
        return None if block is None else block[index]

    async def is_known(self, cluster: int) -> bool:
        """Whether a refcount can be read."""
        if self.ones is not None and 0 < cluster < len(self.ones):
            return self.ones[cluster] != UNKNOWN
        return await self.get(cluster) is not None

    async def ones_of(self, first: int, count: int) -> bytes | bytearray:
        """:attr:`ones` of some neighbours, however large the file is."""
        if self.ones is not None and first + count <= len(self.ones):
            return self.ones[first : first + count]
        found = b""
        while count:
            number, index = divmod(first, self.image.block_entries)
            part = min(count, self.image.block_entries - index)
            if self.offset(number):
                block = await self.block(number)
                found += bytes([UNKNOWN]) * part if block is None else are_one(block[index : index + part])
            else:
                found += bytes(part)
            first, count = first + part, count - part
        return found


_ONE = bytes([0, 1, *bytes(254)])
_ZERO = bytes([1, *bytes(255)])


def are_one(values: array[int]) -> bytes:
    """A byte for each number: 1 where it is 1, 0 elsewhere."""
    return _are_small(values, _ONE)


def are_zero(values: array[int]) -> bytes:
    """A byte for each number: 1 where it is 0, 0 elsewhere."""
    return _are_small(values, _ZERO)


def _are_small(values: array[int], chosen: bytes) -> bytes:
    """What ``chosen`` has for each number below 256, and 0 for larger numbers."""
    if values and are_same(values):
        return (chosen[values[0] : values[0] + 1] or b"\0") * len(values)
    planes = values.tobytes()
    lowest = 3 if _BIG_ENDIAN else 0
    found = planes[lowest::COUNTER_BYTES].translate(chosen)
    for plane in range(COUNTER_BYTES):
        higher = planes[plane::COUNTER_BYTES]
        if plane != lowest and higher != bytes(len(higher)):
            both = int.from_bytes(found, "big") & int.from_bytes(higher.translate(_ZERO), "big")
            found = both.to_bytes(len(found), "big")
    return found
