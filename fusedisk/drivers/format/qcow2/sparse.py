"""Whether an image's clusters may be holes of its file, as ``preallocation=metadata`` leaves them.

QEMU's rule, since block status must say the same: the file takes up clearly less space than the clusters that are in
use. Counting those means reading refcount blocks, so it is done when block status first asks, and not at all for a file
that is too short to hold that many.
"""

from __future__ import annotations

from array import array

from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.errors import FusediskError
from fusedisk.drivers.format.qcow2.image import read_table
from fusedisk.drivers.format.qcow2.layout import Header
from fusedisk.drivers.format.qcow2.refcount_block import refcount_codec

_OFFSET_MASK = ~0x1FF & (1 << 64) - 1
_TYPECODES = {8: "B", 16: "H", 32: "I", 64: "Q"}


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
    clusters_left = -(-file.length >> header.cluster_bits)
    for entry in await read_table(file, header.refcount_table_offset, header.refcount_table_size() // 8):
        if clusters_left <= 0:
            break
        if offset := entry & _OFFSET_MASK:
            block = await _read(file, offset, cluster_size)
            wanted -= _used(block, bits, min(entries, clusters_left))
            if wanted <= 0:
                return True
        clusters_left -= entries
    return False


def _used(block: bytearray, bits: int, entries: int) -> int:
    """How many of the first ``entries`` refcounts are not zero."""
    typecode = _TYPECODES.get(bits)
    if typecode is None:
        values = refcount_codec(bits, len(block) * 8 // bits).values(block, 0, entries)
        return entries - values.count(0)
    return entries - array(typecode, bytes(memoryview(block)[: entries * bits // 8])).count(0)


async def _read(file: Node, offset: int, length: int) -> bytearray:
    data = bytearray(length)
    await io.read(file, offset, memoryview(data))
    return data
