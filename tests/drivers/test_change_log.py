"""The log of changes in memory: what a successor finds, at whatever instant the process died."""

from __future__ import annotations

import mmap
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from fusedisk.drivers.format import change_log
from fusedisk.drivers.format.change_log import Change, ChangeLog, changes_in


def found_in(buffer: bytearray | bytes) -> list[Change] | None:
    """What a successor reads."""
    changes = changes_in(buffer)
    return None if changes is None else list(changes)


@contextmanager
def at_every_instant(look: Callable[[], None]) -> Iterator[None]:
    """Call ``look`` between any two lines that the log executes in the block."""

    def step(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename != change_log.__file__:
            return None
        look()
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        yield
    finally:
        sys.settrace(before)


def test_changes_are_found_in_their_order_through_shared_memory() -> None:
    descriptor = os.memfd_create("changes")
    try:
        os.ftruncate(descriptor, 4096)
        log = ChangeLog(memoryview(mmap.mmap(descriptor, 4096)))
        assert found_in(os.pread(descriptor, 4096, 0)) == []
        log.add(3, 1 << 40, b"")
        log.add(1, 512, b"odd")
        log.add(3, 8, bytearray(range(16)))
        expected = [Change(3, 1 << 40, b""), Change(1, 512, b"odd"), Change(3, 8, bytes(range(16)))]
        assert found_in(os.pread(descriptor, 4096, 0)) == expected
    finally:
        os.close(descriptor)


def test_a_buffer_that_nobody_used_tells_nothing() -> None:
    assert changes_in(bytes(4096)) is None
    assert changes_in(b"\1" * 4096) is None


def test_a_new_log_forgets_what_the_buffer_held() -> None:
    buffer = bytearray(4096)
    ChangeLog(buffer).add(1, 2, b"three")
    ChangeLog(buffer)
    assert found_in(buffer) == []


def test_a_successor_finds_the_changes_of_before_or_after_at_every_instant() -> None:
    """Random changes and commits, some of which fail, in a buffer that is just large enough."""
    rng, buffer = random.Random(3), bytearray(1 << 12)
    log, expected, instants, moved = ChangeLog(buffer), list[Change](), 0, 0
    for _ in range(400):
        allowed = [list(expected)]

        def look() -> None:
            nonlocal instants
            instants += 1
            assert found_in(buffer) in allowed  # noqa: B023 - called while this round runs

        mark, marked = log.mark(), len(expected)
        for _ in range(rng.randrange(6)):
            change = Change(rng.randrange(5), rng.randrange(1 << 50), rng.randbytes(rng.randrange(40)))
            allowed = [list(expected), [*expected, change]]
            with at_every_instant(look):
                log.add(*change)
            expected.append(change)
        allowed = [list(expected), expected[marked:]]
        if rng.random() < 0.8:
            with at_every_instant(look):
                log.settle(mark)
            del expected[:marked]
            moved += bool(expected)
        elif rng.random() < 0.2 or log.full:
            allowed = [list(expected), []]
            with at_every_instant(look):
                log.clear()
            expected.clear()
        assert found_in(buffer) == expected
    assert instants > 3000
    assert moved > 100


def test_without_space_nothing_is_told_until_the_file_has_what_was_lost() -> None:
    buffer = bytearray(256)
    log = ChangeLog(buffer)
    for number in range(20):
        log.add(1, number, b"12345678")
    assert changes_in(buffer) is None
    assert log.full
    log.mark()  # of a commit that fails
    log.add(1, 20, b"before")
    mark = log.mark()
    log.add(1, 21, b"after")
    assert changes_in(buffer) is None
    log.settle(mark)
    assert found_in(buffer) == [Change(1, 21, b"after")]
    assert not log.full


def test_changes_lost_during_a_commit_are_not_settled_by_it() -> None:
    buffer = bytearray(256)
    log = ChangeLog(buffer)
    for again in range(2):
        mark = log.mark()
        for number in range(20):
            log.add(1, number, b"12345678")
        log.settle(mark)
        assert changes_in(buffer) is None, again
    log.settle(log.mark())
    assert found_in(buffer) == []


def test_it_is_full_before_space_runs_out() -> None:
    log = ChangeLog(bytearray(1024))
    while not log.full:
        log.add(1, 0, bytes(8))
    assert changes_in(log._bytes) is not None
    log.settle(log.mark())
    assert not log.full
