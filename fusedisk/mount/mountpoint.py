"""Checks before mounting, each with its own sentence. They block, and run before anything is opened or mounted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator

from fusedisk.core import paths
from fusedisk.core.errors import HostError, NotSupportedError, OptionError, host_error
from fusedisk.mount import mountinfo, runtime, umount_calls

_FUSE = "/dev/fuse"
_FUSE_CONF = "/etc/fuse.conf"


def check_fuse() -> None:
    """Raise NotSupportedError or HostError where this process cannot mount with FUSE at all."""
    try:
        os.close(os.open(_FUSE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError as exc:
        raise NotSupportedError(
            f"{_FUSE} is missing, so nothing can be mounted: load the kernel module fuse (modprobe fuse), or in a "
            f"container pass the device in."
        ) from exc
    except OSError as exc:
        if exc.errno in (errno.ENODEV, errno.ENXIO):
            raise NotSupportedError(f"{_FUSE} is there, but this kernel has no FUSE: load the module fuse.") from exc
        raise HostError(
            f"{_FUSE} cannot be opened ({exc.strerror}), which mounting needs: check its permissions.", errno=exc.errno
        ) from exc
    if os.geteuid() != 0:
        umount_calls.find_fusermount()


def clean_stale(mountpoint: str) -> bool:
    """Take away a mount whose daemon is dead; whether there was one. Mounts that answer are left alone.

    Raises HostError where it may not be taken away.
    """
    mount = mountinfo.mount_at(mountpoint)
    if mount is None or mount.fstype != mountinfo.FSTYPE or not is_stale(mount):
        return False
    umount_calls.detach(mountpoint)
    return True


def is_stale(mount: mountinfo.Mount) -> bool:
    """Whether a mount of ours has lost its daemon."""
    record = runtime.find(mount.mountpoint, mount.user_id)
    if record is not None and record.alive:
        return False  # found out without asking it: it may hang
    try:
        os.statvfs(mount.mountpoint)  # unlike stat never answered from the kernel's cache
    except OSError as exc:
        return exc.errno == errno.ENOTCONN
    return False


def check_mountpoint(mountpoint: str, images: int) -> None:
    """Raise an error unless ``images`` images can be mounted at an absolute path: a directory, or for one a regular
    file. What is mounted there already is not asked: it may hang."""
    mount = mountinfo.mount_at(mountpoint)
    if mount is not None:
        hint = (
            f"unmount it first (fusedisk umount {mountpoint})" if mount.fstype == mountinfo.FSTYPE else "choose another"
        )
        raise HostError(
            f"The mountpoint '{mountpoint}' is busy: {mount.source} ({mount.fstype}) is mounted there, {hint}.",
            errno=errno.EBUSY,
        )
    try:
        mode = os.stat(mountpoint).st_mode
    except FileNotFoundError as exc:
        raise HostError(
            f"The mountpoint '{mountpoint}' does not exist, create it first (mkdir).", errno=exc.errno
        ) from exc
    except OSError as exc:
        raise host_error(exc, mountpoint, "look at the mountpoint") from exc
    if stat.S_ISREG(mode):
        if images > 1:
            raise OptionError(
                f"The mountpoint '{mountpoint}' is a regular file, which has room for one image, but {images} were "
                f"given: use a directory."
            )
    elif not stat.S_ISDIR(mode):
        raise HostError(
            f"The mountpoint '{mountpoint}' is neither a directory nor a regular file.", errno=errno.ENOTDIR
        )


def check_not_hidden(mountpoint: str, files: Iterable[str]) -> None:
    """Raise OptionError if the mount would hide one of the files that it is made of: reading it would wait for
    itself."""
    target = os.stat(mountpoint)
    for filename in files:
        for path in _with_parents(paths.real(filename)):
            try:
                found = os.stat(path)
            except OSError:
                continue
            if (found.st_dev, found.st_ino) != (target.st_dev, target.st_ino):
                continue
            if stat.S_ISREG(target.st_mode):
                raise OptionError(
                    f"'{filename}' is the mountpoint itself and would be hidden by its own mount, use another file or "
                    f"a directory."
                )
            raise OptionError(
                f"'{filename}' lies below the mountpoint '{mountpoint}' and would be hidden by its own mount, use "
                f"another directory."
            )


def _with_parents(path: str) -> Iterator[str]:
    yield path
    while (parent := os.path.dirname(path)) != path:
        yield parent
        path = parent


def may_allow_other() -> bool:
    """Whether this user may let other users into a mount."""
    if os.geteuid() == 0:
        return True
    try:
        with open(_FUSE_CONF, errors="replace") as lines:
            return any(line.strip() == "user_allow_other" for line in lines)
    except OSError:
        return False


def allow_other(choice: str) -> bool:
    """Decide ``--allow-other``: ``off``, ``on`` or ``auto`` (on if it is permitted). Raises HostError."""
    if choice == "on" and not may_allow_other():
        raise HostError(
            f"--allow-other=on needs root, or a line 'user_allow_other' in {_FUSE_CONF}; without it only you can use "
            f"the mount (--allow-other=auto).",
            errno=errno.EPERM,
        )
    return choice != "off" and may_allow_other()
