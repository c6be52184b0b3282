"""Whole vectored transfers on a host descriptor: short transfers continued, long vectors split.

Plain blocking functions, for worker threads or for calls that are known to be quick. All raise OSError.
EINTR is retried by Python itself.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from fusedisk.core.zeroes import zero_fill

IOV_MAX = 1024
"""Most buffers in one ``preadv`` or ``pwritev`` (Linux, UIO_MAXIOV)."""


def total_length(buffers: Sequence[memoryview]) -> int:
    """Return the number of bytes in all buffers."""
    if len(buffers) == 1:
        return len(buffers[0])
    return sum(map(len, buffers))


def remaining(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return the buffers without their first ``done`` bytes and without empty ones."""
    rest = []
    for view in buffers:
        if done >= len(view):
            done -= len(view)
        else:
            rest.append(view[done:] if done else view)
            done = 0
    return rest


def zero_all(buffers: Sequence[memoryview]) -> None:
    """Fill all buffers with zeroes."""
    for view in buffers:
        zero_fill(view)


def read_vector(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> Sequence[memoryview]:
    """Fill the buffers from ``offset``; what lies past the end of the file becomes zeroes.

    Returns what is left to read: nothing, unless ``flags`` is RWF_NOWAIT and the rest is not in the page cache.
    With RWF_NOWAIT, raises OSError with EOPNOTSUPP, before anything is read, where the filesystem cannot.
    """
    left, wanted = buffers, total_length(buffers)
    while True:
        try:
            done = os.preadv(fd, left if len(left) <= IOV_MAX else left[:IOV_MAX], offset, flags)
        except BlockingIOError:
            return left
        if done == wanted:
            return ()
        if done == 0:
            zero_all(left)
            return ()
        left = remaining(left, done)
        wanted -= done
        offset += done


def write_vector(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> Sequence[memoryview]:
    """Write the buffers at ``offset``.

    Returns what is left to write: nothing, unless ``flags`` is RWF_NOWAIT and the rest would wait. With
    RWF_NOWAIT, raises OSError with EOPNOTSUPP, before anything is written, where the filesystem cannot.
    """
    left, wanted = buffers, total_length(buffers)
    while True:
        try:
            done = os.pwritev(fd, left if len(left) <= IOV_MAX else left[:IOV_MAX], offset, flags)
        except BlockingIOError:
            return left
        if done == wanted:
            return ()
        if done == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        left = remaining(left, done)
        wanted -= done
        offset += done
