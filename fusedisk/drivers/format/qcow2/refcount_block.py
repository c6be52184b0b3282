"""Refcount blocks as bytes: reading, changing and searching entries of 1 to 64 bits. No I/O.

An open image keeps a block in memory as it is on disk, since searching it for free clusters is then one call of
``bytes.find``. What works on all refcounts of an image (check, snapshots, amend) decodes whole blocks to arrays of
32-bit counters. Source: docs/interop/qcow2.txt, "Host cluster management".
"""

from __future__ import annotations

import abc
import re
import sys
from array import array
from operator import add

COUNTER = "I"
"""Type of an array of counters."""
COUNTER_BYTES = 4
LARGEST = (1 << 32) - 1
"""The largest counter; it stands for all larger refcounts, which no cluster really has references for."""
_BIG_ENDIAN = sys.byteorder == "big"


class RefcountOverflow(Exception):
    """A refcount would need more bits than it has."""


class RefcountUnderflow(Exception):
    """A refcount of zero was to be lowered."""


Run = tuple[int, int]
"""First entry and number of entries."""


class RefcountCodec(abc.ABC):
    """Entries of one width in blocks of ``entries`` of them. Indices and counts are in entries."""

    def __init__(self, bits: int, entries: int) -> None:
        self.bits = bits
        self.entries = entries
        self.maximum = (1 << bits) - 1

    @abc.abstractmethod
    def values(self, block: bytearray, index: int, count: int) -> list[int]:
        """The refcounts of ``count`` entries."""

    @abc.abstractmethod
    def encoded(self, block: bytearray, index: int, values: list[int]) -> tuple[int, bytes]:
        """Byte position in the block and the bytes to put there so that the entries from ``index`` hold
        ``values``.
        """

    @abc.abstractmethod
    def find_free(self, block: bytearray, index: int, count: int) -> tuple[int, int]:
        """First run of zero entries from ``index`` on that is ``count`` long or reaches the block's end.

        Returns its index and length (at most ``count``); a length of 0 if there is none.
        """

    @abc.abstractmethod
    def free_run(self, block: bytearray, index: int, limit: int) -> int:
        """How many entries from ``index`` are zero, at most ``limit``."""

    @abc.abstractmethod
    def decode(self, block: bytes | bytearray) -> array[int]:
        """The refcounts of a block, or of whole bytes of one, as counters."""

    @abc.abstractmethod
    def encode(self, counters: array[int]) -> bytearray:
        """The bytes of refcounts, which must not be larger than the width allows; whole bytes of them."""

    def get(self, block: bytearray, index: int) -> int:
        """One refcount."""
        return self.values(block, index, 1)[0]

    def last_used(self, block: bytearray) -> int | None:
        """The last entry that is not zero."""
        position = len(block.rstrip(b"\0")) - 1
        if position < 0:
            return None
        if self.bits >= 8:
            return position * 8 // self.bits
        first = position * 8 // self.bits
        values = self.values(block, first, 8 // self.bits)
        return first + max(index for index, value in enumerate(values) if value)

    def added(self, block: bytearray, index: int, deltas: list[int]) -> tuple[int, bytes, list[Run]]:
        """Add ``deltas`` to neighbouring entries without changing the block.

        Returns byte position, bytes, and the runs that drop to zero. Raises RefcountOverflow or
        RefcountUnderflow.
        """
        values = list(map(add, self.values(block, index, len(deltas)), deltas))
        if min(values) < 0:
            raise RefcountUnderflow
        if max(values) > self.maximum:
            raise RefcountOverflow
        position, data = self.encoded(block, index, values)
        return position, data, _zero_runs(values, index)


class WideCodec(RefcountCodec):
    """8, 16, 32 or 64 bits: big-endian integers."""

    def __init__(self, bits: int, entries: int) -> None:
        super().__init__(bits, entries)
        self._width = bits // 8
        self._zero = bytes(self._width)
        self._one = (1).to_bytes(self._width, "big")

    def values(self, block: bytearray, index: int, count: int) -> list[int]:
        width = self._width
        stop = (index + count) * width
        return [int.from_bytes(block[at : at + width], "big") for at in range(index * width, stop, width)]

    def encoded(self, block: bytearray, index: int, values: list[int]) -> tuple[int, bytes]:
        return index * self._width, b"".join(value.to_bytes(self._width, "big") for value in values)

    def decode(self, block: bytes | bytearray) -> array[int]:
        # Byte by byte of all refcounts at once: slices with a step are copied in C.
        width = self._width
        planes = bytearray(len(block) // width * COUNTER_BYTES)
        for plane in range(min(width, COUNTER_BYTES)):
            planes[plane::COUNTER_BYTES] = block[width - 1 - plane :: width]
        found = _from_planes(planes)
        for plane in range(width - COUNTER_BYTES):
            for index, byte in enumerate(block[plane::width] if any(block[plane::width]) else b""):
                if byte:
                    found[index] = LARGEST
        return found

    def encode(self, counters: array[int]) -> bytearray:
        planes, width = _to_planes(counters), self._width
        block = bytearray(len(counters) * width)
        for plane in range(min(width, COUNTER_BYTES)):
            block[width - 1 - plane :: width] = planes[plane::COUNTER_BYTES]
        return block

    def get(self, block: bytearray, index: int) -> int:
        at = index * self._width
        return int.from_bytes(block[at : at + self._width], "big")

    def added(self, block: bytearray, index: int, deltas: list[int]) -> tuple[int, bytes, list[Run]]:
        # Nearly always a run of free clusters is taken, or a run of clusters with one user is freed.
        width, count = self._width, len(deltas)
        start = index * width
        old = block[start : start + count * width]
        if old == self._zero * count and deltas.count(1) == count:
            return start, self._one * count, []
        if old == self._one * count and deltas.count(-1) == count:
            return start, self._zero * count, [(index, count)]
        return super().added(block, index, deltas)

    def find_free(self, block: bytearray, index: int, count: int) -> tuple[int, int]:
        width, end = self._width, len(block)
        wanted, at = self._zero * count, index * width
        while (at := block.find(wanted, at)) >= 0:
            if not at % width:
                return at // width, count
            at += 1
        tail = block[index * width :]
        zeroes = len(tail) - len(tail.rstrip(b"\0"))
        free = min(zeroes // width, count)
        return end // width - free, free

    def free_run(self, block: bytearray, index: int, limit: int) -> int:
        part = block[index * self._width : (index + limit) * self._width]
        return (len(part) - len(part.lstrip(b"\0"))) // self._width


class NarrowCodec(RefcountCodec):
    """1, 2 or 4 bits: packed into bytes, the lowest bits first."""

    def __init__(self, bits: int, entries: int) -> None:
        super().__init__(bits, entries)
        self._per_byte = 8 // bits
        with_zero = bytes(byte for byte in range(256) if 0 in self._split(byte))
        self._byte_with_zero = re.compile(b"[" + re.escape(with_zero) + b"]")
        self._unpacked = [bytes(self._split(byte)) for byte in range(256)]
        self._shifted = [
            bytes((byte & self.maximum) << shift for byte in range(256)) for shift in range(0, 8, self.bits)
        ]

    def _split(self, byte: int) -> list[int]:
        return [byte >> shift & self.maximum for shift in range(0, 8, self.bits)]

    def values(self, block: bytearray, index: int, count: int) -> list[int]:
        per = self._per_byte
        first, last = index // per, (index + count - 1) // per
        values = [value for byte in block[first : last + 1] for value in self._split(byte)]
        return values[index - first * per :][:count]

    def encoded(self, block: bytearray, index: int, values: list[int]) -> tuple[int, bytes]:
        per = self._per_byte
        first, last = index // per, (index + len(values) - 1) // per
        whole = self.values(block, first * per, (last - first + 1) * per)
        whole[index - first * per : index - first * per + len(values)] = values
        data = bytearray(last - first + 1)
        for i, value in enumerate(whole):
            data[i // per] |= value << i % per * self.bits
        return first, bytes(data)

    def decode(self, block: bytes | bytearray) -> array[int]:
        low = b"".join(map(self._unpacked.__getitem__, block))
        planes = bytearray(len(low) * COUNTER_BYTES)
        planes[::COUNTER_BYTES] = low
        return _from_planes(planes)

    def encode(self, counters: array[int]) -> bytearray:
        low, packed = _to_planes(counters)[::COUNTER_BYTES], 0
        for at, shifted in enumerate(self._shifted):
            packed |= int.from_bytes(low[at :: self._per_byte].translate(shifted), "big")
        return bytearray(packed.to_bytes(len(low) // self._per_byte, "big"))

    def find_free(self, block: bytearray, index: int, count: int) -> tuple[int, int]:
        while index < self.entries:
            match = self._byte_with_zero.search(block, index // self._per_byte)
            if match is None:
                break
            at = max(index, match.start() * self._per_byte)
            run = self.free_run(block, at, min(count, self.entries - at))
            if run == count or (run and at + run == self.entries):
                return at, run
            index = at + run + 1
        return self.entries, 0

    def free_run(self, block: bytearray, index: int, limit: int) -> int:
        # Bounded steps: a long run need not be unpacked where a short one is wanted.
        run, limit = 0, min(limit, self.entries - index)
        while run < limit:
            values = self.values(block, index + run, min(limit - run, 64))
            for value in values:
                if value:
                    return run
                run += 1
        return run


def _zero_runs(values: list[int], index: int) -> list[Run]:
    runs: list[Run] = []
    for at, value in enumerate(values, index):
        if value:
            continue
        if runs and sum(runs[-1]) == at:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((at, 1))
    return runs


def _from_planes(planes: bytearray) -> array[int]:
    """Counters from their bytes, lowest first."""
    found: array[int] = array(COUNTER)
    found.frombytes(planes)
    if _BIG_ENDIAN:
        found.byteswap()
    return found


def _to_planes(counters: array[int]) -> bytes:
    """The bytes of counters, lowest first."""
    if _BIG_ENDIAN:
        counters = counters[:]
        counters.byteswap()
    return counters.tobytes()


def refcount_codec(bits: int, entries: int) -> RefcountCodec:
    """The codec for refcounts of ``bits`` bits."""
    return WideCodec(bits, entries) if bits >= 8 else NarrowCodec(bits, entries)
