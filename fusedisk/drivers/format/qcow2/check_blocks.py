"""The refcounts that are in the file, read whole blocks at a time.

A refcount block as a check uses it is an array of 32-bit numbers, whatever the width of the refcounts is; larger ones
become the largest such number, which no cluster really has references for.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict

from fusedisk.core.errors import FusediskError
from fusedisk.drivers.format.qcow2.check_open import CheckedImage

REFCOUNT_TABLE_RESERVED = 0x1FF
REFCOUNT_OFFSET_MASK = (1 << 64) - 1 & ~REFCOUNT_TABLE_RESERVED

_WIDTH = 4
_MOST = (1 << 32) - 1
_BIG_ENDIAN = sys.byteorder == "big"
_CACHED_BYTES = 64 << 20

UNKNOWN = 2
"""In :attr:`DiskRefcounts.ones`: the refcount could not be read."""


class BlockCodec:
    """Between refcount blocks and arrays of 32-bit numbers."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        if bits < 8:
            per_byte, mask = 8 // bits, (1 << bits) - 1
            self._split = [bytes(byte >> at * bits & mask for at in range(per_byte)) for byte in range(256)]
            self._shift = [bytes((byte & mask) << at * bits for byte in range(256)) for at in range(per_byte)]

    def decode(self, block: bytes | bytearray) -> array[int]:
        """The refcounts of a block, or of a part of one."""
        width = max(self.bits // 8, 1)
        low = b"".join(map(self._split.__getitem__, block)) if self.bits < 8 else block
        planes = bytearray(len(low) // width * _WIDTH)
        for plane in range(min(width, _WIDTH)):
            planes[plane::_WIDTH] = low[width - 1 - plane :: width]
        found: array[int] = array("I")
        found.frombytes(planes)
        if _BIG_ENDIAN:
            found.byteswap()
        if width > _WIDTH:
            for plane in range(width - _WIDTH):
                for index, byte in enumerate(low[plane::width] if any(low[plane::width]) else b""):
                    if byte:
                        found[index] = _MOST
        return found

    def encode(self, values: array[int]) -> bytearray:
        """The bytes for refcounts, which must not be larger than the width allows; whole bytes of them."""
        if _BIG_ENDIAN:
            values = values[:]
            values.byteswap()
        planes = values.tobytes()
        if self.bits < 8:
            low, per_byte = planes[::_WIDTH], 8 // self.bits
            packed = 0
            for at in range(per_byte):
                packed |= int.from_bytes(low[at::per_byte].translate(self._shift[at]), "big")
            return bytearray(packed.to_bytes(len(low) // per_byte, "big"))
        width = self.bits // 8
        block = bytearray(len(values) * width)
        for plane in range(min(width, _WIDTH)):
            block[width - 1 - plane :: width] = planes[plane::_WIDTH]
        return block


class DiskRefcounts:
    """The refcount table and blocks of one image, as they were when it was loaded."""

    def __init__(self, image: CheckedImage) -> None:
        self.image = image
        self.codec = BlockCodec(image.refcount_bits)
        self.table: array[int] = array("Q")
        """The refcount table, byte for byte."""
        self.ones: bytearray | None = None
        """For each cluster whether its refcount is 1 (never for cluster 0), or UNKNOWN. None in large files."""
        self._blocks: OrderedDict[int, array[int] | None] = OrderedDict()
        self._cached_blocks = max(_CACHED_BYTES // (image.block_entries * _WIDTH), 2)

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
    planes = values.tobytes()
    lowest = 3 if _BIG_ENDIAN else 0
    found = planes[lowest::_WIDTH].translate(_ONE)
    for plane in range(_WIDTH):
        higher = planes[plane::_WIDTH]
        if plane != lowest and higher != bytes(len(higher)):
            both = int.from_bytes(found, "big") & int.from_bytes(higher.translate(_ZERO), "big")
            found = both.to_bytes(len(found), "big")
    return found
