"""A signal wakes the tasks that wait for it, and is kept for the next one if none does."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from fusedisk.core.locks import Signal


async def test_a_signal_wakes_all_tasks_that_wait() -> None:
    signal, woken = Signal(), []

    async def wait(number: int) -> None:
        await signal.wait()
        woken.append(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, 1)
        nursery.start_soon(wait, 2)
        await trio.testing.wait_all_tasks_blocked()
        assert woken == []
        signal.notify()
    assert sorted(woken) == [1, 2]
    await _assert_waits(signal)


async def test_a_signal_before_the_wait_is_kept_once() -> None:
    signal = Signal()
    signal.notify()
    signal.notify()
    await signal.wait()
    await _assert_waits(signal)


async def test_a_signal_can_be_forgotten() -> None:
    signal = Signal()
    signal.notify()
    signal.clear()
    await _assert_waits(signal)


async def test_a_cancelled_wait_takes_no_signal() -> None:
    signal = Signal()
    signal.notify()
    with trio.CancelScope() as scope:
        scope.cancel()
        await signal.wait()
    assert scope.cancelled_caught
    await signal.wait()


async def _assert_waits(signal: Signal) -> None:
    with pytest.raises(trio.TooSlowError), trio.fail_after(0):
        await signal.wait()
