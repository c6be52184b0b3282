"""How one run is measured: fio on a flat file or on a loop device over it, and tar of the files inside."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from scripts.benchmark.images import MIB
from scripts.benchmark.servers import COMMAND_TIMEOUT, ServerError, run

RAMP = 0.5
"""Seconds before each measurement with fio, in which tables and caches fill."""
PATIENCE = 300.0
"""Seconds that reading all files may take."""
TIMED_TAR = """
start=${EPOCHREALTIME//[!0-9]/}
tar -C "$1" -cf - . | cat >/dev/null || exit
echo "$start ${EPOCHREALTIME//[!0-9]/}"
"""
"""Prints microseconds itself: a parent that waits for a process with a timeout notices its end too late.

The pipe is there because GNU tar does not read what it writes to /dev/null.
"""


@dataclass(frozen=True)
class Measurement:
    """What one run found."""

    value: float
    """In the job's unit."""
    served: float
    """Bytes moved, those of the ramp included at the rate of the rest."""


class Job(Protocol):
    """Something to be measured on a flat file."""

    @property
    def unit(self) -> str:
        """``IOPS`` or ``B/s``, of which more is better, or ``s``, of which less is."""

    @property
    def needs_root(self) -> bool:
        """Whether only root can run it."""

    def measure(self, path: Path, runtime: float) -> Measurement:
        """Run it on the flat file at *path*, for *runtime* seconds if it has no end; raises ServerError."""


@dataclass(frozen=True)
class Fio:
    """fio on the file."""

    rw: str
    """fio's word: randread, randwrite, randrw, read or write."""
    block_size: int
    """In bytes."""
    depth: int = 1
    direct: bool = True
    """Whether past the kernel's page cache, so that each request reaches the daemon."""
    options: tuple[str, ...] = ()
    """More of fio's options."""

    @property
    def unit(self) -> str:
        """Requests per second for small blocks, bytes per second for large ones."""
        return "IOPS" if self.block_size < MIB else "B/s"

    @property
    def needs_root(self) -> bool:
        """It does not."""
        return False

    def measure(self, path: Path, runtime: float) -> Measurement:
        """Run fio on a file or block device for *runtime* seconds; raises ServerError when it fails."""
        command = [
            "fio",
            "--name=bench",
            f"--filename={str(path).replace(':', chr(92) + ':')}",
            "--allow_file_create=0",
            f"--size={_size(path)}",
            f"--rw={self.rw}",
            f"--bs={self.block_size}",
            f"--iodepth={self.depth}",
            f"--ioengine={'libaio' if self.depth > 1 else 'psync'}",
            f"--direct={self.direct:d}",
            "--invalidate=0",
            "--norandommap",
            "--randrepeat=1",
            "--time_based",
            f"--runtime={runtime * 1000:.0f}ms",
            f"--ramp_time={RAMP * 1000:.0f}ms",
            *self.options,
            "--output-format=json",
        ]
        output = run(command, timeout=runtime + 60)
        job = json.loads(output[output.index("{") :])["jobs"][0]
        sides = [job[name] for name in ("read", "write") if job[name]["total_ios"]]
        if job["error"] or not sides:
            raise ServerError(f"fio --rw={self.rw} on {path} failed with error {job['error']}")
        bandwidth = sum(side["bw_bytes"] for side in sides)
        value = sum(side["iops"] for side in sides) if self.unit == "IOPS" else bandwidth
        return Measurement(float(value), bandwidth * (runtime + RAMP))


@dataclass(frozen=True)
class Dd:
    """Filling the file by dd, from its start to its end and over again, without direct I/O."""

    block_size: int = MIB
    """In bytes."""

    @property
    def unit(self) -> str:
        """Bytes per second."""
        return "B/s"

    @property
    def needs_root(self) -> bool:
        """It does not."""
        return False

    def measure(self, path: Path, runtime: float) -> Measurement:
        """Fill it until *runtime* seconds have passed, after once that does not count; raises ServerError."""
        count = _size(path) // self.block_size
        command = ["dd", "if=/dev/zero", f"of={path}", f"bs={self.block_size}", f"count={count}", "conv=notrunc"]
        run(command, timeout=PATIENCE)
        rounds, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < runtime:
            run(command, timeout=PATIENCE)
            rounds += 1
        size = float(count * self.block_size)
        return Measurement(rounds * size / passed, (rounds + 1) * size)


@dataclass(frozen=True)
class OnLoop:
    """A job on a loop device over the file, with direct I/O between the two."""

    job: Fio

    @property
    def unit(self) -> str:
        """That of the job."""
        return self.job.unit

    @property
    def needs_root(self) -> bool:
        """Loop devices are root's."""
        return True

    def measure(self, path: Path, runtime: float) -> Measurement:
        """Run the job on the device; raises ServerError."""
        with loop_device(path) as device:
            return self.job.measure(device, runtime)


@dataclass(frozen=True)
class Tar:
    """Reading every file of the filesystem in the flat file, mounted from a loop device, once.

    Daemon, mount and loop device are new for each run, so no cache between tar and the daemon holds anything yet.
    """

    @property
    def unit(self) -> str:
        """Seconds."""
        return "s"

    @property
    def needs_root(self) -> bool:
        """Loop devices and mounting are root's."""
        return True

    def measure(self, path: Path, runtime: float) -> Measurement:
        """Read all files; *runtime* is not used. Raises ServerError."""
        with loop_device(path) as device, filesystem(device) as files:
            before = _bytes_read(device)
            output = run(["bash", "-o", "pipefail", "-c", TIMED_TAR, "tar", str(files)], timeout=PATIENCE)
            start, end = map(int, output.splitlines()[-1].split())
            return Measurement((end - start) / 1e6, _bytes_read(device) - before)


@contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    """A loop device over the file at *path*, detached again whatever happens; raises ServerError."""
    with _undone(partial(_detach, path)):
        device = Path(run(["losetup", "--find", "--show", "--direct-io=on", str(path)]).splitlines()[-1])
        if (_of(device) / "loop/dio").read_text().strip() != "1":
            raise ServerError(f"{device} over {path} does not take direct I/O")
        yield device


@contextmanager
def filesystem(device: Path) -> Iterator[Path]:
    """The filesystem on *device*, mounted read-only and taken away whatever happens; raises ServerError."""
    mountpoint = Path(tempfile.mkdtemp(prefix="fusedisk-bench."))
    with _undone(partial(_unmount, mountpoint)):
        run(["mount", "-t", "ext4", "-o", "ro,noload", str(device), str(mountpoint)])
        yield mountpoint


@contextmanager
def _undone(undo: Callable[[], None]) -> Iterator[None]:
    """Call *undo* at the end; what it raises does not hide what happened before, least of all Ctrl-C."""
    try:
        yield
    except BaseException:
        with suppress(ServerError):
            undo()
        raise
    undo()


def _unmount(mountpoint: Path) -> None:
    """Unmount, at once in name only where a reader that was killed still holds it, and remove the mountpoint."""
    if os.path.ismount(mountpoint):
        try:
            run(["umount", str(mountpoint)])
        except ServerError:
            run(["umount", "--lazy", str(mountpoint)])
    mountpoint.rmdir()


def _detach(path: Path) -> None:
    """Take every loop device off the file; found by name, since losetup may not have told which it made."""
    for device in _devices_on(path):
        run(["losetup", "--detach", str(device)])
        _wait_until_detached(device)


def _size(path: Path) -> int:
    with path.open("rb", buffering=0) as file:
        return file.seek(0, os.SEEK_END)


def _of(device: Path) -> Path:
    return Path("/sys/block", device.name)


def _bytes_read(device: Path) -> int:
    """By the kernel's count, which is in sectors of 512 bytes on every device."""
    return int((_of(device) / "stat").read_text().split()[2]) * 512


def _devices_on(path: Path) -> list[Path]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        if backing.read_text().rstrip("\n") == str(path):
            found.append(Path("/dev", backing.parent.parent.name))
    return found


def _wait_until_detached(device: Path) -> None:
    deadline = time.monotonic() + COMMAND_TIMEOUT
    while (_of(device) / "loop").exists():
        if time.monotonic() > deadline:
            raise ServerError(f"{device} is still attached after {COMMAND_TIMEOUT:.0f} seconds")
        time.sleep(0.01)
