"""The ``file`` driver: opening, bytes, flushing, locks."""

from __future__ import annotations

import errno
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.reopen import reopen
from fusedisk.block.model.flags import NO_FALLBACK
from fusedisk.block.request import io
from fusedisk.core.errors import (
    HostError,
    LockConflictError,
    NoSpaceError,
    NotSupportedError,
    OptionError,
)
from fusedisk.drivers.protocol import host_file, host_flush, host_io, host_ranges, resize
from fusedisk.drivers.protocol.file import FileDriver
from fusedisk.drivers.protocol.host_file import INLINE_MAX, Pace
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_io, run_tool
from tests.support.files import KIB, MIB, mounted_tmpfs, opened, refusal


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that went to worker threads, once the file is open."""
    seen: list[str] = []
    run = host_file.run_host_io

    async def counting(fn: Any, *args: Any) -> Any:
        seen.append(fn.__name__)
        return await run(fn, *args)

    for module in (host_file, host_ranges, host_flush, resize):
        monkeypatch.setattr(module, "run_host_io", counting)
    return seen


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No inline call counts as slow, however busy the machine is."""
    monkeypatch.setattr(Pace, "SLOW", float("inf"))


# --- opening --------------------------------------------------------------------------------------------


async def test_missing_file(tmp_path: Path) -> None:
    error = await refusal(tmp_path / "none")
    assert error.errno == errno.ENOENT
    assert str(error) == f"Could not open '{tmp_path / 'none'}': No such file or directory"


