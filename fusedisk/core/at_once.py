"""Running a coroutine to its end in one go, where nothing in it has to wait.

A task of its own costs a request more than most requests cost. So a request may be tried without one: whatever would
suspend it, and knows of this, asks :func:`refuse_to_wait` before it changes anything, and raises :class:`WouldWait`.
Everybody on the way cleans up as after any other error, and the request is made again in a task.

Meant for code of which every wait is known to ask. A wait that does not is a bug, and told as one.
"""

from __future__ import annotations

import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class WouldWait(BaseException):
    """What was to be done at once takes waiting. No ``Exception``: it is nobody's failure."""


class _State(threading.local):
    active = False
    """Whether this thread is within :func:`run_at_once`."""


_state = _State()


def refuse_to_wait() -> None:
    """Called by who is about to wait; raises WouldWait within :func:`run_at_once`."""
    if _state.active:
        raise WouldWait


def is_at_once() -> bool:
    """Whether nothing suspends, and so nothing is cancelled: shields, which cost time, can be left out."""
    return _state.active


def run_at_once(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """The coroutine's result. Raises what it raises, and WouldWait where it has to wait."""
    _state.active = True
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: _Result = stop.value
        return result
    finally:
        _state.active = False
    coroutine.close()
    raise RuntimeError(f"{coroutine!r} has waited without asking whether it may")
