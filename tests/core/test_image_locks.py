"""Image locks against each other and against real QEMU processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from fusedisk.block.model import permissions
from fusedisk.core import lock_holders
from fusedisk.core.errors import HostError, LockConflictError
from fusedisk.core.image_locks import ImageLocks, supported
from fusedisk.core.lock_holders import holder
from tests.conftest import ToolError, qemu_img, qemu_io, require_tool, run_tool

READ = permissions.CONSISTENT_READ
WRITE = permissions.CONSISTENT_READ | permissions.WRITE | permissions.RESIZE
SHARE_READERS = permissions.CONSISTENT_READ | permissions.WRITE_UNCHANGED


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    return path


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[ImageLocks]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield ImageLocks(fd, str(path))
    finally:
        os.close(fd)


@contextlib.contextmanager
def held_by_qemu(image: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """While the block runs, a qemu-io process has the image open."""
    process = subprocess.Popen(
        [require_tool("qemu-io"), *options, "-f", "qcow2", str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        answer = process.stdout.read(len("qemu-io> "))
        assert answer == b"qemu-io> ", answer
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=60)


def locked_bytes(path: Path) -> set[int]:
    """Bytes of the file that anybody has locked, as the kernel tells."""
    inode = os.stat(path).st_ino
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "OFDLCK" and words[5].endswith(f":{inode}"):
            assert words[3] == "READ"
            found |= set(range(int(words[6]), int(words[7]) + 1))
    return found


def test_bytes_are_qemus(image: Path) -> None:
    with opened(image) as locks:
        locks.check(WRITE, SHARE_READERS)
        locks.commit()
        assert locked_bytes(image) == {100, 101, 103, 201, 203}
        locks.check(READ, permissions.ALL)
        assert locked_bytes(image) == {100, 101, 103, 201, 203}
        locks.commit()
        assert locked_bytes(image) == {100}
        locks.release()
        assert locked_bytes(image) == set()


def test_qemu_locks_the_same_bytes(image: Path) -> None:
    with held_by_qemu(image):
        assert locked_bytes(image) >= {100, 101, 103, 201, 203}
        assert not locked_bytes(image) & {200, 202}


def test_two_writers_exclude_each_other_and_failure_undoes(image: Path) -> None:
    with opened(image) as first, opened(image) as second:
        first.check(WRITE, SHARE_READERS)
        first.commit()
        second.check(READ, permissions.ALL)
        second.commit()
        before = locked_bytes(image)
        with pytest.raises(LockConflictError) as caught:
            second.check(WRITE, permissions.ALL)
        assert str(caught.value) == f'Failed to get "write" lock: is another process using the image [{image}]?'
        with pytest.raises(LockConflictError) as caught:
            second.check(READ, SHARE_READERS)
        assert str(caught.value) == (
            f'Failed to get shared "write" lock: is another process using the image [{image}]?'
        )
        assert locked_bytes(image) == before
        first.check(READ, permissions.ALL)
        first.commit()
        second.check(WRITE, SHARE_READERS)
        second.commit()


def test_abort_gives_back_only_what_check_took(image: Path) -> None:
    with opened(image) as locks:
        locks.check(READ, permissions.ALL)
        locks.commit()
        locks.check(WRITE, SHARE_READERS)
        locks.abort()
        assert locked_bytes(image) == {100}


def test_readers_share(image: Path) -> None:
    with opened(image, os.O_RDONLY) as first, opened(image, os.O_RDONLY) as second:
        for locks in (first, second):
            locks.check(READ, SHARE_READERS)
            locks.commit()


def test_locks_survive_closing_another_descriptor(image: Path) -> None:
    with opened(image) as locks:
        locks.check(WRITE, SHARE_READERS)
        locks.commit()
        os.close(os.open(image, os.O_RDWR))
        assert 101 in locked_bytes(image)


def test_moving_leaves_no_gap(image: Path) -> None:
    with opened(image) as old, opened(image) as new, opened(image) as stranger:
        old.check(WRITE, SHARE_READERS)
        old.commit()
        moved = old.moved_to(new.fd)
        old.release()
        with pytest.raises(LockConflictError):
            stranger.check(WRITE, SHARE_READERS)
        moved.check(READ, permissions.ALL)
        moved.abort()
        assert locked_bytes(image) == {100, 101, 103, 201, 203}
        moved.check(READ, permissions.ALL)
        moved.commit()
        assert locked_bytes(image) == {100}


def test_a_descriptor_that_cannot_be_read_is_refused_by_the_host(image: Path) -> None:
    with opened(image, os.O_WRONLY) as locks, pytest.raises(HostError, match=r"lock byte 100 .*locking=off"):
        locks.check(READ, permissions.ALL)


def test_supported(image: Path) -> None:
    with opened(image) as locks:
        assert supported(locks.fd)
    fd = os.open(image, os.O_PATH)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            supported(fd)
    finally:
        os.close(fd)


def test_a_qemu_writer_keeps_us_out(image: Path) -> None:
    with held_by_qemu(image), opened(image) as locks:
        with pytest.raises(LockConflictError, match='Failed to get "write" lock'):
            locks.check(WRITE, SHARE_READERS)
        with pytest.raises(LockConflictError, match='Failed to get shared "write" lock'):
            locks.check(READ, SHARE_READERS)
        assert locked_bytes(image) >= {100, 101}
        locks.check(READ, permissions.ALL)
        locks.commit()
    with opened(image) as locks:
        locks.check(WRITE, SHARE_READERS)


def test_a_storage_daemon_keeps_us_out(image: Path, tmp_path: Path) -> None:
    node = f"driver=qcow2,node-name=q,file.driver=file,file.filename={image}"
    pid_file = tmp_path / "pid"
    run_tool("qemu-storage-daemon", "--blockdev", node, "--pidfile", pid_file, "--daemonize")
    try:
        with opened(image) as locks, pytest.raises(LockConflictError, match='Failed to get "write" lock'):
            locks.check(WRITE, SHARE_READERS)
    finally:
        daemon = psutil.Process(int(pid_file.read_text()))
        daemon.terminate()
        daemon.wait(timeout=60)
    with opened(image) as locks:
        locks.check(WRITE, SHARE_READERS)


def test_a_qemu_reader_lets_us_read_only(image: Path) -> None:
    with held_by_qemu(image, "-r"), opened(image) as locks:
        locks.check(READ, SHARE_READERS)
        locks.commit()
        with pytest.raises(LockConflictError, match='Failed to get "write" lock'):
            locks.check(WRITE, SHARE_READERS)


def test_we_keep_qemu_out(image: Path) -> None:
    with opened(image) as locks:
        locks.check(WRITE, SHARE_READERS)
        locks.commit()
        with pytest.raises(ToolError, match='Failed to get shared "write" lock'):
            qemu_img("info", image)
        with pytest.raises(ToolError, match='Failed to get "write" lock'):
            qemu_io(image, "read 0 4k", fmt="qcow2")
        assert "virtual size: 1 MiB" in qemu_img("info", "-U", image)
        locks.check(READ, SHARE_READERS)
        locks.commit()
        assert "virtual size: 1 MiB" in qemu_img("info", image)
        with pytest.raises(ToolError, match='Failed to get "write" lock'):
            qemu_io(image, "read 0 4k", fmt="qcow2")
        locks.release()
        qemu_io(image, "write 0 4k", fmt="qcow2")


CONTENDER = """
import os, sys
from fusedisk.core.errors import LockConflictError
from fusedisk.core.image_locks import ImageLocks
locks = ImageLocks(os.open(sys.argv[1], os.O_RDWR), sys.argv[1])
try:
    locks.check(int(sys.argv[2]), int(sys.argv[3]))
