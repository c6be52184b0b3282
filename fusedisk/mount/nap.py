"""Sleeping for a moment until a descriptor can be read, for less of a processor than a wait with a time limit takes.

poll(2) with a time limit sets a timer of the kernel each time, which in a virtual machine takes its hypervisor: of 29
microseconds of a processor for a sleep and an answer, 8. Sleeps that follow each other share one timer here, a
timerfd(2), which is set anew when it has run out. Where there cannot be one, each sleep has its own.
"""

from __future__ import annotations

import ctypes
import os
import select

TICK = 1e-3
"""Seconds for which the timer is set. A nap in which nothing comes lasts as long at least, and at most twice."""

_CLOCK_MONOTONIC = 1
_libc = ctypes.CDLL(None)
_libc.timerfd_settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_DURATION = (ctypes.c_long * 4)(0, 0, 0, round(TICK * 1e9))
"""struct itimerspec: no interval."""


class Nap:
    """Sleeps until one descriptor can be read."""

    def __init__(self, descriptor: int) -> None:
        self._timer: int = _libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        self._runs = False
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        if self._timer >= 0:
            poller.register(self._timer, select.POLLIN)
        self._poll = poller.poll

    def close(self) -> None:
        """There are no naps any more."""
        if self._timer >= 0:
            os.close(self._timer)

    def take(self) -> bool:
        """Sleep. False: nothing has come."""
        if self._timer < 0:
            return bool(self._poll(TICK * 1e3))
        for _ in range(2):  # it may have been set long before
            if not self._runs:
                if _libc.timerfd_settime(self._timer, 0, _DURATION, None):
                    return False
                self._runs = True
            events = self._poll()
            if len(events) > 1 or events[0][0] != self._timer:
                return True
            os.read(self._timer, 8)
            self._runs = False
        return False
