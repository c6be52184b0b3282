"""The two programs that are compared: each serves an image as a flat file while a ``with`` block runs."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

KEY = ".key"
"""What the name of an encrypted image's key ends with, behind that of the image."""
COMMAND_TIMEOUT = 60.0
"""Seconds that mounting or unmounting may take."""

STRAY = 300
"""Reads and writes that a daemon may make for itself while the data goes past it."""

FUSEDISK = [sys.executable, "-c", "from fusedisk.cli.entry import main; main()"]
"""The command line of this checkout, whether it is installed or not."""


class ServerError(Exception):
    """A server did not start, or a command of ours failed; the message holds its last words."""


@dataclass(frozen=True)
class Served:
    """An image that is being served as a flat file."""

    path: Path
    """The flat file."""
    process: psutil.Process | None
    """The daemon behind it, if there is one."""


Server = Callable[[Path, str, Path], AbstractContextManager[Served]]
"""Called with image, format and an empty directory to mount in."""


@contextmanager
def fusedisk(image: Path, fmt: str, folder: Path, *options: str) -> Iterator[Served]:
    """Serve *image* by ``fusedisk mount`` with more of its *options*; raises ServerError."""
    mountpoint = folder / "fusedisk"
    mountpoint.mkdir()
    pid_file = folder / "fusedisk.pid"
    key = image.with_name(image.name + KEY)
    if key.exists():
        options = (*options, "--key-file", str(key))
    mount = ["mount", "--format", fmt, "--name", "disk", "--pid-file", str(pid_file), *options, str(image)]
    with _cleaned_up(mountpoint, pid_file):
        run([*FUSEDISK, *mount, str(mountpoint)])
        process = _process_of(pid_file)
        yield Served(mountpoint / "disk", process)
        run([*FUSEDISK, "umount", "--wait", "--timeout", "30", str(mountpoint)])
        _wait_for_end(process.pid)


@contextmanager
def qemu_storage_daemon(image: Path, fmt: str, folder: Path) -> Iterator[Served]:
    """Serve *image* by qemu-storage-daemon's FUSE export; raises ServerError."""
    mountpoint = folder / "qemu"
    mountpoint.touch()
    pid_file = folder / "qemu.pid"
    with _cleaned_up(mountpoint, pid_file):
        key = image.with_name(image.name + KEY)
        secret = (f"--object=secret,id=key,file={_escaped(key)}",) if key.exists() else ()
        encrypted = ",encrypt.format=luks,encrypt.key-secret=key" if secret else ""
        options = (
            f"--pidfile={pid_file}",
            *secret,
            f"--blockdev=driver=file,node-name=file,filename={_escaped(image)}",
            f"--blockdev=driver={fmt},node-name=disk,file=file{encrypted}",
            f"--export=type=fuse,id=e,node-name=disk,writable=on,mountpoint={_escaped(mountpoint)}",
        )
        run(["qemu-storage-daemon", "--daemonize", *options])
        process = _process_of(pid_file)
        yield Served(mountpoint, process)
        run(["umount", str(mountpoint)] if os.geteuid() == 0 else ["fusermount3", "-u", str(mountpoint)])
        process.send_signal(signal.SIGTERM)
        _wait_for_end(process.pid)


@contextmanager
def passed_through(image: Path, fmt: str, folder: Path) -> Iterator[Served]:
    """Serve a raw *image* past the daemon; raises ServerError, also when data went through the daemon after all."""
    with fusedisk(image, fmt, folder, "--passthrough=on") as served:
        before = _calls(served)
        yield served
        if _calls(served) - before > STRAY:
            raise ServerError(f"{image} was not passed through: the daemon read or wrote its data itself")


@contextmanager
def awake(image: Path, fmt: str, folder: Path) -> Iterator[Served]:
    """Serve *image* while the processors stay awake; raises ServerError."""
    with fusedisk(image, fmt, folder, "--low-latency") as served:
        yield served


@contextmanager
def host_file(image: Path, fmt: str, folder: Path) -> Iterator[Served]:
    """The raw *image* as it is, without a daemon."""
    yield Served(image, None)


SERVERS: dict[str, Server] = {"fusedisk": fusedisk, "qemu-storage-daemon": qemu_storage_daemon}


def run(command: list[str], timeout: float = COMMAND_TIMEOUT) -> str:
    """Run a command and return its stdout; raises ServerError with its last words when it fails or hangs.

    Output goes through a file: a daemon that keeps our pipe open must not make us wait for it. What the command started
    ends with it when it hangs or we are interrupted; daemons have left its process group by then.
    """
    with os.fdopen(os.memfd_create("output"), "w+", errors="replace") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0)
        try:
            code = process.wait(timeout)
        except BaseException as exc:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(exc, subprocess.TimeoutExpired):
                raise ServerError(f"{_short(command)} did not end within {timeout:.0f} seconds") from None
            raise
        output.seek(0)
        text = output.read()
    if code != 0:
        last = "\n".join(text.strip().splitlines()[-5:])
        raise ServerError(f"{_short(command)} exited {code}: {last}")
    return text


def versions() -> dict[str, str]:
    """What is compared, by name; empty where it cannot be told."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("fusedisk")
    except PackageNotFoundError:
        ours = ""
    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    theirs = run(["qemu-storage-daemon", "--version"]).splitlines()[0].split("version ")[-1].split()[0]
    return {"fusedisk": f"{ours} {commit}".strip(), "qemu-storage-daemon": theirs}


@contextmanager
def _cleaned_up(mountpoint: Path, pid_file: Path) -> Iterator[None]:
    """Leave neither daemon nor mount behind, whatever happened inside, and an empty folder."""
    try:
        yield
    finally:
        if pid_file.exists() and pid_file.read_text().strip():
            _end(int(pid_file.read_text()))
        if _mounted(mountpoint):
            lazy = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
            subprocess.run([*lazy, str(mountpoint)], check=False)
        pid_file.unlink(missing_ok=True)
        if mountpoint.is_dir():
            mountpoint.rmdir()
        else:
            mountpoint.unlink()


def _calls(served: Served) -> int:
    """How often the daemon has read and written so far, by the kernel's count: of each request, at least."""
    if served.process is None:
        return 0
    counters = served.process.io_counters()
    return int(counters.read_count + counters.write_count)


def _end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        _wait_for_end(pid)


def _wait_for_end(pid: int) -> None:
    """Wait until a process, which need not be our child, has ended; raises ServerError when it does not."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not select.select([fd], [], [], COMMAND_TIMEOUT)[0]:
            raise ServerError(f"the daemon (process {pid}) did not end within {COMMAND_TIMEOUT:.0f} seconds")
    finally:
        os.close(fd)


def _mounted(path: Path) -> bool:
    return any(line.split()[4] == str(path) for line in Path("/proc/self/mountinfo").read_text().splitlines())


def _process_of(pid_file: Path) -> psutil.Process:
    return psutil.Process(int(pid_file.read_text()))


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")


def _short(command: list[str]) -> str:
    words = ["fusedisk", *command[len(FUSEDISK) :]] if command[: len(FUSEDISK)] == FUSEDISK else command
    return " ".join(words)
