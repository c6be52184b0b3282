"""Linux calls that Python's ``os`` does not have: fallocate, statx's direct-I/O alignment, statfs's type, and
the ioctls of files and block devices.

All raise OSError; functions that touch the disk block. Constants are those of the kernel's UAPI headers.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import stat
import struct
from typing import Any, NamedTuple

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

TMPFS_MAGIC = 0x01021994
RAMFS_MAGIC = 0x858458F6

_STATX_DIOALIGN = 0x2000
_AT_EMPTY_PATH = 0x1000
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_BLKROGET = 0x125E
_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_HDIO_GETGEO = 0x0301
_SYS_CACHESTAT = 451
"""The same on all architectures but Alpha."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_libc.syscall.restype = ctypes.c_long
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)


class Geometry(NamedTuple):
    """A disk's geometry as old partition tables count it."""

    heads: int
    sectors: int
    cylinders: int


def system_call(number: int, *args: Any) -> int:
    """syscall(2): the result of a call that the C library has no function for. Numbers in ``args`` are ints of C."""
    result: int = _libc.syscall(ctypes.c_long(number), *args)
    _check(min(result, 0))
    return result


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) of ``length`` bytes at ``offset``; ``mode`` is made of FALLOC_FL_*."""
    while True:
        try:
            _check(_libc.fallocate(fd, mode, offset, length))
            return
        except InterruptedError:
            continue


def direct_io_alignment(fd: int) -> tuple[int, int] | None:
    """Alignment in bytes that O_DIRECT asks for, of memory and of offsets and lengths, by statx(2); None where the
    kernel (before 6.1) or the filesystem does not say."""
    buffer = ctypes.create_string_buffer(256)
    try:
        _check(_libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer))
    except OSError:
        return None
    (mask,) = struct.unpack_from("I", buffer, 0)
    memory, offset = struct.unpack_from("II", buffer, 152)
    if not mask & _STATX_DIOALIGN or not memory or not offset:
        return None
    return memory, offset


def lives_in_memory(fd: int) -> bool:
    """Whether a regular file lies on tmpfs or ramfs, where nothing waits for a disk (but swap)."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return False  # a device node's own filesystem says nothing about the device
    buffer = ctypes.create_string_buffer(256)
    _check(_libc.fstatfs(fd, buffer))
    return struct.unpack_from("@l", buffer, 0)[0] in (TMPFS_MAGIC, RAMFS_MAGIC)


def cached_pages(fd: int, offset: int, length: int) -> int:
    """How many of the pages of a file that a range touches are in the page cache, by cachestat(2), Linux 6.5; among
    them some that are still being read."""
    asked, answer = (ctypes.c_uint64 * 2)(offset, length), (ctypes.c_uint64 * 5)()
    system_call(_SYS_CACHESTAT, fd, asked, answer, 0)
    return answer[0]


def set_nocow(fd: int) -> None:
    """Switch copy-on-write off for an empty file, where the filesystem has such a thing (btrfs); elsewhere
    nothing happens."""
    flags = array.array("i", [0])
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags, True)
        if not flags[0] & _FS_NOCOW_FL:
            flags[0] |= _FS_NOCOW_FL
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, flags)
    except OSError as exc:
        if exc.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


# --- block devices --------------------------------------------------------------------------------------


def _number(fd: int, request: int, code: str) -> int:
    answer = fcntl.ioctl(fd, request, bytes(struct.calcsize(code)))
    return int(struct.unpack(code, answer)[0])


def device_size(fd: int) -> int:
    """Size of a block device in bytes."""
    return _number(fd, _BLKGETSIZE64, "@Q")


def device_read_only(fd: int) -> bool:
    """Whether the device refuses writes."""
    return _number(fd, _BLKROGET, "@i") != 0


def logical_block_size(fd: int) -> int:
    """The smallest unit that the device reads and writes, in bytes."""
    return _number(fd, _BLKSSZGET, "@i")


def physical_block_size(fd: int) -> int:
    """The unit that the device writes without read-modify-write of its own, in bytes."""
    return _number(fd, _BLKPBSZGET, "@I")


def device_geometry(fd: int) -> Geometry | None:
    """The geometry that the device claims, None where it claims none."""
    try:
        answer = fcntl.ioctl(fd, _HDIO_GETGEO, bytes(struct.calcsize("@BBHL")))
    except OSError:
        return None
    heads, sectors, cylinders, _start = struct.unpack("@BBHL", answer)
    if not heads or not sectors or not cylinders:
        return None
    return Geometry(heads, sectors, cylinders)


def discard_granularity(fd: int) -> int:
    """The unit that the device discards, in bytes, 0 where it does not say (sysfs, ``queue/discard_granularity``).

    Also 0 for a device that starts inside a unit (a misaligned partition): no multiple of it fits there.
    """
    device = os.fstat(fd).st_rdev
    place = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if _sysfs_number(f"{place}/discard_alignment"):
        return 0
    if os.path.exists(f"{place}/partition"):
        place += "/.."
    return _sysfs_number(f"{place}/queue/discard_granularity")


def _sysfs_number(path: str) -> int:
    try:
        with open(path, encoding="ascii") as attribute:
            return int(attribute.read())
    except (OSError, ValueError):
        return 0


def discard_device(fd: int, offset: int, length: int) -> None:
    """Tell the device that a range of whole logical blocks is not needed; what it reads as then is up to it."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("@QQ", offset, length))


def zero_device(fd: int, offset: int, length: int) -> None:
    """Zero a range of whole logical blocks, by the device where it can, else by the kernel."""
    fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("@QQ", offset, length))
