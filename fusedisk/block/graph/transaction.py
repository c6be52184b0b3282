"""Changing the graph: several changes are prepared together, then all come into force or none does.

While requests run, a change goes through these steps:

1. The caller names the changes, and opens the nodes that they need. Nothing is held back meanwhile.
2. The users whose requests take the changed edges, or pass reopened nodes, are drained; nobody else is.
3. All changes are made for a moment and checked: loops, frozen edges, permissions, what drivers say. Then they are
   taken back, so that no other task sees them.
4. What takes time is prepared: data is flushed that would have no user afterwards, and drivers prepare new settings.
5. The changes are made again, since others may have attached meanwhile, and come into force. Nothing here suspends, and
   after the last check nothing can fail.
6. Lengths and limits are read again, from the bottom up, and the users go on.

QEMU's counterparts: ``bdrv_replace_node``, ``bdrv_set_backing_hd``, ``bdrv_append``, ``bdrv_reopen_multiple``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fusedisk.block.graph.edits import Edits, children_first, reaches, with_all_above
from fusedisk.block.graph.opening import Opener
from fusedisk.block.graph.permission_update import PreparedPermissions, top_down
from fusedisk.block.graph.reopen import Settings, new_settings
from fusedisk.block.model import permissions
from fusedisk.block.model.children import Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.node import Node
from fusedisk.block.model.observer import Change
from fusedisk.block.request import io
from fusedisk.core.alone import shield
from fusedisk.core.errors import FusediskError, NotSupportedError, OptionError

if TYPE_CHECKING:
    from fusedisk.block.graph.backend import Backend
    from fusedisk.block.graph.drain import Target
    from fusedisk.block.graph.graph import Graph

log = logging.getLogger(__name__)


class _Step(NamedTuple):
    targets: Callable[[], Iterable[Target]]
    """What must be drained."""
    apply: Callable[[Edits], None]


class GraphChange:
    """Changes to one graph, made by :meth:`Graph.changing`. Each method adds one; they are made in that order.

    The end of the block raises OptionError for a loop or for what a driver cannot do, OperationBlockedError,
    PermissionConflictError, ReadOnlyError, LockConflictError, or what a driver's ``reopen_prepare`` raises. Then
    everything is as it was, and nodes that were opened for the change are closed.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._steps: list[_Step] = []
        self._reopened: dict[Node, Mapping[str, Any]] = {}
        self._opened: list[Node] = []
        self._moved: dict[Node, int] = {}
        """The nodes that show other bytes from now on, with their old lengths."""
        self._perhaps_unused: list[Node] = []

    # --- new nodes --------------------------------------------------------------------------------------

    async def open_filter(self, target: Node | Child, options: Mapping[str, Any]) -> Node:
        """Open a filter over a node, or over the node that an edge leads to, with the settings of that node."""
        node = target if isinstance(target, Node) else target.node
        driver = options.get("driver")
        kind = self._graph.drivers.load(driver) if isinstance(driver, str) else None
        spec = next((spec for spec in kind.child_specs if spec.role is Role.FILTERED), None) if kind else None
        if kind is None or spec is None or not kind.is_filter:
            raise OptionError(f"driver '{driver}' is no filter, only filters can be inserted.")
        return await self.open_node({**options, spec.name: node.name}, over=node)

    async def open_node(self, options: Mapping[str, Any], *, over: Node) -> Node:
        """Open a node with the settings of ``over``, which the options may refer to by name. Until the change is in
        force it needs no permission but that to read, so it may even be one that will shut out today's users."""
        config = dataclasses.replace(
            over.config, detect_zeroes="off", copy_on_read=False, discard="unmap", reference=None
        )
        node = await Opener(self._graph, dormant=True).open(options, config, None)
        self._opened.append(node)
        return node

    async def close_opened(self, cause: BaseException) -> None:
        """Close the nodes that were opened for a change that failed with ``cause``."""
        for node in self._opened:
            await self._graph.close_failed_opening(node, cause)

    # --- changes ----------------------------------------------------------------------------------------

    def attach(self, node: Node, name: str, *, writable: bool, write_cache: bool = True) -> Backend:
        """Attach a user as :meth:`Graph.attach` does. It has no root node until the change is in force."""
        backend, edge = self._graph.new_backend(node, name, writable, write_cache, None, None)
        self._steps.append(_Step(list, lambda edits: self._graph.register(edits, backend, edge)))
        return backend

    def attach_child(self, parent: Node, node: Node, name: str, role: Role) -> Child:
        """Give an open node another child."""
        edge = Child(name, role, parent, node, f"node '{parent.name}'")

        def apply(edits: Edits) -> None:
            _check_children_may_change(parent, name)
            edits.link(edge)

        self._steps.append(_Step(lambda: [parent], apply))
        return edge

    def detach_child(self, edge: Child) -> None:
        """Take a child away from an open node."""

        def apply(edits: Edits) -> None:
            assert edge.parent is not None
            _check_children_may_change(edge.parent, edge.name)
            if edge.role is Role.BACKING:
                edits.set(edge.parent, "backing_overridden", True)
            edits.unlink(edge)

        self._steps.append(_Step(lambda: [edge], apply))

    def replace(self, old: Node | Child, new: Node) -> None:
        """Let every parent of ``old`` but ``new`` itself, or one edge, lead to ``new``. ``old`` is closed if it is
        unused then. A writer's data is flushed before it leaves a node."""

        def edges() -> list[Child]:
            return [old] if isinstance(old, Child) else [edge for edge in old.parents if edge.parent is not new]

        def apply(edits: Edits) -> None:
            (old if isinstance(old, Node) else old.node).check_operation("replace")
            for edge in edges():
                edits.move(edge, new)

        if isinstance(old, Node):
            self._perhaps_unused.append(old)
        self._steps.append(_Step(edges, apply))

    def set_backing(self, node: Node, backing: Node | None, *, named: bool = False) -> None:
        """Give an image another backing file, or none. ``named``: its header names that one, as the caller has just
        written it; otherwise the node's name says what its backing file is."""

        def apply(edits: Edits) -> None:
            if not node.driver.supports_backing:
                raise OptionError(f"node '{node.name}' is {node.driver.name}, which has no backing file.")
            edge = node.backing
            if backing is None:
                if edge is not None:
                    edits.unlink(edge)
            elif edge is not None:
                edits.move(edge, backing)
            else:
                edits.link(Child("backing", Role.BACKING, node, backing, f"node '{node.name}'"))
            edits.set(node, "backing_overridden", not named)
            known = {name: serial for name, serial in node.opened_children.items() if name != "backing"}
            if named and backing is not None:
                known["backing"] = backing.serial
            if named:
                edits.set(node, "opened_children", known)

        self._steps.append(_Step(lambda: [node], apply))

    def insert_filter(self, filter: Node, target: Node | Child) -> None:
        """Put a filter, which is open over a node, between that node and its parents, or into one edge."""

        def edges() -> list[Child]:
            if isinstance(target, Child):
                return [target]
            return [edge for edge in target.parents if edge.parent is None or not reaches(filter, edge.parent)]

        def apply(edits: Edits) -> None:
            if not filter.driver.is_filter:
                raise OptionError(f"node '{filter.name}' is {filter.driver.name}, only filters can be inserted.")
            below = target if isinstance(target, Node) else target.node
            below.check_operation("replace")
            if not reaches(filter, below):
                raise OptionError(f"filter '{filter.name}' cannot be inserted above '{below.name}': it is not over it.")
            for edge in edges():
                if edge.parent is not None and below.inherits_from is edge.parent:
                    edits.set(filter, "inherits_from", edge.parent)
                    edits.set(below, "inherits_from", filter)
                edits.move(edge, filter)

        self._steps.append(_Step(edges, apply))

    def remove_filter(self, filter: Node) -> None:
        """Connect the parents of a filter to its child."""

        def apply(edits: Edits) -> None:
            if filter.filtered is None:
                raise OptionError(f"node '{filter.name}' is {filter.driver.name}, only filters can be removed.")
            filter.check_operation("replace")
            below = filter.filtered.node
            if below.inherits_from is filter:
                edits.set(below, "inherits_from", filter.inherits_from)
            for edge in filter.parents:
                edits.move(edge, below)

        self._perhaps_unused.append(filter)
        self._steps.append(_Step(lambda: list(filter.parents), apply))

    def reopen(self, node: Node, options: Mapping[str, Any]) -> None:
        """Change options of a node and of what inherits from it. A child may be given by the name of another node, or
        be None for no backing file; other options not given stay as they are."""
        left = dict(options)
        for spec in node.driver.child_specs:
            if isinstance(name := left.get(spec.name), str):
                del left[spec.name]
                if spec.name not in node.children:
                    raise NotSupportedError(f"node '{node.name}' has no child '{spec.name}' that could be replaced.")
                self.replace(node.children[spec.name], self._graph.node(name))
        if "backing" in left:
            name = left.pop("backing")
            if name is not None and not isinstance(name, str):
                raise OptionError("option 'backing' must be the name of a node, or null, for an open image.")
            self.set_backing(node, self._graph.node(name) if name is not None else None)
        self._reopened[node] = {**self._reopened.get(node, {}), **left}

    # --- putting them into force ------------------------------------------------------------------------

    async def commit(self) -> None:
        """Put all changes into force. Raises what the class says; then everything is as it was. An error that comes
        from closing nodes without users comes last, when the changes are in force."""
        if not self._steps and not self._reopened:
            return
        graph = self._graph
        async with graph.drained() as drain:
            await drain.add(self._targets())
            async with graph.change_mutex:
                graph.changing_users = drain.users
                try:
                    # Once more: the graph may have changed while this waited.
                    await drain.add(self._targets())
                    lengths = {user: user.length for user in drain.users if user.root is not None}
                    # Half a transaction would be worse than a late cancellation.
                    with shield():
                        edits = await self._run()
                        await self._refresh(edits)
                finally:
                    graph.changing_users = None
        for user, length in lengths.items():
            if user.root is not None and user.length != length:
                user.notify_resize()
        with shield():
            await self._close_unused(edits)

    def _targets(self) -> list[Target]:
        targets: list[Target] = [*new_settings(self._reopened)]
        for step in self._steps:
            targets += step.targets()
        return targets

    async def _run(self) -> Edits:
        settings = new_settings(self._reopened)
        edits, prepared = self._edit(settings)
        settings |= {
            node: Settings(node.config, node.explicit, node.driver.options)
            for node in edits.became_read_only
            if node not in settings
        }
        unflushed = _without_user(edits, settings)
        prepared.abort()
        edits.undo()
        for node in unflushed:
            await io.flush(node)
        await self._announce_moves(settings)
        states: list[tuple[Node, object]] = []
        try:
            for node in children_first(settings):
                new = settings[node]
                if new.config.auto_read_only and _has_read_only_storage(node, settings):
                    new.config.read_only = True
                states.append((node, await node.driver.reopen_prepare(new.config, new.options)))
            edits, prepared = self._edit(settings)
        except BaseException:
            for node, state in reversed(states):
                node.driver.reopen_abort(state)
            raise
        for node, state in states:
            node.driver.reopen_commit(state)
        # After the drivers: the file driver's locks are by then on its new descriptor.
        prepared.commit()
        _follow_inheritance(edits)
        self._graph.edges_changed()
        return edits

    async def _announce_moves(self, settings: Mapping[Node, Settings]) -> None:
        """Tell observers of the nodes that will show other bytes of their files."""
        moving = [node for node, new in settings.items() if node.driver.shows_other_bytes(new.options)]
        self._moved = {each: each.length for node in moving for each in node.with_filters_above()}
        for node, length in self._moved.items():
            await node.before_change(0, length, Change.REOPEN)

    def _edit(self, settings: Mapping[Node, Settings]) -> tuple[Edits, PreparedPermissions]:
        """Make all changes and check them. Synchronous."""
        edits = Edits()
        try:
            for node in top_down(self._opened):
                for edge in node.children.values():
                    if edge.dormant:
                        edits.set(edge, "dormant", False)
                        edits.note(node)
            for step in self._steps:
                step.apply(edits)
            for node, new in settings.items():
                edits.set(node, "config", new.config)
                edits.set(node, "explicit", new.explicit)
                edits.set(node.driver, "options", new.options)
                edits.note(node)
            edits.check_loops()
            affected = with_all_above(edits.nodes)
            edits.follow_read_only(affected)
            for node in affected:
                if node.is_open:
                    node.driver.check_children()
            return edits, PreparedPermissions(edits.roots)
        except BaseException:
            edits.undo()
            raise

    async def _refresh(self, edits: Edits) -> None:
        """Read lengths and limits again, children before parents, and forget what was resolved."""
        with_new_backing = {edge.parent for edge in edits.changed if edge.role is Role.BACKING}
        for node in with_all_above(edits.nodes):
            # Other tasks may be opening the node, or close it at each await; then it is theirs.
            if node.is_open:
                await self._refresh_length(node)
            if node.is_open:
                self._graph.refresh_limits(node)
                node.change_mapping()
                if node in with_new_backing:
                    await node.driver.backing_opened()
        self._graph.changes += 1
        for node, old in self._moved.items():
            node.changed(0, max(old, node.length), Change.REOPEN)

    @staticmethod
    async def _refresh_length(node: Node) -> None:
        try:
            node.length = await node.driver.length()
        except FusediskError as exc:
            log.warning("'%s' keeps its length of %d bytes: %s", node.filename, node.length, exc)

    async def _close_unused(self, edits: Edits) -> None:
        failure: FusediskError | None = None
        left = [old for old in edits.changed.values() if old is not None]
        for node in dict.fromkeys([*left, *self._perhaps_unused, *self._opened]):
            try:
                await self._graph.close_if_unused(node)
            except FusediskError as exc:
                failure = failure or exc
        if failure is not None:
            raise failure


