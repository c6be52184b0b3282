"""The ``file`` driver: opening, bytes, zeroes, sizes, flushing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block import io
from fusedisk.block.backend import Backend
from fusedisk.block.driver import MAY_UNMAP, NO_FALLBACK
from fusedisk.block.extent import DATA, ZERO
from fusedisk.block.graph import Graph
from fusedisk.block.reopen import reopen
from fusedisk.core.errors import (
    FusediskError,
    HostError,
    LockConflictError,
    NoSpaceError,
    NotSupportedError,
    OptionError,
)
from fusedisk.drivers.protocol import file as file_module
from fusedisk.drivers.protocol import host_file, host_io, hostcalls, resize
from fusedisk.drivers.protocol.file import FileDriver
from fusedisk.drivers.protocol.host_file import INLINE_MAX, Pace
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, qemu_io, require_root, run_tool

KIB = 1 << 10
MIB = 1 << 20


@contextlib.asynccontextmanager
async def opened(path: Path, *, writable: bool = True, **options: Any) -> AsyncIterator[tuple[Backend, FileDriver]]:
    graph = Graph(DRIVERS)
    try:
        given = {"driver": "file", "filename": str(path)}
        for key, value in options.items():
            given[key.replace("__", ".").replace("_", "-")] = value
        backend = await graph.open_backend(given, writable=writable)
        assert isinstance(backend.node.driver, FileDriver)
        yield backend, backend.node.driver
    finally:
        await graph.close()


@contextlib.contextmanager
def mounted_tmpfs(path: Path, options: str) -> Iterator[Path]:
    require_root()
    path.mkdir()
    run_tool("mount", "-t", "tmpfs", "-o", options, "tmpfs", path)
    try:
        yield path
    finally:
        run_tool("umount", path)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file of 1 MiB of random bytes."""
    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(MIB))
    return path


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that went to worker threads, once the file is open."""
    seen: list[str] = []
    run = host_file.run_host_io

    async def counting(fn: Any, *args: Any) -> Any:
        seen.append(fn.__name__)
        return await run(fn, *args)

    for module in (host_file, file_module, resize):
        monkeypatch.setattr(module, "run_host_io", counting)
    return seen


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No inline call counts as slow, however busy the machine is."""
    monkeypatch.setattr(Pace, "SLOW", float("inf"))


# --- opening --------------------------------------------------------------------------------------------


async def refusal(path: Path | str, *, writable: bool = True, **options: Any) -> FusediskError:
    with pytest.raises(FusediskError) as caught:
        async with opened(Path(path), writable=writable, **options):
            pass
    return caught.value


async def test_missing_file(tmp_path: Path) -> None:
    error = await refusal(tmp_path / "none")
    assert error.errno == errno.ENOENT
    assert str(error) == f"Could not open '{tmp_path / 'none'}': No such file or directory"


