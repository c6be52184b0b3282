"""Requests in flight on a node, and which of them wait for which.

A request is entered when it arrives and leaves when it is answered. Two overlapping requests conflict if at
least one of them is *serialising* (read-modify-write, write-zeroes, discard, compressed write, copy-on-read,
resize): the one that came later waits for the earlier. Waiting only ever looks back, so there is no deadlock.

A long serialising request that changes nothing for readers until its end (a snapshot) lets plain reads pass. One that
follows what others change meanwhile also lets changes pass: everything but requests that need the node *alone*. A disk
that only grows does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fusedisk.core.at_once import refuse_to_wait

if TYPE_CHECKING:
    from fusedisk.block.model.node import Node


class Request:
    """A tracked half-open range. Serialising requests widen it to the unit they touch."""

    __slots__ = (
        "_done",
        "alone",
        "end",
        "lets_changes",
        "lets_reads",
        "offset",
        "serialising",
        "waiting",
        "write",
    )

    def __init__(self, offset: int, end: int, write: bool, serialising: bool = False) -> None:
        self.offset = offset
        self.end = end
        self.write = write
        self.serialising = serialising
        self.alone = False
        """Passes no other request: it changes more than data and a length that grows."""
        self.lets_reads = False
        """Serialising, except against plain reads."""
        self.lets_changes = False
        """Serialising, except against requests that are not ``alone``."""
        self.waiting = False
        """Waits for another request now."""
        self._done: trio.Event | None = None

    @classmethod
    def of_all(cls) -> Request:
        """Return a request that runs alone on its node."""
        request = cls(0, 1 << 63, True, serialising=True)
        request.alone = True
        return request

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

    def narrow(self, offset: int) -> None:
        """Let go of the range in front of ``offset``: requests for it go on, also those that wait already.
        Synchronous."""
        self.offset = offset
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

    async def hold_back(self, node: Node, *, reads: bool) -> None:
        """Stop letting changes pass, with ``reads`` also plain reads, and wait for those that did. All other requests
        wait for this one already."""
        self.lets_changes = False
        self.lets_reads = self.lets_reads and not reads
        while (other := self._passing(node, reads=reads)) is not None:
            await other._ended()

    def let_pass(self, *, changes: bool) -> None:
        """Let plain reads pass, with ``changes`` also what changes data, including those that already wait.
        Synchronous."""
        self.lets_reads = True
        self.lets_changes = changes
        self._wake()

    async def _ended(self) -> None:
        if self._done is None:
            self._done = trio.Event()
        await self._done.wait()

    def _passing(self, node: Node, *, reads: bool) -> Request | None:
        for other in node.tracked:
            if (
                other is not self
                and not other.waiting
                and (other.write or other.serialising or reads)
                and other.offset < self.end
                and self.offset < other.end
            ):
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
                and not self._passes(other)
            ):
                return other
        return None

    def _passes(self, other: Request) -> bool:
        """Whether ``other`` lets this request pass, though they conflict."""
        if self.write or self.serialising:
            return other.lets_changes and not self.alone
        return other.lets_reads
