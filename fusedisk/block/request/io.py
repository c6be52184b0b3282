"""The one door for requests on a node.

Every request, from outside through a :class:`~fusedisk.block.graph.backend.Backend` or from a parent node, passes in a
fixed order: permission · alignment (read-modify-write of unaligned heads and tails) · tracking, waiting for earlier
conflicting requests · observers that act before a change · copy-on-read · detect-zeroes · fragmenting to the driver's
limits · the driver · emulation of what it lacks · telling of the change (:meth:`.Node.changed`). Counting in flight for
drain, throttling, range checks and accounting are the backend's, since every request in the system starts at one.

In the common case (aligned, nothing serialising, everything cached) none of this suspends.

Here: reads, writes and flushes. Discards, preallocation and resizing are in :mod:`.space`, the checks of all in
:mod:`.checks`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from functools import partial

from fusedisk.block.model.children import Role
from fusedisk.block.model.extent import UNALLOCATED
from fusedisk.block.model.flags import COMPRESSED, COPY_ON_READ, FUA, MAY_UNMAP, UNCHANGED, Buffer
from fusedisk.block.model.node import Node
from fusedisk.block.model.observer import Change
from fusedisk.block.model.tracked import Request
from fusedisk.block.request import transfer
from fusedisk.block.request.checks import PROBE_SIZE, check_end, check_writable, guarding_request
from fusedisk.core.errors import (
    FusediskError,
    NoMediumError,
    NotSupportedError,
    OutOfRangeError,
    ReadOnlyError,
)
from fusedisk.core.zeroes import ZEROES, is_zero

COPY_CHUNK = 1 << 20
"""Bytes that are copied from one layer to another at a time."""
_WRITE = Change.WRITE
"""A global is found faster than a member of an enum."""


# --- reads ----------------------------------------------------------------------------------------------


async def read(node: Node, offset: int, buffer: Buffer, flags: int = 0) -> None:
    """Fill ``buffer`` from ``offset``. Bytes past the node's end read as zeroes.

    Raises the driver's FusediskError, with node and range attached.
    """
    length = len(buffer)
    if not length:
        return
    if node.closed:
        raise NoMediumError(f"Node '{node.name}' is closed.")
    align = node.limits.request_alignment
    if align > 1 and (offset | length) & (align - 1):
        await _read_unaligned(node, offset, buffer, flags)
        return
    copy = flags & COPY_ON_READ or node.config.copy_on_read
    request = _copy_request(node, offset, length) if copy else Request(offset, offset + length, False)
    request.enter(node)
    try:
        if node.serialising:
            await request.wait_for_earlier(node)
        if copy:
            await _copy_on_read(node, request, offset, buffer)
        else:
            await transfer.read(node, offset, buffer)
    except FusediskError as exc:
        exc.at(node.name, "read", offset, length)
        raise
    finally:
        request.leave(node)


async def read_bytes(node: Node, offset: int, length: int) -> bytearray:
    """Return ``length`` bytes from ``offset``; bytes past the node's end are zeroes. Raises as :func:`read` does."""
    data = bytearray(length)
    await read(node, offset, memoryview(data))
    return data


async def _read_unaligned(node: Node, offset: int, buffer: Buffer, flags: int) -> None:
    align = node.limits.request_alignment
    start = offset & -align
    end = (offset + len(buffer) + align - 1) & -align
    whole = memoryview(bytearray(end - start))
    await read(node, start, whole, flags)
    buffer[:] = whole[offset - start : offset - start + len(buffer)]


