"""Prevents a deadlock: the kernel must not wait for the daemon while the daemon waits for the kernel's memory.

The kernel frees memory by writing out dirty pages. Where those belong to a loop device on our own mount, writing them
takes us; and if we, to do so, had to wait for memory, nobody would go on.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource

log = logging.getLogger(__name__)

_PR_SET_IO_FLUSHER = 57
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14


def prepare() -> None:
    """Ask for both, as far as the host lets us: that the kernel must not reclaim by I/O on our behalf (prctl(2),
    CAP_SYS_RESOURCE), nor take pages away that we have (mlockall(2), CAP_IPC_LOCK)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        log.debug("the process cannot be marked as an I/O flusher: %s", os.strerror(ctypes.get_errno()))
    if _may_lock() and libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        log.debug("the process's memory cannot be locked: %s", os.strerror(ctypes.get_errno()))


def _may_lock() -> bool:
    """Under a limit a lock would hold for all memory yet to come, and no thread could be started any more."""
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY or _has_capability(_CAP_IPC_LOCK)


def _has_capability(number: int) -> bool:
    """Whether the process has one of capabilities(7)."""
    try:
        with open("/proc/self/status", "rb") as status:  # the name of the program in it may be any bytes
            effective = next(line.split()[1] for line in status if line.startswith(b"CapEff:"))
    except (OSError, StopIteration):
        return False
    return bool(int(effective, 16) >> number & 1)
