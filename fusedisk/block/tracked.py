"""Requests in flight on a node, and who waits for whom.

A request is entered when it arrives and leaves when it is answered. Two overlapping requests conflict if at
least one of them is *serialising* (read-modify-write, write-zeroes, discard, compressed write, copy-on-read,
resize): the one that came later waits for the earlier. Waiting only ever looks back, so there is no deadlock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fusedisk.core.at_once import refuse_to_wait

if TYPE_CHECKING:
    from fusedisk.block.node import Node


class Request:
    """A tracked half-open range. Serialising requests widen it to the unit they touch."""

    __slots__ = ("_done", "end", "offset", "serialising", "write")

    def __init__(self, offset: int, end: int, write: bool, serialising: bool = False) -> None:
        self.offset = offset
        self.end = end
        self.write = write
        self.serialising = serialising
        self._done: trio.Event | None = None

    def enter(self, node: Node) -> None:
        """Be seen by every later request."""
        node.tracked[self] = None
        if self.serialising:
            node.serialising += 1

    def leave(self, node: Node) -> None:
        """Forget the request and wake who waited for it. Synchronous."""
        del node.tracked[self]
        if self.serialising:
            node.serialising -= 1
        if self._done is not None:
            self._done.set()

    async def wait_for_earlier(self, node: Node) -> None:
        """Wait until no earlier conflicting request is in flight. Call after ``enter``."""
        while (other := self._conflict(node)) is not None:
            refuse_to_wait()
            if other._done is None:
                other._done = trio.Event()
            await other._done.wait()

    def _conflict(self, node: Node) -> Request | None:
        for other in node.tracked:
            if other is self:
                return None
            if (other.serialising or self.serialising) and other.offset < self.end and self.offset < other.end:
                return other
        return None