except LockConflictError as exc:
    print(exc)
else:
    locks.commit()
    print("locked")
"""


def test_two_processes_exclude_each_other(image: Path) -> None:
    def contend(perm: int, shared: int) -> str:
        arguments = [sys.executable, "-c", CONTENDER, str(image), str(perm), str(shared)]
        return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60).stdout

    with opened(image) as locks:
        locks.check(WRITE, SHARE_READERS)
        locks.commit()
        assert 'Failed to get "write" lock' in contend(WRITE, SHARE_READERS)
        assert 'Failed to get shared "write" lock' in contend(READ, SHARE_READERS)
        assert contend(READ, permissions.ALL) == "locked\n"
    assert contend(WRITE, SHARE_READERS) == "locked\n"


def test_the_holder_is_named(image: Path) -> None:
    """Another process is; what this process has locked itself is asked about as QEMU does."""
    with held_by_qemu(image) as process, opened(image) as locks:
        with pytest.raises(LockConflictError) as caught:
            locks.check(WRITE, SHARE_READERS)
        assert str(caught.value) == (
            f'Failed to get "write" lock: is another process using the image [{image}]? It is in use by '
            f"qemu-io (pid {process.pid})."
        )
        with pytest.raises(LockConflictError) as caught:
            locks.check(READ, SHARE_READERS)
        assert str(caught.value) == (
            f'Failed to get shared "write" lock: is another process using the image [{image}]? It is in use by '
            f"qemu-io (pid {process.pid})."
        )


def test_who_reads_only_is_not_taken_for_the_holder(image: Path) -> None:
    """Several have the file open; the one whose lock is in the way is named."""
    with held_by_qemu(image, "-U", "-r"), held_by_qemu(image) as process, opened(image) as locks:
        assert holder(locks.fd, 101) is None, "without a lock of its own the file is not known"
        locks.check(permissions.CONSISTENT_READ, permissions.ALL)
        assert holder(locks.fd, 101) == f"qemu-io (pid {process.pid})"
        assert holder(locks.fd, 202) is None


def test_nobody_is_named_where_proc_does_not_tell(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_by_qemu(image), opened(image) as locks:
        monkeypatch.setattr(lock_holders, "_numbers", lambda directory: [])
        with pytest.raises(LockConflictError) as caught:
            locks.check(WRITE, SHARE_READERS)
        assert str(caught.value) == f'Failed to get "write" lock: is another process using the image [{image}]?'


def test_the_search_for_a_holder_ends(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    with held_by_qemu(image), opened(image) as locks:
        locks.check(permissions.CONSISTENT_READ, permissions.ALL)
        monkeypatch.setattr(lock_holders, "time", SimpleNamespace(monotonic=lambda: next(now)))
        assert holder(locks.fd, 101) is None
    assert next(now) < 5
