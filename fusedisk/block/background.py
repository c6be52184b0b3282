"""Work that a driver does ahead of requests, such as reading on for a sequential reader.

Nothing in the graph waits for it in vain and nothing is changed under it, since it counts as a request: in flight at
every user of the node, so draining, reopening and closing wait for it; and as a tracked read of the whole node, so
resizes, snapshots and other serialising requests do. In return it looks at ``welcome`` after each small step, and ends
when that says no.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from fusedisk.block.backend import Backend
from fusedisk.block.node import Node
from fusedisk.block.tracked import Request

log = logging.getLogger(__name__)

_EVERYTHING = 1 << 63

Welcome = Callable[[], bool]
"""Whether the work may go on. Changes between awaits only."""
Work = Callable[[Welcome], Awaitable[None]]


_running = 0


def running() -> int:
    """How many works are under way in this process."""
    return _running


def start(node: Node, work: Work) -> bool:
    """Start ``work`` in a task of its own, unless somebody waits for the node to be idle. Synchronous, called from
    inside a request; tells whether it was started.

    The work handles its own errors: any other is a bug, which is logged and costs nobody anything.
    """
    backends = node.backends()
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


def _welcome(node: Node, backends: list[Backend]) -> bool:
    return not node.serialising and not any(backend.quiesced for backend in backends)


async def _run(node: Node, backends: list[Backend], request: Request, work: Work) -> None:
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
