"""Coroutines that are run to their end in one go."""

from __future__ import annotations

import threading

import pytest
import trio

from fusedisk.core.at_once import WouldWait, refuse_to_wait, run_at_once
from fusedisk.core.locks import Mutex
from fusedisk.core.offload import run_cpu, run_host_io


async def _answer(value: int) -> int:
    return value


async def _fail() -> None:
    raise KeyError("found by the caller")


async def test_results_and_errors_come_through() -> None:
    assert run_at_once(_answer(5)) == 5
    with pytest.raises(KeyError, match="found by the caller"):
        run_at_once(_fail())
    refuse_to_wait()  # that is over


async def test_nobody_waits_at_once() -> None:
    mutex = Mutex()
    started: list[str] = []
    for wait in (run_host_io(started.append, "io"), run_cpu(started.append, "cpu"), mutex.acquire()):
        await mutex.acquire()
        with pytest.raises(WouldWait):
            run_at_once(wait)
        mutex.release()
    assert not started
    assert not mutex.locked
    run_at_once(mutex.acquire())
    assert mutex.locked


async def test_others_wait_meanwhile() -> None:
    """What is at once in one thread holds for that one alone."""
    inside, seen = threading.Event(), threading.Event()

    async def linger() -> None:
        inside.set()
        assert seen.wait(30)
        with pytest.raises(WouldWait):
            refuse_to_wait()

    thread = threading.Thread(target=lambda: run_at_once(linger()))
    thread.start()
    assert inside.wait(30)
    refuse_to_wait()
    seen.set()
    thread.join()


async def _wait() -> None:
    await trio.lowlevel.cancel_shielded_checkpoint()


async def test_a_wait_that_does_not_ask_is_a_bug() -> None:
    with pytest.raises(RuntimeError, match="has suspended without asking"):
        run_at_once(_wait())
    refuse_to_wait()
