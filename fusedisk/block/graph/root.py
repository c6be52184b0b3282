"""What a user of the graph stands on: another node in place of its own, and whether it may write.

Both keep the :class:`.Backend`, so whatever uses it goes on with it.
"""

from __future__ import annotations

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import WRITER_SHARES
from fusedisk.block.graph.permission_update import update_permissions
from fusedisk.block.graph.reopen import reopen
from fusedisk.block.model import permissions


async def exchange(one: Backend, other: Backend) -> None:
    """Let two backends exchange their nodes; one may have none. Requests wait meanwhile, and what was answered is
    flushed first. Raises the error of the flush; then nothing has changed."""
    one.quiesce()
    other.quiesce()
    try:
        for backend in (one, other):
            await backend.wait_idle()
            if backend.writable:
                await backend.last_flush()
        one.graph.exchange_roots(one, other)
    finally:
        one.resume()
        other.resume()


async def set_writable(backend: Backend, writable: bool) -> None:
    """Let a backend write, or no longer. Raises what :func:`.reopen` raises; then nothing has changed."""
    edge, node, graph = backend.root, backend.node, backend.graph
    assert edge is not None
    if writable == backend.writable:
        return
    if writable:
        await reopen(graph, {node: {"read-only": False}})
    else:
        await backend.flush()
    before = edge.perm, edge.shared
    changing = permissions.WRITE | permissions.WRITE_UNCHANGED | permissions.RESIZE
    edge.perm = permissions.CONSISTENT_READ | (changing if writable else 0)
    edge.shared = WRITER_SHARES if writable else permissions.ALL
    try:
        update_permissions([node])
        if not writable:
            await reopen(graph, {node: {"read-only": True}})
    except BaseException:
        edge.perm, edge.shared = before
        update_permissions([node])
        if writable:
            await reopen(graph, {node: {"read-only": True}})
        raise
