"""The system's ways to unmount: umount2(2) if that is permitted, fusermount3 otherwise. Everything here blocks."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess

from fusedisk.core.errors import HostError, NotSupportedError
from fusedisk.mount import mountinfo

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8


def unmount(mountpoint: str) -> bool:
    """Take away the mount at an absolute path unless somebody uses it.

    Returns False if it is busy; True if nothing is mounted there any more. Dirty mapped pages are written to the
    daemon first, so the daemon must be able to serve meanwhile. Raises HostError where it is not allowed.
    """
    try:
        _unmount(mountpoint, lazy=False)
    except OSError as exc:
        # Somebody else was faster, or it was gone before; fusermount3 has no error number of its own for that.
        if mountinfo.mount_at(mountpoint) is None:
            return True
        if exc.errno != errno.EBUSY:
            raise _error(mountpoint, exc) from exc
        return False
    return True


def detach(mountpoint: str) -> None:
    """Detach a mount that has no server, or by force. Open files stay open, and fail as soon as the daemon is gone.
    Raises HostError if unmounting is not permitted."""
    try:
        _unmount(mountpoint, lazy=True)
    except OSError as exc:
        if mountinfo.mount_at(mountpoint) is not None:
            raise _error(mountpoint, exc) from exc


def _unmount(mountpoint: str, *, lazy: bool) -> None:
    try:
        _umount2(mountpoint, _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0))
    except PermissionError:
        _fusermount(mountpoint, lazy=lazy)


def _umount2(mountpoint: str, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), mountpoint)


def _fusermount(mountpoint: str, *, lazy: bool) -> None:
    program = find_fusermount()
    command = [program, "-u", *(["-z"] if lazy else []), "--", mountpoint]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode:
        said = done.stderr.strip() or f"exit status {done.returncode}"
        raise OSError(errno.EBUSY if "busy" in said else errno.EPERM, said, mountpoint)


def find_fusermount() -> str:
    """Return the path of fusermount3. Raises NotSupportedError if it is not installed."""
    program = shutil.which("fusermount3") or shutil.which("fusermount3", path="/usr/bin:/bin:/usr/sbin:/sbin")
    if program is None:
        raise NotSupportedError(
            "fusermount3 is not installed, which mounting without root needs: install the package fuse3."
        )
    return program


def _error(mountpoint: str, exc: OSError) -> HostError:
    return HostError(f"Could not unmount '{mountpoint}': {exc.strerror or exc}", errno=exc.errno)
