"""Helpers and checks shared by all tests.

Import the helpers as ``from tests.conftest import qemu_img, qemu_io, require_tool``.

A session that leaves a mount, a loop device or a daemon below its temporary directory behind cleans it up
and fails: a leak in a test is a leak in the product, or hides one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("fusedisk", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fusedisk")  # how long an example takes says something of the machine, not of the code

QEMU_TIMEOUT = 300.0
"""Seconds after which a call of a qemu tool counts as hung."""

_CANNOT_TIME = "Unable to get accurate CPU usage"
"""What QEMU's tools give up with as they make a LUKS header or measure one, at random: they measure how long the
key derivation takes, and with fast hashes or a coarse clock find that it took no time. Nothing is changed then."""
_ATTEMPTS = 60

_LONGEST = ("differential", "mutation", "crash", "mount")
"""Folders whose tests take longest."""


def pytest_configure() -> None:
    """Undo what nohup and shells do to commands in the background: all that the tests start would ignore these."""
    for number, usual in (
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that at the end no process waits for another one's last file."""
    ranks = {folder: rank for rank, folder in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.parent.name, len(_LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let reports hold any captured text: processes that run tests cannot send surrogates, as odd file names have."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


class ToolError(AssertionError):
    """A tool that a test called exited non-zero; the message holds the command line and its stderr."""


def require_tool(name: str) -> str:
    """Return the path of the program *name*; without it, skip the test, or fail it when ``CI=true``."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is not None:
        return found
    return _unavailable(f"the program {name!r} is not installed")


def require_root() -> None:
    """Skip the test when not root; fail it when ``CI=true``."""
    if os.geteuid() != 0:
        _unavailable("needs root")


def require_fuse() -> None:
    """Skip the test when /dev/fuse cannot be opened; fail it when ``CI=true``."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        _unavailable(f"/dev/fuse cannot be opened ({exc.strerror})")


def _unavailable(reason: str) -> str:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI must not skip", pytrace=False)
    pytest.skip(reason)


def run_tool(name: str, *args: str | os.PathLike[str], check: bool = True) -> str:
    """Run a program and return its stdout; where QEMU could not time its key derivation, run it again.

    Raises ToolError, with its stderr, when *check* is set and it exits non-zero.
    """
    command = [require_tool(name), *(os.fspath(arg) for arg in args)]
    for _ in range(_ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True, timeout=QEMU_TIMEOUT, check=False)
        if _CANNOT_TIME not in done.stderr:
            break
    if check and done.returncode != 0:
        raise ToolError(f"{' '.join(command)} exited {done.returncode}:\n{done.stderr}{done.stdout}")
    return done.stdout


def qemu_img(*args: str | os.PathLike[str], check: bool = True) -> str:
    """Run ``qemu-img ARGS`` and return its stdout; raises ToolError when it fails."""
    return run_tool("qemu-img", *args, check=check)


def qemu_io(image: str | os.PathLike[str], *cmds: str, fmt: str | None = None, options: str = "") -> str:
    """Run qemu-io commands, such as ``"write -P 5 0 64k"``, on *image* in one process; return its stdout.

    *fmt* forces the format; *options* is passed before the image (``"-r"``, ``"-U"``). Raises ToolError when
    qemu-io fails, and also when it reports a pattern mismatch or a failed request, which old versions do with
    exit status 0.
    """
    args: list[str | os.PathLike[str]] = [*options.split()]
    if fmt is not None:
        args += ["-f", fmt]
    for cmd in cmds:
        args += ["-c", cmd]
    out = run_tool("qemu-io", *args, image)
    if re.search(r"verification failed|^(?:read|write|discard|aio_\w+) failed:", out, re.MULTILINE):
        raise ToolError(f"qemu-io on {os.fspath(image)}: {out}")
    return out


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp().resolve()
    yield
    leaks = clean_leaks(base)
    if leaks:
        pytest.fail("tests left behind (now cleaned up):\n  " + "\n  ".join(leaks), pytrace=False)


def clean_leaks(base: Path, patience: float = 10.0) -> list[str]:
    """Detach loop devices, unmount mounts and end processes that belong to the tree *base*; describe each.

    Processes get *patience* seconds to end by themselves, as a daemon does after its mount is gone.
    """
    leaks: list[str] = []
    mounts = _mounts_below(base)
    loops = _loops_below(base)
    used_loops = {source for source, _ in mounts}
    for source, target in mounts:
        leaks.append(f"mount {target} ({source})")
    for loop, backing in loops:
        leaks.append(f"loop device {loop} on {backing}{' (mounted)' if loop in used_loops else ''}")
    # Filesystems on loops first, then the loops, then the FUSE mounts that the loops' files lie on.
    for source, target in mounts:
        if source.startswith("/dev/"):
            _quietly("umount", "-l", target)
    for loop, _ in loops:
        _quietly("losetup", "-d", loop)
    for source, target in mounts:
        if not source.startswith("/dev/"):
            _quietly("umount", "-l", target)
    leaks += [f"process {line}" for line in _end_processes_of(base, patience)]
    return leaks


def _mounts_below(base: Path) -> list[tuple[str, str]]:
    """(source, target) of every mount below *base*, innermost first."""
    found = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).removesuffix("\n").split("\n"):
        left, _, right = line.partition(" - ")
        target = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), left.split(" ")[4])
        if target.startswith(f"{base}/"):
            found.append((right.split(" ")[1], target))
    return found[::-1]


def _loops_below(base: Path) -> list[tuple[str, str]]:
    """(device, backing file) of every loop device whose file lies below *base*."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached while we looked
            backing = os.fsdecode(entry.read_bytes().removesuffix(b"\n"))
            if backing.startswith(f"{base}/"):
                found.append((f"/dev/{entry.parent.parent.name}", backing))
    return found


def _end_processes_of(base: Path, patience: float) -> list[str]:
    """End processes whose command line names a path below *base*; those about to exit do not count."""
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    suspects = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in mine and any(f"{base}/" in arg for arg in process.cmdline()):
                suspects.append((process, " ".join(process.cmdline())))
    _, alive = psutil.wait_procs([process for process, _ in suspects], timeout=patience)
    leaked = [process for process in alive if not _is_zombie(process)]
    for process in leaked:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return [f"{process.pid}: {line}" for process, line in suspects if process in leaked]


def _is_zombie(process: psutil.Process) -> bool:
    """Whether it has ended, and only whoever adopted it has not noticed yet."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _quietly(*command: str) -> None:
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
