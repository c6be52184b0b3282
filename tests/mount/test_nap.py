"""Sleeping until a descriptor can be read."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from fusedisk.mount import nap
from fusedisk.mount.nap import Nap


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def sleeper(pipe: tuple[int, int]) -> Iterator[Nap]:
    made = Nap(pipe[0])
    yield made
    made.close()


def test_what_is_there_already_ends_it(sleeper: Nap, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    for _ in range(3):
        assert sleeper.sleep()


def test_nothing_comes_again_and_again(sleeper: Nap) -> None:
    assert [sleeper.sleep() for _ in range(5)] == [False] * 5


def test_what_comes_during_a_nap_ends_it(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # It would last for an hour.
    monkeypatch.setattr(nap, "_DURATION", type(nap._DURATION)(0, 0, 3600, 0))
    sleeper = Nap(pipe[0])
    for _ in range(20):
        thread = threading.Thread(target=os.write, args=(pipe[1], b"x"))
        thread.start()
        assert sleeper.sleep()
        thread.join()
        os.read(pipe[0], 1)
    sleeper.close()


def test_a_timer_that_ran_out_long_ago_does_not_end_the_next_one(sleeper: Nap, pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"x")
    assert sleeper.sleep()
    os.read(pipe[0], 1)
    polled = []
    poll = sleeper._poll

    def counted() -> list[tuple[int, int]]:
        polled.append(1)
        return poll()

    sleeper._poll = counted  # type: ignore[method-assign, assignment]
    while not poll():
        pass  # until it has run out
    assert not sleeper.sleep()
    assert len(polled) == 2


def test_the_other_end_is_gone(sleeper: Nap) -> None:
    read, write = os.pipe()
    other = Nap(read)
    os.close(write)
    assert other.sleep()
    other.close()
    os.close(read)


def test_naps_without_a_timer_of_their_own(monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]) -> None:
    class Library:
        def timerfd_create(self, clock: int, flags: int) -> int:
            return -1

    monkeypatch.setattr(nap, "_libc", Library())
    sleeper = Nap(pipe[0])
    assert not sleeper.sleep()
    os.write(pipe[1], b"x")
    assert sleeper.sleep()
    sleeper.close()
