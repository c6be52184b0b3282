"""Loop devices hear of a new size, and nobody is asked for the sake of devices that do not exist."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import trio
import trio.testing

from fusedisk.mount import loop_device
from fusedisk.mount.loop_follower import LoopFollower


def test_without_devices_nobody_looks_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        pytest.fail("the place was asked for")

    monkeypatch.setattr(loop_device, "devices", lambda: iter(()))
    assert loop_device.follow_size(fail, 4096)


async def test_a_file_that_grows_all_the_time_is_followed_now_and_then(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """And at the end with its last length."""
    told: list[int] = []
    monkeypatch.setattr(loop_device, "follow_size", lambda where, length: told.append(length) or True)
    monkeypatch.setattr(trio.to_thread, "run_sync", _in_place)  # a thread knows nothing of the clock
    backend = SimpleNamespace(on_resize=[], length=0)
    export: Any = SimpleNamespace(backend=backend, empty=False)
    follower = LoopFollower(export, lambda: "/mnt/disk")
    (resized,) = backend.on_resize
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follower.run)
        await trio.testing.wait_all_tasks_blocked()
        for backend.length in range(1, 1001):
            resized(backend.length)
            await trio.sleep(0.001)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert told[-1] == 1000
    assert told[0] <= 2
    assert 2 <= len(told) < 20


async def _in_place(function: Callable[..., Any], *args: Any, abandon_on_cancel: bool) -> Any:
    await trio.lowlevel.checkpoint()
    return function(*args)
