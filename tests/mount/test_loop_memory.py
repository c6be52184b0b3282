"""Dirty pages of a filesystem on a loop device over our own mount, while memory is short for who writes them.

The kernel frees memory by writing pages, and that takes the daemon. Writer and memory eater share a memory cgroup that
is much smaller than what is written, made inside of the one that the tests run in. The daemon stays outside: in a
cgroup of version 1, whoever takes a page waits for the writing of others, unless it may call itself an I/O flusher.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import qemu_img, require_root, run_tool
from tests.mount.test_attach import attached  # noqa: F401  # a fixture
from tests.support.attachments import Attachments
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, wait_until

MIB = 1 << 20
LIMIT = 160 * MIB
EATEN = 64 * MIB
WRITTEN = 512 * MIB
_FILES = 8

_EATER = f"""
import sys
eaten = bytearray({EATEN})
while True:
    for place in range(0, len(eaten), 4096):
        eaten[place] += 1 if eaten[place] < 255 else -255
    if sys.stdout.writable():
        print("full", flush=True)
        sys.stdout = open("/dev/null", "w")
"""
_WRITER = """
import hashlib, os, random, sys
folder, seed, count, size = sys.argv[1], *map(int, sys.argv[2:])
numbers = random.Random(seed)
for index in range(count):
    digest = hashlib.sha256()
    with open(f"{folder}/file{index}", "wb") as file:
        for _ in range(size >> 20):
            piece = numbers.randbytes(1 << 20)
            digest.update(piece)
            file.write(piece)
    print(digest.hexdigest())
os.sync()
"""


class _Group:
    """A memory cgroup, of either version."""

    def __init__(self, path: Path, limit_file: str) -> None:
        self.path = path
        (path / limit_file).write_text(str(LIMIT))

    def add(self, pid: int) -> None:
        """Move a process that the test has started, with its threads."""
        (self.path / "cgroup.procs").write_text(str(pid))


@pytest.fixture
def group() -> Iterator[_Group]:
    """A new memory cgroup, which is empty by the end."""
    require_root()
    path, limit_file = _make_group()
    try:
        yield _Group(path, limit_file)
    finally:
        wait_until(lambda: _try_rmdir(path), "the cgroup is gone")


def _make_group() -> tuple[Path, str]:
    """A new cgroup in ours (version 1), or beside ours (version 2, whose inner groups have no processes)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "memory":
            path, limit_file = Path("/sys/fs/cgroup/memory", own.lstrip("/")), "memory.limit_in_bytes"
        elif controllers == "":
            path, limit_file = Path("/sys/fs/cgroup", own.lstrip("/")).parent, "memory.max"
        else:
            continue
        new = path / f"fusedisk-test-{os.getpid()}"
        try:
            new.mkdir()
        except OSError:
            continue
        if (new / limit_file).exists():
            return new, limit_file
        new.rmdir()
    pytest.skip("no memory cgroup can be made here")


def _try_rmdir(path: Path) -> bool:
    try:
        path.rmdir()
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_writing_more_than_memory_holds(
    attached: Attachments,  # noqa: F811
    mounts: Mounts,
    tmp_path: Path,
    group: _Group,
    direct_io: str,
) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", 768 * MIB)
    device = attached.attach("--direct-io", direct_io, image)
    run_tool("mkfs.ext4", "-q", device)
    files = mounts.mount_filesystem(device)
    with subprocess.Popen([sys.executable, "-c", _EATER], stdout=subprocess.PIPE) as eater:
        try:
            group.add(eater.pid)
            assert eater.stdout is not None
            assert eater.stdout.readline() == b"full\n"
            sums = _write(group, files, attached.record(device).pid)
            assert eater.poll() is None, "nobody was killed for want of memory"
        finally:
            eater.kill()
    mounts.umount_filesystem(files)
    attached.detach(device)

    qemu_img("check", image)
    flat = tmp_path / "flat"
    qemu_img("convert", "-O", "raw", image, flat)
    run_tool("e2fsck", "-fn", flat)
    files = mounts.mount_filesystem(mounts.loop(flat, "-r"), "-o", "ro")
    assert [hashlib.sha256((files / f"file{index}").read_bytes()).hexdigest() for index in range(_FILES)] == sums


def _write(group: _Group, files: Path, daemon: int) -> list[str]:
    """Fill files from a process in the group; returns their hashes."""
    command = [sys.executable, "-c", f"input()\n{_WRITER}", files, "1", str(_FILES), str(WRITTEN // _FILES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        group.add(writer.pid)
        try:
            told, _ = writer.communicate("go\n", timeout=120)
        except subprocess.TimeoutExpired:
            # Everybody waits for everybody: let the daemon's death end that, or nothing here ever ends.
            os.kill(daemon, signal.SIGKILL)
            raise
    assert writer.returncode == 0
    return told.split()
