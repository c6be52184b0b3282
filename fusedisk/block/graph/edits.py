"""Changes to edges and settings that can be taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fusedisk.block.graph.permission_update import PreparedPermissions, top_down
from fusedisk.block.model.children import Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.node import Node
from fusedisk.core.errors import NodeNotFoundError, OperationBlockedError, OptionError

if TYPE_CHECKING:
    from fusedisk.block.graph.graph import Graph


class Edits:
    """Changes that are made one after the other, visible at once, until ``undo`` takes all of them back.

    Lists of edges are replaced, never changed in place, so that ``undo`` finds them as they were. All of it is
    synchronous: no other task sees what is not yet agreed on.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []
        self.roots: dict[Node, None] = {}
        """Nodes whose edges, or those below, need other permissions now."""
        self.nodes: dict[Node, None] = {}
        """Nodes whose children or settings were changed."""
        self.became_read_only: list[Node] = []
        """Nodes that follow their storage, see ``follow_read_only``."""
        self.changed: dict[Child, Node | None] = {}
        """Each edge that was changed, and the node that it led to before; None for a new one."""
        self._loops: list[tuple[Child, str]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Take everything back."""
        while self._undo:
            owner, name, value = self._undo.pop()
            setattr(owner, name, value)

    # --- edges ------------------------------------------------------------------------------------------

    def link(self, edge: Child) -> None:
        """Add a new edge. Raises OptionError if the parent has a child of that name, NodeNotFoundError if an end is
        closed by now."""
        parent, node = edge.parent, edge.node
        _check_open(node)
        if parent is not None:
            if parent.graph.nodes.get(parent.name) is not parent:
                raise NodeNotFoundError(f"node '{parent.name}' is closed by now.")
            if edge.name in parent.children:
                raise OptionError(f"node '{parent.name}' has a child '{edge.name}' already.")
            self.set(parent, "children", {**parent.children, edge.name: edge})
            self._loops.append((edge, f"node '{node.name}' cannot be below '{parent.name}'"))
        self.set(node, "parents", [*node.parents, edge])
        self._note(edge, None)

    def unlink(self, edge: Child) -> None:
        """Remove an edge. Raises OperationBlockedError if it is frozen, OptionError if it is gone already."""
        _check_changeable(edge)
        parent, node = edge.parent, edge.node
        if parent is not None:
            self.set(parent, "children", {name: other for name, other in parent.children.items() if other is not edge})
        self.set(node, "parents", [other for other in node.parents if other is not edge])
        self._note(edge, node)

    def move(self, edge: Child, node: Node) -> None:
        """Let an edge lead to another node. Raises OperationBlockedError if it is frozen, OptionError if it is gone,
        NodeNotFoundError if the node is closed by now."""
        _check_changeable(edge)
        _check_open(node)
        old = edge.node
        self.set(old, "parents", [other for other in old.parents if other is not edge])
        self.set(edge, "node", node)
        self.set(node, "parents", [*node.parents, edge])
        self._loops.append((edge, f"node '{node.name}' cannot replace '{old.name}'"))
        self._note(edge, old)

    def _note(self, edge: Child, old: Node | None) -> None:
        self.changed.setdefault(edge, old)
        if edge.parent is not None:
            self.note(edge.parent)
        self.roots[edge.node] = None
        if old is not None:
            self.roots[old] = None

    def note(self, node: Node) -> None:
        """Note that children or settings of a node were changed."""
        self.nodes[node] = self.roots[node] = None

    # --- checks -----------------------------------------------------------------------------------------

    def check_loops(self) -> None:
        """Raise OptionError if an edge that was added or moved has closed a loop."""
        for edge, sentence in self._loops:
            if edge.parent is not None and reaches(edge.node, edge.parent):
                raise OptionError(f"{sentence}: the graph would have a loop.")

    def follow_read_only(self, nodes: Iterable[Node]) -> None:
        """Make nodes with auto-read-only read-only if their storage is. ``nodes``: children before parents."""
        for node in nodes:
            config = node.config
            if (
                config.auto_read_only
                and not config.read_only
                and any(edge.node.config.read_only for edge in node.children.values() if edge.role is not Role.BACKING)
            ):
                self.set(node, "config", dataclasses.replace(config, read_only=True))
                self.became_read_only.append(node)
                self.note(node)


@contextmanager
def edited(graph: Graph) -> Iterator[Edits]:
    """Make the changes of the block and put their permissions into force; after any error all is as it was.

    For new edges that no request uses yet: nothing is drained, and nothing is prepared but permissions.
    """
    edits = Edits()
    try:
        yield edits
        edits.check_loops()
        permissions = PreparedPermissions(edits.roots)
    except BaseException:
        edits.undo()
        raise
    permissions.commit()
    graph.edges_changed()


def _check_open(node: Node) -> None:
    if not node.is_open:
        raise NodeNotFoundError(f"node '{node.name}' is not open yet, or closed by now.")


def _check_changeable(edge: Child) -> None:
    place = f"'{edge.parent.name}'" if edge.parent is not None else edge.owner
    if edge not in edge.node.parents:
        raise OptionError(f"the link '{edge.name}' from {place} is gone by now.")
    if edge.frozen:
        raise OperationBlockedError(f"The link '{edge.name}' from {place} cannot change now: {edge.frozen[0]}.")


def reaches(start: Node, wanted: Node) -> bool:
    """Whether ``wanted`` is ``start`` or below it."""
    return wanted in start.with_all_below()


def with_all_above(nodes: Iterable[Node]) -> list[Node]:
    """Return ``nodes`` and all nodes above them, children before parents."""
    found = dict.fromkeys(nodes)
    queue = list(found)
    while queue:
        for edge in queue.pop().parents:
            if edge.parent is not None and edge.parent not in found:
                found[edge.parent] = None
                queue.append(edge.parent)
    return children_first(found)


def children_first(nodes: Iterable[Node]) -> list[Node]:
    """Return ``nodes``, children before parents."""
    wanted = dict.fromkeys(nodes)
    return [node for node in reversed(top_down(wanted)) if node in wanted]
