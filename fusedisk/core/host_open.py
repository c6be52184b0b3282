"""Opening host files without surprises.

A name can lead to a pipe, whose opening waits for somebody at its other end, or to a device, whose opening can have
effects; and where it leads to can change between a look and the open. So a name is first opened as a descriptor that
touches nothing (O_PATH). What it is gets decided by that descriptor, and that very file is opened for use.
"""

from __future__ import annotations

import errno
import os
import stat

_OWN_DESCRIPTORS = "/proc/self/fd"

Identity = tuple[int, int]
"""Numbers of a file's device and inode, which tell it from all others as long as it exists."""


def identity(found: os.stat_result) -> Identity:
    """What tells a file from others, under whatever name."""
    return found.st_dev, found.st_ino


def descriptor_path(fd: int) -> str:
    """Where the file behind a descriptor lies now, as the kernel knows it: free of symbolic links. Raises OSError where
    /proc is missing."""
    return os.readlink(f"{_OWN_DESCRIPTORS}/{fd}")


class Found:
    """A file that a name leads to: known, but not opened for reading or writing yet. A context manager."""

    def __init__(self, path: str) -> None:
        """Raises OSError, or ValueError for what no file can be called. Blocks."""
        self._path = path
        self.fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            self.mode = os.fstat(self.fd).st_mode
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Found:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    def open(self, flags: int) -> int:
        """Open this very file, whatever the name leads to by now; returns a descriptor. Blocks; raises OSError."""
        flags |= os.O_CLOEXEC | os.O_NOCTTY
        try:
            return os.open(f"{_OWN_DESCRIPTORS}/{self.fd}", flags)
        except FileNotFoundError:
            if os.path.exists(_OWN_DESCRIPTORS):
                raise
        return self._open_by_name(flags)

    def _open_by_name(self, flags: int) -> int:
        """The same without /proc."""
        fd = os.open(self._path, flags | os.O_NONBLOCK)
        if identity(os.fstat(fd)) != identity(os.fstat(self.fd)):
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        os.set_blocking(fd, not flags & os.O_NONBLOCK)
        return fd


def kind_name(mode: int) -> str:
    """What a file that is no regular one is, with its article."""
    for is_kind, name in (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if is_kind(mode):
            return name
    return "a file of an unknown kind"
