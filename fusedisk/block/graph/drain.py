"""Drained sections: users of the graph hold back their requests while something changes below them.

A drain takes what it needs and no more: the users whose requests pass certain nodes or edges. A user that comes to
reach them while the section lasts is held back, too, before its first request. Requests that are parked, such as
throttled ones, do not count as in flight, so a drain does not wait for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fusedisk.block.model.edge import Child
from fusedisk.block.model.node import Node

if TYPE_CHECKING:
    from fusedisk.block.graph.backend import Backend
    from fusedisk.block.graph.graph import Graph

Target = Node | Child
"""All requests on a node, or only those that reach it by one edge."""


class Drain:
    """One drained section, made by :meth:`Graph.drained`."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._targets: list[Target] = []
        self.users: list[Backend] = []
        """The users that are held back."""

    async def add(self, targets: Iterable[Target]) -> None:
        """Hold back the users over ``targets``, too, and wait until none of all users has a request in flight."""
        self._targets += targets
        self.hold_back_new()
        while (busy := next((user for user in self.users if user.in_flight), None)) is not None:
            await busy.wait_idle()

    def hold_back_new(self) -> None:
        """After a change of edges: hold back the users that have come to reach the targets. Their requests, if they
        have any, are not on the targets."""
        for target in self._targets:
            for user in self._graph.users_over(target):
                if user not in self.users:
                    user.quiesce()
                    self.users.append(user)

    def end(self) -> None:
        """Let all of them go on."""
        for user in self.users:
            user.resume()
        self.users.clear()
