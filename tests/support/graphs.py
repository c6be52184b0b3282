"""What must hold of every graph, whatever has been done to it."""

from __future__ import annotations

import json
from typing import Any

from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.permission_update import top_down
from fusedisk.block.model import permissions
from fusedisk.block.model.node import Node, NodeConfig


def assert_sound(graph: Graph) -> None:
    """Edges lead both ways, every node has a user, and permissions are what they are if computed from scratch."""
    for node in graph.nodes.values():
        assert not node.closed
        assert node.parents or node.kept_by_name, f"{node.name} has leaked"
        assert len(set(node.parents)) == len(node.parents)
        for name, edge in node.children.items():
            assert edge.parent is node
            assert edge.name == name
            assert not edge.dormant
            assert edge.node.parents.count(edge) == 1
            assert graph.nodes[edge.node.name] is edge.node
        for edge in node.parents:
            assert edge.node is node
            if edge.parent is None:
                backend = graph.backend_of(edge)
                assert backend is not None
                assert backend.root is edge
            else:
                assert edge.parent.children[edge.name] is edge
                assert graph.nodes[edge.parent.name] is edge.parent
    wanted: dict[Any, tuple[int, int]] = {}
    for node in top_down(graph.nodes.values()):
        values = [wanted[edge] if edge.parent else (edge.perm, edge.shared) for edge in node.parents]
        perm, shared = 0, permissions.ALL
        for edge_perm, edge_shared in values:
            perm, shared = perm | edge_perm, shared & edge_shared
        for edge in node.children.values():
            wanted[edge] = node.driver.child_permissions(edge, perm, shared)
    for edge, expected in wanted.items():
        assert (edge.perm, edge.shared) == expected, f"{edge.owner} and {edge.node.name}"


def picture(graph: Graph) -> Any:
    """All that a failed change must leave as it was."""
    return {
        name: (
            node.driver.options,
            node.config,
            node.explicit,
            None if node.driver.moves_bytes else node.length,  # those grow by writes
            node.backing_overridden,
            node.inherits_from.name if node.inherits_from else None,
            [(edge, edge.node.name, edge.perm, edge.shared) for edge in node.children.values()],
            [(edge, edge.perm, edge.shared) for edge in node.parents],
        )
        for name, node in graph.nodes.items()
    }


async def read_by_name(node: Node) -> bytes:
    """Open what a node prints as its name, in a fresh graph and read-only, and return the bytes.

    The name for messages must give the same ones, unless it is a plain name, which says nothing of the driver.
    """
    found = await _read(node, node.printable_name)
    if node.filename.startswith("json:"):
        assert await _read(node, node.filename) == found
    return found


async def _read(node: Node, name: str) -> bytes:
    graph = Graph(node.graph.drivers, Gate(allow_any=True))  # type: ignore[attr-defined]
    spec: Any = _read_only(json.loads(name[5:])) if name.startswith("json:") else name
    backend = await graph.open_backend(spec, config=NodeConfig(force_share=True))  # the disk is in use
    try:
        return bytes(await backend.read(0, backend.length))
    finally:
        await graph.close()


def _read_only(options: Any) -> Any:
    if not isinstance(options, dict):
        return options
    if options.get("driver") == "copy-on-read":  # which opens over what is writable only
        return _read_only(options["file"])
    return {key: _read_only(value) for key, value in options.items() if key not in ("read-only", "auto-read-only")}
