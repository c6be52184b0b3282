"""The one predicate for the short ways: which of them a user's requests may take.

A short way leaves out what the door (:mod:`.io`) and the runner of the backend do. So it is open only if nothing in the
graph below, and none of the user's policies, needs them. The answer holds as long as ``Graph.changes``, which every
change of edges, permissions, settings, observers and policies raises.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from fusedisk.block.model import permissions
from fusedisk.block.model.edge import Child
from fusedisk.block.model.node import Owner
from fusedisk.block.request.accounting import Accounting
from fusedisk.block.request.policies import ErrorPolicy, OnDone, Throttle


class Requester(Protocol):
    """What the short ways need of a user of the graph, a :class:`~fusedisk.block.graph.backend.Backend`."""

    @property
    def graph(self) -> Owner:
        """The graph."""

    @property
    def throttle(self) -> Throttle | None:
        """Delays requests."""

    @property
    def on_error(self) -> ErrorPolicy | None:
        """Decides about failed requests."""

    @property
    def on_done(self) -> OnDone | None:
        """Measures requests; the short ways ask no clock."""

    accounting: Accounting
    root: Child | None
    """The edge to the root node; None once closed."""
    drain_count: int
    """While it is not 0, no new request starts."""
    write_cache: bool
    """False: each write is on stable storage when it is answered."""


class Ways(NamedTuple):
    """The short ways that are open, as of one state of the graph."""

    reads: bool = False
    """:class:`~fusedisk.block.request.immediate.Immediate` may read and lend."""
    writes: bool = False
    """It may overwrite. It tells the observers of changes itself."""
    at_once: bool = False
    """A write may be tried through the door without a task, by :func:`fusedisk.core.at_once.run_at_once`."""
    passthrough: bool = False
    """The kernel may access the host file directly, if the root node has the same bytes as one."""
    detects: bool = False
    """A node looks for zeroes in writes, so a write of zeroes must take the door."""


CLOSED = Ways()


def ways_of(user: Requester) -> Ways:
    """Return which short ways are open to the requests of ``user``."""
    root = user.root
    if root is None or user.throttle is not None or user.on_error is not None or user.on_done is not None:
        return CLOSED
    below = root.node.with_all_below()
    # force-share: another process may write to the image, so the file must be asked each time.
    if any(node.config.copy_on_read or node.config.force_share for node in below):
        return CLOSED
    writable = bool(root.perm & permissions.WRITE)
    detects = any(node.config.detect_zeroes != "off" for node in below)
    writes = writable and user.write_cache and not any(node.before_observers for node in below)
    can_run = all(node.driver.can_run_at_once for node in below)
    seen = detects or any(node.observers for node in below)
    return Ways(
        reads=not any(node.read_observers for node in below),
        writes=writes,
        at_once=writes and can_run and not detects,
        passthrough=not seen and (not writable or (user.write_cache and not root.node.guards_probe)),
        detects=detects,
    )
