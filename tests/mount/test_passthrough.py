"""Plain raw disks that the kernel serves past us, and everything that keeps it from doing so."""

from __future__ import annotations

import errno
import os
import platform
from pathlib import Path

import pytest

from fusedisk.mount.reply_pipe import LEAST
from tests.conftest import run_tool
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, daemon_of

MIB = 1 << 20


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


pytestmark = [
    pytest.mark.skipif(_kernel() < (6, 9), reason="the kernel has no FUSE passthrough"),
    pytest.mark.skipif(os.geteuid() != 0, reason="passthrough is for root"),
]


def _is_passed(path: Path, on: Path) -> bool:
    """Whether reading the file through the mount goes past the daemon: its own count of bytes read does not move."""
    daemon = daemon_of(on)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        before = daemon.io_counters().read_chars
        # In pieces so small that the daemon would have them in its memory.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, MIB, LEAST // 2):
            os.pread(descriptor, LEAST // 2, offset)
        return daemon.io_counters().read_chars - before < MIB // 2
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        (["--read-only"], True),
        (["--read-only", "-f", "raw"], True),
        (["-f", "raw", "--passthrough", "on"], True),
        (["-f", "raw", "--growable"], True),
        (["-f", "raw"], False),
        (["--passthrough", "on"], False),
        (["--read-only", "--passthrough", "off"], False),
        (["--read-only", "--channel", "off"], False),
        (["-f", "raw", "--growable", "--detect-zeroes", "on"], False),
        (["-f", "raw", "--growable", "--cache", "writethrough"], False),
        (["-f", "raw", "--growable", "--cache", "none"], False),
        (["--overlay", "-f", "raw"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_where_nothing_is_in_between(mounts: Mounts, raw: Path, options: list[str], passed: bool) -> None:
    on, done = mounts.try_mount(*options, raw, guess=True)
    assert done.code == 0
    assert (on / "disk").read_bytes() == raw.read_bytes()
    assert _is_passed(on / "disk", on) == passed


def test_windows_and_formats_are_not_passed_through(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB, "write -P 1 0 1M")
    window = f"driver=raw,offset=4096,file.driver=file,file.filename={raw},name=window"
    on = mounts.mount("--read-only", image, window)
    assert not _is_passed(on / "vm", on)
    assert not _is_passed(on / "window", on)
    assert (on / "window").read_bytes() == raw.read_bytes()[4096:]


def test_what_is_written_past_us_counts(mounts: Mounts, raw: Path) -> None:
    """Size, times and flushes are those of the file, and our own way reads what was written."""
    on = mounts.mount("-f", "raw", "--growable", raw)
    path = on / "disk"
    os.utime(raw, ns=(10**18, 10**18))
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"past us", 4 * MIB + 100)
        os.fsync(file.fileno())
        assert os.fstat(file.fileno()).st_size == 4 * MIB + 107
        assert os.fstat(file.fileno()).st_mtime_ns == raw.stat().st_mtime_ns > 10**18
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        run_tool("fallocate", "-p", "-o", "0", "-l", "8192", path)
        assert os.pread(file.fileno(), 8192, 0) == bytes(8192)
        os.ftruncate(file.fileno(), 2 * MIB)
        assert raw.stat().st_size == 2 * MIB
    assert path.stat().st_size == 2 * MIB
    mounts.umount(on)
    assert raw.stat().st_size == 2 * MIB


@pytest.mark.parametrize("options", [["--growable"], ["--passthrough", "on"]], ids=" ".join)
def test_requests_know_how_long_the_file_has_just_become(mounts: Mounts, tmp_path: Path, options: list[str]) -> None:
    """The kernel makes the file longer and nobody asks for its size before the next request comes to us."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"b" * MIB)
    path = mounts.mount("-f", "raw", *options, raw) / "disk"
    tail = b"t" * 100
    with path.open("r+b", buffering=0) as file, path.open("r+b", buffering=0) as other:
        fd = file.fileno()

        def grow(end: int) -> None:
            os.pwrite(fd, tail, end - len(tail))

        grow(3 * MIB)
        run_tool("fallocate", "-o", str(MIB), "-l", str(MIB), path)
        assert os.pread(fd, 200, 3 * MIB - 100) == tail
        grow(4 * MIB)
        run_tool("fallocate", "-z", "-o", str(2 * MIB), "-l", str(MIB), path)
        assert os.pread(fd, 200, 4 * MIB - 100) == tail
        grow(5 * MIB)
        assert os.copy_file_range(fd, other.fileno(), 1000, 0, 2 * MIB) == 1000
        assert os.pread(fd, 200, 5 * MIB - 100) == tail
        grow(6 * MIB)
        assert os.copy_file_range(fd, other.fileno(), 100, 6 * MIB - 100, 0) == 100
        assert os.pread(fd, 100, 0) == tail
        grow(7 * MIB)
        assert os.lseek(fd, 7 * MIB - 50, os.SEEK_DATA) == 7 * MIB - 50
        grow(8 * MIB)
        run_tool("fallocate", "-p", "-o", str(8 * MIB - 100), "-l", "100", path)
        assert os.pread(fd, 200, 8 * MIB - 100) == bytes(100)
        grow(9 * MIB)
        os.ftruncate(fd, 8 * MIB)
        assert raw.stat().st_size == 8 * MIB
        grow(9 * MIB)
        with path.open("r+b") as emptied:
            os.close(os.open(path, os.O_RDWR | os.O_TRUNC))
            left = 0 if "--growable" in options else 9 * MIB
            assert os.fstat(emptied.fileno()).st_size == raw.stat().st_size == left
    assert not raw.read_bytes().strip(b"\0")


def test_the_disk_ends_where_it_ends_unless_asked_otherwise(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount("-f", "raw", raw)
    with (on / "disk").open("r+b", buffering=0) as file, pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        os.pwrite(file.fileno(), b"x", 4 * MIB)
    assert raw.stat().st_size == 4 * MIB


def test_a_loop_device_over_it(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount("-f", "raw", "--passthrough", "on", raw)
    device = mounts.loop(on / "disk")
    run_tool("mkfs.ext4", "-q", device)
    filesystem = mounts.mount_filesystem(device)
    (filesystem / "file").write_bytes(b"content" * 1000)
    mounts.umount_filesystem(filesystem)
    mounts.detach(device)
    mounts.umount(on)
    run_tool("e2fsck", "-fn", raw)
    assert b"content" * 100 in raw.read_bytes()
