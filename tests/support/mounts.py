"""Real mounts for tests, made by the command line in subprocesses and always taken away again."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from fusedisk.mount import mountinfo, runtime
from tests.conftest import require_fuse, run_tool
from tests.support.commands import Outcome, fusedisk_process, process_command, process_environment
from tests.support.images import with_format

PATIENCE = 60.0


class Mounts:
    """Makes mounts below a directory; ``close`` ends all of them, come what may."""

    def __init__(self, folder: Path) -> None:
        require_fuse()
        self.folder = folder
        self._count = 0
        self._mountpoints: list[Path] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._loops: list[str] = []
        self._filesystems: list[Path] = []

    def directory(self) -> Path:
        """A new, empty directory to mount on."""
        self._count += 1
        path = self.folder / f"mnt{self._count}"
        path.mkdir()
        return path

    def adopt(self, mountpoint: Path) -> None:
        """Unmount what somebody else will have mounted there."""
        self._mountpoints.append(mountpoint)

    def try_mount(
        self, *args: str | os.PathLike[str], on: Path | None = None, guess: bool = False, **keywords: Any
    ) -> tuple[Path, Outcome]:
        """Run ``fusedisk mount`` with options and images; returns the mountpoint and what the command did. The format
        of raw images is named for it, unless it is to ``guess``."""
        on = self.directory() if on is None else on
        self._mountpoints.append(on)
        return on, fusedisk_process("mount", *(args if guess else with_format(*args)), on, **keywords)

    def mount(self, *args: str | os.PathLike[str], on: Path | None = None, **keywords: Any) -> Path:
        """Mount; the command must succeed and say nothing."""
        on, done = self.try_mount(*args, on=on, **keywords)
        assert done == (0, "", ""), done
        return on

    def start(
        self, *args: str | os.PathLike[str], on: Path, program: list[str] | None = None
    ) -> subprocess.Popen[bytes]:
        """``fusedisk mount --foreground``, ready."""
        self._mountpoints.append(on)
        receiving, sending = os.pipe()
        command = program or process_command()
        process = subprocess.Popen(
            [*command, "mount", "--foreground", "--ready-fd", str(sending), *map(os.fspath, [*with_format(*args), on])],
            env=process_environment(),
            stderr=subprocess.PIPE,
            pass_fds=(sending,),
        )
        self._processes.append(process)
        os.close(sending)
        with open(receiving, "rb") as pipe:
            told = select.select([pipe], [], [], PATIENCE)[0]
            line = pipe.readline() if told else b""
        assert line == b"ready\n", process.communicate(timeout=PATIENCE)
        return process

    def umount(self, mountpoint: Path, *args: str) -> None:
        """Unmount; the command must succeed and say nothing."""
        done = fusedisk_process("umount", *args, mountpoint)
        assert done == (0, "", ""), done

    def loop(self, file: Path, *args: str) -> str:
        """A loop device on ``file``."""
        device = run_tool("losetup", "-f", "--show", *args, file).strip()
        self._loops.append(device)
        return device

    def detach(self, device: str) -> None:
        """Take a loop device off its file, for good."""
        run_tool("losetup", "-d", device)
        self._loops.remove(device)
        wait_until(
            lambda: not Path("/sys/block", os.path.basename(device), "loop").exists(), "the loop device is detached"
        )

    def mount_filesystem(self, device: str, *options: str) -> Path:
        """Mount the filesystem on a device."""
        on = self.directory()
        run_tool("mount", *options, device, on)
        self._filesystems.append(on)
        return on

    def umount_filesystem(self, on: Path) -> None:
        """Unmount it, and wait until its device is free: another test's process in a mount namespace of its own may
        hold it for a moment more."""
        found = mountinfo.mount_at(str(on))
        assert found is not None
        run_tool("umount", on)
        self._filesystems.remove(on)
        wait_until(lambda: _is_free(found.source), f"nobody has {found.source} mounted")

    def close(self) -> None:
        """Take everything away: filesystems, loop devices, mounts, processes."""
        for filesystem in self._filesystems:
            run_tool("umount", "-l", filesystem, check=False)
        for device in self._loops:
            run_tool("losetup", "-d", device, check=False)
        for mountpoint in self._mountpoints:
            if mountinfo.mount_at(str(mountpoint)) is not None:
                fusedisk_process("umount", "--force", "--timeout", "20", mountpoint)
            while mountinfo.mount_at(str(mountpoint)) is not None:
                run_tool("umount", "-l", mountpoint)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.communicate()


class Covered:
    """A place to mount on, and then to cover by another filesystem."""

    def __init__(self, above: Path) -> None:
        self._above = above
        self._older = above / "older"
        self.place = above / "mnt"
        for folder in (self._older, self.place):
            folder.mkdir()
        run_tool("mount", "-t", "tmpfs", "cover", self._older)

    def cover(self, way: str) -> Path:
        """Cover it; returns where the other filesystem is."""
        if way == "moved over it":
            run_tool("mount", "--move", self._older, self.place)
            return self.place
        where = self._above if way == "over a directory above" else self.place
        run_tool("mount", "-t", "tmpfs", "cover", where)
        return where


@contextlib.contextmanager
def mounts_below(folder: Path) -> Iterator[Mounts]:
    """Mounts that are all gone when the block ends."""
    found = Mounts(folder)
    try:
        yield found
    finally:
        found.close()


def daemon_of(mountpoint: Path) -> psutil.Process:
    """The process that serves a mount."""
    record = runtime.find(str(mountpoint))
    assert record is not None
    assert record.alive
    return psutil.Process(record.pid)


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended; that nobody has asked for its exit status yet does not count."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_mounted(mountpoint: Path) -> bool:
    """Whether something is mounted exactly there."""
    return mountinfo.mount_at(str(mountpoint)) is not None


def _is_free(device: str) -> bool:
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            return False
        raise
    return True


def wait_until(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Wait for a condition that another process brings about."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"it never came to this: {what}"
        time.sleep(0.02)


def own_mounts(script: str, but: Path | None = None) -> list[str]:
    """A command, for root: a shell script among mounts of its own. They are copies of all there are, which would keep
    the daemons of other tests; it lets go of those first, all but that at ``but``."""
    return [
        *("unshare", "-m", "sh", "-c"),
        "while read -r _ place type _; do "
        f'test $type != fuse.fusedisk || test "$place" = "{but}" || umount -l "$(printf "$place")" 2>/dev/null; '
        f"done < /proc/self/mounts; {script}",
    ]
