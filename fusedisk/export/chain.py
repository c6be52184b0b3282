"""The nodes below an export: the layers of its backing chain, and the files that hold them."""

from __future__ import annotations

from fusedisk.block.model.children import Role
from fusedisk.block.model.node import Node


def backing_chain(top: Node) -> list[Node]:
    """Return ``top`` and its backing files, each without its filters."""
    chain: list[Node] = []
    node: Node | None = top
    while node is not None:
        node = node.unfiltered
        chain.append(node)
        node = node.backing.node if node.backing is not None else None
    return chain


def storage_nodes(top: Node, *, backing: bool = True) -> list[Node]:
    """Return the protocol nodes below ``top``; without ``backing`` only those that writes may reach."""
    found: dict[Node, None] = {}
    queue = [top]
    while queue:
        node = queue.pop()
        if node.driver.is_protocol:
            found[node] = None
        queue.extend(edge.node for edge in node.children.values() if backing or edge.role is not Role.BACKING)
    return list(found)
