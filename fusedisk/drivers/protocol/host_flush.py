"""Flushing a host file in the kernel's own worker threads (Linux AIO) rather than in one of ours.

Flushing little takes some 60 to 130 microseconds where the disk is quick, a hop to a Python thread and back another
170, waiting on an eventfd another 50. Nothing else is done this way, as the kernel does reads and writes of the page
cache in the middle of submitting them.

Where there is no AIO (other architectures, containers that forbid it, no events left) a thread does it as before.

Source: include/uapi/linux/aio_abi.h, fs/aio.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import sys
import weakref

import trio

from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.offload import run_host_io
from fusedisk.drivers.protocol.hostcalls import system_call

_MOST = 64
"""The least number of simultaneous flushes that have room; more may go to threads."""
_FDSYNC = 3
_RESFD = 1

_GENERIC = (0, 1, 2, 4)
_CALLS = {"x86_64": (206, 207, 209, 208), "aarch64": _GENERIC, "riscv64": _GENERIC}
"""The numbers of io_setup, io_destroy, io_submit and io_getevents."""


class _Request(ctypes.Structure):
    """struct iocb, of machines whose low byte comes first."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_int32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("event_fd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """struct io_event."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("request", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    )


def _destroy(number: int, context: ctypes.c_ulong) -> None:
    """Destroy a context. A child of fork has none to destroy."""
    with contextlib.suppress(OSError):
        system_call(number, context)


class _Flushes:
    """The flushes of one trio run. Raises OSError if there is no AIO."""

    def __init__(self, calls: tuple[int, int, int, int]) -> None:
        setup, destroy, self._submit, self._get_events = calls
        context = ctypes.c_ulong(0)
        system_call(setup, ctypes.c_uint(_MOST), ctypes.byref(context))
        self._context = context
        self._last = 0
        self._results: dict[int, int] = {}
        """The results of finished flushes by number, for the tasks that began them."""
        self._events = (_Event * _MOST)()
        weakref.finalize(self, _destroy, destroy, context)

    def begin(self, fd: int) -> tuple[int, int]:
        """Begin a flush; returns its number, and a descriptor that is readable when it has ended. Raises OSError."""
        event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._last += 1
        request = _Request(data=self._last, opcode=_FDSYNC, fd=fd, flags=_RESFD, event_fd=event_fd)
        try:
            system_call(self._submit, self._context, ctypes.c_long(1), (ctypes.c_void_p * 1)(ctypes.addressof(request)))
        except OSError:
            os.close(event_fd)
            raise
        return self._last, event_fd

    def end(self, number: int, event_fd: int) -> int:
        """The result of a flush that has ended: 0 or a negative errno."""
        os.close(event_fd)
        # The event lies there before its descriptor is readable; others may lie there, too, and before it.
        while number not in self._results:
            if not self._collect():
                return -errno.EIO
        return self._results.pop(number)

    def _collect(self) -> int:
        """Collect some of the events that are ready; returns how many."""
        count = system_call(self._get_events, self._context, ctypes.c_long(0), ctypes.c_long(_MOST), self._events, None)
        for event in self._events[:count]:
            self._results[event.data] = event.result
        return count


@functools.cache
def _of_run() -> trio.lowlevel.RunVar[_Flushes | None]:
    return trio.lowlevel.RunVar("host_flushes")


def _flushes() -> _Flushes | None:
    """Return the flushes of this trio run; None if there is no AIO."""
    try:
        return _of_run().get()
    except LookupError:
        found = None
        calls = _CALLS.get(os.uname().machine)
        if calls is not None and sys.byteorder == "little":
            try:
                found = _Flushes(calls)
            except OSError:
                pass
        _of_run().set(found)
        return found


async def flush_file(fd: int) -> None:
    """Run fdatasync(2) without stopping the trio thread; a cancelled caller waits for its end. Raises OSError."""
    refuse_to_wait()
    flushes = _flushes()
    if flushes is not None:
        try:
            number, event_fd = flushes.begin(fd)
        except OSError:
            pass  # fdatasync reports the same error of the file
        else:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.wait_readable(event_fd)
            result = flushes.end(number, event_fd)
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            return
    await run_host_io(os.fdatasync, fd)