async def test_what_is_no_regular_file_is_refused_by_name(tmp_path: Path) -> None:
    assert "is a directory, expected a regular file" in str(await refusal(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe, expected a regular file" in str(await refusal(tmp_path / "pipe"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(tmp_path / "socket"))
        assert "is a socket" in str(await refusal(tmp_path / "socket"))
    error = await refusal("/dev/null")
    assert isinstance(error, OptionError)
    assert "use the driver 'host_device'" in str(error)


async def test_names_that_cannot_be_files() -> None:
    with pytest.raises(OptionError, match="needs the option 'filename'"):
        await Graph(DRIVERS).open_backend({"driver": "file"})
    with pytest.raises(OptionError, match="is not a valid path"):
        await FileDriver.create_file("a\0b", 0, "off", False)


async def test_auto_read_only_falls_back(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "ro", "size=1m") as place:
        (place / "disk").write_bytes(bytes(4096))
        run_tool("mount", "-o", "remount,ro", place)
        error = await refusal(place / "disk")
        assert error.errno == errno.EROFS
        graph = Graph(DRIVERS)
        options = {"driver": "file", "filename": str(place / "disk"), "auto-read-only": True, "read-only": False}
        backend = await graph.open_backend(options)
        assert backend.node.config.read_only
        await reopen(graph, {backend.node: {"read-only": False}})
        assert backend.node.config.read_only
        assert await backend.read(0, 16) == bytes(16)
        await graph.close()


async def test_name_that_opens_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "nbd:host", "with/slash:colon"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"x" * 512)
        async with opened(Path(name)) as (backend, _):
            exact = backend.node.exact_filename()
        graph = Graph(DRIVERS)
        again = await graph.open_backend(exact, format="raw")
        assert await again.read(0, 512) == b"x" * 512
        await graph.close()


# --- reading --------------------------------------------------------------------------------------------


async def test_reads_from_the_page_cache_take_no_thread(disk: Path, hops: list[str]) -> None:
    async with opened(disk) as (backend, _):
        hops.clear()
        expected = disk.read_bytes()
        for offset, length in ((0, 4096), (1, 3), (MIB - 5, 5), (4095, 700 * KIB), (0, MIB)):
            assert await backend.read(offset, length) == expected[offset : offset + length]
        assert hops == []
        buffer = memoryview(bytearray(INLINE_MAX + 1))
        await io.read(backend.node, 0, buffer)  # too long a copy for the trio thread
        assert buffer == expected + bytes(1)
        assert hops == ["read_vector"]


async def test_cold_reads_take_a_thread(disk: Path, hops: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer is given for it: asking it starts reading the page, which may be done before it answers."""
    preadv = os.preadv

    def cold(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError(errno.EAGAIN, "")
        return preadv(fd, buffers, offset, flags)

    async with opened(disk) as (backend, driver):
        if driver.file.in_memory:
            pytest.skip("the temporary directory is in memory, nothing is ever cold there")
        monkeypatch.setattr(os, "preadv", cold)
        hops.clear()
        assert await backend.read(512 * KIB, 4096) == disk.read_bytes()[512 * KIB : 516 * KIB]
        assert hops == ["read_vector"]


async def test_reads_past_the_end_are_zeroes(disk: Path) -> None:
    async with opened(disk) as (_, driver):
        for offset in (MIB - 100, MIB, 5 * MIB):
            buffers = [memoryview(bytearray(b"\xff" * 150)) for _ in range(2)]
            await driver.preadv(offset, buffers)
            expected = (disk.read_bytes()[offset:] + bytes(300))[:300]
            assert b"".join(buffers) == expected


async def test_filesystems_without_nowait_are_remembered(
    disk: Path, hops: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    preadv, pwritev, pwrite = os.preadv, os.pwritev, os.pwrite

    def refuse(flags: int) -> None:
        asked.append(flags)
        if flags:
            raise OSError(errno.EOPNOTSUPP, "")

    def no_nowait_read(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        refuse(flags)
        return preadv(fd, buffers, offset)

    def no_nowait_write(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        refuse(flags)
        return pwritev(fd, buffers, offset)

    def plain_write(fd: int, data: Any, offset: int) -> int:
        refuse(0)
        return pwrite(fd, data, offset)

    async with opened(disk) as (backend, driver):
        if driver.file.in_memory:
            pytest.skip("the temporary directory is in memory, where RWF_NOWAIT is not tried")
        driver.file.nowait_writes = True
        monkeypatch.setattr(os, "preadv", no_nowait_read)
        monkeypatch.setattr(os, "pwritev", no_nowait_write)
        monkeypatch.setattr(os, "pwrite", plain_write)
        hops.clear()
        for _ in range(2):
            assert await backend.read(0, 10) == disk.read_bytes()[:10]
        assert asked == [os.RWF_NOWAIT, 0, 0]
        assert hops == ["read_vector", "read_vector"]
        monkeypatch.setattr(Pace, "SLOW", float("inf"))
        asked.clear()
        hops.clear()
        for _ in range(2):
            await backend.write(0, b"abc")
        assert asked == [os.RWF_NOWAIT, 0, 0]
        assert hops == []


async def test_short_transfers_are_continued(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, pwritev = os.preadv, os.pwritev

    def cut(buffers: Any) -> list[memoryview]:
        first = next(view for view in map(memoryview, buffers) if len(view))
        return [first[:777]]

    monkeypatch.setattr(os, "preadv", lambda fd, buffers, *rest: preadv(fd, cut(buffers), *rest))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, *rest: pwritev(fd, cut(buffers), *rest))
    data = random.Random(2).randbytes(10000)
    async with opened(disk) as (_, driver):
        parts = [memoryview(data)[:1000], memoryview(b""), memoryview(data)[1000:]]
        await driver.pwritev(5, parts, 0)
        buffers = [memoryview(bytearray(size)) for size in (3, 0, 9997)]
        await driver.preadv(5, buffers)
        assert b"".join(buffers) == data
    assert disk.read_bytes()[5:10005] == data


async def test_more_buffers_than_one_call_takes(disk: Path) -> None:
    count = 2 * host_io.IOV_MAX + 3
    data = random.Random(3).randbytes(3 * count)
    async with opened(disk) as (_, driver):
        await driver.pwritev(1, [memoryview(data)[i * 3 : i * 3 + 3] for i in range(count)], 0)
        buffers = [memoryview(bytearray(3)) for _ in range(count)]
        await driver.preadv(1, buffers)
        assert b"".join(buffers) == data


async def test_host_errors_are_named(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "")

    async with opened(disk) as (backend, _):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            with pytest.raises(HostError, match=f"Could not read from '{disk}': Input/output error"):
                await backend.read(0, 1)
            patch.setattr(os, "pwritev", fail)
            with pytest.raises(HostError, match=f"Could not write to '{disk}': Input/output error") as caught:
                await backend.write(512, b"x")
            assert caught.value.errno == errno.EIO
            assert caught.value.where() == f"node '{backend.node.name}', write of 1 bytes at 512"


# --- writing --------------------------------------------------------------------------------------------


async def test_writes_up_to_the_limit_run_inline(disk: Path, hops: list[str], patient: None) -> None:
    async with opened(disk) as (backend, driver):
        hops.clear()
        await backend.write(0, b"a" * 4096)
        await backend.write(4096, b"b" * (INLINE_MAX - 4096))
        assert hops == []
        await io.write(driver.node, 0, (memoryview(b"c" * (INLINE_MAX + 1)),))
        assert hops == ["write_vector"]
        assert backend.length == INLINE_MAX + 1
    assert disk.read_bytes() == b"c" * (INLINE_MAX + 1)


async def test_slow_writes_move_to_threads_and_come_back(disk: Path, hops: list[str]) -> None:
    async with opened(disk) as (backend, driver):
        driver.file.nowait_writes = False
        pace = driver.file.pace
        pace.measured(0.0, 0.5)
        pace._until = float("inf")
        hops.clear()
        await backend.write(0, b"one")
        assert hops == ["write_vector"]
        pace._until = 0.0
        await backend.write(0, b"two")
        assert hops == ["write_vector"]
    assert disk.read_bytes()[:3] == b"two"


async def test_slowness_is_measured(tmp_path: Path, hops: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pace, "SLOW", -1.0)  # everything is slow
    monkeypatch.setattr(Pace, "_FIRST_PAUSE", 1e9)
    monkeypatch.setattr(Pace, "_LONGEST_PAUSE", 1e9)
    with mounted_tmpfs(tmp_path / "memory", "size=4m") as place:
        for request in (lambda user: user.read(0, 10), lambda user: user.write(0, b"x" * 10)):
            (place / "disk").write_bytes(bytes(MIB))
            async with opened(place / "disk") as (backend, _):
                hops.clear()
                await request(backend)
                assert hops == []
                await request(backend)
                assert len(hops) == 1


def test_pace() -> None:
    pace = Pace()
    assert pace.is_quick(0.0)
    pace.measured(1.0, Pace.SLOW / 2)
    assert pace.is_quick(1.0)
    now, pauses = 1.0, []
    for _ in range(12):
        pace.measured(now, Pace.SLOW * 2)
        start = now
        while not pace.is_quick(now):
            now += 0.001
        pauses.append(now - start)
    assert pauses[0] == pytest.approx(0.01, abs=0.002)
    assert pauses[1] == pytest.approx(0.02, abs=0.002)
    assert pauses[-1] == pytest.approx(1.0, abs=0.002)
    pace.measured(now, 0.0)
    pace.measured(now, Pace.SLOW * 2)
    assert pace.is_quick(now + 0.011)


async def test_writing_past_the_end_extends(disk: Path) -> None:
    async with opened(disk) as (backend, driver):
        await io.write(driver.node, MIB + 10, (memoryview(b"end"),))
        assert backend.length == MIB + 13
        assert await backend.read(MIB, 13) == bytes(10) + b"end"
    assert disk.stat().st_size == MIB + 13


async def write_chunks(backend: Backend, length: int) -> None:
    for offset in range(0, length, 64 * KIB):
        await backend.write(offset, b"x" * (64 * KIB))


async def test_full_filesystem(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=1m") as place:
        path = place / "disk"
        await FileDriver.create_file(str(path), 4 * MIB, "off", False)
        async with opened(path, discard="unmap") as (backend, _):
            with pytest.raises(NoSpaceError, match=f"Could not write to '{path}': No space left on device"):
                await write_chunks(backend, 4 * MIB)
            with pytest.raises(NoSpaceError, match="Could not resize"):
                await backend.truncate(8 * MIB, "falloc")
            assert path.stat().st_size == backend.length == 4 * MIB
            await backend.discard(0, 4 * MIB)
            with pytest.raises(NoSpaceError, match="Could not resize"):
                await backend.truncate(8 * MIB, "full")
            assert path.stat().st_size == backend.length == 4 * MIB
        with pytest.raises(NoSpaceError):
            await FileDriver.create_file(str(place / "new"), 8 * MIB, "full", False)
        assert not (place / "new").exists()


async def test_files_in_memory_are_served_inline(tmp_path: Path, hops: list[str], patient: None) -> None:
    with mounted_tmpfs(tmp_path / "memory", "size=4m") as place:
        (place / "disk").write_bytes(bytes(MIB))
        async with opened(place / "disk") as (backend, driver):
            assert driver.file.in_memory
            hops.clear()
            await backend.write(0, b"x" * 4096)
            assert await backend.read(4000, 4096) == b"x" * 96 + bytes(4000)
            assert hops == []
            with pytest.raises(NotSupportedError):
                await io.write_zeroes(driver.node, 0, 4096, NO_FALLBACK)
            await backend.write_zeroes(0, 100)
            await backend.write_zeroes(200, MIB - 200, may_unmap=True)
            assert await backend.read(0, MIB) == bytes(100) + b"x" * 100 + bytes(MIB - 200)


# --- flushing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["kernel", "thread"])
async def test_flush_and_no_flush(disk: Path, hops: list[str], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread flushes only where the kernel has none for that."""
    if where == "thread":
        monkeypatch.setattr(host_flush, "_CALLS", {})
    async with opened(disk) as (backend, _):
        await backend.write(0, b"x")
        hops.clear()
        await backend.flush()
        assert hops == (["fdatasync"] if where == "thread" else [])
    async with opened(disk, cache__no_flush=True) as (backend, driver):
        await backend.write(0, b"x")
        hops.clear()
        await backend.flush()
        await driver.flush_to_disk()
        assert hops == []


async def test_many_flush_at_once(disk: Path, hops: list[str]) -> None:
    """More than the kernel takes on; each waits for its own."""
    fd = os.open(disk, os.O_RDWR)
    try:
        for length in (200, 3, 200):
            async with trio.open_nursery() as nursery:
                for number in range(length):
                    os.pwrite(fd, b"x", number)
                    nursery.start_soon(host_flush.flush_file, fd)
            assert hops.count("fdatasync") <= length - min(length, 64)
            hops.clear()
    finally:
        os.close(fd)


async def test_a_cancelled_flush_is_waited_for(disk: Path) -> None:
    fd = os.open(disk, os.O_RDWR)
    try:
        with trio.CancelScope() as scope:
            scope.cancel()
            await host_flush.flush_file(fd)
        await host_flush.flush_file(fd)  # finds no result but its own
        flushes = host_flush._flushes()
        assert flushes is not None
        assert not flushes._results
    finally:
        os.close(fd)


@pytest.mark.parametrize("where", ["kernel", "thread"])
async def test_what_cannot_be_flushed_is_told(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "thread":
        monkeypatch.setattr(host_flush, "_CALLS", {})
    reading, writing = os.pipe()
    try:
        for fd in (reading, writing, 1 << 20):
            with pytest.raises(OSError, match=r"Invalid argument|Bad file descriptor"):
                await host_flush.flush_file(fd)
    finally:
        os.close(reading)
        os.close(writing)


async def test_flushing_leaves_no_descriptor(disk: Path) -> None:
    fd = os.open(disk, os.O_RDWR)
    try:
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(5):
            await host_flush.flush_file(fd)
        assert sorted(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(fd)


async def test_a_failed_flush_is_not_forgotten(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(fd: int) -> None:
        raise OSError(errno.EIO, "")

    graph = Graph(DRIVERS)
    backend = await graph.open_backend({"driver": "file", "filename": str(disk)}, writable=True)
    await backend.write(0, b"x")
    with monkeypatch.context() as patch:
        patch.setattr("fusedisk.drivers.protocol.file.flush_file", fail)
        with pytest.raises(HostError, match=f"Could not flush '{disk}': Input/output error"):
            await backend.flush()
    with pytest.raises(HostError, match=f"Could not flush '{disk}': an earlier flush failed") as caught:
        await backend.flush()
    assert caught.value.errno == errno.EIO
    with pytest.raises(HostError, match="an earlier flush failed"):
        await graph.close()


# --- locks ----------------------------------------------------------------------------------------------


async def test_two_graphs_exclude_each_other(disk: Path) -> None:
    async with opened(disk):
        error = await refusal(disk)
        assert isinstance(error, LockConflictError)
        assert str(error) == f'Failed to get "write" lock: is another process using the image [{disk}]?'
        async with opened(disk, locking="off"):
            pass
        async with opened(disk, writable=False, force_share=True):
            pass
    async with opened(disk):
        pass


async def test_qemu_and_we_exclude_each_other(disk: Path) -> None:
    async with opened(disk) as (backend, _):
        with pytest.raises(AssertionError, match='Failed to get "write" lock'):
            qemu_io(disk, "read 0 4k", fmt="raw")
        await backend.write(0, b"\x05" * 4096)
        qemu_io(disk, "read -P 5 0 4k", fmt="raw", options="-r -U")
    qemu_io(disk, "write -P 6 0 4k", fmt="raw")
