"""Reads small files in directories of other users, which may hold anything: only plain files of the directory's owner
are read, no file outside it is reached, and no pipe or device can block us."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator

_LARGEST = 1 << 20
"""Bytes of another user's file; a disk takes a few hundred in the record of its mount."""


def is_trusted(found: os.stat_result, owner: int) -> bool:
    """Whether something is a directory that nobody but ``owner`` can write to."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == owner and not found.st_mode & 0o022


@contextlib.contextmanager
def trusted_directory(path: str, owner: int) -> Iterator[int]:
    """A descriptor of such a directory. Raises OSError for anything else."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not is_trusted(os.fstat(folder), owner):
            raise PermissionError(errno.EPERM, "others could write to it", path)
        yield folder
    finally:
        os.close(folder)


def read(folder: int, name: str, owner: int) -> bytes:
    """The content of a file in a directory, by its descriptor. Raises OSError where ``name`` is anything else than a
    plain file of ``owner``, or larger than what is accepted from others."""
    return read_locked(folder, name, owner)[0]


def read_locked(folder: int, name: str, owner: int) -> tuple[bytes, bool]:
    """The same, and whether somebody holds a lock of flock(2) on the file."""
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = os.fstat(file)
        # None under a second name: it would be read as often as it has names. It has no name at all when it was
        # replaced just now.
        if not stat.S_ISREG(found.st_mode) or found.st_uid != owner or found.st_nlink > 1:
            raise PermissionError(errno.EPERM, f"it is no plain file of user {owner}", name)
        most = found.st_size if owner == os.geteuid() else _LARGEST
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, at most {most} are read", name)
        with open(file, "rb", closefd=False) as stream:
            return stream.read(most), _is_locked(file)
    finally:
        os.close(file)


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
