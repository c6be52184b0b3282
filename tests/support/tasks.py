"""Tasks in tests: start one, wait until it stands still, see whether it ended; wait for something outside."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing


class Task:
    """A request running in its own task."""

    def __init__(self) -> None:
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    async def _run(self, call: Callable[[], Awaitable[Any]]) -> None:
        try:
            with self.scope:
                self.result = await call()
        except Exception as exc:
            self.error = exc
        self.done = True
        self.ended.set()

    async def join(self) -> Any:
        """Wait for its end (a hung one fails the test); returns its result or raises its error."""
        with trio.fail_after(30):
            await self.ended.wait()
        if self.error is not None:
            raise self.error
        return self.result


async def start(nursery: trio.Nursery, call: Callable[[], Awaitable[Any]]) -> Task:
    """Run ``call`` in a task of its own until every task stands still."""
    task = Task()
    nursery.start_soon(task._run, call)
    await trio.testing.wait_all_tasks_blocked()
    return task


async def until(condition: Callable[[], object]) -> None:
    """Wait for what threads or other processes do; if they do not, the test fails."""
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - there is nobody who would tell
            await trio.sleep(0.005)
