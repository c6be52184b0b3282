"""Locks and signals between tasks."""

from __future__ import annotations

import trio
import trio.testing

from fusedisk.core.locks import Signal


async def test_a_signal_wakes_all_tasks_that_wait_and_no_later_one() -> None:
    signal = Signal()
    woken: list[str] = []

    async def wait(name: str) -> None:
        await signal.wait()
        woken.append(name)

    signal.notify()  # not remembered
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "a")
        nursery.start_soon(wait, "b")
        await trio.testing.wait_all_tasks_blocked()
        assert woken == []
        signal.notify()
        nursery.start_soon(wait, "late")
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(woken) == ["a", "b"]
        nursery.cancel_scope.cancel()
