"""How much memory a daemon takes that serves a 1 TiB qcow2 whose metadata is touched all over."""

from __future__ import annotations

import os
import random
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from scripts.benchmark.servers import SERVERS, Served, ServerError, run

TIB = 1 << 40
GIB = 1 << 30
LIMIT = 100 << 20
"""What fusedisk promises to stay under, in bytes."""
READS = 4096


@dataclass(frozen=True)
class Memory:
    """Resident memory of a daemon and its children, in bytes."""

    mounted: int
    """Right after mounting."""
    used: int
    """After writing to 1,024 places and reading from thousands."""
    peak: int
    """The highest it ever was, by the kernel's account of the daemon."""


def measure_memory(server: str, folder: Path) -> Memory:
    """Mount a fresh 1 TiB qcow2 in *folder* with one of SERVERS and work on it; raises ServerError."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        image = Path(name) / "large.qcow2"
        run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(TIB)])
        with SERVERS[server](image, "qcow2", Path(name)) as served:
            if served.process is None:
                raise ServerError(f"{server} serves without a daemon that could be weighed")
            mounted = _resident(served.process)
            _work(served)
            return Memory(mounted, _resident(served.process), _peak(served.process))


def _work(served: Served) -> None:
    """One 4 KiB write in each GiB, which makes a table for each, then scattered reads."""
    source = random.Random(1)
    block = source.randbytes(4096)
    fd = os.open(served.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        places = [start + source.randrange(0, GIB, 4096) for start in range(0, TIB, GIB)]
        for offset in places:
            os.pwrite(fd, block, offset)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for offset in source.choices(places, k=READS):
            if os.pread(fd, 4096, offset) != block:
                raise ServerError(f"{served.path} does not read at {offset} what was written there")
    finally:
        os.close(fd)


def _resident(process: psutil.Process) -> int:
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family)


def _peak(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
