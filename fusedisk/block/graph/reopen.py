"""Changing settings of open nodes, and what that means for the nodes below.

Children that took a setting from their parent follow it, unless their own options had said otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fusedisk.block.graph.opening import pop_common_options
from fusedisk.block.model.node import Node, NodeConfig
from fusedisk.core.options import Options, nest

if TYPE_CHECKING:
    from fusedisk.block.graph.graph import Graph


class Settings(NamedTuple):
    """All new settings of one node."""

    config: NodeConfig
    explicit: frozenset[str]
    options: Options


async def reopen(graph: Graph, changes: Mapping[Node, Mapping[str, Any]]) -> None:
    """Change the given options of each node and of what inherits from it; options not given stay as they are.

    Raises OptionError, PermissionConflictError, ReadOnlyError, LockConflictError or what a driver's ``reopen_prepare``
    raises; then every node is as it was.
    """
    async with graph.changing() as change:
        for node, options in changes.items():
            change.reopen(node, options)


def new_settings(changes: Mapping[Node, Mapping[str, Any]]) -> dict[Node, Settings]:
    """Return the new settings of all nodes that the changes reach, parents before children. Raises OptionError."""
    queue: dict[Node, Settings] = {}
    for node, given in changes.items():
        options = nest(given)
        config, explicit = pop_common_options(options, node.config)
        merged = {**node.driver.options.given(), **options}
        parsed = node.driver.options_type.parse(merged, node.driver.name)
        queue[node] = Settings(config, node.explicit | explicit, parsed)
    for node in queue:
        node.check_operation("reopen")
    stack = list(reversed(queue))
    while stack:
        node = stack.pop()
        for edge in node.children.values():
            child = edge.node
            if child.inherits_from is not node or child in queue or edge.role is None:
                continue
            inherited = queue[node].config.defaults_for_child(edge.role)
            kept = {name: getattr(child.config, name) for name in (*child.explicit, "reference")}
            queue[child] = Settings(dataclasses.replace(inherited, **kept), child.explicit, child.driver.options)
            stack.append(child)
    return queue
