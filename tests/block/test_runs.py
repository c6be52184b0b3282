"""The map of runs against one that knows every byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fusedisk.block.runs import RunMap

SIZE = 60


@given(
    st.lists(st.tuples(st.integers(0, SIZE), st.integers(1, 20), st.integers(1, 6)), max_size=30),
)
def test_knows_what_was_added(additions: list[tuple[int, int, int]]) -> None:
    """``world`` says once and for all where each byte leads, so that additions never contradict each other."""
    world = [(byte // 7 % 3, 100 * (byte // 7)) for byte in range(SIZE + 32)]
    runs: RunMap[int] = RunMap(1000)
    known: set[int] = set()
    for start, length, _ in additions:
        position = start
        while position < start + length:
            end = position
            while end < start + length and world[end] == world[position]:
                end += 1
            runs.add(position, end, *world[position])
            known.update(range(position, end))
            position = end
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


def test_is_bounded() -> None:
    runs: RunMap[int] = RunMap(4)
    for number in range(100):
        runs.add(10 * number, 10 * number + 5, number, 0)
        assert len(runs) <= 4
        assert runs.find(10 * number) >= 0
