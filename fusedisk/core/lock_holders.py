"""Finds the holder of a conflicting lock, as far as /proc shows it.

The kernel names no process for locks of open file descriptions, but shows them with each descriptor that has them
(``/proc/PID/fdinfo/FD``). Nothing of the file itself is asked, so a filesystem that hangs does not matter. Other users'
processes, and those of other machines and containers, are not seen.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

_MAX_SECONDS = 0.5
"""For the whole search."""

describe_process: list[Callable[[int], str | None]] = []
"""What knows more of processes than their names: each is asked with a process number, and the first answer counts."""


def holder(fd: int, byte: int) -> str | None:
    """``qemu-io (pid 7)``: another process that has a byte of the file behind a descriptor locked, None where none is
    found. The descriptor must have a lock itself. Reads /proc, for half a second at most."""
    file = next((lock[0] for lock in _locks("self", str(fd))), None)
    if file is None:
        return None
    deadline = time.monotonic() + _MAX_SECONDS
    for pid in _numbers("/proc"):
        if pid == str(os.getpid()):
            continue
        for other in _numbers(f"/proc/{pid}/fd"):
            if time.monotonic() > deadline:
                return None
            if any(name == file and first <= byte <= last for name, first, last in _locks(pid, other)):
                return _describe(int(pid))
    return None


def _numbers(directory: str) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if name.isdecimal()]
    except OSError:
        return []


def _locks(pid: str, fd: str) -> Iterator[tuple[str, int, int]]:
    """The locks of a descriptor: device and inode of the file as the kernel writes them, first and last byte."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/fdinfo/{fd}", "rb") as lines:
        for line in lines:
            # lock:	1: OFDLCK ADVISORY  READ -1 08:01:1234 100 100
            if line.startswith(b"lock:") and (words := line.split())[2] == b"OFDLCK":
                first, last = words[7], words[8]
                yield words[6].decode(), int(first), (1 << 63) - 1 if last == b"EOF" else int(last)


def _describe(pid: int) -> str:
    for describe in describe_process:
        if (found := describe(pid)) is not None:
            return found
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            name = os.fsdecode(file.read().rstrip(b"\n"))
    except OSError:
        name = "a process"
    return f"{name} (pid {pid})"
