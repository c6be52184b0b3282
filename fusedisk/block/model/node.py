"""A node of the block graph."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fusedisk.block.model.children import Role
from fusedisk.block.model.driver import Driver
from fusedisk.block.model.edge import Child
from fusedisk.block.model.limits import Limits
from fusedisk.block.model.observer import Change, Observer
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import FusediskError, OperationBlockedError
from fusedisk.core.locks import Mutex

if TYPE_CHECKING:
    from fusedisk.block.model.tracked import Request

log = logging.getLogger(__name__)

OBSERVE = "observe"
"""The operation that is blocked while requests bypass this process, see :meth:`Node.block_operation`."""


class Reference(Protocol):
    """A file name in an image's header, and what it may open; see :class:`fusedisk.block.graph.gate.ImageReference`."""

    def check_driver(self, driver: Driver) -> None:
        """Raise GateError for a driver that images may not name."""

    def check_node(self, name: str) -> None:
        """Raise GateError unless images may use open nodes."""

    def check_file(self, fd: int) -> None:
        """Raise GateError unless the file behind a descriptor may be opened."""


_serials = itertools.count()


class User(Protocol):
    """A user of the graph whose requests can be held back, a :class:`~fusedisk.block.graph.backend.Backend`."""

    drain_count: int
    """The number of drained sections; while it is not 0, no new request starts."""

    def hold(self) -> None:
        """Count some work as a request in flight until ``release``."""

    def release(self) -> None:
        """Undo one ``hold``."""


class Owner(Protocol):
    """What a node and the requests on it need of their graph, a :class:`~fusedisk.block.graph.graph.Graph`."""

    changes: int
    """The number of changes to edges, permissions and settings."""
    look_only: bool
    """Images are open for their headers, not for their disks."""
    nodes: dict[str, Node]
    """All open nodes, by name."""

    async def open_child(
        self, parent: Node, name: str, role: Role, reference: str | dict[str, Any], *, implicit: bool
    ) -> Child:
        """Open and attach a child from inside ``Driver.open``."""

    def resized(self, node: Node) -> None:
        """Tell the users attached to ``node`` that its length has changed."""

    def backends_over(self, node: Node) -> Sequence[User]:
        """Return all users whose requests reach ``node``."""

    def probe(self, head: bytes, filename: str) -> str:
        """Return the name of the format that ``head`` looks like."""


@dataclasses.dataclass(slots=True)
class NodeConfig:
    """Settings that every node has, whatever its driver."""

    read_only: bool = True
    auto_read_only: bool = False
    """Fall back to read-only if the file cannot be opened for writing."""
    force_share: bool = False
    """Take no image locks and accept other writers; read-only nodes only."""
    cache_direct: bool = False
    """Bypass the host's page cache (O_DIRECT)."""
    cache_no_flush: bool = False
    """Ignore flushes to disk: fast and unsafe."""
    discard: str = "ignore"
    """ignore (drop them) or unmap (pass them on)."""
    detect_zeroes: str = "off"
    """off, on (writes of zeroes become write-zeroes) or unmap (they may also free the space)."""
    copy_on_read: bool = False
    """Do every read with the flag COPY_ON_READ, which the filter copy-on-read sets on reads that pass it."""
    reference: Reference | None = None
    """The reference in an image's header for which the node is opened; None if the user names it. Used by the gate."""

    def as_qmp_options(self, fields: Iterable[str]) -> dict[str, Any]:
        """Return these fields as QMP's nested options."""
        options: dict[str, Any] = {}
        for field in fields:
            value = getattr(self, field)
            if field.startswith("cache_"):
                options.setdefault("cache", {})[field.removeprefix("cache_").replace("_", "-")] = value
            else:
                options[field.replace("_", "-")] = value
        return options

    def defaults_for_child(self, role: Role) -> NodeConfig:
        """Return the default settings for a child of this node."""
        if role is Role.BACKING:
            return dataclasses.replace(
                self,
                read_only=True,
                auto_read_only=False,
                discard="ignore",
                detect_zeroes="off",
                copy_on_read=False,
            )
        return dataclasses.replace(self, discard="unmap", detect_zeroes="off", copy_on_read=False)


