"""The cache of inflated pieces: its bound, and what becomes of loads whose space is freed."""

from __future__ import annotations

import random
from array import array

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedisk.compression.inflate import Content
from fusedisk.compression.inflated_cache import InflatedCache, Run


def kept(cache: InflatedCache, key: int, size: int = 10) -> None:
    if key % 2:
        cache.insert(key, bytes([key]) * size)
    else:
        cache.finish(cache.begin([key], size), bytes([key]) * size, {})


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
    bad = "bad"
    for content, errors in ((b"x" * 10, {}), (b"", {7: bad}), (None, {})):
        run = cache.begin([7], 10)
        assert cache.loading(7) is run
        assert cache.get(7) is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.wait)
            nursery.start_soon(run.wait)
            await trio.testing.wait_all_tasks_blocked()
            cache.finish(run, content, errors)
        await run.wait()
        assert cache.loading(7) is None
        assert run.get(7) == (content or None)
        assert run.errors == errors
        assert cache.knows(7) == bool(content)
        cache.drop(7)


async def test_space_freed_and_used_again_during_a_load() -> None:
    """The key is the same, the content is not: neither the cache nor those who wait get the old one."""
    cache = InflatedCache(30)
    old = cache.begin([7], 10)
    cache.drop(7)
    assert not cache.knows(7)
    new = cache.begin([7], 10)
    cache.finish(old, b"old.......", {})
    assert cache.loading(7) is new, "the end of the old load is not the end of the new one"
    assert cache.get(7) is None
    await old.wait()
    assert (old.get(7), old.errors) == (None, {})
    cache.finish(new, b"new.......", {})
    assert cache.get(7) == new.get(7) == b"new......."


def test_what_was_freed_need_not_inflate() -> None:
    cache = InflatedCache(30)
    for forget in (lambda: cache.drop(7), cache.clear):
        run = cache.begin([7], 10)
        forget()
        cache.finish(run, b"", {7: "other data by now"})
        assert run.errors == {}
        assert not cache.knows(7)
        assert (len(cache), cache.size) == (0, 0)


def together(cache: InflatedCache, keys: range, size: int = 10) -> Run:
    """Have pieces that came together, ahead of who may ask for them."""
    run = cache.begin(keys, size, asked=False)
    cache.finish(run, memoryview(b"".join(bytes([key % 256]) * size for key in keys)), {})
    return run


def test_what_came_together_goes_together() -> None:
    cache = InflatedCache(250)
    for first in (0, 10, 20):
        together(cache, range(first, first + 10))
        assert cache.size <= 250
    assert [key for key in range(30) if cache.knows(key)] == [*range(10, 30)]
    assert (cache.size, len(cache)) == (200, 20)
    for key in range(10, 20):
        assert cache.get(key) == bytes([key]) * 10
    kept(cache, 30, 60)
    assert [key for key in range(30) if cache.knows(key)] == [*range(10, 20)], "which was not used for longest"


def test_a_part_of_what_came_together_is_freed() -> None:
    cache = InflatedCache(250)
    run = cache.begin(range(10), 10)
    cache.drop(3)
    cache.finish(run, bytes(range(100)), {5: "bad"})
    cache.drop(7)
    there = [0, 1, 2, 4, 6, 8, 9]
    assert [key for key in range(10) if cache.knows(key)] == there
    assert all(cache.get(key) == run.get(key) == bytes(range(key * 10, key * 10 + 10)) for key in there)
    assert [key for key in range(10) if run.get(key) is None] == [3, 5, 7]
    assert [*run.errors] == [5]
    assert cache.size == 100, "all of the memory stays"
    for key in there:
        cache.drop(key)
    assert (cache.size, len(cache)) == (0, 0)


def test_what_proves_itself_gets_memory_of_its_own() -> None:
    cache = InflatedCache(240)
    together(cache, range(10))
    for key in range(50, 54):
        kept(cache, key)
    assert type(cache.get(2)) is memoryview, "it was not asked for before"
    for key in range(60, 64):
        kept(cache, key)
    assert type(cache.get(3)) is bytes
    assert (cache.size, len(cache)) == (190, 18)
    for key in range(100, 130):
        kept(cache, key)
    assert [key for key in range(10) if cache.knows(key)] == [3]
    assert cache.get(3) == b"\3" * 10


def test_readers_that_go_on_beside_each_other_prove_nothing() -> None:
    cache = InflatedCache(240)
    pieces = 0
    for step in range(20):
        for reader in range(5):
            together(cache, range(1000 * reader + step * 2, 1000 * reader + step * 2 + 2))
        for piece in range(2):
            for reader in range(5):
                assert cache.get(1000 * reader + step * 2 + piece) is not None
                pieces += 1
        assert not cache._proven
        assert cache.size <= 240
    assert pieces == 200


def test_who_waits_for_pieces_asks_for_them() -> None:
    for waits in (False, True):
        for asked in (False, True):
            cache = InflatedCache(240)
            run = cache.begin(range(2), 10, asked=asked)
            if waits:
                assert cache.loading(1) is run
            cache.finish(run, memoryview(bytes(20)), {})
            for key in range(50, 54):
                kept(cache, key)
            assert type(cache.get(0)) is (bytes if asked or waits else memoryview)


def found(cache: InflatedCache, *keys: int) -> list[bytes] | None:
    parts = cache.get_all(array("Q", keys))
    return None if parts is None else [bytes(part) for part in parts]


