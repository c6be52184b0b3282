"""The table cache: bounded, one read for many, and never older than the file."""

from __future__ import annotations

import pytest
import trio

from fusedisk.drivers.format.table_cache import TableCache
from tests.support.tasks import start


class Tables:
    """Tables to read, with reads that wait to be let go."""

    def __init__(self) -> None:
        self.content: dict[int, str] = {}
        self.reads: list[int] = []
        self.gate: trio.Event | None = None
        self.error: Exception | None = None

    async def read(self, offset: int) -> str:
        self.reads.append(offset)
        found = self.content.get(offset, f"table {offset}")
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return found


@pytest.fixture
def tables() -> Tables:
    return Tables()


@pytest.fixture
def cache(tables: Tables) -> TableCache[str]:
    return TableCache(tables.read, table_size=100, minimum=2)


async def test_the_least_recently_used_table_goes_first(tables: Tables, cache: TableCache[str]) -> None:
    cache.set_size(300)
    assert cache.size == 300
    for offset in (1, 2, 3):
        await cache.load(offset)
    cache.get(1)
    await cache.load(4)
    assert set(cache.tables) == {1, 3, 4}
    cache.set_size(0)
    assert set(cache.tables) == {1, 4}, "the minimum stays, whatever the size"


async def test_many_who_want_a_table_share_one_read(tables: Tables, cache: TableCache[str]) -> None:
    tables.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        tasks = [await start(nursery, lambda: cache.load(7)) for _ in range(5)]
        tables.gate.set()
        assert {await task.join() for task in tasks} == {"table 7"}
    assert tables.reads == [7]


async def test_a_failed_or_cancelled_read_lets_others_try(tables: Tables, cache: TableCache[str]) -> None:
    tables.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        first = await start(nursery, lambda: cache.load(7))
        second = await start(nursery, lambda: cache.load(7))
        first.scope.cancel()
        await first.ended.wait()
        tables.gate.set()
        assert await second.join() == "table 7"
    cache.drop(7)
    tables.error = OSError("broken")
    with pytest.raises(OSError, match="broken"):
        await cache.load(7)
    tables.error = None
    assert await cache.load(7) == "table 7"


@pytest.mark.parametrize("evicted", [False, True])
async def test_a_read_that_began_before_a_write_is_not_kept(
    tables: Tables, cache: TableCache[str], evicted: bool
) -> None:
    tables.content[7] = "old"
    tables.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        reader = await start(nursery, lambda: cache.load(7))
        tables.content[7] = "new"
        cache.put(7, "new")
        if evicted:
            cache.put(8, "other")
            cache.put(9, "other")
        tables.gate.set()
        assert await reader.join() == "new"
    assert cache.get(7) == "new"


async def test_a_dropped_table_is_read_again(tables: Tables, cache: TableCache[str]) -> None:
    await cache.load(7)
    tables.content[7] = "new"
    cache.drop(7)
    assert await cache.load(7) == "new"
