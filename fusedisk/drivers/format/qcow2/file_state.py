"""What the file of an image tells beyond its content: whether it was cut short, and whether its clusters may be holes.

Incomplete images
-----------------
The file of an incomplete image ends before what its metadata leads to, as after a copy that was cut short. Looking
costs no more than the refcount table and one refcount block: the highest cluster in use lies past the end of an
incomplete file. That alone does not prove it, since a crash may leave clusters in use that were never written. So L2
tables are read then, those at the end of the file first, which lead to what was written last.

Sparse images
-------------
In an image with ``preallocation=metadata`` clusters in use are holes of the file. QEMU's rule, since block status must
say the same: the file takes up clearly less space than the clusters that are in use. Counting those means reading
refcount blocks, so it is done when block status first asks, and not at all for a file that is too short to hold that
many.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterator
from heapq import nlargest

from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.alone import checkpoint
from fusedisk.core.errors import FusediskError
from fusedisk.core.zeroes import is_zero
from fusedisk.drivers.format.qcow2.counts import REFCOUNT_OFFSET_MASK
from fusedisk.drivers.format.qcow2.entries import (
    ALL_ALLOCATED,
    COMPRESSED,
    L1_RESERVED,
    OFFSET_MASK,
    ZERO,
    Geometry,
    used_pieces,
)
from fusedisk.drivers.format.qcow2.image import Image, read_table
from fusedisk.drivers.format.qcow2.layout import Header
from fusedisk.drivers.format.qcow2.refcount_block import refcount_codec

log = logging.getLogger(__name__)

_MAX_BLOCKS = 8
"""The most refcount blocks to read: those at the end of the table may be empty."""
_MAX_L2_TABLES = 64
"""The most L2 tables to read."""


async def warn_if_incomplete(image: Image) -> None:
    """Warn once if a part of the image is missing. Raises the errors of reading the file."""
    place = await _find_missing(image)
    if place is not None:
        log.warning(
            "'%s' is incomplete: the file is %d bytes long, but has data at %d; what is missing reads as zeroes, "
            "so copy it again if it was cut short.",
            image.filename,
            image.storage.node.length,
            place,
        )
    data_file = image.data_file
    if data_file is not None and image.header.has_raw_data_file and data_file.node.length < image.header.size:
        log.warning(
            "'%s', the data file of '%s', is incomplete: it is %d bytes long, but the disk %d; what is missing reads "
            "as zeroes.",
            data_file.node.filename,
            image.filename,
            data_file.node.length,
            image.header.size,
        )


async def _find_missing(image: Image) -> int | None:
    """Return the host offset of a table or of data that should lie past the end of the file, None without any sign."""
    end = image.storage.node.length
    missing = _missing_places(image)
    bad = L1_RESERVED | image.geometry.cluster_mask & OFFSET_MASK
    last: list[int] = []
    for _, piece in used_pieces(image.l1):
        offsets = [entry & OFFSET_MASK for entry in piece if entry and not entry & bad]
        last = nlargest(_MAX_L2_TABLES, last + offsets)
        await checkpoint()
    found = next((place for place in last if place in missing), None)
    if found is not None:
        return found
    if await _end_of_use(image) <= end or image.data_file is not None:
        return None
    for offset in last:
        table = await image.read_table(offset, image.geometry.l2_words)
        found = next((place for place in _data_places(table, image.geometry) if place in missing), None)
        if found is not None:
            return found
    return None


def _missing_places(image: Image) -> range:
    """Return the host offsets behind the file's end that the refcount table can count. Entries that lead further, like
    other invalid entries, are corruption and are reported when they are met."""
    header, geometry = image.header, image.geometry
    clusters = header.refcount_table_size() // 8 * geometry.block_entries
    return range(image.storage.node.length, clusters << geometry.cluster_bits)


async def _end_of_use(image: Image) -> int:
    """Return one more than the host offset of the last cluster with a refcount, 0 if there is none."""
    header, geometry = image.header, image.geometry
    table = await image.read_table(header.refcount_table_offset, header.refcount_table_size() // 8)
    end = _used(table)
    for index in range(end - 1, max(end - _MAX_BLOCKS, 0) - 1, -1):
        offset = table[index] & OFFSET_MASK
        if offset >= image.storage.node.length:
            return offset + 1
        used = _length_in_use(memoryview(await image.read(offset, geometry.cluster_size))) if offset else 0
        if used:
            cluster = index * geometry.block_entries + (used - 1) * 8 // geometry.refcount_bits
            return (cluster << geometry.cluster_bits) + 1
    return 0


def _used(table: array[int]) -> int:
    """Return how many entries a table has up to its last one that is not zero."""
    return -(-_length_in_use(memoryview(table).cast("B")) // table.itemsize)


def _length_in_use(data: memoryview) -> int:
    """Return the length up to the last byte that is not zero. Halving takes a few microseconds, ``rstrip`` 150."""
    low, high = 0, len(data)
    while low < high:
        middle = (low + high) // 2
        if is_zero(data[middle:high]):
            high = middle
        else:
            low = middle + 1
    return high


def _data_places(table: array[int], geometry: Geometry) -> Iterator[int]:
    """The host offsets that the entries of an L2 table read data from."""
    bitmaps = table[1::2] if geometry.extended_l2 else [ALL_ALLOCATED] * len(table)
    for entry, bitmap in zip(geometry.descriptors(table), bitmaps, strict=True):
        if entry & COMPRESSED:
            yield geometry.compressed_range(entry)[0]
        elif entry & geometry.l2_bad:
            continue
        elif bitmap & ALL_ALLOCATED and (geometry.extended_l2 or not entry & ZERO):
            yield entry & OFFSET_MASK


# --- holes --------------------------------------------------------------------------------------------


async def sparse_threshold(file: Node, header: Header) -> int | None:
    """How many clusters in use make the image a sparse one; None where there cannot be that many."""
    try:
        allocated = await file.driver.allocated_size()
    except FusediskError:
        return None
    if allocated is None:
        return None
    present = allocated >> header.cluster_bits
    threshold = max(present * 10 // 9, present + 2)
    return threshold if -(-file.length >> header.cluster_bits) >= threshold else None


async def uses_clusters(file: Node, header: Header, wanted: int) -> bool:
    """Whether at least ``wanted`` clusters of the file have a refcount. Raises the errors of reading the file."""
    bits = 1 << header.refcount_order
    cluster_size = header.cluster_size
    entries = cluster_size * 8 // bits
    codec = refcount_codec(bits, entries)
    clusters_left = -(-file.length >> header.cluster_bits)
    for entry in await read_table(file, header.refcount_table_offset, header.refcount_table_size() // 8):
        if clusters_left <= 0:
            break
        if offset := entry & REFCOUNT_OFFSET_MASK:
            block = await io.read_bytes(file, offset, cluster_size)
            counters = codec.decode(block)[: min(entries, clusters_left)]
            wanted -= len(counters) - counters.count(0)
            if wanted <= 0:
                return True
        clusters_left -= entries
    return False
