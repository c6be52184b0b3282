"""The content of an image where it has no data of its own: the backing file, or zeroes."""

from __future__ import annotations

import trio

from fusedisk.block.model.node import Node
from fusedisk.block.request.status import chain_status
from fusedisk.core.errors import FusediskError

_EVERYTHING = 1 << 63
_LOOKUPS_AT_ONCE = 64


class Backing:
    """The backing file of one image, as it is now.

    ``node`` is the open one. ``named``: the header names one; where it is not open nothing is known of it, and all of
    it might show through later.
    """

    def __init__(self, node: Node | None, *, named: bool) -> None:
        self._node = node
        self.end = node.length if node is not None else _EVERYTHING if named else 0
        """Behind this guest offset there are zeroes."""

    async def zero_until(self, offset: int, end: int) -> int:
        """Up to where from ``offset`` on nothing but zeroes shows through, as far as that is known without reading
        data; ``end`` at most."""
        lookups = 0
        while offset < min(end, self.end):
            if self._node is None:
                return offset
            try:
                status = await chain_status(self._node, offset, min(end, self.end) - offset)
            except FusediskError:
                return offset  # reading it reports the error
            if not status.zero:
                return offset
            offset += status.length
            lookups += 1
            if lookups % _LOOKUPS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return end


NO_BACKING = Backing(None, named=False)
