"""The map of runs against one that knows every byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fusedisk.block.request.runs import RunMap

SIZE = 60


@given(
    st.lists(st.tuples(st.integers(0, SIZE), st.integers(1, 32), st.booleans()), max_size=30),
)
def test_knows_what_was_added(additions: list[tuple[int, int, bool]]) -> None:
    """``world`` says once and for all where each byte leads, so that additions never contradict each other."""
    world = [(byte // 7 % 3, 100 * (byte // 7)) for byte in range(SIZE + 32)]
    runs: RunMap[int] = RunMap(1000)
    known: set[int] = set()
    for start, length, together in additions:
        position = start
        parts = []
        while position < start + length:
            end = position
            while end < start + length and world[end] == world[position]:
                end += 1
            parts.append((position, end, *world[position]))
            known.update(range(position, end))
            position = end
        if together:
            runs.add_all(parts)
        else:
            for part in parts:
                runs.add(*part)
    for byte in range(SIZE + 32):
        index = runs.find(byte)
        assert (index >= 0) == (byte in known)
        if index >= 0:
            assert (runs.targets[index], runs.deltas[index]) == world[byte]
    assert runs.starts == sorted(runs.starts)
    assert all(end <= start for end, start in zip(runs.ends, runs.starts[1:], strict=False))
    assert len({len(runs.starts), len(runs.ends), len(runs.targets), len(runs.deltas)}) == 1


def test_neighbours_become_one() -> None:
    runs: RunMap[str] = RunMap(10)
    runs.add(0, 10, "a", 5)
    runs.add(20, 30, "a", 5)
    assert len(runs) == 2
    runs.add(5, 25, "a", 5)
    assert (runs.starts, runs.ends) == ([0], [30])
    runs.add(30, 40, "b", 5)
    runs.add(40, 50, "b", 6)
    assert len(runs) == 3


def test_neighbours_become_one_when_they_come_together() -> None:
    runs: RunMap[str] = RunMap(10)
    runs.add(0, 10, "a", 0)
    runs.add(50, 60, "c", 0)
    runs.add_all([(10, 20, "a", 0), (20, 25, "b", 0), (25, 30, "b", 0), (30, 40, "b", 1), (40, 50, "c", 0)])
    assert (runs.starts, runs.ends) == ([0, 20, 30, 40], [20, 30, 40, 60])
    assert (runs.targets, runs.deltas) == (["a", "b", "b", "c"], [0, 0, 1, 0])


def test_many_at_once_are_bounded() -> None:
    runs: RunMap[int] = RunMap(4)
    runs.add_all([(10 * number, 10 * number + 5, number, 0) for number in range(100)])
    assert len(runs) <= 4
    assert runs.find(990) >= 0


def test_is_bounded() -> None:
    runs: RunMap[int] = RunMap(4)
    for number in range(100):
        runs.add(10 * number, 10 * number + 5, number, 0)
        assert len(runs) <= 4
        assert runs.find(10 * number) >= 0
