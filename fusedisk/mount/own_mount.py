"""Unmounts one of our own mounts, and never another mount that covers it. Everything here blocks."""

from __future__ import annotations

import enum
import os

from fusedisk.mount import holders, mountinfo, umount_calls
from fusedisk.mount.mountinfo import Mount

VISIT = 0.5
"""Seconds that a short visit lasts: desktop indexers look into a new mount and leave again."""


class Obstacle(enum.Enum):
    """Why a mount cannot be unmounted."""

    IN_USE = enum.auto()
    COVERED = enum.auto()
    """Something else is mounted over it, or over a directory above it."""


def unmount_own(place: str, device: str) -> Obstacle | None:
    """Unmount the mount with the device number ``major:minor`` at an absolute path, each layer if it is there more than
    once. Makes one attempt: returns the obstacle if it is in use or covered, None if it is gone. Raises HostError if
    unmounting is not permitted."""
    while is_at(place, device):
        if not is_on_top(place, device):
            return Obstacle.COVERED
        if not umount_calls.unmount(place):
            return Obstacle.IN_USE
    return None


def is_at(place: str, device: str) -> bool:
    """Whether the mount with that device number is at an absolute path, covered or not. Never touches the path."""
    return any((mount.mountpoint, mount.device) == (place, device) for mount in mountinfo.mounts())


def is_on_top(place: str, device: str) -> bool:
    """Whether a path leads into the mount with that device number."""
    mount = _led_to(place)
    return mount is not None and mount.device == device


def describe(place: str, obstacle: Obstacle) -> str:
    """Describe an obstacle for the end of a sentence about ``place``: ``in use by dd (pid 12, open file)``."""
    if obstacle is Obstacle.IN_USE:
        mount = mountinfo.mount_at(place)
        return holders.describe(mount) if mount is not None else "not in use"
    cover = _led_to(place)
    return f"covered by {'another mount' if cover is None else f'{cover.source} ({cover.fstype})'}"


def _led_to(path: str) -> Mount | None:
    """Return the mount that an absolute path leads into, None without one. Mountinfo does not show that, since mounts
    can be moved."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with open(f"/proc/self/fdinfo/{fd}") as lines:
            number = next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))
    finally:
        os.close(fd)
    return next((mount for mount in mountinfo.mounts() if mount.mount_id == number), None)
