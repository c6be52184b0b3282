"""The graph: opening, attaching, closing, draining and changing it under load."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.drain import Drain, Target
from fusedisk.block.graph.edits import Edits, edited
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.opening import Opener
from fusedisk.block.graph.permission_update import update_permissions
from fusedisk.block.graph.registry import Registry
from fusedisk.block.graph.transaction import GraphChange
from fusedisk.block.model import permissions
from fusedisk.block.model.children import Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.limits import Limits
from fusedisk.block.model.node import Node, NodeConfig
from fusedisk.core.alone import shield
from fusedisk.core.errors import (
    FusediskError,
    NodeNotFoundError,
    OptionError,
)
from fusedisk.core.locks import Mutex

log = logging.getLogger(__name__)

WRITER_SHARES = permissions.CONSISTENT_READ | permissions.WRITE_UNCHANGED
"""What a writer shares: others may read, nobody else may write."""


class Graph:
    """All nodes of one process, by name.

    Not safe for threads: everything runs in one trio thread. Opening and closing suspend, attaching edges and changing
    permissions do not.
    """

    def __init__(
        self, drivers: Registry, gate: Gate | None = None, *, follow_backing: bool = True, look_only: bool = False
    ) -> None:
        self.drivers = drivers
        self.gate = gate or Gate()
        self.follow_backing = follow_backing
        """Open the backing files that images name; if False, each image is opened alone."""
        self.look_only = look_only
        """Open images to read their headers, not their disks. Data files stay closed, a chain ends without error at a
        backing file that fails to open, and no guessed format is reported."""
        self.changes = 0
        """The number of changes to edges, permissions and settings; a change invalidates all that is derived from
        them."""
        self.nodes: dict[str, Node] = {}
        self._backends: dict[Child, Backend] = {}
        self._drains: list[Drain] = []
        self.change_mutex = Mutex()
        """Held while a transaction prepares and commits; its users are drained by then."""
        self.changing_users: list[Backend] | None = None
        """The drained users of the transaction that holds ``change_mutex``."""
        self._counter = 0

    # --- opening ----------------------------------------------------------------------------------------

    async def open_backend(
        self,
        spec: str | Mapping[str, Any],
        *,
        name: str | None = None,
        writable: bool = False,
        format: str | None = None,
        config: NodeConfig | None = None,
        write_cache: bool = True,
        group: object | None = None,
    ) -> Backend:
        """Open an image and attach a user to it.

        ``spec`` is a file name (``json:…`` and ``proto:…`` included), or nested options. ``format`` forces the driver
        of a file name. ``config`` are defaults that the options override. Edges of one ``group`` do not exclude each
        other, such as those of a disk and its partitions; see :meth:`open_node`. Raises a FusediskError; then nothing
        stays open.
        """
        config = dataclasses.replace(config or NodeConfig(), read_only=not writable)
        node = await self.open_node(spec, config, format=format, group=group)
        try:
            return self.attach(node, name or node.name, writable=writable, write_cache=write_cache)
        except BaseException as exc:
            await self.close_failed_opening(node, exc)
            raise

    async def open_node(
        self,
        spec: str | Mapping[str, Any],
        config: NodeConfig,
        *,
        format: str | None = None,
        group: object | None = None,
    ) -> Node:
        """Open a node and all below it. The caller attaches an edge, or sets ``kept_by_name``, before it next awaits.

        Edges to nodes that ``spec`` refers to by name belong to ``group``.
        """
        return await Opener(self, group).open(spec, config, format)

    async def open_child(
        self, parent: Node, name: str, role: Role, reference: str | dict[str, Any], *, implicit: bool
    ) -> Child:
        """Open and attach a child from inside ``Driver.open``.

        ``implicit``: the reference comes from the image itself, so it goes through the gate and is resolved relative
        to the image.
        """
        return await Opener(self).open_child(parent, name, role, reference, implicit=implicit)

    def new_node(self, name: str | None, config: NodeConfig, explicit: frozenset[str], inherits: Node | None) -> Node:
        """Register a node without a driver. ``name`` None makes one up. Raises OptionError for a name in use."""
        if name is None:
            self._counter += 1
            name = f"#block{self._counter}"
        elif name in self.nodes:
            raise OptionError(f"a node named '{name}' exists already, names must be unique.")
        node = Node(self, name, dataclasses.replace(config))
        node.inherits_from = inherits
        node.explicit = explicit
        self.nodes[name] = node
        return node

    async def start(self, node: Node) -> None:
        """Run the driver's ``open``, then read its length and limits."""
        if node.config.reference is not None:
            node.config.reference.check_driver(node.driver)
        await node.driver.open()
        try:
            node.length = await node.driver.length()
            self.refresh_limits(node)
            node.note_opened()
        except BaseException as exc:
            with shield():
                try:
                    await node.driver.close()
                except Exception:
                    log.exception("closing '%s' failed, after: %s", node.name, exc)
            raise

    @staticmethod
    def refresh_limits(node: Node) -> None:
        """Read the driver's limits again."""
        limits = Limits()
        node.driver.refresh_limits(limits)
        node.limits = limits

    async def close_failed_opening(self, node: Node, cause: BaseException, *, opened: bool = True) -> None:
        """Close what a failed opening leaves behind. Errors are only logged: ``cause`` is the one to report."""
        with shield():
            try:
                await self.close_if_unused(node, opened=opened)
            except FusediskError as exc:
                log.warning("while giving up on '%s': %s (after: %s)", node.name, exc, cause)

    # --- edges ------------------------------------------------------------------------------------------

    def attach_child(
        self, parent: Node, node: Node, name: str, role: Role, *, group: object | None = None, dormant: bool = False
    ) -> Child:
        """Make ``node`` the child ``name`` of ``parent``, which is being opened; :meth:`GraphChange.attach_child` is
        for open ones. Raises OptionError or a permission error; then there is no edge."""
        edge = Child(name, role, parent, node, f"node '{parent.name}'")
        edge.group = group
        edge.dormant = dormant
        with edited(self) as edits:
            edits.link(edge)
            edits.follow_read_only([parent])
        parent.opened_children[name] = node.serial
        return edge

    def attach(
        self,
        node: Node,
        name: str,
        *,
        writable: bool,
        write_cache: bool = True,
        perm: int | None = None,
        shared: int | None = None,
    ) -> Backend:
        """Attach a user to a node. Raises PermissionConflictError or LockConflictError; then nothing has changed.

        By default the user needs the read permission, with ``writable`` also write and resize. A writer lets others
        read, a reader lets them do anything.
        """
        backend, edge = self.new_backend(node, name, writable, write_cache, perm, shared)
        with edited(self) as edits:
            self.register(edits, backend, edge)
        return backend

    def new_backend(
        self, node: Node, name: str, writable: bool, write_cache: bool, perm: int | None, shared: int | None
    ) -> tuple[Backend, Child]:
        """Return a user and its root edge, not attached yet; see :meth:`attach`."""
        backend = Backend(self, name, write_cache=write_cache)
        edge = Child("root", None, None, node, f"'{name}'")
        if perm is None:
            perm = permissions.CONSISTENT_READ
            if writable:
                perm |= permissions.WRITE | permissions.WRITE_UNCHANGED | permissions.RESIZE
            elif node.config.copy_on_read and not node.config.read_only:
                perm |= permissions.WRITE_UNCHANGED
        edge.perm = perm
        edge.shared = shared if shared is not None else WRITER_SHARES if writable else permissions.ALL
        return backend, edge

    def register(self, edits: Edits, backend: Backend, edge: Child) -> None:
        """Link the root edge of a new user."""
        edits.link(edge)
        edits.set(backend, "root", edge)
        edits.set(self, "_backends", {**self._backends, edge: backend})

    async def detach(self, backend: Backend) -> None:
        """Flush, detach, and close the nodes that are unused then. Raises the first error after releasing everything.

        Idempotent, and safe if two tasks detach the same backend.
        """
        edge = backend.root
        if edge is None:
            return
        backend.quiesce()
        try:
            await backend.wait_idle()
            while self.changing_users is not None and backend in self.changing_users:
                async with self.change_mutex:
                    pass
        except BaseException:
            backend.resume()
            raise
        if backend.root is None:  # another task closed it during the wait
            backend.resume()
            return
        with shield():
            await self._detach_idle(backend, edge)

    async def _detach_idle(self, backend: Backend, edge: Child) -> None:
        failure: Exception | None = None
        try:
            await backend.last_flush()
        except Exception as exc:
            failure = exc
        backend.root = None
        backend.resume()
        self._backends = {root: user for root, user in self._backends.items() if root is not edge}
        edge.node.parents = [parent for parent in edge.node.parents if parent is not edge]
        try:
            await self.close_if_unused(edge.node)
        except FusediskError as exc:
            failure = failure or exc
        if self.nodes.get(edge.node.name) is edge.node:
            update_permissions([edge.node])
        if failure is not None:
            raise failure

    def exchange_roots(self, one: Backend, other: Backend) -> None:
        """Let two idle backends exchange their nodes, with what they may do there."""
        one.root, other.root = other.root, one.root
        one.write_cache, other.write_cache = other.write_cache, one.write_cache
        for backend in (one, other):
            if backend.root is not None:
                backend.root.owner = f"'{backend.name}'"
                self._backends[backend.root] = backend
        self.changes += 1

    def backend_of(self, edge: Child) -> Backend | None:
        """Return the backend with this root edge."""
        return self._backends.get(edge)

    def users_over(self, target: Target) -> list[Backend]:
        """Return all backends whose requests reach a node, or take an edge."""
        if isinstance(target, Node):
            return self.backends_over(target)
        if target.parent is not None:
            return self.backends_over(target.parent)
        backend = self._backends.get(target)
        return [backend] if backend is not None else []

    def backends_over(self, node: Node) -> list[Backend]:
        """Return all backends whose requests reach ``node``."""
        found: dict[Backend, None] = {}
        seen = {node}
        queue = [node]
        while queue:
            for edge in queue.pop().parents:
                backend = self._backends.get(edge)
                if backend is not None:
                    found[backend] = None
                elif edge.parent is not None and edge.parent not in seen:
                    seen.add(edge.parent)
                    queue.append(edge.parent)
        return list(found)

    def probe(self, head: bytes, filename: str) -> str:
        """Return the name of the format that ``head`` looks like."""
        return self.drivers.probe(head, filename)

    def node(self, name: str) -> Node:
        """Return the node of that name. Raises NodeNotFoundError."""
        found = self.nodes.get(name)
        if found is None:
            raise NodeNotFoundError(f"there is no node '{name}'.")
        return found

    def resized(self, node: Node) -> None:
        """Tell the backends attached directly to ``node`` that its length has changed. Nodes above that did not ask for
        the change keep theirs: a filter passes such a request on itself, and no other user may resize below it."""
        for edge in node.parents:
            backend = self._backends.get(edge)
            if backend is not None:
                backend.notify_resize()

    # --- closing ----------------------------------------------------------------------------------------

    async def close_if_unused(self, node: Node, *, opened: bool = True) -> None:
        """Close ``node`` if it is unused, then every node that only it used. Raises the first error, at the end."""
        failure: FusediskError | None = None
        queue = [(node, opened)]
        while queue:
            unused, started = queue.pop(0)
            if unused.parents or unused.kept_by_name or self.nodes.get(unused.name) is not unused:
                continue
            # Out of the table, no other task can find the node, attach to it or close it again.
            del self.nodes[unused.name]
            for notify in list(unused.close_notifiers):
                notify(unused)
            try:
                if started:
                    await unused.driver.close()
            except FusediskError as exc:
                failure = failure or exc
            except Exception as exc:
                log.exception("closing node '%s' failed", unused.name)
                failure = failure or FusediskError(
                    f"'{unused.name}' could not be closed: {exc!r} (a bug, see the log)."
                )
            unused.closed = True
            for edge in list(unused.children.values()):
                edge.node.parents = [parent for parent in edge.node.parents if parent is not edge]
                try:
                    if edge.node.parents or edge.node.kept_by_name:
                        update_permissions([edge.node])
                except FusediskError as exc:
                    failure = failure or exc
                queue.append((edge.node, True))
            unused.children = {}
        if failure is not None:
            raise failure

    async def close(self) -> None:
        """Detach every backend and close every node. Raises the first error, after everything is released."""
        failure: Exception | None = None
        for backend in list(self._backends.values()):
            try:
                await self.detach(backend)
            except Exception as exc:
                failure = failure or exc
        for node in list(self.nodes.values()):
            node.kept_by_name = False
            try:
                await self.close_if_unused(node)
            except FusediskError as exc:
                failure = failure or exc
        if failure is not None:
            raise failure

    # --- changing under load ----------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def drained(self, *targets: Target) -> AsyncIterator[Drain]:
        """Run the block while no request is in flight on any of the nodes, or by any of the edges, in ``targets``.

        Holds back the users above and waits for their requests. Never use it from inside a request.
        """
        drain = Drain(self)
        self._drains.append(drain)
        try:
            await drain.add(targets)
            yield drain
        finally:
            self._drains.remove(drain)
            drain.end()

    def edges_changed(self) -> None:
        """Called after each change of edges: users that have come to reach drained nodes are held back, too."""
        for drain in self._drains:
            drain.hold_back_new()

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[GraphChange]:
        """Collect changes in the block and put all of them into force at its end, or none; see :class:`GraphChange`."""
        change = GraphChange(self)
        try:
            yield change
            await change.commit()
        except BaseException as exc:
            await change.close_opened(exc)
            raise

    async def replace(self, old: Node | Child, new: Node) -> None:
        """Let every parent of ``old``, or one edge, use ``new`` instead; see :meth:`GraphChange.replace`."""
        async with self.changing() as change:
            change.replace(old, new)

    async def insert_filter(self, target: Node | Child, options: dict[str, Any]) -> Node:
        """Open a filter and insert it between a node and all its parents, or into one edge. Returns the filter."""
        async with self.changing() as change:
            filter = await change.open_filter(target, options)
            change.insert_filter(filter, target)
        return filter

    async def remove_filter(self, filter: Node) -> None:
        """Remove a filter: connect its parents to its child, then close it."""
        async with self.changing() as change:
            change.remove_filter(filter)

    async def set_backing(self, node: Node, backing: Node | None, *, named: bool = False) -> None:
        """Give an image another backing file, or none; see :meth:`GraphChange.set_backing`."""
        async with self.changing() as change:
            change.set_backing(node, backing, named=named)
