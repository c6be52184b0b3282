"""Block status: where a range's data lies, along a chain, as ``qemu-img map`` reports it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fusedisk.block.model.extent import SPECIAL, UNALLOCATED, ZERO, BlockStatus, Extent
from fusedisk.block.model.node import Node
from fusedisk.block.model.tracked import Request
from fusedisk.block.request.transfer import check_extent


@asynccontextmanager
async def tracked(node: Node, offset: int, length: int) -> AsyncIterator[None]:
    """Count as a read of the range, so that operations that change a whole image, such as applying a snapshot or
    resizing, run before or after. Tracked on all filters and the image below them: those operations enter at the
    image."""
    requests: dict[Request, Node] = {}
    try:
        while True:
            request = Request(offset, offset + length, False)
            request.enter(node)
            requests[request] = node
            await request.wait_for_earlier(node)
            if (below := node.filtered) is None:
                break
            node = below.node
        yield
    finally:
        for request, entered in requests.items():
            request.leave(entered)


async def chain_status(node: Node, offset: int, length: int, base: Node | None = None) -> BlockStatus:
    """Return the status of a prefix of ``[offset, offset + length)``, through the chain down to ``base`` (exclusive).

    The prefix has one status throughout, but need not be the longest such. An empty range has an empty answer.
    """
    if not length:
        return BlockStatus(0, data=False, zero=False, allocated=False)
    depth = 0
    layer = node
    length = min(length, node.length - offset)
    while True:
        extent = await layer.driver.map(offset, length)
        check_extent(layer, extent, length)
        length = extent.length
        is_filter = layer.driver.is_filter
        if not is_filter and extent.status != UNALLOCATED:
            return await _layer_status(layer, extent, offset, depth)
        below = _next_layer(layer)
        if below is None or below is base or offset >= below.length:
            # The zeroes behind a shorter backing file belong to the overlay that goes past its end.
            allocated = below is None and not layer.driver.supports_backing
            place = extent.child if not is_filter else None
            reserved = (extent.offset, place.node.filename) if place is not None else (None, None)
            return BlockStatus(length, False, True, allocated, depth, *reserved)
        depth += not is_filter
        layer = below
        length = min(length, layer.length - offset)


def _next_layer(node: Node) -> Node | None:
    """Return the node that shows where ``node`` has nothing of its own: everywhere, for a filter."""
    edge = node.filtered or node.backing
    return edge.node if edge else None


async def _layer_status(layer: Node, extent: Extent, offset: int, depth: int) -> BlockStatus:
    """Return the status of an allocated extent, with the holes of the file below it if they are known."""
    length = extent.length
    if extent.status == SPECIAL:
        return BlockStatus(length, True, False, True, depth, compressed=extent.compressed)
    zero = extent.status == ZERO
    if extent.child is None:
        own = layer.driver.is_protocol
        return BlockStatus(
            length, not zero, zero, True, depth, offset if own else None, layer.filename if own else None
        )
    below = extent.child.node
    data = not zero
    if data and extent.recurse and await layer.driver.has_holes():
        inner = await chain_status(below, extent.offset, length) if extent.offset < below.length else None
        if layer.driver.passes_status:
            if inner is None:
                return BlockStatus(length, False, True, True, depth)
            return inner._replace(depth=depth + inner.depth) if depth else inner
        # Allocated by a format, never written: data that reads as zeroes.
        zero = inner is None or inner.zero
        length = inner.length if inner is not None else length
    return BlockStatus(length, data, zero, True, depth, extent.offset, below.filename)


async def is_allocated_above(top: Node, base: Node | None, offset: int, length: int) -> tuple[bool, int]:
    """Whether a layer from ``top`` down to ``base`` (exclusive) holds a prefix of the range, and the prefix's length.

    ``[offset, offset + length)`` starts before the end of ``top`` and is not empty.
    """
    layer: Node | None = top
    length = min(length, top.length - offset)
    while layer is not None and layer is not base:
        if offset >= layer.length:
            # Behind its end a shorter layer hides all layers below: these zeroes are its own.
            return True, length
        extent = await layer.driver.map(offset, min(length, layer.length - offset))
        check_extent(layer, extent, length)
        if extent.status != UNALLOCATED and not layer.driver.is_filter:
            return True, extent.length
        length = extent.length
        layer = _next_layer(layer)
    return False, length
