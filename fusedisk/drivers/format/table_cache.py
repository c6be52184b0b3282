"""Tables of one kind (qcow2's L2 tables and refcount blocks, the second level of a block table), each loaded whole.

The cache is bounded in bytes.

``load`` may run concurrently; callers that want the same table share one read. Tables that are changed and not yet
written are pinned by their owner: they stay, even if they exceed the size of the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Container
from typing import Generic, TypeVar

import trio

from fusedisk.core.at_once import refuse_to_wait

Table = TypeVar("Table")


class _Loading:
    """One read in flight."""

    __slots__ = ("done", "stale")

    def __init__(self) -> None:
        self.done: trio.Event | None = None
        self.stale = False
        """The table was written or freed meanwhile, so the result of the read must not be cached."""


class TableCache(Generic[Table]):
    """Least recently used tables by host offset.

    ``tables`` may be read directly on the hot path (``tables.get(offset)``, then
    ``tables.move_to_end(offset)``).
    """

    def __init__(self, read: Callable[[int], Awaitable[Table]], table_size: int, minimum: int) -> None:
        self.tables: OrderedDict[int, Table] = OrderedDict()
        self._read = read
        self._table_size = table_size
        self._minimum = minimum
        self._capacity = minimum
        self._loading: dict[int, _Loading] = {}
        self.is_pinned: Callable[[int], bool] = _never
        """Whether the table at an offset must stay."""

    def set_size(self, size: int) -> None:
        """Hold at most ``size`` bytes of tables, but not fewer than the minimum number of them."""
        self._capacity = max(size // self._table_size, self._minimum)
        self._evict()

    @property
    def capacity(self) -> int:
        """The bound in tables."""
        return self._capacity

    @property
    def size(self) -> int:
        """The bound in bytes."""
        return self._capacity * self._table_size

    def get(self, offset: int) -> Table | None:
        """The table at ``offset`` if it is cached."""
        table = self.tables.get(offset)
        if table is not None:
            self.tables.move_to_end(offset)
        return table

    async def load(self, offset: int) -> Table:
        """Return the table at ``offset``, read if it is not cached. Does not suspend if it is.

        The table is reliable only until the next await. Raises what the read raises.
        """
        while True:
            table = self.get(offset)
            if table is not None:
                return table
            loading = self._loading.get(offset)
            if loading is None:
                table = await self._load(offset)
                if table is not None:
                    return table
                continue
            refuse_to_wait()
            if loading.done is None:
                loading.done = trio.Event()
            await loading.done.wait()

    async def _load(self, offset: int) -> Table | None:
        loading = self._loading[offset] = _Loading()
        try:
            table = await self._read(offset)
        finally:
            if self._loading.get(offset) is loading:
                del self._loading[offset]
            if loading.done is not None:
                loading.done.set()
        if loading.stale:
            return None
        self.put(offset, table)
        return table

    def put(self, offset: int, table: Table) -> None:
        """Cache ``table``, which was just read or written, as the table at ``offset``."""
        self._outdate(offset)
        self.tables[offset] = table
        self.tables.move_to_end(offset)
        self._evict()

    def drop(self, offset: int) -> None:
        """Forget a table: it was freed, or a write of it failed and only the file knows its content."""
        self._outdate(offset)
        self.tables.pop(offset, None)

    def drop_all(self, offsets: Container[int]) -> None:
        """Forget the tables at all these offsets, however many they are."""
        for offset in [*self.tables, *self._loading]:
            if offset in offsets:
                self.drop(offset)

    def clear(self) -> None:
        """Forget all tables."""
        for offset in list(self._loading):
            self._outdate(offset)
        self.tables.clear()

    def _outdate(self, offset: int) -> None:
        loading = self._loading.pop(offset, None)
        if loading is not None:
            loading.stale = True

    def _evict(self) -> None:
        while len(self.tables) > self._capacity:
            victim = self._victim()
            if victim is None:
                return
            del self.tables[victim]

    def _victim(self) -> int | None:
        """Return the least recently used table that may go; never the one that was used last."""
        last = next(reversed(self.tables))
        for offset in self.tables:
            if offset != last and not self.is_pinned(offset):
                return offset
        return None


def _never(offset: int) -> bool:
    return False