def test_neighbours_are_found_in_one_part() -> None:
    cache = InflatedCache(1000)
    together(cache, range(10))
    together(cache, range(10, 20))
    kept(cache, 20)
    assert found(cache, 2, 3, 4) == [bytes([2] * 10 + [3] * 10 + [4] * 10)]
    assert found(cache, 8, 9, 10, 11) == [bytes([8] * 10 + [9] * 10), bytes([10] * 10 + [11] * 10)]
    assert found(cache, 19, 20) == [bytes([19] * 10), bytes([20] * 10)]
    assert found(cache, 3, 5, 4) == [bytes([3] * 10), bytes([5] * 10), bytes([4] * 10)], "in the order of the keys"
    assert found(cache, 20, 21) is None
    cache.begin([21], 10)
    assert found(cache, 20, 21) is None, "on its way is not there"
    cache.drop(3)
    assert found(cache, 2, 3) is None
    assert found(cache, 4, 5) == [bytes([4] * 10), bytes([5] * 10)]


def test_neighbours_in_use_stay_and_prove_themselves() -> None:
    cache = InflatedCache(240)
    together(cache, range(2))
    together(cache, range(10, 12))
    assert found(cache, 0, 1) == [bytes([0] * 10 + [1] * 10)]
    for key in range(100, 121):
        kept(cache, key)
    assert [key for key in range(20) if cache.knows(key)] == [0, 1], "of the oldest"
    assert found(cache, 0, 1) == [bytes(10), bytes([1] * 10)], "each by itself"
    for key in range(200, 250):
        kept(cache, key)
    assert [key for key in range(20) if cache.knows(key)] == [0, 1]


def test_a_view_counts_as_what_it_keeps_in_memory() -> None:
    cache = InflatedCache(250)
    whole = memoryview(bytearray(100))
    cache.finish(cache.begin([1], 10, asked=False), whole[:10], {})
    assert cache.size == 100
    for key in range(2, 7):
        cache.insert(key, bytes([key]) * 10)
    assert cache.size == 150
    assert cache.get(1) == bytes(10)
    for key in range(7, 12):
        cache.insert(key, bytes([key]) * 10)
    assert type(cache.get(1)) is bytes
    assert cache.size == 110


def consistent(cache: InflatedCache) -> None:
    """Books that agree with each other."""
    runs = [each for each in cache._new if isinstance(each, Run)]
    singles = {each: content for each, (content, _) in cache._new.items() if not isinstance(each, Run)}
    assert cache._proven_size == sum(map(len, cache._proven.values()))
    assert cache.size == sum(run.memory for run in runs) + sum(map(len, singles.values())) + cache._proven_size
    assert cache.size <= cache.capacity or len(cache._new) + len(cache._proven) == 1
    assert all(cache._runs[key] is run for run in runs for key in run.places)
    assert all(key in run.places and (run in cache._new or not run.finished) for key, run in cache._runs.items())
    assert not any(key in cache._runs or key in cache._proven for key in singles)
    assert not cache._runs.keys() & cache._proven.keys()
    assert len(cache) == sum(len(run.places) for run in runs) + len(singles) + len(cache._proven)


@given(seed=st.integers(0, 1 << 32), capacity=st.sampled_from([30, 100, 240, 1000]))
@settings(max_examples=60)
def test_whatever_happens_nobody_gets_what_is_not_there(seed: int, capacity: int) -> None:
    rng = random.Random(seed)
    cache = InflatedCache(capacity)
    generations = dict.fromkeys(range(40), 0)
    """How often what a key stands for was freed."""
    under_way: list[tuple[Run, dict[int, int]]] = []

    def content(key: int, generation: int) -> bytes:
        return bytes([key, generation % 256]) * 5

    def right(key: int, found: Content | None) -> bool:
        return found is None or found == content(key, generations[key])

    for _ in range(400):
        key = rng.randrange(40)
        match rng.randrange(9):
            case 0 | 1:
                first = rng.choice((key, key - key % 10))
                keys = [each for each in range(first, min(first + rng.randrange(1, 11), 40)) if not cache.knows(each)]
                if keys:
                    under_way.append((cache.begin(keys, 10), {each: generations[each] for each in keys}))
            case 2 | 3 if under_way:
                run, at = under_way.pop(rng.randrange(len(under_way)))
                bad = {each: "bad" for each in at if not rng.randrange(20)}
                whole = b"".join(content(each, generation) for each, generation in at.items())
                cache.finish(run, rng.choice((whole, memoryview(whole), memoryview(whole), None)), bad)
                assert run.finished
                assert all(right(each, run.get(each)) for each in at)
                assert all(at[each] == generations[each] for each in run.errors)
            case 4 if not cache.knows(key):
                cache.insert(key, content(key, generations[key]))
                assert right(key, cache.get(key))
            case 5:
                cache.drop(key)
                generations[key] += 1
                assert not cache.knows(key)
            case 6 if not rng.randrange(20):
                cache.clear()
                for each in generations:
                    generations[each] += 1
                assert not len(cache)
            case 7:
                assert right(key, cache.get(key))
            case _:
                keys = [*range(key, min(key + rng.randrange(1, 12), 40))]
                parts = cache.get_all(array("Q", keys))
                if parts is not None:
                    assert b"".join(parts) == b"".join(content(each, generations[each]) for each in keys)
        consistent(cache)
