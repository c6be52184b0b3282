"""Finds the users of a mount: processes, loop devices, other mounts. Blocks, and never touches the mount itself.

Paths are read as links of /proc, so a mount whose daemon hangs does not hang us. Files of processes in other mount
namespaces are found only if the path is the same there. Names in /proc may be any bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from fusedisk.mount import loop_device, loop_users
from fusedisk.mount.mountinfo import Mount, mounts_below

_MOST = 8
"""The most holders that a message names."""


def describe(mount: Mount) -> str:
    """Name the users of ``mount`` for the end of a sentence: ``in use by dd (pid 12, open file) and /dev/loop0``."""
    found = holders(mount)
    if not found:
        return "in use by something that cannot be seen from here (another user's process or another namespace)"
    return f"in use by {listed(found)}"


def listed(found: list[str]) -> str:
    """``this, that and 3 more``."""
    if len(found) > _MOST:
        found = [*found[: _MOST - 1], f"{len(found) - _MOST + 1} more"]
    return f"{', '.join(found[:-1])} and {found[-1]}" if found[1:] else found[0]


def holders(mount: Mount) -> list[str]:
    """Yield all users of ``mount`` that can be found, each in a few words."""
    return [
        *_loop_devices(mount),
        *(f"the mount at '{other.mountpoint}'" for other in mounts_below(mount.mountpoint)),
        *_processes(mount),
    ]


def _processes(mount: Mount) -> Iterator[str]:
    import psutil

    for process in psutil.process_iter(["name"]):
        if process.pid == os.getpid():  # has what its parent left open, and ends soon
            continue
        uses = _uses(process.pid, mount)
        if uses:
            yield f"{process.info['name']} (pid {process.pid}, {', '.join(uses)})"


def _uses(pid: int, mount: Mount) -> list[str]:
    """Return how a process uses the mount; an empty list if it does not, or if we have no access to it."""
    proc = f"/proc/{pid}"
    uses = []
    for link, what in (("cwd", "working directory"), ("root", "root directory"), ("exe", "program")):
        if _leads_into(f"{proc}/{link}", mount):
            uses.append(what)
    try:
        fds = os.listdir(f"{proc}/fd")
    except OSError:
        return uses
    opened = sum(_leads_into(f"{proc}/fd/{fd}", mount) or _on_mount(f"{proc}/fdinfo/{fd}", mount) for fd in fds)
    if opened:
        uses.append("open file" if opened == 1 else f"{opened} open files")
    if not opened and _maps(proc, mount):
        uses.append("mapped file")
    return uses


def _leads_into(link: str, mount: Mount) -> bool:
    try:
        target = os.readlink(link)
    except OSError:
        return False
    return _is_inside(target, mount.mountpoint)


def _is_inside(path: str, mountpoint: str) -> bool:
    return path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/")


def _on_mount(fdinfo: str, mount: Mount) -> bool:
    try:
        with open(fdinfo, "rb") as lines:
            return any(line.split() == [b"mnt_id:", b"%d" % mount.mount_id] for line in lines)
    except OSError:
        return False


def _maps(proc: str, mount: Mount) -> bool:
    major, _, minor = mount.device.partition(":")
    device = b"%02x:%02x" % (int(major), int(minor))
    try:
        with open(f"{proc}/maps", "rb") as lines:
            return any(fields[3:4] == [device] for fields in map(bytes.split, lines))
    except OSError:
        return False


def _loop_devices(mount: Mount) -> Iterator[str]:
    for device, path in loop_device.devices():
        if _is_inside(path, mount.mountpoint):
            users = loop_users.users(device)
            yield f"{device} ({', '.join(users)})" if users else device
