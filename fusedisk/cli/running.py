"""Running a command's asynchronous part."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")


def run_async(function: Callable[[*_Args], Awaitable[_Result]], *args: *_Args) -> _Result:
    """Run ``function(*args)`` in an event loop of its own.

    Ctrl-C comes where a cancellation may come, and nowhere else: between any two instructions it could, say, leave a
    request counted that nobody ends, and closing waits for that for ever.
    """
    import trio

    return trio.run(function, *args, restrict_keyboard_interrupt_to_checkpoints=True)
