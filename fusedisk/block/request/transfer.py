"""Moving bytes below the door: from a request that is already checked, aligned and tracked to the drivers.

Nothing here tracks requests on the node it is given; children that could conflict with others are entered
through their own door again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import trio

from fusedisk.block.model.extent import DATA, SPECIAL, UNALLOCATED, ZERO, Extent, WriteExtent
from fusedisk.block.model.flags import COMPRESSED, FUA, MAY_UNMAP, NO_FALLBACK, UNCHANGED, Buffer
from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.at_once import is_at_once
from fusedisk.core.errors import NotSupportedError
from fusedisk.core.zeroes import ZEROES, is_zero, zero_fill


class DriverBug(RuntimeError):
    """A driver broke its contract."""


def check_extent(node: Node, extent: Extent | WriteExtent, length: int) -> None:
    """Raise DriverBug unless a driver's answer fits a range of ``length`` bytes."""
    if not 0 < extent.length <= length:
        raise DriverBug(f"{node.driver.name} answered {extent.length} of {length} bytes on '{node.name}'")


async def read(node: Node, offset: int, buffer: Buffer) -> None:
    """Fill ``buffer``; bytes past the node's end read as zeroes. Every read of a node comes through here, if the short
    ways are closed to it."""
    if node.read_observers:
        node.was_read(offset, len(buffer))
    driver = node.driver
    if driver.moves_bytes:
        limit = node.limits.max_transfer
        if len(buffer) <= limit:
            await driver.preadv(offset, (buffer,))
            return
        for start in range(0, len(buffer), limit):
            await driver.preadv(offset + start, (buffer[start : start + limit],))
        return
    room = node.length - offset
    if len(buffer) > room:
        room = max(0, room)
        zero_fill(buffer[room:])
        buffer = buffer[:room]
    done, length = 0, len(buffer)
    while done < length:
        done += await _read_extent(node, offset + done, buffer[done:] if done else buffer)


async def _read_extent(node: Node, offset: int, buffer: Buffer) -> int:
    """Fill a prefix of ``buffer`` from the layer of the chain that holds it; returns its length."""
    length = len(buffer)
    layer = node
    while True:
        extent = await layer.driver.map(offset, length)
        status, count = extent.status, extent.length
        if not 0 < count <= length:
            check_extent(layer, extent, length)
        part = buffer if count == len(buffer) else buffer[:count]
        if status == DATA:
            await io.read(extent.child.node, extent.offset, part)  # type: ignore[union-attr]
            return count
        backing = layer.children.get("backing") if status == UNALLOCATED else None
        if status == SPECIAL:
            await layer.driver.read_special(extent, offset, part)
            return count
        if status == ZERO or backing is None or offset >= backing.node.length:
            zero_fill(part)
            return count
        layer = backing.node
        length = min(count, layer.length - offset)
        config = layer.config
        if layer.driver.moves_bytes or config.copy_on_read or not config.read_only or layer.read_observers:
            # Other requests may free or change this layer's data, so the read must be tracked on it; or it is watched.
            await io.read(layer, offset, buffer[:length])
            return length


