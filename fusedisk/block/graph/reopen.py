"""Changing settings of open nodes: one transaction over many nodes, all or none.

Children that took a setting from their parent follow it, unless their own options had said otherwise. While the
transaction runs, no request is in flight on any of the nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.opening import pop_common_options
from fusedisk.block.graph.permission_update import PreparedPermissions
from fusedisk.block.model.node import Node, NodeConfig
from fusedisk.block.request import io
from fusedisk.core.options import Options, nest


class _Change(NamedTuple):
    config: NodeConfig
    explicit: frozenset[str]
    options: Options


async def reopen(graph: Graph, changes: Mapping[Node, Mapping[str, Any]]) -> None:
    """Change the given options of each node and of what inherits from it; options not given stay as they are.

    Raises OptionError, PermissionConflictError, ReadOnlyError, LockConflictError or what a driver's ``reopen_prepare``
    raises; then every node is as it was.
    """
    queue: dict[Node, _Change] = {}
    for node, given in changes.items():
        options = nest(given)
        config, explicit = pop_common_options(options, node.config)
        merged = {**node.driver.options.given(), **options}
        parsed = node.driver.options_type.parse(merged, node.driver.name)
        queue[node] = _Change(config, node.explicit | explicit, parsed)
    for node in list(queue):
        _enqueue_children(queue, node)
    async with graph.drained(*queue):
        # Half a transaction would be worse than a late cancellation.
        with trio.CancelScope(shield=True):
            await _run(queue)
            for node in reversed(queue):
                node.length = await node.driver.length()
                graph.refresh_limits(node)


def _enqueue_children(queue: dict[Node, _Change], node: Node) -> None:
    for edge in node.children.values():
        child = edge.node
        if child.inherits_from is not node or child in queue or edge.role is None:
            continue
        inherited = queue[node].config.defaults_for_child(edge.role)
        kept = {name: getattr(child.config, name) for name in (*child.explicit, "reference")}
        queue[child] = _Change(dataclasses.replace(inherited, **kept), child.explicit, child.driver.options)
        _enqueue_children(queue, child)


async def _run(queue: dict[Node, _Change]) -> None:
    for node, change in queue.items():
        if change.config.read_only and not node.config.read_only:
            await io.flush(node)
    old = {node: node.config for node in queue}
    _set_configs({node: change.config for node, change in queue.items()})
    try:
        edges = PreparedPermissions(queue)
    finally:
        _set_configs(old)
    prepared: list[tuple[Node, object]] = []
    try:
        for node, change in queue.items():
            prepared.append((node, await node.driver.reopen_prepare(change.config, change.options)))
    except BaseException:
        for node, state in reversed(prepared):
            node.driver.reopen_abort(state)
        edges.abort()
        raise
    _set_configs({node: change.config for node, change in queue.items()})
    for node, state in reversed(prepared):
        node.driver.reopen_commit(state)
        node.driver.options = queue[node].options
        node.explicit = queue[node].explicit
        node.change_mapping()
    # After the drivers: the file driver's locks are by then on its new descriptor.
    edges.commit()


def _set_configs(configs: Mapping[Node, NodeConfig]) -> None:
    for node, config in configs.items():
        node.config = config
