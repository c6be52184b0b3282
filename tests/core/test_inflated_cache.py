"""The cache of inflated pieces: its bound, and what becomes of loads whose space is freed."""

from __future__ import annotations

import trio
import trio.testing

from fusedisk.core.inflate import InflateError
from fusedisk.core.inflated_cache import InflatedCache, Load


def kept(cache: InflatedCache, key: int, size: int = 10) -> Load:
    load = cache.begin(key, 0, 1, size)
    cache.finish(load, bytes([key]) * size)
    return load


def test_what_was_not_used_for_longest_goes_first() -> None:
    cache = InflatedCache(30)
    for key in (1, 2, 3):
        kept(cache, key)
    assert cache.get(1) == b"\1" * 10
    kept(cache, 4)
    assert [cache.get(key) is not None for key in (1, 2, 3, 4)] == [True, False, True, True]
    assert (cache.size, len(cache)) == (30, 3)
    kept(cache, 5, 25)
    assert (cache.size, len(cache)) == (25, 1)
    kept(cache, 6, 100)
    assert cache.get(6) == b"\6" * 100, "what came last stays"
    assert cache.size == 100
    cache.clear()
    assert (cache.size, len(cache)) == (0, 0)


def test_dropped_pieces_take_no_room() -> None:
    cache = InflatedCache(30)
    for key in (1, 2, 3):
        kept(cache, key)
    cache.drop(2)
    cache.drop(2)
    assert cache.get(2) is None
    assert cache.size == 20


async def test_those_who_wait_are_woken_by_whatever_end() -> None:
    cache = InflatedCache(30)
    for result in (b"x" * 10, InflateError("bad"), None):
        load = cache.begin(7, 0, 1, 10)
        assert cache.loading(7) is load
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.wait)
            nursery.start_soon(load.wait)
            await trio.testing.wait_all_tasks_blocked()
            cache.finish(load, result)
        await load.wait()
        assert cache.loading(7) is None
        assert load.content == (result if isinstance(result, bytes) else None)
        assert load.error is (result if isinstance(result, InflateError) else None)
        cache.drop(7)


async def test_space_freed_and_used_again_during_a_load() -> None:
    """The key is the same, the content is not: neither the cache nor those who wait get the old one."""
    cache = InflatedCache(30)
    old = cache.begin(7, 0, 1, 10)
    cache.drop(7)
    assert not cache.knows(7)
    new = cache.begin(7, 0, 1, 10)
    cache.finish(old, b"old" * 3)
    assert cache.loading(7) is new, "the end of the old load is not the end of the new one"
    assert cache.get(7) is None
    await old.wait()
    assert (old.content, old.error) == (None, None)
    cache.finish(new, b"new" * 3)
    assert cache.get(7) == new.content == b"new" * 3


def test_what_was_freed_need_not_inflate() -> None:
    cache = InflatedCache(30)
    for forget in (lambda: cache.drop(7), cache.clear):
        load = cache.begin(7, 0, 1, 10)
        forget()
        cache.finish(load, InflateError("other data by now"))
        assert load.error is None
        assert not cache.knows(7)
