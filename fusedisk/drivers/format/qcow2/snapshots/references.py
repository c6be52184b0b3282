"""Counts the references in L1 and L2 tables in bulk, and sets and clears their COPIED flags.

A strip of entries that continue each other is counted as one run, other strips in a few passes in C; nothing here calls
Python for each cluster.

Source: docs/interop/qcow2.txt, "Cluster mapping".
"""

from __future__ import annotations

import functools
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from operator import or_

import trio

from fusedisk.core.errors import ImageError
from fusedisk.drivers.format.qcow2.counts import Counts, are_one, are_same
from fusedisk.drivers.format.qcow2.entries import (
    COMPRESSED,
    L1_RESERVED,
    OFFSET_MASK,
    Geometry,
    compressed_references,
    decode_table,
    empty_table,
    encode_table,
    used_pieces,
)
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.refcount import Pause
from fusedisk.drivers.format.qcow2.refcount_block import RefcountOverflow, RefcountUnderflow

_STRIP = 512
_CLEARED = bytes(byte & 0x7F for byte in range(256))
"""The first byte of an entry without its COPIED flag."""
_ONE_TO_FLAG = bytes([0, 0x80, *bytes(254)])


async def table_weights(
    image: Image, l1: array[int], what: str, pause: Pause = trio.lowlevel.checkpoint
) -> Counter[int]:
    """How many of the L1 entries lead to each L2 table, by its host offset, in the order of the L1 table.

    Raises ImageError for invalid entries; ``what`` names the table.
    """
    weights: Counter[int] = Counter()
    for first, piece in used_pieces(l1):
        weights.update(l2_offsets(image, piece, first, what))
        await pause()
    return weights


def l2_offsets(image: Image, piece: array[int], first: int, what: str) -> Iterator[int]:
    """The host offsets that L1 entries from ``first`` on lead to. Raises ImageError for invalid entries."""
    bad = L1_RESERVED | OFFSET_MASK & image.geometry.cluster_mask
    if functools.reduce(or_, piece) & bad:
        index, entry = next((at, entry) for at, entry in enumerate(piece, first) if entry & bad)
        raise corrupt(image, f"entry {index} of {what} is {entry:#018x}, which is invalid")
    return filter(None, [entry & OFFSET_MASK for entry in piece])


async def rewritten(
    l1: array[int], change: Callable[[int], int], pause: Pause = trio.lowlevel.checkpoint
) -> array[int]:
    """An L1 table with ``change(entry)`` in place of each entry but empty ones."""
    found = empty_table(len(l1))
    for first, piece in used_pieces(l1):
        found[first : first + len(piece)] = array("Q", [change(entry) if entry else 0 for entry in piece])
        await pause()
    return found


def corrupt(image: Image, what: str) -> ImageError:
    """Return the error for a table that holds something invalid: ``what`` is a clause."""
    return ImageError(f"'{image.filename}' is corrupt: {what}; 'fusedisk check -r all' may repair it.")