def _check_children_may_change(parent: Node, name: str) -> None:
    parent.check_operation("change-children")
    if not (parent.driver.takes_children or (name == "backing" and parent.driver.supports_backing)):
        raise NotSupportedError(
            f"node '{parent.name}' is {parent.driver.name}, whose child '{name}' cannot come or go while it is open."
        )


def _has_read_only_storage(node: Node, settings: Mapping[Node, Settings]) -> bool:
    below = [edge.node for edge in node.children.values() if edge.role is not Role.BACKING]
    return any((settings[child].config if child in settings else child.config).read_only for child in below)


def _without_user(edits: Edits, settings: Mapping[Node, Settings]) -> list[Node]:
    """Return the nodes that will have no writer any more, but have one now whose later flushes will not reach them."""
    found: dict[Node, None] = {}
    for edge, old in edits.changed.items():
        if old is not None and edge.perm & permissions.WRITE and not old.config.read_only:
            linked = edge in edge.node.parents
            if not (linked and _flushes(edge.node, old)):
                found[old] = None
    return [*found, *(node for node, new in settings.items() if new.config.read_only and node not in found)]


def _flushes(start: Node, wanted: Node) -> bool:
    """Whether a flush of ``start`` reaches ``wanted``."""
    queue = [start]
    for node in queue:
        if node is wanted:
            return True
        queue += [edge.node for edge in node.children.values() if edge.role is not Role.BACKING]
    return False


def _follow_inheritance(edits: Edits) -> None:
    """Let nodes inherit settings from the parents that they have now."""
    for edge, old in edits.changed.items():
        parent = edge.parent
        if parent is None:
            continue
        if parent.children.get(edge.name) is edge and _inherits(edge.node, parent):
            edge.node.inherits_from = parent
        if (
            old is not None
            and old.inherits_from is parent
            and all(other.node is not old for other in parent.children.values())
        ):
            old.inherits_from = None


def _inherits(node: Node | None, parent: Node) -> bool:
    """Whether a node has its settings from ``parent``, perhaps through nodes between them."""
    while node is not None:
        node = node.inherits_from
        if node is parent:
            return True
    return False
