"""Absolute names for the relative ones that users give, also where the working directory has been removed.

A removed directory still leads to its parent, so ``../disk.qcow2`` opens there as everywhere else; only asking for the
directory's own name fails, which is what os.path.abspath and os.path.realpath do. Use these two instead.
"""

from __future__ import annotations

import errno
import os

from fusedisk.core.errors import HostError, host_error


def absolute(path: str) -> str:
    """``os.path.abspath``. Raises HostError for a name in a removed working directory."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        return _through_descriptor(path)


def real(path: str) -> str:
    """``os.path.realpath``. Raises HostError for a name in a removed working directory."""
    try:
        return os.path.realpath(path)
    except FileNotFoundError:
        return os.path.realpath(_through_descriptor(path))


def _through_descriptor(path: str) -> str:
    """Ask the kernel for the name of the directory that a relative path leads to."""
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        folder, name = path, ""
    try:
        fd = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise host_error(exc, path, "find") from exc
    try:
        if os.fstat(fd).st_nlink == 0:
            raise HostError(
                f"Could not find '{path}': the working directory has been removed, change to an existing one.",
                errno=errno.ENOENT,
            )
        return os.path.join(os.readlink(f"/proc/self/fd/{fd}"), name).rstrip("/") or "/"
    finally:
        os.close(fd)
