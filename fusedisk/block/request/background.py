"""Work that a driver does ahead of requests, such as reading on for a sequential reader.

The work counts as a request, so the graph does not change under it. It is in flight at every user of the node, so
draining, reopening and closing wait for it; and it is a tracked read of the whole node, so resizes, snapshots and
other serialising requests wait too. In return it calls ``welcome`` after each small step, and ends when the answer is
no.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

from fusedisk.block.model.node import Node, User
from fusedisk.block.model.tracked import Request

log = logging.getLogger(__name__)

_EVERYTHING = 1 << 63

Welcome = Callable[[], bool]
"""Whether the work may go on. Changes between awaits only."""
Work = Callable[[Welcome], Awaitable[None]]


_running = 0


def running() -> int:
    """Return the number of works that run in this process."""
    return _running


def start(node: Node, work: Work) -> bool:
    """Start ``work`` in a task of its own, unless another task waits for the node to be idle. Returns whether it was
    started. Synchronous; call it from inside a request.

    The work handles its own errors: any other is a bug, which is logged and has no other effect.
    """
    backends = node.graph.backends_over(node)
    if not backends or not _welcome(node, backends):
        return False
    for backend in backends:
        backend.hold()
    request = Request(0, _EVERYTHING, False)
    request.enter(node)
    global _running
    _running += 1
    trio.lowlevel.spawn_system_task(_run, node, backends, request, work, name=f"background of '{node.name}'")
    return True


def _welcome(node: Node, backends: Sequence[User]) -> bool:
    return not node.serialising and not any(backend.drain_count for backend in backends)


async def _run(node: Node, backends: Sequence[User], request: Request, work: Work) -> None:
    try:
        await work(lambda: _welcome(node, backends))
    except Exception:
        log.exception("background work on node '%s' failed", node.name)
    finally:
        global _running
        _running -= 1
        request.leave(node)
        for backend in backends:
            backend.release()
