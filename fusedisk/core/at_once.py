"""Runs a coroutine without a task, as long as nothing in it has to wait.

Starting a task costs more than most requests do. So a request may first be tried without one. Every place that would
wait calls :func:`refuse_to_wait` before it changes anything, which raises :class:`WouldWait`. The callers clean up as
after any other error, and the request is made again in a task.

Use it only for code in which every wait makes that call. A wait that does not is a bug and raises RuntimeError.
"""

from __future__ import annotations

import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class WouldWait(BaseException):
    """The request would have to wait. Not an ``Exception``, because nothing has failed."""


class _State(threading.local):
    active = False
    """Whether this thread is within :func:`run_at_once`."""


_state = _State()


def refuse_to_wait() -> None:
    """Call this before waiting. Raises WouldWait within :func:`run_at_once`."""
    if _state.active:
        raise WouldWait


def is_at_once() -> bool:
    """Whether this runs without a task. Nothing is cancelled then, so costly shields can be left out."""
    return _state.active


def run_at_once(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the coroutine's result. Raises what it raises, and WouldWait if it has to wait."""
    _state.active = True
    try:
        return drive(coroutine)
    finally:
        _state.active = False


def drive(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine to its end. Raises what it raises, and RuntimeError if it suspends, which is a bug."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: _Result = stop.value
        return result
    coroutine.close()
    raise RuntimeError(f"{coroutine!r} has suspended without asking whether it may")
