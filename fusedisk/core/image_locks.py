"""QEMU's image locks: a running virtual machine and fusedisk keep each other out of an image.

Byte 100 + i of the file is locked while permission i is used, byte 200 + i while permission i is not shared
(bit numbers of :mod:`fusedisk.block.model.permissions`: consistent read, write, write unchanged, resize). Everybody
takes shared locks only, on single bytes; a conflict is found by asking whether an exclusive lock of a byte
would meet somebody else's: for each used permission at 200 + i, for each unshared one at 100 + i. Lock first,
then test, and undo on failure: of two that come at once at least one sees the other.

The locks are of the open file description (F_OFD_SETLK): they hold until unlocked or until the last duplicate
of the descriptor is closed, and closing another descriptor of the file does not lose them.

Source: the locking scheme of QEMU's file driver (``block/file-posix.c``), described from its behaviour.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from fusedisk.core import lock_holders
from fusedisk.core.errors import HostError, LockConflictError

_USED_BASE = 100
_UNSHARED_BASE = 200
_NAMES = ("consistent read", "write", "write unchanged", "resize")
_WRITE = _NAMES.index("write")
_ALL = (1 << len(_NAMES)) - 1

_FLOCK = struct.Struct("@hhqqi0q")
"""C's ``struct flock``: type, whence, start, length, pid, and padding at the end."""

_NO_LOCKS_HERE = frozenset((errno.ENOLCK, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP))


def supported(fd: int) -> bool:
    """Whether the file's filesystem and this kernel have open-file-description locks."""
    try:
        _conflicts(fd, _USED_BASE)
    except OSError as exc:
        if exc.errno in _NO_LOCKS_HERE:
            return False
        raise
    return True


def is_written(fd: int) -> bool:
    """Whether another opening of the file may write to it now. Raises OSError."""
    return supported(fd) and _conflicts(fd, _USED_BASE + _WRITE)


class ImageLocks:
    """The image locks of one descriptor.

    ``check`` is followed by ``commit`` or ``abort``. All calls are synchronous and do not wait.
    """

    def __init__(self, fd: int, filename: str) -> None:
        """``fd`` is open for reading at least and stays the caller's; ``filename`` is for messages."""
        self.fd = fd
        self.filename = filename
        self._held: set[int] = set()
        """Bytes locked now."""
        self._settled: set[int] = set()
        """Bytes that the last committed permissions need."""
        self._wanted: set[int] = set()
        """Bytes that the permissions being checked need."""

    def check(self, perm: int, shared: int) -> None:
        """Lock what using ``perm`` and sharing ``shared`` needs beyond what is held, then test for conflicts.

        Raises LockConflictError where another process stands in the way, HostError where the host refuses the
        lock itself; the locks are then as they were.
        """
        self._wanted = _bytes_of(perm, shared)
        try:
            for byte in sorted(self._wanted - self._held):
                self._lock(byte)
            self._test(perm, shared)
        except BaseException:
            self.abort()
            raise

    def commit(self) -> None:
        """Release what the checked permissions no longer need."""
        self._settled = self._wanted
        self._release(self._held - self._settled)

    def abort(self) -> None:
        """Go back to the locks of the last ``commit``."""
        self._wanted = self._settled
        self._release(self._held - self._settled)

    def release(self) -> None:
        """Release everything; for duplicates of the descriptor that outlive it."""
        self._settled = self._wanted = set()
        self._release(set(self._held))

    def moved_to(self, fd: int) -> ImageLocks:
        """The same locks on another descriptor of the same file, without a test: they passed it when they were
        taken here, and are held here meanwhile. Raises HostError."""
        other = ImageLocks(fd, self.filename)
        other._wanted = set(self._wanted)
        other._settled = set(self._settled)
        try:
            for byte in sorted(self._held):
                other._lock(byte)
        except HostError:
            other.release()
            raise
        return other

    def _lock(self, byte: int) -> None:
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        except OSError as exc:
            raise HostError(
                f"Could not lock byte {byte} of '{self.filename}': {os.strerror(exc.errno or 0)}; locking=off does "
                f"without image locks.",
                errno=exc.errno,
            ) from exc
        self._held.add(byte)

    def _test(self, perm: int, shared: int) -> None:
        for bit, name in enumerate(_NAMES):
            if perm & 1 << bit and _conflicts(self.fd, _UNSHARED_BASE + bit):
                raise self._conflict(f'"{name}"', _UNSHARED_BASE + bit)
        for bit, name in enumerate(_NAMES):
            if not shared & 1 << bit and _conflicts(self.fd, _USED_BASE + bit):
                raise self._conflict(f'shared "{name}"', _USED_BASE + bit)

    def _conflict(self, what: str, byte: int) -> LockConflictError:
        message = f"Failed to get {what} lock: is another process using the image [{self.filename}]?"
        if (holder := lock_holders.holder(self.fd, byte)) is not None:
            message += f" It is in use by {holder}."
        return LockConflictError(message)

    def _release(self, surplus: set[int]) -> None:
        for byte in surplus:
            try:
                fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))
            except OSError:
                # The lock goes with the descriptor at the latest; too much locked harms nobody's data.
                pass
        self._held -= surplus


def _bytes_of(perm: int, shared: int) -> set[int]:
    unshared = _ALL & ~shared
    return {_USED_BASE + bit for bit in range(len(_NAMES)) if perm & 1 << bit} | {
        _UNSHARED_BASE + bit for bit in range(len(_NAMES)) if unshared & 1 << bit
    }


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _conflicts(fd: int, byte: int) -> bool:
    """Whether somebody else holds a lock on ``byte``."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