async def test_what_is_no_regular_file_is_refused_by_name(tmp_path: Path) -> None:
    assert "is a directory, but a regular file was wanted" in str(await refusal(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe, but a regular file was wanted" in str(await refusal(tmp_path / "pipe"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(tmp_path / "socket"))
        assert "is a socket" in str(await refusal(tmp_path / "socket"))
    error = await refusal("/dev/null")
    assert isinstance(error, OptionError)
    assert "use the driver 'host_device'" in str(error)


async def test_names_that_cannot_be_files() -> None:
    with pytest.raises(OptionError, match="needs the option 'filename'"):
        await Graph(DRIVERS).open_backend({"driver": "file"})
    with pytest.raises(OptionError, match="cannot be a path"):
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
    preadv, pwritev = os.preadv, os.pwritev

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

    async with opened(disk) as (backend, driver):
        if driver.file.in_memory:
            pytest.skip("the temporary directory is in memory, where RWF_NOWAIT is not tried")
        driver.file.nowait_writes = True
        monkeypatch.setattr(os, "preadv", no_nowait_read)
        monkeypatch.setattr(os, "pwritev", no_nowait_write)
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


async def test_flush_and_no_flush(disk: Path, hops: list[str]) -> None:
    async with opened(disk) as (backend, _):
        await backend.write(0, b"x")
        hops.clear()
        await backend.flush()
        assert hops == ["fdatasync"]
    async with opened(disk, cache__no_flush=True) as (backend, driver):
        await backend.write(0, b"x")
        hops.clear()
        await backend.flush()
        await driver.flush_to_disk()
        assert hops == []


async def test_a_failed_flush_is_not_forgotten(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "")

    graph = Graph(DRIVERS)
    backend = await graph.open_backend({"driver": "file", "filename": str(disk)}, writable=True)
    await backend.write(0, b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(HostError, match=f"Could not flush '{disk}': Input/output error"):
            await backend.flush()
    with pytest.raises(HostError, match=f"Could not flush '{disk}': an earlier flush failed") as caught:
        await backend.flush()
    assert caught.value.errno == errno.EIO
    with pytest.raises(HostError, match="an earlier flush failed"):
        await graph.close()


# --- zeroes and holes -----------------------------------------------------------------------------------


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


async def test_write_zeroes_keeps_or_frees_space(disk: Path) -> None:
    async with opened(disk, discard="unmap") as (backend, driver):
        await backend.flush()
        full = blocks(disk)
        await driver.write_zeroes(0, 512 * KIB, 0)
        assert blocks(disk) >= full
        await driver.write_zeroes(512 * KIB, 256 * KIB, MAY_UNMAP)
        assert blocks(disk) <= full - 256 * KIB
        assert await backend.read(0, 768 * KIB) == bytes(768 * KIB)
        assert any(await backend.read(768 * KIB, 256 * KIB))
        assert backend.length == disk.stat().st_size == MIB
        assert await driver.allocated_size() == blocks(disk)


async def test_write_zeroes_without_unmap_never_frees(disk: Path) -> None:
    async with opened(disk, discard="ignore") as (backend, driver):
        await backend.flush()
        full = blocks(disk)
        await driver.write_zeroes(0, MIB, MAY_UNMAP)
        assert blocks(disk) >= full
        assert await backend.read(0, MIB) == bytes(MIB)


@pytest.mark.parametrize("flags", [0, MAY_UNMAP])
async def test_write_zeroes_extends(disk: Path, flags: int) -> None:
    async with opened(disk, discard="unmap") as (backend, driver):
        await io.write_zeroes(driver.node, MIB - 10, 110, flags)
        assert backend.length == disk.stat().st_size == MIB + 100
        await io.write_zeroes(driver.node, 2 * MIB, 100, flags)
        assert backend.length == disk.stat().st_size == 2 * MIB + 100
        assert await backend.read(MIB - 10, MIB + 110) == bytes(MIB + 110)


async def test_missing_fallocate_is_remembered(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def unsupported(fd: int, mode: int, offset: int, length: int) -> None:
        calls.append(mode)
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(file_module, "fallocate", unsupported)
    async with opened(disk, discard="unmap") as (backend, driver):
        for _ in range(2):
            with pytest.raises(NotSupportedError):
                await driver.write_zeroes(0, 4096, MAY_UNMAP)
            with pytest.raises(NotSupportedError):
                await driver.discard(0, 4096)
        assert len(calls) == 3  # punching, zeroing and discarding, once each
        await backend.write_zeroes(10, 4096, may_unmap=True)  # the core writes them out
        await backend.discard(0, 4096)
        assert await backend.read(10, 4096) == bytes(4096)


async def test_discard(disk: Path) -> None:
    async with opened(disk, discard="unmap") as (backend, _):
        await backend.flush()
        full = blocks(disk)
        await backend.discard(0, 512 * KIB)
        assert blocks(disk) <= full - 512 * KIB
        assert await backend.read(0, 512 * KIB) == bytes(512 * KIB)
        assert disk.stat().st_size == MIB
    data = disk.read_bytes()
    async with opened(disk, discard="ignore") as (_, driver):
        await driver.discard(512 * KIB, 512 * KIB)
    assert disk.read_bytes() == data


async def extents(driver: FileDriver, length: int) -> list[tuple[int, int, int]]:
    found, offset = [], 0
    while offset < length:
        extent = await driver.map(offset, length - offset)
        assert 0 < extent.length <= length - offset
        assert extent.child is None
        assert extent.offset == offset
        found.append((extent.status, offset, extent.length))
        offset += extent.length
    return found


async def test_map_tells_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(MIB)
        file.seek(256 * KIB)
        file.write(b"x" * (64 * KIB))
        file.truncate(MIB + 100)
    async with opened(path) as (_, driver):
        assert await extents(driver, 2 * MIB) == [
            (ZERO, 0, 256 * KIB),
            (DATA, 256 * KIB, 64 * KIB),
            (ZERO, 320 * KIB, 2 * MIB - 320 * KIB),
        ]
        assert await driver.map(256 * KIB + 5, 10) == (DATA, 10, None, 256 * KIB + 5, False, False, None)


async def test_map_agrees_with_qemu_img(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    chance = random.Random(4)
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        for _ in range(40):
            file.seek(chance.randrange(0, 8 * MIB, 4096))
            file.write(b"x" * 4096)
    told = json.loads(qemu_img("map", "--output=json", "-f", "raw", path))
    async with opened(path) as (_, driver):
        ours = await extents(driver, 8 * MIB)
    assert ours == [(DATA if entry["data"] else ZERO, entry["start"], entry["length"]) for entry in told]


async def test_filesystems_that_do_not_tell_holes(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "")

    async with opened(disk) as (_, driver):
        monkeypatch.setattr(os, "lseek", refuse)
        assert await extents(driver, MIB) == [(DATA, 0, MIB)]


# --- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
async def test_truncate(disk: Path, preallocation: str) -> None:
    async with opened(disk) as (backend, _):
        await backend.flush()
        before = blocks(disk)
        await backend.truncate(3 * MIB + 1, preallocation)
        assert backend.length == disk.stat().st_size == 3 * MIB + 1
        if preallocation == "off":
            assert blocks(disk) <= before
        else:
            assert blocks(disk) >= before + 2 * MIB
        assert await backend.read(MIB, 2 * MIB + 1) == bytes(2 * MIB + 1)
        await backend.truncate(1000)
        assert backend.length == disk.stat().st_size == 1000


async def test_truncate_refusals(disk: Path) -> None:
    async with opened(disk) as (backend, _):
        with pytest.raises(NotSupportedError, match="no preallocation mode 'metadata', one of off, falloc, full"):
            await backend.truncate(2 * MIB, "metadata")
        with pytest.raises(OptionError, match="is to shrink from 1048576 to 10 bytes"):
            await backend.truncate(10, "falloc")
        assert backend.length == disk.stat().st_size == MIB


async def test_a_cancelled_preallocation_leaves_the_old_length(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "_WRITE_STEP", 64 * KIB)
    async with opened(disk) as (backend, driver):
        write, scope = resize._write_zeroes, trio.CancelScope()

        def write_then_cancel(fd: int, offset: int, length: int) -> None:
            write(fd, offset, length)
            trio.from_thread.run_sync(scope.cancel)

        monkeypatch.setattr(resize, "_write_zeroes", write_then_cancel)
        with scope:
            await driver.truncate(2 * MIB, "full", 0)
        assert scope.cancelled_caught
        assert backend.length == disk.stat().st_size == MIB


# --- creating -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
async def test_create(tmp_path: Path, preallocation: str) -> None:
    path = tmp_path / "new"
    await FileDriver.create_file(str(path), MIB + 7, preallocation, False)
    assert path.read_bytes() == bytes(MIB + 7)
    assert (blocks(path) >= MIB) == (preallocation != "off")
    path.write_bytes(b"old" * MIB)
    await FileDriver.create_file(str(path), 100, preallocation, True)
    assert path.read_bytes() == bytes(100)


async def test_create_refusals(tmp_path: Path) -> None:
    async def refused(name: str, preallocation: str = "off") -> FusediskError:
        with pytest.raises(FusediskError) as caught:
            await FileDriver.create_file(str(tmp_path / name), 100, preallocation, False)
        return caught.value

    assert (await refused("none/new")).errno == errno.ENOENT
    assert (await refused(".")).errno == errno.EISDIR
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in str(await refused("pipe"))
    assert "no preallocation mode 'metadata'" in str(await refused("new", "metadata"))
    assert not (tmp_path / "new").exists()


async def test_create_spares_a_file_in_use(disk: Path) -> None:
    before = disk.read_bytes()
    async with opened(disk):
        with pytest.raises(LockConflictError, match='Failed to get "write" lock'):
            await FileDriver.create_file(str(disk), 100, "off", False)
    assert disk.read_bytes() == before


def test_nocow_flag_reaches_the_filesystem(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = 0x10
    calls: list[int] = []

    def ioctl(fd: int, request: int, argument: Any, mutate: bool = False) -> int:
        nonlocal flags
        calls.append(request)
        if request == 0x80086601:
            argument[0] = flags
        else:
            flags = argument[0]
        return 0

    monkeypatch.setattr(hostcalls.fcntl, "ioctl", ioctl)
    hostcalls.set_nocow(0)
    assert flags == 0x00800010
    hostcalls.set_nocow(0)
    assert calls == [0x80086601, 0x40086602, 0x80086601]


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


async def test_data_that_becomes_a_hole_while_it_is_looked_for(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the moment in which a filesystem allocates what it is writing back."""
    lseek = os.lseek

    def changing(fd: int, offset: int, whence: int) -> int:
        return offset if whence in (os.SEEK_DATA, os.SEEK_HOLE) else lseek(fd, offset, whence)

    async with opened(disk) as (backend, _):
        monkeypatch.setattr(os, "lseek", changing)
        status = await backend.block_status(4096, 8192)
        assert 0 < status.length <= 8192
        assert not status.zero