async def write(node: Node, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
    """Write all buffers at ``offset``, within the node's length unless its driver moves bytes itself."""
    driver = node.driver
    if driver.moves_bytes:
        await _write_bytes(node, offset, buffers, flags)
        return
    for buffer in buffers:
        done, length = 0, len(buffer)
        while done < length:
            done += await _write_extent(node, offset + done, buffer[done:] if done else buffer, flags)
        offset += length


async def _write_bytes(node: Node, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
    limit = node.limits.max_transfer
    if not node.driver.supports_fua:
        flags &= ~FUA
    if sum(map(len, buffers)) <= limit:
        await node.driver.pwritev(offset, buffers, flags)
        return
    if len(buffers) > 1 and node.limits.request_alignment > 1:
        # Only their sum is aligned, not each buffer.
        buffers = (memoryview(b"".join(buffers)),)
    for buffer in buffers:
        for start in range(0, len(buffer), limit):
            part = buffer[start : start + limit]
            await node.driver.pwritev(offset, (part,), flags)
            offset += len(part)


async def _write_extent(node: Node, offset: int, buffer: Buffer, flags: int) -> int:
    """Write a prefix of ``buffer`` to one extent, with the old bytes around it; returns its length."""
    driver = node.driver
    extent = await driver.map_write(offset, len(buffer))
    count = extent.length
    flags &= UNCHANGED | COMPRESSED  # a compressed write comes here only on its way through a filter
    allocation = extent.allocation
    try:
        if not 0 < count <= len(buffer):
            check_extent(node, extent, len(buffer))
        part = buffer if count == len(buffer) else buffer[:count]
        if allocation is not None:
            await extent.child.node.driver.debug_event("write_aio")
        if not extent.copy_head and not extent.copy_tail:
            if driver.encodes:
                part = await driver.encode(offset, extent.offset, bytes(part))
            await io.write(extent.child.node, extent.offset, (part,), flags)
        else:
            parts = [part]
            below = extent.child.node.driver
            await below.debug_event("cow_read")
            if extent.copy_head:
                parts.insert(0, await _old_bytes(node, offset - extent.copy_head, extent.copy_head))
            if extent.copy_tail:
                parts.append(await _old_bytes(node, offset + count, extent.copy_tail))
            await below.debug_event("cow_write")
            if driver.encodes:
                start, host = offset - extent.copy_head, extent.offset - extent.copy_head
                parts = [await driver.encode(start, host, b"".join(parts))]
            await io.write(extent.child.node, extent.offset - extent.copy_head, parts, flags)
    except BaseException:
        if allocation is not None:
            driver.abandon(allocation)
        raise
    if allocation is not None:
        # The data is written. A cancellation from here on could leave the tables on disk and in memory different.
        with nullcontext() if is_at_once() else trio.CancelScope(shield=True):
            await driver.publish(allocation)
    return count


async def _old_bytes(node: Node, offset: int, length: int) -> Buffer:
    buffer = memoryview(bytearray(length))
    await read(node, offset, buffer)
    return buffer


async def write_or_zero(node: Node, offset: int, buffer: Buffer, flags: int) -> None:
    """Write ``buffer``, by write-zeroes if it holds only zeroes."""
    if is_zero(buffer):
        await write_zeroes(node, offset, len(buffer), flags)
    else:
        await write(node, offset, (buffer,), flags)


async def write_zeroes(node: Node, offset: int, length: int, flags: int) -> None:
    """Zero a range: whole units by the driver, the edges by writing (or with their whole unit, if the rest of it reads
    as zeroes already). The caller's request is serialising over whole units."""
    unit = max(node.limits.zeroes_alignment, node.limits.request_alignment)
    end = offset + length
    if unit == 1:
        await _zero_units(node, offset, end, flags)
        return
    first = min(-(-offset // unit) * unit, end)
    last = end if end == node.length and not node.driver.moves_bytes else max(end // unit * unit, first)
    if offset < first:
        await _zero_edge(node, offset, first, unit, flags)
    if first < last:
        await _zero_units(node, first, last, flags)
    if last < end:
        await _zero_edge(node, last, end, unit, flags)


async def _zero_units(node: Node, offset: int, end: int, flags: int) -> None:
    """Let the driver zero whole units: whole clusters, or a part of one."""
    limits = node.limits
    unit = max(limits.zeroes_alignment, limits.request_alignment)
    cluster = max(limits.cluster_size, unit)
    step = max(limits.max_write_zeroes // cluster * cluster, cluster)
    while offset < end:
        count = min(step, end - offset)
        if unit < cluster:
            inside = offset % cluster
            count = min(count, cluster - inside) if inside or count < cluster else count // cluster * cluster
        try:
            with trio.CancelScope(shield=True):
                await node.driver.write_zeroes(offset, count, flags & (MAY_UNMAP | NO_FALLBACK))
        except NotSupportedError:
            if flags & NO_FALLBACK:
                raise
            await _write_out_zeroes(node, offset, count, flags)
        offset += count
        if offset < end:
            await trio.lowlevel.checkpoint()


async def _zero_edge(node: Node, offset: int, end: int, unit: int, flags: int) -> None:
    """Zero a part of one unit."""
    start = offset // unit * unit
    stop = start + unit if node.driver.moves_bytes else min(start + unit, node.length)
    if not node.driver.moves_bytes and await _reads_zero(node, start, offset) and await _reads_zero(node, end, stop):
        await _zero_units(node, start, stop, flags)
        return
    if flags & NO_FALLBACK:
        raise NotSupportedError(f"{node.driver.name} cannot zero {end - offset} bytes without writing them.")
    await _write_out_zeroes(node, offset, end - offset, flags)


async def _reads_zero(node: Node, offset: int, end: int) -> bool:
    """Whether the mappings of the chain show, without reading data, that a range is zero."""
    while offset < end:
        status, length, layer = UNALLOCATED, end - offset, node
        while status == UNALLOCATED:
            extent = await layer.driver.map(offset, length)
            status, length = extent.status, extent.length
            backing = layer.backing
            if backing is None or offset >= backing.node.length:
                break
            if status == UNALLOCATED:
                layer = backing.node
                length = min(length, layer.length - offset)
        if status not in (ZERO, UNALLOCATED):
            return False
        offset += length
    return True


async def _write_out_zeroes(node: Node, offset: int, length: int, flags: int) -> None:
    align = node.limits.request_alignment
    end = offset + length
    while offset < end:
        count = min(len(ZEROES), node.limits.max_transfer, end - offset)
        zeroes = ZEROES[:count]
        if (offset | count) & (align - 1):
            await io.write_unaligned(node, offset, (zeroes,), count, flags)
        else:
            await write(node, offset, (zeroes,), flags & UNCHANGED)
        offset += count
