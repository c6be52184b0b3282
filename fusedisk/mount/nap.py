"""A short sleep until a descriptor is readable, cheaper than poll(2) with a time limit.

Each poll(2) with a time limit programs a kernel timer, which traps into the hypervisor in a virtual machine: 8 of the
29 microseconds that a sleep and an answer cost. Here consecutive sleeps share one timerfd(2), which is armed again
after it has fired. If there is no timerfd, each sleep has a time limit of its own.
"""

from __future__ import annotations

import ctypes
import os
import select

TICK = 1e-3
"""Seconds for which the timer is armed. A nap without a request lasts one to two of these."""

_CLOCK_MONOTONIC = 1
_libc = ctypes.CDLL(None)
_libc.timerfd_settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_DURATION = (ctypes.c_long * 4)(0, 0, 0, round(TICK * 1e9))
"""struct itimerspec: no interval."""


class Nap:
    """Sleeps until one descriptor is readable."""

    def __init__(self, descriptor: int) -> None:
        self._timer: int = _libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        self._runs = False
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        if self._timer >= 0:
            poller.register(self._timer, select.POLLIN)
        self._poll = poller.poll

    def close(self) -> None:
        """Close the timer."""
        if self._timer >= 0:
            os.close(self._timer)

    def sleep(self) -> bool:
        """Sleep; return whether the descriptor became readable."""
        if self._timer < 0:
            return bool(self._poll(TICK * 1e3))
        for _ in range(2):  # the shared timer may have been armed earlier and fire at once
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
