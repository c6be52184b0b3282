"""A sorted map from disjoint runs of a disk to the target that fills each of them.

For mappings that do not change: a new run never contradicts an existing one, so adding only fills gaps.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Generic, TypeVar

_Target = TypeVar("_Target")


class RunMap(Generic[_Target]):
    """Runs ``[start, end)`` in bytes, each with a target and a delta: target offset minus disk offset."""

    __slots__ = ("_limit", "deltas", "ends", "starts", "targets")

    def __init__(self, limit: int) -> None:
        """``limit``: the most runs that are kept; adding one more forgets all of them."""
        self._limit = limit
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.targets: list[_Target] = []
        self.deltas: list[int] = []

    def __len__(self) -> int:
        return len(self.starts)

    def find(self, offset: int) -> int:
        """Return the index of the run that holds ``offset``, -1 if there is none."""
        index = bisect_right(self.starts, offset) - 1
        return index if index >= 0 and offset < self.ends[index] else -1

    def add(self, start: int, end: int, target: _Target, delta: int) -> None:
        """Map the unknown parts of ``[start, end)`` to ``target``, at the disk's offset plus ``delta``."""
        if len(self.starts) >= self._limit:
            self.clear()
        index = bisect_right(self.starts, start)
        if index and self.ends[index - 1] > start:
            start = self.ends[index - 1]
        while start < end:
            known = index < len(self.starts) and self.starts[index] < end
            stop = self.starts[index] if known else end
            if start < stop:
                index = self._insert(index, start, stop, target, delta)
            if not known:
                return
            start = self.ends[index]
            index += 1

    def add_all(self, runs: Sequence[tuple[int, int, _Target, int]]) -> None:
        """Add several runs, sorted by start and without overlap. If they fall into one gap, each list is moved once,
        not for each run."""
        joined: list[tuple[int, int, _Target, int]] = []
        for run in runs:
            start, end, target, delta = run
            if joined and joined[-1][1:] == (start, target, delta):
                run = joined.pop()[0], end, target, delta
            joined.append(run)
        if len(joined) > 2 and len(self.starts) + len(joined) <= self._limit:
            second, last = joined[1], joined[-1]
            index = bisect_right(self.starts, joined[0][0])
            if index == bisect_right(self.starts, last[1] - 1) and (not index or self.ends[index - 1] <= second[0]):
                # The first and the last run may continue existing ones.
                self.add(*joined[0])
                index = bisect_right(self.starts, second[0])
                starts, ends, targets, deltas = zip(*joined[1:-1], strict=True)
                self.starts[index:index] = starts
                self.ends[index:index] = ends
                self.targets[index:index] = targets
                self.deltas[index:index] = deltas
                joined = [last]
        for run in joined:
            self.add(*run)

    def _insert(self, index: int, start: int, end: int, target: _Target, delta: int) -> int:
        """Insert a run into the gap before ``index``, or extend the neighbours that it continues. Returns the index of
        the run behind the gap."""
        before, behind = index - 1, index
        joins_before = before >= 0 and self.ends[before] == start and self._leads(before, target, delta)
        joins_behind = behind < len(self.starts) and self.starts[behind] == end and self._leads(behind, target, delta)
        if joins_before and joins_behind:
            self.ends[before] = self.ends[behind]
            del self.starts[behind], self.ends[behind], self.targets[behind], self.deltas[behind]
            return before
        if joins_before:
            self.ends[before] = end
            return behind
        if joins_behind:
            self.starts[behind] = start
            return behind
        self.starts.insert(index, start)
        self.ends.insert(index, end)
        self.targets.insert(index, target)
        self.deltas.insert(index, delta)
        return index + 1

    def _leads(self, index: int, target: _Target, delta: int) -> bool:
        return self.targets[index] == target and self.deltas[index] == delta

    def clear(self) -> None:
        """Forget all runs."""
        self.starts.clear()
        self.ends.clear()
        self.targets.clear()
        self.deltas.clear()
