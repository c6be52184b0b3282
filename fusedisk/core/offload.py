"""Worker threads for what would stop the trio thread: host I/O and CPU work.

The hop costs about 190 microseconds, so callers come here only when the call may take longer than that. A
cancelled caller waits for its thread: the thread fills the caller's buffer, which may not be used again
before it is done. A coroutine that runs alone (:mod:`fusedisk.core.alone`) keeps nobody waiting and needs no thread.
Only what opens a file leaves its thread behind: nobody needs what comes of it, and a file of a network or a FUSE
filesystem that hangs can keep it for ever.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

from fusedisk.core.alone import is_alone
from fusedisk.core.at_once import refuse_to_wait

HOST_IO_THREADS = 16
"""Host requests under way at once; more only queue up in the host's own scheduler."""

_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")


@functools.cache
def _host_io_limiter() -> trio.lowlevel.RunVar[trio.CapacityLimiter]:
    return trio.lowlevel.RunVar("host_io_limiter")


@functools.cache
def _cpu_limiter() -> trio.lowlevel.RunVar[trio.CapacityLimiter]:
    return trio.lowlevel.RunVar("cpu_limiter")


async def run_host_io(fn: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
    """Run ``fn(*args)``, which may wait for the host's disks, in a worker thread and return its result."""
    if is_alone():
        return fn(*args)
    refuse_to_wait()
    limiter = _limiter(_host_io_limiter(), HOST_IO_THREADS)
    return await trio.to_thread.run_sync(fn, *args, limiter=limiter)


async def run_cpu(fn: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
    """Run ``fn(*args)``, which computes with the GIL released (inflate, ciphers), in a worker thread."""
    if is_alone():
        return fn(*args)
    refuse_to_wait()
    limiter = _limiter(_cpu_limiter(), len(os.sched_getaffinity(0)))
    return await trio.to_thread.run_sync(fn, *args, limiter=limiter)


async def run_opening(
    fn: Callable[[*_Args], _Result], *args: *_Args, unwanted: Callable[[_Result], object] | None = None
) -> _Result:
    """Run ``fn(*args)``, which finds or opens files by name, in a worker thread and return its result.

    A cancelled caller does not wait: ``unwanted`` gets a result that comes too late, in that thread.
    """
    if is_alone():
        return fn(*args)
    refuse_to_wait()
    handing_over = threading.Lock()
    results: list[_Result] = []
    gone = False

    def work() -> _Result:
        result = fn(*args)
        with handing_over:
            if not gone:
                results.append(result)
                return result
        if unwanted is not None:
            unwanted(result)
        return result

    # Without a common limit: files that hang would keep others from being opened.
    limiter = trio.CapacityLimiter(1)
    try:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
    except trio.Cancelled:
        with handing_over:
            gone = True
        if unwanted is not None:
            for result in results:
                unwanted(result)
        raise


def _limiter(variable: trio.lowlevel.RunVar[trio.CapacityLimiter], threads: int) -> trio.CapacityLimiter:
    """The limiter of this trio run; each run has its own."""
    try:
        return variable.get()
    except LookupError:
        limiter = trio.CapacityLimiter(threads)
        variable.set(limiter)
        return limiter
