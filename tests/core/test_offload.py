"""Worker threads and their limits."""

from __future__ import annotations

import os
import threading
from functools import partial

import trio
import trio.testing

from fusedisk.core import offload
from fusedisk.core.offload import HOST_IO_THREADS, run_cpu, run_host_io, run_opening


async def test_results_and_errors_come_back() -> None:
    main = threading.get_ident()
    assert await run_host_io(divmod, 7, 2) == (3, 1)
    assert await run_cpu(threading.get_ident) != main
    try:
        await run_host_io(int, "x")
    except ValueError:
        pass
    else:
        raise AssertionError


async def test_each_kind_has_its_limit() -> None:
    release = threading.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(HOST_IO_THREADS * 2):
            nursery.start_soon(run_host_io, release.wait, 30)
            nursery.start_soon(run_cpu, release.wait, 30)
        await trio.testing.wait_all_tasks_blocked()
        for variable, threads in (
            (offload._host_io_limiter(), HOST_IO_THREADS),
            (offload._cpu_limiter(), len(os.sched_getaffinity(0))),
        ):
            found = variable.get().statistics()
            assert found.borrowed_tokens == threads
            assert found.tasks_waiting == HOST_IO_THREADS * 2 - threads
        release.set()


async def test_a_cancelled_caller_waits_for_its_thread() -> None:
    buffer = bytearray(1)
    started, release = threading.Event(), threading.Event()

    def fill() -> None:
        started.set()
        assert release.wait(timeout=30)
        buffer[0] = 1

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_host_io, fill)
            await trio.to_thread.run_sync(started.wait)
            scope.cancel()
            release.set()
    assert buffer[0] == 1


async def _given_up(*, done_before: bool) -> list[str]:
    """What becomes of the result of an opening that is cancelled while, or just after, its thread works."""
    go_on, done, undone = threading.Event(), threading.Event(), threading.Event()
    unwanted: list[str] = []

    def opening() -> str:
        assert go_on.wait(60)
        done.set()
        return "opened"

    def undo(result: str) -> None:
        unwanted.append(result)
        undone.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_opening, opening, unwanted=undo))
        await trio.testing.wait_all_tasks_blocked()
        if done_before:
            go_on.set()
            done.wait(60)  # the loop has not heard of it
        nursery.cancel_scope.cancel()
    if not done_before:
        assert unwanted == []
        go_on.set()
    assert await trio.to_thread.run_sync(undone.wait, 60)
    return unwanted


async def test_an_opening_that_is_given_up_is_not_waited_for_and_undone() -> None:
    assert await _given_up(done_before=False) == ["opened"]


async def test_an_opening_that_is_given_up_as_it_is_done_is_undone() -> None:
    assert await _given_up(done_before=True) == ["opened"]
