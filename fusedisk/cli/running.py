"""Running a command's asynchronous part."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, NoReturn, TypeVar, TypeVarTuple

from fusedisk.cli import exit_codes
from fusedisk.cli.last_resort import SignalWatch, after_grace
from fusedisk.cli.output import tell

_GARBAGE_THRESHOLD = 50_000
"""Objects that are made before Python looks for garbage; by default these are 700."""

_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")


def run_async(function: Callable[[*_Args], Awaitable[_Result]], *args: *_Args, writes: bool = False) -> _Result:
    """Run ``function(*args)`` in an event loop of its own.

    Ctrl-C comes where a cancellation may come, and nowhere else: between any two instructions it could, say, leave a
    request counted that nobody ends, and closing waits for that for ever. A command that waits for a file that hangs
    ends all the same: after a moment where it only reads, else at the second Ctrl-C. ``writes``: it changes something.
    """
    import trio

    async def run() -> _Result:
        before = signal.getsignal(signal.SIGINT)
        if not callable(before):  # interrupts are ignored
            return await function(*args)
        with _Interrupts(before, writes):
            return await function(*args)

    return trio.run(run, restrict_keyboard_interrupt_to_checkpoints=True)


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
    # Otherwise interrupts are ignored, or somebody else's.
    interrupts = _Interrupts(interrupt, writes=False) if ours else contextlib.nullcontext()
    # Most of what is made now are modules, which stay: looking for garbage among them costs more than it finds.
    gc.set_threshold(_GARBAGE_THRESHOLD)
    try:
        with interrupts:
            return run_alone(function(*args))
    except BaseException as exc:
        if interrupted:
            raise KeyboardInterrupt from exc
        raise
    finally:
        gc.set_threshold(*thresholds)
        if ours:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end this process although it waits for a file that does not answer, as long as nothing is changed
    yet."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler and threading.current_thread() is threading.main_thread():
        with _Interrupts(signal.default_int_handler, writes=False):
            yield
    else:
        yield


class _Interrupts:
    """Handles Ctrl-C in addition to trio's own handler."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any], writes: bool) -> None:
        self._handler = handler
        self._writes = writes
        self._told = False
        self._timer: threading.Timer | None = None
        self._watch = SignalWatch(frozenset({signal.SIGINT}), self._stuck)

    def __enter__(self) -> None:
        signal.signal(signal.SIGINT, self._interrupt)

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._handler)
        self._watch.__exit__()
        if self._timer is not None:
            self._timer.cancel()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._watch.heard()
        self._take()
        self._handler(number, frame)

    def _take(self) -> None:
        if self._timer is not None:
            self._end()
        self._timer = after_grace(self._late)

    def _stuck(self, number: int) -> None:
        """The main thread has had its time already."""
        self._take()
        self._late()

    def _late(self) -> None:
        """It has not ended in time."""
        if not self._writes:
            self._end()
        if not self._told:
            self._told = True
            tell(
                "still waiting for the host to write; Ctrl-C again ends this at once, and what is written may be lost."
            )

    def _end(self) -> NoReturn:
        os._exit(exit_codes.INTERRUPTED)
