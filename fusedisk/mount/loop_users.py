"""Finds the users of a loop device or its partitions: mounts, swap, other devices, processes. Blocks, and reads only
/proc and /sys, so it cannot hang."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from fusedisk.mount import loop_device
from fusedisk.mount.mountinfo import Mount, mounts

_SYSFS = Path("/sys/block")
_SWAPS = Path("/proc/swaps")


def users(device: str) -> list[str]:
    """Yield the users of a loop device, each in a few words that follow its name: ``mounted at '/mnt'``."""
    names = _names(device)
    # Names hold no blanks here, but may hold what else ends a line in text.
    swaps = {os.fsdecode(line.partition(b" ")[0]) for line in _SWAPS.read_bytes().split(b"\n")[1:]}
    return [
        *(f"mounted at '{mount.mountpoint}'" for mount in filesystems(device)),
        *(f"used as swap ({name})" for name in sorted(names & swaps)),
        *(f"used by /dev/{holder.name}" for holder in _devices_above(device)),
    ]


def openers(device: str) -> list[str]:
    """Which processes have a loop device open, in such words."""
    import psutil

    names = _names(device)
    found = []
    for process in psutil.process_iter(["name"]):
        if process.pid != os.getpid() and _has_open(process.pid, names):
            found.append(f"opened by {process.info['name']} (pid {process.pid})")
    return found


def filesystems(device: str) -> list[Mount]:
    """Return the mounts of a loop device or its partitions, by device number or, where a filesystem has one of its
    own, by name."""
    numbers, names = _numbers(device), _names(device)
    return [mount for mount in mounts() if mount.device in numbers or mount.source in names]


def flush_filesystems(device: str) -> None:
    """Sync the filesystems on a loop device; ignores errors."""
    libc = ctypes.CDLL(None)
    for mount in filesystems(device):
        try:
            fd = os.open(mount.mountpoint, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        libc.syncfs(fd)
        os.close(fd)


def _names(device: str) -> set[str]:
    return {device, *loop_device.partitions(device)}


def _numbers(device: str) -> set[str]:
    name = os.path.basename(device)
    files = [_SYSFS / name / "dev", *(_SYSFS / name).glob(f"{name}p*/dev")]
    return {file.read_text().strip() for file in files if file.exists()}


def _devices_above(device: str) -> list[Path]:
    name = os.path.basename(device)
    block = _SYSFS / name
    return [*block.glob("holders/*"), *block.glob(f"{name}p*/holders/*")]


def _has_open(pid: int, names: set[str]) -> bool:
    try:
        fds = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for fd in fds:
        try:
            if os.readlink(f"/proc/{pid}/fd/{fd}") in names:
                return True
        except OSError:
            continue
    return False
