"""Namespaces of other processes: what is mounted there, how to get there, and our numbers of the processes there.
Blocks, and reads only /proc."""

from __future__ import annotations

import os
import shlex
from typing import NamedTuple

from fusedisk.mount.mountinfo import FSTYPE, mounts


class Copy(NamedTuple):
    """A place where a filesystem is mounted, maybe in the mount namespace of another process."""

    mountpoint: str
    pid: int | None = None
    """A process of the namespace; None: it is ours."""
    process: str = ""
    """The name of that process."""

    def __str__(self) -> str:
        """``the mount of sleep (pid 12) at '/mnt'``."""
        whose = "" if self.pid is None else f" of {self.process} (pid {self.pid})"
        return f"the mount{whose} at '{self.mountpoint}'"

    def way_to_unmount(self) -> str:
        """The command line that takes it away."""
        inside = "" if self.pid is None else f"{enter(self.pid)} "
        return f"{inside}umount {shlex.quote(self.mountpoint)}"


def of(pid: int | str = "self", kind: str = "mnt") -> str | None:
    """The namespace of a process, ``mnt:[4026531841]``; None where we may not know."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return None


def is_foreign(pid: int) -> bool:
    """Whether a process is known to live in another mount namespace."""
    found = of(pid)
    return found is not None and found != of()


def proc_is_ours() -> bool:
    """Whether /proc counts processes as we do: after ``unshare --pid`` without ``--mount-proc`` it does not."""
    return os.readlink("/proc/self") == str(os.getpid())


def pid_of(namespace: str, number: int) -> int | None:
    """Our number of a process that has ``number`` in another PID namespace; None if we cannot see it."""
    for name in os.listdir("/proc"):
        if name.isdigit() and of(name, "pid") == namespace:
            try:
                with open(f"/proc/{name}/status") as file:
                    numbers = next((line for line in file if line.startswith("NSpid:")), "")
            except OSError:
                continue
            if numbers.split()[-1:] == [str(number)]:
                return int(name)
    return None


def mountpoint_of(pid: int, device: str) -> str | None:
    """Return the place where a process sees our mount with the device number ``major:minor``; None if it does not."""
    try:
        found = mounts(pid)
    except OSError:
        return None
    return next((mount.mountpoint for mount in found if (mount.device, mount.fstype) == (device, FSTYPE)), None)


def enter(pid: int) -> str:
    """The beginning of a command line that runs the rest of it in the mount namespace of a process."""
    users = of(pid, "user")
    own = users is None or users == of(kind="user")
    return f"nsenter -t {pid} -m" if own else f"nsenter -t {pid} -U --preserve-credentials -m"


def copies(device: str) -> list[Copy]:
    """Every place where the filesystem with the device number ``major:minor`` is mounted: in our namespace first, then
    in those of other processes as far as we may look."""
    found = []
    seen = set()
    for pid in [os.getpid(), *(int(name) for name in os.listdir("/proc") if name.isdigit())]:
        try:
            namespace = of(pid)
            if namespace is None or namespace in seen:
                continue
            seen.add(namespace)
            places = [mount.mountpoint for mount in mounts(pid) if mount.device == device]
            with open(f"/proc/{pid}/comm", "rb") as comm:
                name = os.fsdecode(comm.read().removesuffix(b"\n"))
        except OSError:
            continue
        found += [Copy(place) if pid == os.getpid() else Copy(place, pid, name) for place in places]
    return found
