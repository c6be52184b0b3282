"""Permissions along the edges: computed from the top down, changed all together or not at all."""

from __future__ import annotations

from collections.abc import Iterable

from fusedisk.block.model import permissions
from fusedisk.block.model.edge import Child
from fusedisk.block.model.node import Node
from fusedisk.core.errors import PermissionConflictError, ReadOnlyError

_ONLY_READ = permissions.CONSISTENT_READ, permissions.ALL
_CHANGING = permissions.WRITE | permissions.WRITE_UNCHANGED | permissions.RESIZE


class PreparedPermissions:
    """New permissions for every edge below ``roots``, checked with all drivers, not in force yet.

    Making one raises PermissionConflictError, ReadOnlyError or what a driver's ``check_permissions`` raises; then
    nothing has changed. Call ``commit`` or ``abort`` once. All of it is synchronous.
    """

    def __init__(self, roots: Iterable[Node]) -> None:
        self._wanted: dict[Child, tuple[int, int]] = {}
        self._checked: list[tuple[Node, int, int]] = []
        try:
            for node in top_down(roots):
                perm, shared = self._cumulative(node)
                node.driver.check_permissions(perm, shared)
                self._checked.append((node, perm, shared))
                for edge in node.children.values():
                    self._wanted[edge] = (
                        _ONLY_READ if edge.dormant else node.driver.child_permissions(edge, perm, shared)
                    )
        except BaseException:
            self.abort()
            raise

    def commit(self) -> None:
        """Put the new permissions into force."""
        for edge, (perm, shared) in self._wanted.items():
            edge.perm, edge.shared = perm, shared
        for node, perm, shared in self._checked:
            node.driver.commit_permissions(perm, shared)
            node.graph.changes += 1

    def abort(self) -> None:
        """Drop the new permissions."""
        for node, _, _ in reversed(self._checked):
            node.driver.abort_permissions()

    def _cumulative(self, node: Node) -> tuple[int, int]:
        """Return what all parents of ``node`` together need and share; raises if one refuses what another needs."""
        perm, shared = 0, permissions.ALL
        values = [(edge, *self._wanted.get(edge, (edge.perm, edge.shared))) for edge in node.parents]
        for edge, edge_perm, edge_shared in values:
            if edge_perm & _CHANGING and node.config.read_only:
                raise ReadOnlyError(f"'{node.filename}' is open read-only, but {edge.owner} needs to write to it.")
            perm |= edge_perm
            shared &= edge_shared
            for other, other_perm, _ in values:
                refused = other_perm & ~edge_shared
                if refused and other is not edge and (edge.group is None or other.group is not edge.group):
                    raise PermissionConflictError(
                        f"{other.owner} needs the permission '{permissions.names(refused)}' on '{node.filename}', "
                        f"but {edge.owner} uses it and does not share that."
                    )
        return perm, shared


def update_permissions(roots: Iterable[Node]) -> None:
    """Recompute what every edge below ``roots`` needs and shares and inform the drivers; all or nothing."""
    PreparedPermissions(roots).commit()


def top_down(roots: Iterable[Node]) -> list[Node]:
    """Return ``roots`` and all nodes below them, parents before children."""
    order: list[Node] = []
    done: set[Node] = set()
    stack = [(node, False) for node in roots]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack.extend((edge.node, False) for edge in node.children.values() if edge.node not in done)
    order.reverse()
    return order
