"""Ending a process whose event loop cannot end it.

A call to the host can hang for ever: a file of a network filesystem without its server, or of a FUSE filesystem whose
daemon is stopped. Where a worker thread hangs, the loop waits for it; where the loop's own thread hangs, no signal
handler of Python runs. So a thread beside them takes the signals that nobody has taken for a second.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

GRACE_SECONDS = 2.0
"""How long ending in good order may take where ending at once loses nothing, and ending at all without a word."""
_LOOK_SECONDS = 1.0


class SignalWatch:
    """Sees signals that the main thread does not take. Start it in the process that it is for, after any fork. A
    context manager."""

    def __init__(self, numbers: frozenset[signal.Signals], stuck: Callable[[int], None]) -> None:
        """``stuck`` is called, in another thread, with a signal that the main thread has not taken in time."""
        self._numbers = numbers
        self._stuck = stuck
        self._heard = threading.Event()
        self._over = False
        threading.Thread(target=self._run, name="signals", daemon=True).start()

    def __enter__(self) -> SignalWatch:
        return self

    def __exit__(self, *exc: object) -> None:
        self._over = True

    def heard(self) -> None:
        """The main thread has taken a signal."""
        self._heard.set()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        while not self._over:
            # The kernel gives signals to the main thread, unless that is busy when the time is over.
            taken = signal.sigtimedwait(self._numbers, _LOOK_SECONDS)
            if taken is None or taken.si_signo not in self._numbers:  # Python 3.11 makes one up if interrupted late
                continue
            self._heard.clear()
            signal.pthread_kill(threading.main_thread().ident or 0, taken.si_signo)
            if not self._heard.wait(GRACE_SECONDS) and not self._over:
                self._stuck(taken.si_signo)


def after_grace(function: Callable[[], object]) -> threading.Timer:
    """Call ``function`` in another thread when the time for ending in good order is over, unless it is cancelled."""

    def run() -> None:
        # A handler that runs here only leaves a note for the main thread, which may never read it.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        function()

    timer = threading.Timer(GRACE_SECONDS, run)
    timer.daemon = True
    timer.start()
    return timer