def _copy_request(node: Node, offset: int, length: int) -> Request:
    unit = node.limits.cluster_size or 1
    return Request(offset // unit * unit, -(-(offset + length) // unit) * unit, False, serialising=True)


async def _copy_on_read(node: Node, request: Request, offset: int, buffer: Buffer) -> None:
    """Read, and store whole clusters that came from the backing file. The serialising request holds the clusters."""
    if node.config.read_only or node.backing is None or node.fenced is not None:
        await transfer.read(node, offset, buffer)
        return
    position, stop, end = request.offset, min(request.end, node.length), offset + len(buffer)
    while position < stop:
        length = min(stop - position, COPY_CHUNK)
        extent = await node.driver.map(position, length)
        transfer.check_extent(node, extent, length)
        after = position + extent.length
        low, high = max(position, offset), min(after, end)
        if extent.status == UNALLOCATED:
            content = memoryview(bytearray(extent.length))
            await transfer.read(node, position, content)
            await node.driver.debug_event("cor_write")
            try:
                await transfer.write_or_zero(node, position, content, UNCHANGED)
            finally:
                node.changed(position, extent.length, Change.STORAGE)
            if low < high:
                buffer[low - offset : high - offset] = content[low - position : high - position]
        elif low < high:
            await transfer.read(node, low, buffer[low - offset : high - offset])
        position = after
    if end > node.length:
        await transfer.read(node, max(node.length, offset), buffer[max(node.length - offset, 0) :])


# --- writes ---------------------------------------------------------------------------------------------


async def write(node: Node, offset: int, buffers: Sequence[Buffer], flags: int = 0) -> None:
    """Write all buffers, one after the other, at ``offset``.

    A write past the end extends nodes whose driver moves bytes; others raise OutOfRangeError. ``flags`` may hold
    COMPRESSED, for whole clusters (or up to the disk's end); raises NotSupportedError if the driver does not compress.
    Raises the driver's FusediskError, with node and range attached.
    """
    length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
    if not length:
        return
    check_writable(node, flags)
    end = offset + length
    if flags & COMPRESSED and not node.driver.is_filter:
        await _write_compressed(node, offset, buffers, length, flags)
        return
    check_end(node, end, "A write")
    align = node.limits.request_alignment
    unaligned = align > 1 and bool((offset | length) & (align - 1))
    guard = node.guards_probe and offset < PROBE_SIZE
    if guard:
        request = guarding_request(end, align)
    elif unaligned:
        request = Request(offset & -align, (end + align - 1) & -align, True, serialising=True)
    else:
        request = Request(offset, end, True)
    zeroes = node.config.detect_zeroes
    if zeroes != "off" and not unaligned and all(map(is_zero, buffers)):
        await write_zeroes(node, offset, length, flags | (MAY_UNMAP if zeroes == "unmap" else 0))
        return
    begun = False
    request.enter(node)
    try:
        if node.serialising:
            await request.wait_for_earlier(node)
            check_end(node, end, "A write")
        if guard:
            await check_probe(node, offset, buffers)
        if node.before_observers:
            await node.before_change(offset, length, _WRITE)
        begun = True
        if unaligned:
            await write_unaligned(node, offset, buffers, length, flags)
        else:
            await transfer.write(node, offset, buffers, flags)
        _grow(node, end)
    except FusediskError as exc:
        exc.at(node.name, "write", offset, length)
        raise
    finally:
        if begun:
            node.changed(offset, length, _WRITE)  # also after an error: a part may be written
        request.leave(node)
    if flags & FUA and not node.driver.supports_fua:
        await flush(node)


async def _write_compressed(node: Node, offset: int, buffers: Sequence[Buffer], length: int, flags: int) -> None:
    if not node.driver.compresses:
        raise NotSupportedError(
            f"'{node.filename}' does not support compressed writes: {node.driver.name} does not compress."
        )
    end, unit = offset + length, node.limits.cluster_size
    if offset % unit or end > node.length or (end % unit and end != node.length):
        raise OutOfRangeError(
            f"A compressed write to '{node.filename}' has {length} bytes at {offset}, expected whole clusters of "
            f"{unit} bytes, or up to the disk's end at {node.length}."
        )
    request = Request(offset, -(-end // unit) * unit, True, serialising=True)
    begun = False
    request.enter(node)
    try:
        await request.wait_for_earlier(node)
        check_end(node, end, "A compressed write")
        await node.before_change(offset, length, _WRITE)
        data = buffers[0] if len(buffers) == 1 else memoryview(b"".join(buffers))
        begun = True
        await node.driver.write_compressed(offset, data)
    except FusediskError as exc:
        exc.at(node.name, "write-compressed", offset, length)
        raise
    finally:
        if begun:
            node.changed(offset, length, _WRITE)
        request.leave(node)
    if flags & FUA:
        await flush(node)


async def write_unaligned(node: Node, offset: int, buffers: Sequence[Buffer], length: int, flags: int) -> None:
    """Read-modify-write. The caller's request is serialising over the widened range."""
    align = node.limits.request_alignment
    start = offset & -align
    end = (offset + length + align - 1) & -align
    head, tail = offset - start, end - offset - length
    parts = list(buffers)
    first = memoryview(bytearray(align))
    if head:
        await node.driver.debug_event("pwritev_rmw_head")
        await transfer.read(node, start, first)
        await node.driver.debug_event("pwritev_rmw_after_head")
        parts.insert(0, first[:head])
    if tail:
        last = first
        if end - start > align or not head:
            last = memoryview(bytearray(align))
            await node.driver.debug_event("pwritev_rmw_tail")
            await transfer.read(node, end - align, last)
            await node.driver.debug_event("pwritev_rmw_after_tail")
        parts.append(last[align - tail :])
    await transfer.write(node, start, (memoryview(b"".join(parts)),), flags)


def _grow(node: Node, end: int) -> None:
    """Note that a write or write-zeroes up to ``end`` was done: it extends nodes whose driver moves bytes."""
    if end > node.length and node.driver.moves_bytes:
        node.take_length(end)


async def check_probe(node: Node, offset: int, buffers: Sequence[Buffer]) -> None:
    """Refuse a guest's write that would make a guessed raw image look like another format."""
    head = bytearray(PROBE_SIZE)
    await transfer.read(node, 0, memoryview(head))
    written = b"".join(buffers)[: PROBE_SIZE - offset]
    head[offset : offset + len(written)] = written
    found = node.graph.probe(bytes(head), node.filename)
    if found != node.driver.name:
        raise ReadOnlyError(
            f"'{node.filename}' was guessed to be raw, and this write would make it look like {found}; name its format "
            f"(--format raw) to allow it.",
            errno=errno.EPERM,
        )


async def write_zeroes(node: Node, offset: int, length: int, flags: int = 0) -> None:
    """Make a range read as zeroes: compactly if the driver can, otherwise by writing zeroes.

    ``flags``: MAY_UNMAP, NO_FALLBACK (raises NotSupportedError rather than write at length), FUA.
    """
    if not length:
        return
    check_writable(node, flags)
    end = offset + length
    check_end(node, end, "Zeroing")
    if node.config.discard != "unmap" and node.config.detect_zeroes != "unmap":
        flags &= ~MAY_UNMAP
    unit = max(node.limits.zeroes_alignment, node.limits.request_alignment, node.limits.cluster_size)
    guard = node.guards_probe and offset < PROBE_SIZE
    if guard:
        request = guarding_request(end, unit)
    else:
        request = Request(offset // unit * unit, -(-end // unit) * unit, True, serialising=unit > 1)
    begun = False
    request.enter(node)
    try:
        if node.serialising:
            await request.wait_for_earlier(node)
            check_end(node, end, "Zeroing")
        if guard:
            await check_probe(node, offset, (ZEROES[: min(length, PROBE_SIZE)],))
        if node.before_observers:
            await node.before_change(offset, length, Change.ZEROES)
        begun = True
        await transfer.write_zeroes(node, offset, length, flags)
        _grow(node, end)
    except FusediskError as exc:
        exc.at(node.name, "write-zeroes", offset, length)
        raise
    finally:
        if begun:
            node.changed(offset, length, Change.ZEROES)
        request.leave(node)
    if flags & FUA:
        await flush(node)


# --- flush ----------------------------------------------------------------------------------------------


async def flush(node: Node) -> None:
    """Put every write answered before this call on stable storage.

    First the driver's caches go to the OS, then the children are flushed, then the OS's cache goes to the disk;
    ``cache.no-flush`` skips the last step.
    """
    if node.closed:
        raise NoMediumError(f"Node '{node.name}' is closed.")
    if node.config.read_only:
        return
    try:
        await node.driver.flush(partial(_flush_layers, node))
    except FusediskError as exc:
        exc.at(node.name, "flush")
        raise


async def _flush_layers(node: Node) -> None:
    """Flush the driver's caches, the children, and the host's cache."""
    storage = node.filtered or node.storage
    if storage is not None:
        await storage.node.driver.debug_event("flush_to_os")
    await node.driver.flush_to_os()
    if storage is not None:
        await storage.node.driver.debug_event("flush_to_disk")
    for child in list(node.children.values()):
        if child.role is not Role.BACKING:
            await flush(child.node)
    if node.driver.is_protocol:
        await _flush_to_disk(node)


async def _flush_to_disk(node: Node) -> None:
    written = node.completed_writes
    if node.writes_flushed >= written or node.config.cache_no_flush:
        return
    async with node.flush_mutex:
        # The previous holder of the mutex may have flushed our writes as well.
        written = max(written, node.completed_writes)
        if node.writes_flushed < written:
            await node.driver.flush_to_disk()
            node.writes_flushed = written
