"""Finds out where each range of a read-only backing chain leads, through all its layers, from tables in memory."""

from __future__ import annotations

from collections.abc import Callable

from fusedisk.block.model.extent import DATA, SPECIAL, UNALLOCATED
from fusedisk.block.model.flags import Buffer
from fusedisk.block.model.node import Node
from fusedisk.block.request.runs import RunMap
from fusedisk.core.zeroes import zero_fill

Fill = Callable[[int, Buffer], bool]
"""Fills a buffer from an offset in its source."""

_ALIGNMENT = 1 << 21
"""Lookups begin at a multiple of this, so that random reads of neighbours share them."""
_LOOKAHEAD = 1 << 26
"""The most bytes that one lookup covers."""
_MOST_STEPS = 64
"""The most extents that one miss looks up."""


def learn(runs: RunMap[Fill], node: Node, offset: int, length: int) -> None:
    """Add to ``runs`` where ``offset`` of a read-only chain leads, and the ranges around it."""
    position, end = offset & -_ALIGNMENT, offset + length
    empty: dict[Node, tuple[int, int]] = {}
    new: list[tuple[int, int, Fill, int]] = []
    for _ in range(_MOST_STEPS):
        known = runs.find(position)
        if known >= 0:
            position = runs.ends[known]
        else:
            found = _resolve(node, position, _LOOKAHEAD, empty)
            if found is not None:
                new.append(_run(position, found))
                position = new[-1][1]
            elif position < offset:
                position = offset
                continue
            else:
                break
        if position >= end:
            break
    else:
        found = _resolve(node, offset, length, empty) if position <= offset else None
        if found is not None:
            new.append(_run(offset, found))
    runs.add_all(new)


_Found = tuple[int, Fill, int]
"""A length, the function that fills that much, and the source offset to pass to it."""


def _run(offset: int, found: _Found) -> tuple[int, int, Fill, int]:
    """Return the result of :func:`_resolve` at ``offset`` in the form that :class:`RunMap` takes."""
    count, fill, place = found
    return offset, offset + count, fill, place - offset if fill is not fill_with_zeroes else 0


_NO_RANGE = (0, 0)


def _resolve(node: Node, offset: int, length: int, empty: dict[Node, tuple[int, int]]) -> _Found | None:
    """Return what fills a prefix of a range of a node; None if a layer's mapping is not in memory.

    ``empty`` holds a range of each layer that has no data of its own; new ones are added. So the upper layers are
    asked once about a large hole, not for each scattered piece below it.
    """
    while True:
        room = node.length - offset
        if length > room:
            length = room
        driver = node.driver
        if driver.moves_bytes:
            return length, driver.read_now, offset
        start, end = empty.get(node, _NO_RANGE)
        if start <= offset < end:
            if length > end - offset:
                length = end - offset
        else:
            extent = driver.lookup(offset, min(max(length, _ALIGNMENT), room))
            if extent is None:
                return None
            status, count, child, place, _, _, _ = extent
            length = min(length, count)
            if status == DATA:
                assert child is not None
                if place >= child.node.length:
                    return length, fill_with_zeroes, 0
                node, offset = child.node, place
                continue
            if status == SPECIAL:
                return length, driver.read_cached, offset
            if status != UNALLOCATED:
                return length, fill_with_zeroes, 0
            empty[node] = offset, offset + count
        backing = node.backing
        if backing is None or offset >= backing.node.length:
            return length, fill_with_zeroes, 0
        node = backing.node


def fill_with_zeroes(place: int, buffer: Buffer) -> bool:
    """Fill a range that no layer holds."""
    zero_fill(buffer)
    return True
