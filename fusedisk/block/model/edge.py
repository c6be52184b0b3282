"""Edges of the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusedisk.block.model import permissions

if TYPE_CHECKING:
    from fusedisk.block.model.children import Role
    from fusedisk.block.model.node import Node


class Child:
    """One edge: ``parent`` uses ``node`` as its child ``name``.

    ``perm`` is what the parent needs of the node, ``shared`` what it lets the node's other parents do.
    ``parent`` is None for the root edge of a :class:`~fusedisk.block.graph.backend.Backend`.
    """

    __slots__ = ("dormant", "frozen", "group", "implied", "name", "node", "owner", "parent", "perm", "role", "shared")

    def __init__(self, name: str, role: Role | None, parent: Node | None, node: Node, owner: str) -> None:
        self.name = name
        self.role = role
        self.parent = parent
        self.node = node
        self.owner = owner
        """The name of the node's user, for messages."""
        self.implied = False
        """The parent's image names the node, so opening the parent opens it too (``implicit`` of ``open_child``)."""
        self.group: object | None = None
        """Edges of one group belong to one user, such as a disk and its partitions, and do not exclude each other."""
        self.dormant = False
        """The parent was opened for a change of the graph that is not in force yet: it may read only."""
        self.frozen: list[str] = []
        """Why the edge must stay as it is, such as a job that relies on it: sentences without their full stops."""
        self.perm = 0
        self.shared = permissions.ALL
