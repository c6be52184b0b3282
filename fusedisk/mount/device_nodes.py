"""Nodes of block devices below /dev, where nobody else makes them.

devtmpfs and udev may both be missing, as in a container with a /dev of its own. The kernel gives the numbers of
partitions again, so a node that was left behind may lead to another disk: a node counts only if its number is right.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

_CLASS = Path("/sys/class/block")


def number_of(device: str) -> str | None:
    """``major:minor`` of a block device that the kernel has; None where it has none of that name."""
    try:
        return (_CLASS / os.path.basename(device) / "dev").read_text().strip()
    except OSError:
        return None


def has_node(device: str) -> bool:
    """Whether the name of a block device leads to it."""
    return _node_number(device) == number_of(device) is not None


def make_node(device: str) -> bool:
    """Make the node of a block device that the kernel has, for root only; one that leads elsewhere is replaced. False
    where that is not possible: the file system refuses it, or the process may not."""
    number = number_of(device)
    if number is None:
        return False
    major, minor = map(int, number.split(":"))
    try:
        remove_dead_nodes([device])
        os.mknod(device, stat.S_IFBLK | 0o600, os.makedev(major, minor))
    except OSError:
        pass
    return has_node(device)


def remove_dead_nodes(devices: Iterable[str]) -> None:
    """Remove the nodes of block devices that the kernel does not have, or has under another number."""
    for device in devices:
        if _node_number(device) is not None and not has_node(device):
            with contextlib.suppress(OSError):  # devtmpfs removes its own at the same moment
                os.unlink(device)


def mknod_command(device: str) -> str:
    """The command line that makes the node of a block device."""
    return f"mknod {device} b {(number_of(device) or '7:N').replace(':', ' ')}"


def _node_number(path: str) -> str | None:
    """``major:minor`` of the block device that a node leads to; None where it is no such node."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}" if stat.S_ISBLK(found.st_mode) else None
