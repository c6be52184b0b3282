"""Overwrites: plain writes to space that is allocated and the disk's alone. They pass a snapshot that is being made or
deleted (``request/snapshot.py``), which changes nothing for them until its end.

The snapshot holds its format's mutex, so a write that passes must never need it. That holds for one extent that
``lookup_in_place`` answers: the transfer asks for it again before the first await and finds the same. It does not hold
for a second extent, whose table may leave memory while the first is written, nor with an observer that is asked before.
"""

from __future__ import annotations

from functools import partial

from fusedisk.block.model.node import Node
from fusedisk.block.model.tracked import Request
from fusedisk.core.errors import FusediskError


async def prepare(node: Node, request: Request) -> None:
    """Let a plain write, which is not entered yet, pass as long as it is an overwrite."""
    request.in_place = partial(_is_in_place, node, request)
    if any(other.lets_overwrites for other in node.tracked) and not request.in_place():
        await _load_mapping(node, request)


def _is_in_place(node: Node, request: Request) -> bool:
    """Whether the whole write is an overwrite that can begin at once."""
    if node.before_observers or node.fenced is not None or request.end > node.length:
        return False
    length = request.end - request.offset
    extent = node.driver.lookup_in_place(request.offset, length)
    return extent is not None and extent.length == length


async def _load_mapping(node: Node, write: Request) -> None:
    """Bring the table that the answer depends on into memory, as a read of the range would."""
    offset, length = write.offset, write.end - write.offset
    read = Request(offset, write.end, False)
    read.enter(node)
    try:
        await read.wait_for_earlier(node)
        if write.end <= node.length:
            await node.driver.map(offset, length)
    except FusediskError as exc:
        exc.at(node.name, "write", offset, length)
        raise
    finally:
        read.leave(node)
