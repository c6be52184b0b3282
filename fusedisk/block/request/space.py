"""The door for requests about space and length: preallocation, discards and resizing. They pass it in the order that
:mod:`.io` describes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import trio

from fusedisk.block.model import permissions
from fusedisk.block.model.driver import UNCHANGED, ZERO_NEW
from fusedisk.block.model.extent import UNALLOCATED, ZERO
from fusedisk.block.model.node import Node
from fusedisk.block.model.observer import Change
from fusedisk.block.model.tracked import Request
from fusedisk.block.request import transfer
from fusedisk.block.request.checks import PROBE_SIZE, check_end, check_writable, guarding_request
from fusedisk.block.request.io import COPY_CHUNK, check_probe
from fusedisk.core.at_once import is_at_once
from fusedisk.core.errors import (
    FusediskError,
    NotSupportedError,
    OutOfRangeError,
    PermissionConflictError,
)
from fusedisk.core.zeroes import ZEROES

_RANGES_AT_ONCE = 256
"""Short ranges that are freed in one trip to the host: some milliseconds."""


# --- space ----------------------------------------------------------------------------------------------


async def preallocate(node: Node, offset: int, length: int) -> None:
    """Reserve host space for a range, which reads as before. If the driver cannot reserve it, write the range."""
    if not length:
        return
    check_writable(node, UNCHANGED)
    end = offset + length
    check_end(node, end, "Allocating", also_files=True)
    unit = max(node.limits.cluster_size, node.limits.request_alignment)
    start, stop = offset // unit * unit, min(-(-end // unit) * unit, node.length)
    request = Request(start, stop, True, serialising=True)
    request.enter(node)
    try:
        await request.wait_for_earlier(node)
        check_end(node, end, "Allocating", also_files=True)
        try:
            with trio.CancelScope(shield=True):
                await node.driver.preallocate(start, stop - start)
        except NotSupportedError:
            await _write_unallocated(node, start, stop)
    except FusediskError as exc:
        exc.at(node.name, "preallocate", offset, length)
        raise
    finally:
        node.changed(start, stop - start, Change.STORAGE)
        request.leave(node)


async def _write_unallocated(node: Node, position: int, stop: int) -> None:
    """Write the parts of a range that the top layer has no data for, with the bytes that they read as. The caller holds
    the range."""
    while position < stop:
        length = min(stop - position, COPY_CHUNK)
        extent = await node.driver.map(position, length)
        transfer.check_extent(node, extent, length)
        if extent.status in (UNALLOCATED, ZERO):
            content = memoryview(bytearray(extent.length))
            await transfer.read(node, position, content)
            await transfer.write(node, position, (content,), UNCHANGED)
        position += extent.length


async def discard(node: Node, offset: int, length: int) -> None:
    """Free a range, as far as the node's settings and driver allow; the rest stays as it is."""
    check_writable(node, 0)
    if not node.config.discard_unmap:
        return
    unit = max(node.limits.discard_alignment, node.limits.request_alignment)
    start, stop = _discardable(node, offset, length)
    if start >= stop:
        return
    widen = max(unit, node.limits.cluster_size)
    guard = node.guards_probe and start < PROBE_SIZE
    if guard:
        request = guarding_request(stop, widen)
    else:
        request = Request(start // widen * widen, -(-stop // widen) * widen, True, serialising=True)
    done = start
    request.enter(node)
    try:
        if node.serialising:
            await request.wait_for_earlier(node)
            stop = min(stop, node.length)
            if start >= stop:
                return
        if guard:
            await check_probe(node, start, (ZEROES[: min(stop - start, PROBE_SIZE)],))
        await node.before_change(start, stop - start, Change.DISCARD)
        step = max(node.limits.max_discard // unit * unit, unit)
        for position in range(start, stop, step):
            if position > start:
                await trio.lowlevel.checkpoint()
            done = min(position + step, stop)
            with trio.CancelScope(shield=True):
                await node.driver.discard(position, done - position)
    except NotSupportedError:
        done = position  # the last step has changed nothing
    except FusediskError as exc:
        exc.at(node.name, "discard", offset, length)
        raise
    finally:
        if done > start:
            node.changed(start, done - start, Change.DISCARD)
        request.leave(node)


def _discardable(node: Node, offset: int, length: int) -> tuple[int, int]:
    """The part of a range that a discard may free: whole units, except at the end of the node."""
    end = min(offset + length, node.length)
    unit = max(node.limits.discard_alignment, node.limits.request_alignment)
    return -(-offset // unit) * unit, end if end == node.length else end // unit * unit


async def discard_ranges(node: Node, ranges: Sequence[tuple[int, int]]) -> None:
    """Free many short ranges as :func:`discard` frees one, with few trips to the host. ``ranges``: offset and length of
    each, sorted."""
    check_writable(node, 0)
    if not node.config.discard_unmap:
        return
    for first in range(0, len(ranges), _RANGES_AT_ONCE):
        if first:
            await trio.lowlevel.checkpoint()
        part = ranges[first : first + _RANGES_AT_ONCE]
        if node.guards_probe:
            for offset, length in part:
                await discard(node, offset, length)
        else:
            await _discard_part(node, part)


async def _discard_part(node: Node, ranges: Sequence[tuple[int, int]]) -> None:
    low, high = ranges[0][0], sum(ranges[-1])
    widen = max(node.limits.discard_alignment, node.limits.request_alignment, node.limits.cluster_size)
    request = Request(low // widen * widen, -(-high // widen) * widen, True, serialising=True)
    parts: list[tuple[int, int]] = []
    request.enter(node)
    try:
        if node.serialising:
            await request.wait_for_earlier(node)
        found = (_discardable(node, offset, length) for offset, length in ranges)
        wanted = [(start, stop - start) for start, stop in found if start < stop]
        for part in wanted:
            await node.before_change(*part, Change.DISCARD)
        parts = wanted
        with trio.CancelScope(shield=True):
            await node.driver.discard_ranges(parts)
    except NotSupportedError:
        parts = []
    except FusediskError as exc:
        exc.at(node.name, "discard", low, high - low)
        raise
    finally:
        for offset, length in parts:
            node.changed(offset, length, Change.DISCARD)
        request.leave(node)


# --- length ---------------------------------------------------------------------------------------------


async def truncate(node: Node, length: int, preallocation: str = "off", flags: int = 0) -> None:
    """Change the node's virtual length.

    New space reads as zeroes, also where a longer backing file has data. ``preallocation``: off, metadata, falloc or
    full, for the space added. Raises NotSupportedError if the driver cannot resize, OperationBlockedError if resizing
    is blocked.
    """
    if not 0 <= length < 1 << 63:
        raise OutOfRangeError(f"'{node.filename}' cannot be {length} bytes long, expected 0 to 2^63 - 1.")
    check_writable(node, 0)
    node.check_operation("resize")
    if not node.perm & permissions.RESIZE:
        raise PermissionConflictError(f"No user of node '{node.name}' has asked for the resize permission.")
    request = Request(0, 1 << 63, True, serialising=True)
    old: int | None = None
    request.enter(node)
    try:
        await request.wait_for_earlier(node)
        await node.before_change(*between_lengths(node.length, length), Change.RESIZE)
        old = node.length
        if node.backing is not None and min(node.backing.node.length, length) > node.length:
            flags |= ZERO_NEW
        with nullcontext() if is_at_once() else trio.CancelScope(shield=True):
            await node.driver.truncate(length, preallocation, flags)
            node.take_length(await node.driver.length())
        node.change_mapping()
    except FusediskError as exc:
        exc.at(node.name, "resize", length)
        raise
    finally:
        if old is not None:
            node.changed(*between_lengths(old, length, node.length), Change.RESIZE)
        request.leave(node)
    if node.filtered is None:  # a filter leaves this to the node below, which also notifies the filter's users
        node.resized()


def between_lengths(*lengths: int) -> tuple[int, int]:
    """Return offset and length of what a resize between these lengths cuts off or adds."""
    return min(lengths), max(lengths) - min(lengths)
