"""Replies that go from the page cache to the kernel through a pipe."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedisk.drivers.protocol.hostcalls import cached_pages
from fusedisk.mount import wire
from fusedisk.mount.reply_pipe import LEAST, ReplyPipe
from tests.conftest import require_tool
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, daemon_of

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def pipe() -> Iterator[ReplyPipe]:
    made = ReplyPipe()
    yield made
    made.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(300 * KIB))
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


class Device:
    """What takes replies."""

    def __init__(self) -> None:
        self._out, self.descriptor = os.pipe()
        os.set_blocking(self._out, False)

    def taken(self) -> bytes:
        return os.read(self._out, wire.MAX_WRITE)

    def break_down(self) -> None:
        os.close(self._out)

    def close(self) -> None:
        os.close(self.descriptor)


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.close()


def reply(unique: int, data: bytes) -> bytes:
    return wire.OUT_HEADER.pack(wire.OUT_HEADER.size + len(data), 0, unique) + data


def test_a_reply_is_made_of_parts(pipe: ReplyPipe, file: int, device: Device) -> None:
    parts = [(file, 100, 5000), (file, 65536, 4096), (file, 7, 1)]
    expected = b"".join(os.pread(file, length, offset) for _, offset, length in parts)
    assert pipe.send(device.descriptor, 42, len(expected), parts)
    assert device.taken() == reply(42, expected)


def test_a_part_behind_the_end_of_its_file_leaves_nothing_behind(pipe: ReplyPipe, file: int, device: Device) -> None:
    assert not pipe.send(device.descriptor, 1, 8192, [(file, 0, 4096), (file, 300 * KIB - 10, 4096)])
    with pytest.raises(BlockingIOError):
        device.taken()
    assert pipe.send(device.descriptor, 2, 10, [(file, 0, 10)])
    assert device.taken() == reply(2, os.pread(file, 10, 0))


def test_a_part_that_cannot_be_read_leaves_nothing_behind(pipe: ReplyPipe, tmp_path: Path, device: Device) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        assert not pipe.send(device.descriptor, 1, 10, [(folder, 0, 10)])
    finally:
        os.close(folder)


def test_a_reply_that_is_not_taken_leaves_nothing_behind(pipe: ReplyPipe, file: int, device: Device) -> None:
    broken = Device()
    broken.break_down()
    with pytest.raises(BrokenPipeError):
        pipe.send(broken.descriptor, 1, 10, [(file, 0, 10)])
    broken.close()
    assert pipe.send(device.descriptor, 2, 10, [(file, 0, 10)])
    assert device.taken() == reply(2, os.pread(file, 10, 0))


def test_what_has_no_room_is_refused(pipe: ReplyPipe, file: int, device: Device) -> None:
    assert LEAST <= pipe.longest <= min(wire.MAX_WRITE, pipe.pages * mmap.PAGESIZE // 2)
    assert not pipe.send(device.descriptor, 1, pipe.pages * mmap.PAGESIZE, [(file, 0, pipe.pages * mmap.PAGESIZE)])
    with pytest.raises(BlockingIOError):
        device.taken()


def test_where_pipes_are_short_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who has many of them: then they have sixteen pages, or two."""
    control = fcntl.fcntl

    def limited(fd: int, command: int, *args: int) -> int:
        if command == fcntl.F_SETPIPE_SZ:
            raise PermissionError(errno.EPERM, "")
        return control(fd, command, *args)

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "fcntl", limited)
    with pytest.raises(OSError, match="a pipe may only have 16 pages"):
        ReplyPipe()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_large_reads_do_not_pass_through_our_memory(mounts: Mounts, tmp_path: Path, kind: str) -> None:
    require_tool("qemu-img")
    if kind == "raw":
        image = tmp_path / "disk.raw"
        image.write_bytes(os.urandom(4 * MIB))
        expected = image.read_bytes()
    else:
        image = make_qcow2(tmp_path / "disk.qcow2", 4 * MIB, "write -P 7 0 4M")
        expected = b"\7" * (4 * MIB)
        image.read_bytes()
    with image.open("rb") as host:
        try:
            cached_pages(host.fileno(), 0, MIB)
        except OSError:
            pytest.skip("this kernel does not tell what is in the page cache")
    options = ("-f", "raw") if kind == "raw" else ()
    on = mounts.mount(*options, "--passthrough=off", "--kernel-cache=off", image)
    buffer = mmap.mmap(-1, MIB)
    descriptor = os.open(on / "disk", os.O_RDWR | os.O_DIRECT)
    try:
        os.preadv(descriptor, [buffer], 0)  # tables are in memory then
        daemon = daemon_of(on)
        before = daemon.io_counters().read_chars
        for offset in range(0, 4 * MIB, MIB):
            assert os.preadv(descriptor, [buffer], offset) == MIB
            assert buffer[:] == expected[offset : offset + MIB]
        assert daemon.io_counters().read_chars - before < MIB
        with image.open("rb") as host:
            os.fdatasync(descriptor)
            os.posix_fadvise(host.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.preadv(descriptor, [buffer], MIB) == MIB
        assert buffer[:] == expected[MIB : 2 * MIB]
    finally:
        os.close(descriptor)
