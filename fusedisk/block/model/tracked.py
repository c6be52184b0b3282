"""Requests in flight on a node, and which of them wait for which.

A request is entered when it arrives and leaves when it is answered. Two overlapping requests conflict if at
least one of them is *serialising* (read-modify-write, write-zeroes, discard, compressed write, copy-on-read,
resize): the one that came later waits for the earlier. Waiting only ever looks back, so there is no deadlock.

A long serialising request that changes nothing for readers until its end (a snapshot) lets plain reads pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fusedisk.core.at_once import refuse_to_wait

if TYPE_CHECKING:
    from fusedisk.block.model.node import Node


class Request:
    """A tracked half-open range. Serialising requests widen it to the unit they touch."""

    __slots__ = ("_done", "end", "lets_reads", "offset", "serialising", "waiting", "write")

    def __init__(self, offset: int, end: int, write: bool, serialising: bool = False) -> None:
        self.offset = offset
        self.end = end
        self.write = write
        self.serialising = serialising
        self.lets_reads = False
        """Serialising, except against plain reads."""
        self.waiting = False
        """Waits for another request now."""
        self._done: trio.Event | None = None

    def enter(self, node: Node) -> None:
        """Become visible to every later request."""
        node.tracked[self] = None
        if self.serialising:
            node.serialising += 1

    def leave(self, node: Node) -> None:
        """Forget the request and wake the requests that waited for it. Synchronous."""
        del node.tracked[self]
        if self.serialising:
            node.serialising -= 1
        self._wake()

    def _wake(self) -> None:
        if self._done is not None:
            self._done.set()
            self._done = None

    async def wait_for_earlier(self, node: Node) -> None:
        """Wait until no earlier conflicting request is in flight. Call after ``enter``."""
        while (other := self._conflict(node)) is not None:
            refuse_to_wait()
            self.waiting = True
            try:
                await other._ended()
            finally:
                self.waiting = False

    async def wait_for_reads(self, node: Node) -> None:
        """Stop letting reads pass, and wait for those that did. All other requests wait for this one already."""
        self.lets_reads = False
        while (other := self._passing_read(node)) is not None:
            await other._ended()

    def let_reads_pass(self) -> None:
        """Let plain reads pass, including those that already wait. Synchronous."""
        self.lets_reads = True
        self._wake()

    async def _ended(self) -> None:
        if self._done is None:
            self._done = trio.Event()
        await self._done.wait()

    def _passing_read(self, node: Node) -> Request | None:
        for other in node.tracked:
            if other is not self and not other.waiting and other.offset < self.end and self.offset < other.end:
                return other
        return None

    def _conflict(self, node: Node) -> Request | None:
        for other in node.tracked:
            if other is self:
                return None
            if (
                (other.serialising or self.serialising)
                and other.offset < self.end
                and self.offset < other.end
                and not (other.lets_reads and not self.write and not self.serialising)
            ):
                return other
        return None
