"""O_DIRECT transfers: detects the alignment, and copies unaligned buffers through an aligned one.

Plain blocking functions for worker threads; all raise OSError. The request path has aligned offsets and total lengths
to the file's request alignment; addresses and single buffers need not be aligned.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from typing import NamedTuple

from fusedisk.drivers.protocol.host_io import IOV_MAX, remaining, total_length, zero_all
from fusedisk.drivers.protocol.hostcalls import direct_io_alignment

_BOUNCE_SIZE = 1 << 20
_PROBED = (512, 1024, 2048, 4096)


class Alignment(NamedTuple):
    """The alignment that O_DIRECT needs, in bytes; powers of two."""

    memory: int
    request: int
    """Of offsets and of every buffer's length."""


def find_alignment(fd: int) -> Alignment | None:
    """Return the alignment for a file or block device opened with O_DIRECT, from the kernel or by trying reads; None if
    even page-sized reads fail."""
    told = direct_io_alignment(fd)
    if told is not None:
        return Alignment(*told)
    if os.fstat(fd).st_size == 0:
        return Alignment(mmap.PAGESIZE, _PROBED[-1])  # a read at the end of a file is not checked everywhere
    page = memoryview(mmap.mmap(-1, _PROBED[-1]))
    for size in _PROBED:
        try:
            os.preadv(fd, [page[:size]], 0)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
        else:
            return Alignment(mmap.PAGESIZE, size)
    return None


class _PyBuffer(ctypes.Structure):
    """CPython's ``Py_buffer``."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_PyBuffer),)
_release_buffer.restype = None


def address_of(view: memoryview) -> int:
    """Return the address of a view's bytes; works for read-only views too."""
    buffer = _PyBuffer()
    _get_buffer(view, buffer, 0)
    try:
        return int(buffer.buf or 0)
    finally:
        _release_buffer(buffer)


def is_aligned(buffers: Sequence[memoryview], alignment: Alignment) -> bool:
    """Whether the buffers are aligned enough for the kernel."""
    return all(not len(view) % alignment.request and not address_of(view) % alignment.memory for view in buffers)


def read_direct(fd: int, buffers: Sequence[memoryview], offset: int, alignment: Alignment) -> None:
    """Fill all buffers from ``offset``; what lies past the end of the file becomes zeroes."""
    if is_aligned(buffers, alignment):
        _read_aligned(fd, buffers, offset, alignment.request)
        return
    left, total = list(buffers), total_length(buffers)
    bounce = memoryview(mmap.mmap(-1, min(total, _BOUNCE_SIZE)))
    while total:
        count = min(total, _BOUNCE_SIZE)
        part = bounce[:count]
        _read_aligned(fd, (part,), offset, alignment.request)
        _scatter(part, left)
        left = remaining(left, count)
        offset += count
        total -= count


def _read_aligned(fd: int, buffers: Sequence[memoryview], offset: int, unit: int) -> None:
    left = remaining(buffers, 0)
    while left:
        done = os.preadv(fd, left[:IOV_MAX], offset)
        left = remaining(left, done)
        if done % unit or not done:  # the end of the file, which may lie inside a unit
            zero_all(left)
            return
        offset += done


def write_direct(fd: int, buffers: Sequence[memoryview], offset: int, alignment: Alignment) -> None:
    """Write all buffers at ``offset``."""
    if is_aligned(buffers, alignment):
        _write_aligned(fd, buffers, offset, alignment.request)
        return
    left, total = list(buffers), total_length(buffers)
    bounce = memoryview(mmap.mmap(-1, min(total, _BOUNCE_SIZE)))
    while total:
        count = min(total, _BOUNCE_SIZE)
        part = bounce[:count]
        _gather(left, part)
        _write_aligned(fd, (part,), offset, alignment.request)
        left = remaining(left, count)
        offset += count
        total -= count


def _write_aligned(fd: int, buffers: Sequence[memoryview], offset: int, unit: int) -> None:
    left = remaining(buffers, 0)
    while left:
        done = os.pwritev(fd, left[:IOV_MAX], offset)
        done -= done % unit
        if not done:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        left = remaining(left, done)
        offset += done


def _scatter(source: memoryview, buffers: Sequence[memoryview]) -> None:
    """Copy ``source`` to the first bytes of the buffers."""
    position = 0
    for view in buffers:
        count = min(len(view), len(source) - position)
        view[:count] = source[position : position + count]
        position += count


def _gather(buffers: Sequence[memoryview], target: memoryview) -> None:
    """Fill ``target`` with the first bytes of the buffers."""
    position = 0
    for view in buffers:
        count = min(len(view), len(target) - position)
        target[position : position + count] = view[:count]
        position += count
