"""The door for requests about space and length: preallocation, discards and resizing. They pass it in the order that
:mod:`.io` describes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import trio

from fusedisk.block.model import permissions
from fusedisk.block.model.extent import UNALLOCATED, ZERO
from fusedisk.block.model.flags import UNCHANGED, ZERO_NEW
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
    """Free a range, as far as the node's settings and driver allow; the rest stays as it is. A range longer than the
    driver's limit is freed piece by piece: requests for the pieces that are done go on meanwhile."""
    check_writable(node, 0)
    if node.config.discard != "unmap":
        return
    start, stop = _discardable(node, offset, length)
    if start >= stop:
        return
    unit = _widening_unit(node)
    guard = node.guards_probe and start < PROBE_SIZE
    request = guarding_request(stop, unit) if guard else _discard_request(node, start, stop)
    request.enter(node)
    try:
        if node.serialising:
            await request.wait_for_earlier(node)
            start, stop = _discardable(node, start, stop - start)
            if start >= stop:
                return
        if guard:
            await check_probe(node, start, (ZEROES[: min(stop - start, PROBE_SIZE)],))
        await node.before_change(start, stop - start, Change.DISCARD)
        step = _longest_discard(node)
        for position in range(start, stop, step):
            if position > start:
                if not guard or position >= PROBE_SIZE:
                    request.narrow(position // unit * unit)
                await trio.lowlevel.checkpoint()
            await _discard_piece(node, position, min(step, stop - position))
    except NotSupportedError:
        pass  # the rest stays as it is
    except FusediskError as exc:
        exc.at(node.name, "discard", offset, length)
        raise
    finally:
        request.leave(node)


async def _discard_piece(node: Node, offset: int, length: int) -> None:
    may_have_changed = True
    try:
        with trio.CancelScope(shield=True):
            await node.driver.discard(offset, length)
    except NotSupportedError:
        may_have_changed = False
        raise
    finally:
        if may_have_changed:
            node.changed(offset, length, Change.DISCARD)


def _discardable(node: Node, offset: int, length: int) -> tuple[int, int]:
    """The part of a range that a discard may free: whole units, except at the end of the node."""
    end = min(offset + length, node.length)
    unit = max(node.limits.discard_alignment, node.limits.request_alignment)
    return -(-offset // unit) * unit, end if end == node.length else end // unit * unit


def _longest_discard(node: Node) -> int:
    unit = max(node.limits.discard_alignment, node.limits.request_alignment)
    return max(node.limits.max_discard // unit * unit, unit)


def _widening_unit(node: Node) -> int:
    limits = node.limits
    return max(limits.discard_alignment, limits.request_alignment, limits.cluster_size)


def _discard_request(node: Node, start: int, stop: int) -> Request:
    unit = _widening_unit(node)
    return Request(start // unit * unit, -(-stop // unit) * unit, True, serialising=True)


async def discard_ranges(node: Node, ranges: Sequence[tuple[int, int]]) -> None:
    """Free many short ranges as :func:`discard` frees one, with few trips to the host. ``ranges``: offset and length of
    each, sorted. The caller sees to it that nobody writes to those whose turn is yet to come."""
    check_writable(node, 0)
    if node.config.discard != "unmap":
        return
    longest = _longest_discard(node)
    for first in range(0, len(ranges), _RANGES_AT_ONCE):
        if first:
            await trio.lowlevel.checkpoint()
        part = ranges[first : first + _RANGES_AT_ONCE]
        alone = part if node.guards_probe else [(offset, length) for offset, length in part if length > longest]
        for offset, length in alone:
            await discard(node, offset, length)
        if len(alone) < len(part):
            await _discard_together(node, [each for each in part if each[1] <= longest] if alone else part)


async def _discard_together(node: Node, ranges: Sequence[tuple[int, int]]) -> None:
    """Free ranges in one go. Each is held by a request of its own, so that requests between them go on."""
    requests: list[Request] = []
    for offset, length in ranges:
        request = _discard_request(node, offset, offset + length)
        if requests and request.offset < requests[-1].end:
            requests[-1].end = max(requests[-1].end, request.end)  # two in one cluster
        else:
            requests.append(request)
    others = bool(node.tracked)
    for request in requests:
        request.enter(node)
    parts: list[tuple[int, int]] = []
    try:
        if others:
            for request in requests:
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
        low = ranges[0][0]
        exc.at(node.name, "discard", low, sum(ranges[-1]) - low)
        raise
    finally:
        for offset, length in parts:
            node.changed(offset, length, Change.DISCARD)
        for request in requests:
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
    request = Request.of_all()
    request.alone = preallocation != "off"
    old: int | None = None
    request.enter(node)
    try:
        await request.wait_for_earlier(node)
        if length < node.length:
            request.alone = True
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
