"""The mounts of this process, from /proc/self/mountinfo (proc(5)). Never touches the filesystems themselves."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from fusedisk.core import paths
from fusedisk.core.errors import OptionError

FSTYPE = "fuse.fusedisk"
"""The filesystem type of our mounts."""

_MOUNTINFO = "/proc/self/mountinfo"
_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """One line of mountinfo."""

    mount_id: int
    device: str
    """``major:minor`` of files on it."""
    mountpoint: str
    fstype: str
    source: str
    options: str
    """The options of the superblock, separated by commas."""
    flags: str = ""
    """Options of the mount itself, such as ``rw,nosuid,nodev``."""

    @property
    def user_id(self) -> int | None:
        """The user that mounted it, for a FUSE mount."""
        for option in self.options.split(","):
            if option.startswith("user_id="):
                return int(option[8:])
        return None


def mounts(pid: int | None = None) -> list[Mount]:
    """Every mount of this mount namespace, or that of a process, in the order in which they were mounted."""
    # As bytes: names may hold whatever else ends a line in text, such as a carriage return.
    with open(_MOUNTINFO if pid is None else f"/proc/{pid}/mountinfo", "rb") as file:
        lines = os.fsdecode(file.read()).split("\n")
    return [mount for mount in map(_parse, lines) if mount is not None]


def mount_at(mountpoint: str) -> Mount | None:
    """The topmost mount at an absolute path, None where nothing is mounted."""
    found = None
    for mount in mounts():
        if mount.mountpoint == mountpoint:
            found = mount
    return found


def place_of(mount: Mount) -> str:
    """Return the current place of a known mount: a directory above it may have been renamed, or it was moved."""
    found = [other.mountpoint for other in mounts() if (other.device, other.source) == (mount.device, mount.source)]
    return mount.mountpoint if mount.mountpoint in found or not found else found[0]


def mounts_below(mountpoint: str) -> list[Mount]:
    """Mounts strictly below a path, innermost last."""
    inside = mountpoint.rstrip("/") + "/"
    return [mount for mount in mounts() if mount.mountpoint.startswith(inside)]


def absolute(path: str) -> str:
    """The absolute path without symbolic links, as mountinfo spells it.

    The last part is looked at only if nothing is mounted there: looking at a mount whose daemon hangs would hang too.
    Raises OptionError for an empty path, which would be the current directory.
    """
    if not path:
        raise OptionError("the mountpoint is empty.")
    parent, base = os.path.split(paths.absolute(path))
    plain = os.path.join(os.path.realpath(parent), base) if base else os.path.realpath(parent)
    return plain if mount_at(plain) is not None else os.path.realpath(plain)


def _parse(line: str) -> Mount | None:
    """A line without its end; None for the empty one after the last, and for what proc(5) does not describe."""
    left, _, right = line.partition(" - ")
    try:
        mount_id, _, device, _, place, flags, *_ = left.split(" ")
        fstype, source, options = right.split(" ", 2)
        return Mount(int(mount_id), device, _unescape(place), fstype, _unescape(source), options, flags)
    except ValueError:
        return None


def _unescape(text: str) -> str:
    """Blanks, line ends and backslashes are written as octal numbers."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text) if "\\" in text else text
