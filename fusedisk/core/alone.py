"""Running one coroutine without an event loop, while nothing else runs in the process.

Commands that read an image's metadata do one thing after another. They need no tasks, and importing trio takes half of
the time that such a command has. So they run alone: what would go to a worker thread is called in place, as nobody else
is kept waiting, and a checkpoint does nothing. Nothing is cancelled, so shields do nothing either.

Code that such commands reach uses :func:`shield` and :func:`checkpoint` in place of trio's. Anything else that suspends
is refused: with :class:`~fusedisk.core.at_once.WouldWait` where it knows of that, as a bug otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import trio

from fusedisk.core.at_once import drive, is_at_once

_Result = TypeVar("_Result")

_alone = False


def is_alone() -> bool:
    """Whether there is no event loop, and one coroutine only."""
    return _alone


def run_alone(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """The coroutine's result. Raises what it raises."""
    global _alone
    _alone = True
    try:
        return drive(coroutine)
    finally:
        _alone = False


def shield() -> AbstractContextManager[object]:
    """What must not be cancelled."""
    return nullcontext() if _alone or is_at_once() else trio.CancelScope(shield=True)


async def sleep(seconds: float) -> None:
    """Wait for a time."""
    if _alone:
        time.sleep(seconds)
    else:
        await trio.sleep(seconds)


async def checkpoint() -> None:
    """Give other tasks their turn."""
    if not _alone:
        await trio.lowlevel.checkpoint()
