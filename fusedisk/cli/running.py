"""Running a command's asynchronous part."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar, TypeVarTuple

_GARBAGE_THRESHOLD = 50_000
"""Objects that are made before Python looks for garbage; by default these are 700."""

_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")


def run_async(function: Callable[[*_Args], Awaitable[_Result]], *args: *_Args) -> _Result:
    """Run ``function(*args)`` in an event loop of its own.

    Ctrl-C comes where a cancellation may come, and nowhere else: between any two instructions it could, say, leave a
    request counted that nobody ends, and closing waits for that for ever.
    """
    import trio

    return trio.run(function, *args, restrict_keyboard_interrupt_to_checkpoints=True)


def run_reading(function: Callable[[*_Args], Coroutine[Any, Any, _Result]], *args: *_Args) -> _Result:
    """Run ``function(*args)``, which only reads metadata, without an event loop: see :mod:`fusedisk.core.alone`.

    Ctrl-C ends it anywhere. Closing may fail then, which is nobody's concern: nothing was changed.
    """
    from fusedisk.core.alone import run_alone

    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before, thresholds = signal.getsignal(signal.SIGINT), gc.get_threshold()
    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:  # else interrupts are ignored, or somebody else's
        signal.signal(signal.SIGINT, interrupt)
    # Most of what is made now are modules, which stay: looking for garbage among them costs more than it finds.
    gc.set_threshold(_GARBAGE_THRESHOLD)
    try:
        return run_alone(function(*args))
    except BaseException as exc:
        if interrupted:
            raise KeyboardInterrupt from exc
        raise
    finally:
        gc.set_threshold(*thresholds)
        if ours:
            signal.signal(signal.SIGINT, before)