class Node:
    """One node: a driver, its settings, its edges and its requests in flight.

    Only the graph makes nodes. A node lives while it has a parent edge or is ``kept_by_name``.

    It has four names. ``exact_filename()`` is the plain name of the file that it stores its bytes in, None without
    one; it says nothing of backing files. ``options_filename()`` is always a ``json:`` name with all options.
    ``filename``, for messages, is the plain name until a change of the graph makes it lead to other bytes than the
    node's. ``printable_name`` is the shortest name that opens the same thing again.
    """

    __slots__ = (
        "_drains",
        "_opened_options",
        "backing_overridden",
        "before_observers",
        "blockers",
        "change_observers",
        "children",
        "close_notifiers",
        "closed",
        "completed_writes",
        "config",
        "driver",
        "explicit",
        "fenced",
        "flush_mutex",
        "generation",
        "graph",
        "guards_probe",
        "inherits_from",
        "kept_by_name",
        "length",
        "limits",
        "missing_backing",
        "name",
        "observers",
        "opened_children",
        "parents",
        "probed",
        "read_observers",
        "serial",
        "serialising",
        "tracked",
        "writes_flushed",
    )
    """Not a dictionary: beyond 30 attributes CPython looks them up more slowly, and every request uses many."""

    driver: Driver

    def __init__(self, graph: Owner, name: str, config: NodeConfig) -> None:
        self.graph = graph
        self.name = name
        self.serial = next(_serials)
        """Tells nodes apart, also after one is closed."""
        self.config = config
        self.children: dict[str, Child] = {}
        self.parents: list[Child] = []
        self.kept_by_name = False
        """Stays open without a parent, under its name (QMP's blockdev-add)."""
        self.inherits_from: Node | None = None
        self.explicit: frozenset[str] = frozenset()
        """Fields of ``config`` that the options set; the others follow ``inherits_from``."""
        self.opened_children: dict[str, int] = {}
        """The serials of the children that opening the node again would give it."""
        self._opened_options: dict[str, Any] | None = None
        """The driver's options and the explicit settings that the node was opened with."""
        self.probed = False
        """The driver was chosen by probing."""
        self.guards_probe = False
        """A guessed raw image: a write that would make it look like another format is refused."""
        self.backing_overridden = False
        """The options or a change of the graph say what the backing file is, not the header."""
        self.missing_backing: FusediskError | None = None
        """Why the backing file is not open, in a ``look_only`` graph."""
        self.length = 0
        self.limits = Limits()
        self.fenced: str | None = None
        """Why the node accepts no more writes; set when corruption is found."""
        self.closed = False
        self.generation = 0
        """Changes with every change of mapping; results from another generation are stale."""
        self.completed_writes = 0
        """The number of changes that may be stored; ``writes_flushed`` is its value at the last flush to disk."""
        self.writes_flushed = 0
        self.flush_mutex = Mutex()
        self.tracked: dict[Request, None] = {}
        self.serialising = 0
        """The number of tracked requests that are serialising; the short ways are closed while there are any."""
        self._drains = 0
        self.observers: tuple[Observer, ...] = ()
        """Replaced by each registration, never changed, so a loop over it is safe. The next three are parts of it."""
        self.before_observers: tuple[Observer, ...] = ()
        self.change_observers: tuple[Observer, ...] = ()
        self.read_observers: tuple[Observer, ...] = ()
        self.close_notifiers: list[Callable[[Node], None]] = []
        self.blockers: dict[str, list[str]] = {}

    # --- edges ------------------------------------------------------------------------------------------

    @property
    def backing(self) -> Child | None:
        """The backing edge, None without one."""
        return self.children.get("backing")

    @property
    def filtered(self) -> Child | None:
        """The edge to the child that a filter passes everything to; None for other drivers."""
        if not self.driver.is_filter:
            return None
        return next((edge for edge in self.children.values() if edge.role is Role.FILTERED), None)

    @property
    def unfiltered(self) -> Node:
        """This node, or the first one below its filters."""
        node = self
        while (edge := node.filtered) is not None:
            node = edge.node
        return node

    @property
    def storage(self) -> Child | None:
        """The edge to the file that a format lies in; None for filters and protocols."""
        if self.driver.is_filter:
            return None
        return next((edge for edge in self.children.values() if edge.role is Role.FILE), None)

    @property
    def perm(self) -> int:
        """Permissions that the parents need, together."""
        perm = 0
        for edge in self.parents:
            perm |= edge.perm
        return perm

    def with_all_below(self) -> list[Node]:
        """Return this node and all nodes below it, each once, from the top down."""
        found = {self: None}
        queue = [self]
        while queue:
            for edge in queue.pop().children.values():
                if edge.node not in found:
                    found[edge.node] = None
                    queue.append(edge.node)
        return list(found)

    # --- state ------------------------------------------------------------------------------------------

    def change_mapping(self) -> None:
        """Invalidate everything resolved on this node so far."""
        self.generation += 1

    def with_filters_above(self) -> list[Node]:
        """Return this node and every filter over it, which have the same content and the same length."""
        found = [self]
        for node in found:
            found += [edge.parent for edge in node.parents if edge.role is Role.FILTERED and edge.parent is not None]
        return found

    def take_length(self, length: int) -> None:
        """Take a new length, here and in every filter above."""
        self.length = length
        for edge in self.parents:
            if edge.role is Role.FILTERED and edge.parent is not None:
                edge.parent.take_length(length)

    def resized(self) -> None:
        """Tell the users of this node and of every filter above that its length was changed, other than by a write."""
        for node in self.with_filters_above():
            node.change_mapping()
            node.graph.resized(node)

    def fence(self, reason: str) -> None:
        """Accept no more writes. ``reason`` is a whole sentence about what is corrupt."""
        if self.fenced is None:
            self.fenced = reason
            log.error("%s: %s No more writes are accepted.", self.filename, reason)
            self.change_mapping()

    def begin_drain(self) -> None:
        """Have the driver let go of requests; may be nested, since several users may be drained."""
        self._drains += 1
        if self._drains == 1:
            self.driver.drain_begin()

    def end_drain(self) -> None:
        """Undo one ``begin_drain``."""
        self._drains -= 1
        if not self._drains:
            self.driver.drain_end()

    # --- observers --------------------------------------------------------------------------------------

    def observe(self, observer: Observer) -> None:
        """Tell ``observer`` of every request on this node from now on. Raises OperationBlockedError while requests
        bypass this process."""
        self.check_observable()
        self._set_observers((*self.observers, observer))

    def unobserve(self, observer: Observer) -> None:
        """Undo one ``observe``."""
        observers = list(self.observers)
        observers.remove(observer)
        self._set_observers(tuple(observers))

    def _set_observers(self, observers: tuple[Observer, ...]) -> None:
        self.observers = observers
        self.before_observers = tuple(observer for observer in observers if observer.wants_before)
        self.change_observers = tuple(observer for observer in observers if observer.wants_changes)
        self.read_observers = tuple(observer for observer in observers if observer.wants_reads)
        self.graph.changes += 1

    def check_observable(self) -> None:
        """Raise OperationBlockedError, with the reason, if requests bypass this process."""
        reasons = self.blockers.get(OBSERVE)
        if reasons:
            raise OperationBlockedError(f"The requests of node '{self.name}' cannot be watched now: {reasons[0]}.")

    async def before_change(self, offset: int, length: int, kind: Change) -> None:
        """Call this before the driver gets a change; where speed counts, only if there are ``before_observers``."""
        for observer in self.before_observers:
            refuse_to_wait()
            if observer in self.before_observers:  # it may have gone while another one waited
                await observer.before_change(self, offset, length, kind)

    def changed(self, offset: int, length: int, kind: Change) -> None:
        """Call this after each change, done or failed half-way, before its request leaves the node. The only place that
        counts writes and tells observers. The node already has its new length."""
        self.completed_writes += 1
        if self.change_observers and length and kind is not Change.STORAGE:
            for observer in self.change_observers:
                observer.changed(self, offset, length, kind)

    def was_read(self, offset: int, length: int) -> None:
        """Call this for each read of the node's content, if there are ``read_observers``."""
        for observer in self.read_observers:
            observer.read(self, offset, length)

    # --- blockers ---------------------------------------------------------------------------------------

    def block_operation(self, operation: str, reason: str) -> None:
        """Forbid an operation such as ``resize`` until ``unblock_operation`` is called with the same reason, which is a
        sentence without its full stop."""
        self.blockers.setdefault(operation, []).append(reason)

    def unblock_operation(self, operation: str, reason: str) -> None:
        """Undo one ``block_operation``."""
        reasons = self.blockers[operation]
        reasons.remove(reason)
        if not reasons:
            del self.blockers[operation]

    def check_operation(self, operation: str) -> None:
        """Raise OperationBlockedError, with the reason, if ``operation`` is forbidden."""
        reasons = self.blockers.get(operation)
        if reasons:
            raise OperationBlockedError(f"Node '{self.name}' cannot do {operation} now: {reasons[0]}.")

    # --- names ------------------------------------------------------------------------------------------

    def exact_filename(self) -> str | None:
        """Return the plain name of the file with the node's bytes, None if only options can describe them."""
        return self.driver.exact_filename()

    @property
    def filename(self) -> str:
        """The name for messages: the plain name, or ``json:`` options if there is none, or if a change of the graph
        makes it lead elsewhere."""
        exact = self.exact_filename()
        return exact if exact is not None and self.is_as_opened(bytes_only=True) else self.options_filename()

    def note_opened(self) -> None:
        """Remember the options that the node was opened with."""
        self._opened_options = self._own_options()

    @property
    def is_open(self) -> bool:
        """Whether the node can be used: not while it is being opened or closed, or waits for the change of the graph
        that it was opened for."""
        known = self._opened_options is not None and self.graph.nodes.get(self.name) is self
        return known and not any(edge.dormant for edge in self.children.values())

    def _own_options(self) -> dict[str, Any]:
        options: dict[str, Any] = self.driver.options.given()
        return options | self.config.as_qmp_options(sorted(self.explicit))

    def is_as_opened(self, *, bytes_only: bool = False) -> bool:
        """Whether opening the node again would give the same nodes, here and below: no child was replaced, no option
        was changed. ``bytes_only``: settings that have come, and filters that were inserted, do not count."""
        return not any(node._differs(bytes_only) for node in self.with_all_below())

    def _differs(self, bytes_only: bool) -> bool:
        children = {name: edge.node.serial for name, edge in self.children.items()}
        if bytes_only and children.keys() == self.opened_children.keys():
            for name, edge in self.children.items():
                node, wanted = edge.node, self.opened_children[name]
                while node.serial != wanted and (below := node.filtered) is not None:
                    node = below.node
                children[name] = node.serial
        if children != self.opened_children:
            return True
        opened = self._opened_options
        if opened is None:
            return False
        found = self._own_options()
        return (
            any(found.get(key) != opened.get(key) for key in self.driver.options.names())
            if bytes_only
            else (found != opened)
        )

    def _header_leads_to(self, child: Child) -> bool:
        """Whether the node's image names this child, so that opening the node opens it, too."""
        by_header = not self.backing_overridden if child.role is Role.BACKING else child.implied
        return by_header and self.opened_children.get(child.name) == child.node.serial and child.node.is_as_opened()

    def full_options(self) -> dict[str, Any]:
        """Return nested options that open this node again, children included."""
        options: dict[str, Any] = {"driver": self.driver.name, **self.driver.options.given()}
        options |= self.config.as_qmp_options(sorted(self.explicit))
        if not self.name.startswith("#"):
            options["node-name"] = self.name
        for child in self.children.values():
            if not self._header_leads_to(child):
                _put_child(options, child.name, child.node.full_options())
        if self.backing is None and (self.backing_overridden or "backing" in self.opened_children):
            options["backing"] = None
        return options

    def options_filename(self) -> str:
        """Return :meth:`full_options` as a file name, ``json:{...}``."""
        return "json:" + json.dumps(_without_names(self.full_options()))

    @property
    def printable_name(self) -> str:
        """A name that opens the same thing: plain if probing finds the same driver, ``json:`` otherwise."""
        exact = self.exact_filename()
        options = self.full_options()
        if exact is None or options.keys() - {"driver", "file", "filename", "node-name"}:
            return self.options_filename()
        storage = self.storage
        if storage is None:  # a bare protocol: its plain name would be probed for a format
            return self.options_filename()
        below = storage.node
        plain = below.driver.is_protocol and set(below.driver.options.given()) <= {"filename"} and not below.explicit
        return exact if self.probed and plain else self.options_filename()


def _put_child(options: dict[str, Any], name: str, child: dict[str, Any]) -> None:
    """Add the options of a child; ``children.0`` goes into the list ``children``. Children come in their order."""
    group, dot, index = name.rpartition(".")
    if dot and index.isdigit():
        options.setdefault(group, []).append(child)
    else:
        options[name] = child


def _without_names(options: dict[str, Any]) -> dict[str, Any]:
    """Remove node names: they are unique in a graph, so they would stop the same options from opening again."""
    return {
        key: _without_names(value)
        if isinstance(value, dict)
        else [_without_names(item) if isinstance(item, dict) else item for item in value]
        if isinstance(value, list)
        else value
        for key, value in options.items()
        if key != "node-name"
    }
