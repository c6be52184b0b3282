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
    assert [cache.knows(key) for key in (1, 2, 3, 4)] == [True, False, True, True]
    assert (cache.size, len(cache)) == (30, 3)
    kept(cache, 5, 25)
    assert (cache.size, len(cache)) == (25, 1)
    kept(cache, 6, 100)
    assert cache.get(6) == b"\6" * 100, "what came last stays"
    assert cache.size == 100
    cache.clear()
    assert (cache.size, len(cache)) == (0, 0)


def test_there_is_room_until_something_has_to_go() -> None:
    cache = InflatedCache(30)
    for key in (1, 2, 3):
        assert cache.has_room(10)
        kept(cache, key)
    assert not cache.has_room(1)
    cache.drop(2)
    assert cache.has_room(10)
    assert not cache.has_room(11)


def prove(cache: InflatedCache, keys: range, others: range) -> None:
    """Have pieces, and ask for them after others came."""
    for key in (*keys, *others):
        kept(cache, key)
    for key in keys:
        assert cache.get(key) is not None


def test_what_is_asked_for_later_survives_what_is_not() -> None:
    cache = InflatedCache(240)
    prove(cache, range(10), range(50, 54))
    for key in range(100, 200):
        kept(cache, key)
        for _ in range(5):
            assert cache.get(key) is not None
        assert cache.size <= 240
    assert [cache.knows(key) for key in range(10)] == [True] * 10
    assert [key for key in range(100, 200) if cache.knows(key)] == [*range(186, 200)]


def test_who_reads_on_behind_what_was_fetched_proves_nothing() -> None:
    cache = InflatedCache(240)
    prove(cache, range(10), range(50, 54))
    for key in range(100, 200):
        kept(cache, key)
        if key >= 102:
            assert cache.get(key - 2) is not None
    assert [cache.knows(key) for key in range(10)] == [True] * 10


def test_the_proven_leave_room_and_get_another_chance() -> None:
    cache = InflatedCache(240)
    prove(cache, range(20), range(50, 54))
    # Eighteen of them fit in three quarters; the first two are new again.
    kept(cache, 60)
    assert cache.get(1) is not None
    for key in range(61, 70):
        kept(cache, key)
    assert [key for key in range(20) if not cache.knows(key)] == [0, 1]
    assert (cache.size, len(cache)) == (240, 24)


def test_proven_pieces_that_are_dropped_leave_room_for_others() -> None:
    cache = InflatedCache(120)
    prove(cache, range(8), range(50, 52))
    for key in range(8):
        cache.drop(key)
    assert (cache.size, len(cache)) == (20, 2)
    prove(cache, range(10, 18), range(52, 54))
    for key in range(20, 40):
        kept(cache, key)
    assert all(cache.knows(key) for key in range(10, 18))


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


def test_a_view_counts_as_what_it_keeps_in_memory() -> None:
    cache = InflatedCache(250)
    wholes = [memoryview(bytearray(100)) for _ in range(3)]
    for number, whole in enumerate(wholes):
        for part in range(10):
            cache.keep(number * 10 + part, whole[part * 10 : part * 10 + 10])
        assert cache.size <= 250
    assert cache.size == 200, "each whole once"
    assert [key for key in range(30) if cache.knows(key)] == [*range(10, 30)], "and it stays until all of it goes"
    for key in range(10, 19):
        cache.drop(key)
    assert cache.size == 200
    cache.drop(19)
    assert cache.size == 100
    cache.keep(100, bytes(30))
    assert cache.size == 130
    cache.clear()
    assert cache.size == 0
    cache.keep(1, wholes[0][:10])
    assert cache.size == 100
    cache._came += cache._proof
    assert type(cache.get(1)) is bytes
    assert cache.size == 10