class L2Table:
    """One L2 table, with bytes as in the file."""

    def __init__(self, image: Image, offset: int, raw: bytearray, first_of_run: int | None = None) -> None:
        """``first_of_run``: what :meth:`first_of_run` found before, if anything."""
        self.image = image
        self.geometry = image.geometry
        self.offset = offset
        self.raw = raw
        self._stride = self.geometry.cluster_size // self.geometry.l2_entries
        self._first_of_run = first_of_run

    @classmethod
    async def read(cls, image: Image, offset: int, first_of_run: int | None = None) -> L2Table:
        """The table at a host offset, with all changes in memory. Raises HostError."""
        table = image.l2.tables.get(offset)
        if table is not None:
            return cls(image, offset, bytearray(encode_table(table)), first_of_run)
        return cls(image, offset, await image.read(offset, image.geometry.cluster_size), first_of_run)

    def entries(self) -> array[int]:
        """The entries, without the bitmaps of extended ones."""
        table = decode_table(self.raw)
        return table if self._stride == 8 else table[0::2]

    def first_of_run(self) -> int:
        """The host cluster of the first entry where all entries have one, each the one behind its neighbour's; else
        0, to which no entry leads."""
        if self._first_of_run is None:
            self._first_of_run = self._find_run()
        return self._first_of_run

    def _find_run(self) -> int:
        raw, size = self.raw, self.geometry.cluster_size
        first, last = int.from_bytes(raw[:8], "big"), int.from_bytes(raw[-self._stride :][:8], "big")
        host = first & OFFSET_MASK
        if not host or (first | last) & (COMPRESSED | self.geometry.l2_bad):
            return 0
        if last - first != (self.geometry.l2_entries - 1) * size:
            return 0
        ones, steps = _sequence(self.geometry.l2_entries, size)
        entries = raw if self._stride == 8 else bytearray(encode_table(self.entries()))
        if entries != (ones * first + steps).to_bytes(len(entries), "big"):
            return 0
        return host >> self.geometry.cluster_bits

    # --- counting ---------------------------------------------------------------------------------------

    def blocks(self) -> set[int]:
        """The refcount blocks, by index, that count what the entries refer to."""
        bits, per_block = self.geometry.cluster_bits, self.geometry.block_entries
        first = self.first_of_run()
        if first:
            return set(range(first // per_block, (first + self.geometry.l2_entries - 1) // per_block + 1))
        table = self.entries()
        found = {(entry & OFFSET_MASK) >> bits for entry in table if not entry & COMPRESSED}
        found.update(compressed_references(table, self.geometry))
        return {cluster // per_block for cluster in found if cluster}

    def count(self, counts: Counts, weight: int) -> None:
        """Count what the entries refer to, ``weight`` times; fewer times if that is negative. Raises ImageError for
        invalid entries."""
        first = self.first_of_run()
        if first:
            self._count_clusters(counts, first, self.geometry.l2_entries, weight)
            return
        table = self.entries()
        zeroes = array("Q", bytes(8 * min(_STRIP, len(table))))
        for start in range(0, len(table), _STRIP):
            strip = table[start : start + _STRIP]
            if strip != zeroes and not self._count_run(strip, counts, weight):
                self._count_strip(strip, start, counts, weight)

    def _count_run(self, strip: array[int], counts: Counts, weight: int) -> bool:
        """Count entries that continue each other; returns False, with nothing done, where they do not."""
        first, last, size = strip[0], strip[-1], self.geometry.cluster_size
        if last - first != (len(strip) - 1) * size or not first & OFFSET_MASK:
            return False
        if (first | last) & (COMPRESSED | self.geometry.l2_bad) or strip != array("Q", range(first, last + 1, size)):
            return False
        self._count_clusters(counts, (first & OFFSET_MASK) >> self.geometry.cluster_bits, len(strip), weight)
        return True

    def _count_clusters(self, counts: Counts, first: int, count: int, weight: int) -> None:
        if first + count > counts.clusters:
            raise corrupt(self.image, f"its L2 table at {self.offset} leads behind the end of the file")
        counts.add_run(first, count, weight)

    def _count_strip(self, strip: array[int], start: int, counts: Counts, weight: int) -> None:
        geometry = self.geometry
        entries: Sequence[int] = strip
        if functools.reduce(or_, strip) & COMPRESSED:
            for cluster, references in compressed_references(strip, geometry).items():
                self._count_clusters(counts, cluster, 1, references * weight)
            entries = [0 if entry & COMPRESSED else entry for entry in strip]
        if functools.reduce(or_, entries) & geometry.l2_bad:
            index, bad = next((at, entry) for at, entry in enumerate(entries, start) if entry & geometry.l2_bad)
            raise corrupt(self.image, f"entry {index} of its L2 table at {self.offset} is {bad:#018x}")
        bits = geometry.cluster_bits
        clusters = filter(None, [(entry & OFFSET_MASK) >> bits for entry in entries])
        if counts.add(clusters, weight):
            raise corrupt(self.image, f"its L2 table at {self.offset} leads behind the end of the file")

    # --- COPIED flags -----------------------------------------------------------------------------------

    def without_copied(self) -> bytearray | None:
        """The table without any COPIED flag; None where it has none."""
        return self._with_heads(self.raw[0 :: self._stride].translate(_CLEARED))

    def with_copied(self, ones: Ones, *, keep: bool = False) -> bytearray | None:
        """The table with COPIED flags where ``ones`` says that there is one reference, and with ``keep`` where it has
        them; None where it is like that."""
        heads = self.raw[0 :: self._stride]
        heads = heads if keep else heads.translate(_CLEARED)
        first = self.first_of_run()
        flags = ones.of_run(first, self.geometry.l2_entries) if first else ones.of_entries(self.entries())
        merged = int.from_bytes(heads, "big") | int.from_bytes(flags, "big")
        return self._with_heads(merged.to_bytes(len(heads), "big"))

    def _with_heads(self, heads: bytes | bytearray) -> bytearray | None:
        """The table with other first bytes of its entries; None where they are the same."""
        if heads == self.raw[0 :: self._stride]:
            return None
        changed = self.raw[:]
        changed[0 :: self._stride] = heads
        return changed


@functools.cache
def _sequence(count: int, step: int) -> tuple[int, int]:
    """``count`` big-endian numbers of 64 bits as one: ones, and multiples of ``step``."""
    ones = int.from_bytes((1).to_bytes(8, "big") * count, "big")
    return ones, int.from_bytes(encode_table(array("Q", range(0, count * step, step))), "big")


class Ones:
    """Which clusters have exactly one reference, by whole refcount blocks."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self._blocks: dict[int, bytes] = {}
        self._nothing = bytes(geometry.block_entries)

    def put(self, block_index: int, refcounts: array[int]) -> None:
        """The refcounts of one block."""
        flags = are_one(refcounts).translate(_ONE_TO_FLAG)
        if not block_index:
            flags = b"\0" + flags[1:]  # the header's cluster, to which no entry leads: unallocated ones seem to
        self._blocks[block_index] = flags

    def of(self, cluster: int) -> int:
        """The COPIED flag, in the first byte of an entry that leads to ``cluster``."""
        block_index, index = divmod(cluster, self.geometry.block_entries)
        return self._blocks.get(block_index, self._nothing)[index]

    def of_run(self, first: int, count: int) -> bytes:
        """The flags of neighbouring clusters, a byte for each."""
        found = b""
        while count:
            block_index, index = divmod(first, self.geometry.block_entries)
            part = self._blocks.get(block_index, self._nothing)[index : index + count]
            found += part
            first, count = first + len(part), count - len(part)
        return found

    def of_entries(self, table: array[int]) -> bytes:
        """The flags of what L2 entries lead to."""
        bits, per_block = self.geometry.cluster_bits, self.geometry.block_entries
        blocks, nothing = self._blocks, self._nothing
        clusters = [0 if entry & COMPRESSED else (entry & OFFSET_MASK) >> bits for entry in table]
        return bytes([blocks.get(cluster // per_block, nothing)[cluster % per_block] for cluster in clusters])


# --- sums -----------------------------------------------------------------------------------------------

_WIDTH = 4
_PLANES = range(_WIDTH) if sys.byteorder == "little" else range(_WIDTH - 1, -1, -1)
"""Where the bytes of a counter are, the lowest first."""
_TOP = _PLANES[-1]
_MOST = (1 << 32) - 1
_BALANCED_AT_ONCE = 2048
"""Neighbours often have the same refcount, and then one number stands for a strip of so many."""


def balance(values: array[int], gained: array[int] | None, lost: array[int] | None, bits: int) -> array[int]:
    """``values`` with what they gained and without what they lost; arrays of as many 32-bit numbers.

    Raises RefcountOverflow where a result does not fit into ``bits`` bits, RefcountUnderflow where one is negative.
    """
    terms = [(part, sign) for part, sign in ((values, 1), (gained, 1), (lost, -1)) if part is not None]
    if all(are_same(part) for part, _ in terms):
        return _balance_strip(terms, bits)
    found: array[int] = array("I")
    for start in range(0, len(values), _BALANCED_AT_ONCE):
        found += _balance_strip([(part[start : start + _BALANCED_AT_ONCE], sign) for part, sign in terms], bits)
    return found


def _balance_strip(terms: list[tuple[array[int], int]], bits: int) -> array[int]:
    count = len(terms[0][0])
    if all(are_same(part) for part, _ in terms):
        return _balance_each([(part[:1], sign) for part, sign in terms], bits) * count
    zeroes = bytes(count)
    total = _guards(count)
    for part, sign in terms:
        raw = part.tobytes()
        if raw[_TOP::_WIDTH] != zeroes:
            return _balance_each(terms, bits)
        total += sign * int.from_bytes(raw, sys.byteorder)
    result = bytearray(total.to_bytes(count * _WIDTH, sys.byteorder))
    if result[_TOP::_WIDTH] != b"\x80" * count:
        return _balance_each(terms, bits)
    result[_TOP::_WIDTH] = zeroes
    for place, plane in enumerate(_PLANES):
        if not _fits(result[plane::_WIDTH], bits - 8 * place):
            raise RefcountOverflow
    return array("I", bytes(result))


def _fits(plane: bytearray, bits: int) -> bool:
    """Whether no byte has more than ``bits`` bits."""
    if bits >= 8:
        return True
    if bits <= 0:
        return plane == bytes(len(plane))
    return not plane.strip(_allowed(bits))


@functools.cache
def _guards(count: int) -> int:
    """The highest bit of each counter: it is borrowed from where a result is negative."""
    return int.from_bytes((array("I", [1 << 31]) * count).tobytes(), sys.byteorder)


@functools.cache
def _allowed(bits: int) -> bytes:
    """The values that ``bits`` bits of a byte can have."""
    return bytes(range(1 << bits))


def _balance_each(terms: list[tuple[array[int], int]], bits: int) -> array[int]:
    found = [sum(numbers) for numbers in zip(*([sign * value for value in part] for part, sign in terms), strict=True)]
    if min(found) < 0:
        raise RefcountUnderflow
    # Larger ones are not told apart.
    if max(found) > min((1 << bits) - 1, _MOST - 1):
        raise RefcountOverflow
    return array("I", found)
