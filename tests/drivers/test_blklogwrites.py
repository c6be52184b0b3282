"""blklogwrites: what it logs, that QEMU's logs and ours are read alike, appending, broken logs."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import FusediskError, HostError, ImageError, OptionError, OutOfRangeError
from fusedisk.drivers.filter import blklogwrites_layout as layout
from fusedisk.drivers.filter.blklogwrites import BlklogwritesDriver
from fusedisk.drivers.filter.blklogwrites_layout import Entry, Superblock
from fusedisk.drivers.table import DRIVERS
from tests.conftest import run_tool
from tests.crash.replay import Operation, apply, read_log
from tests.support import tasks
from tests.support.oracle import random_bytes, random_request

KIB = 1 << 10
SIZE = 256 * KIB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(7).randbytes(SIZE))
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.write_bytes(b"")
    return path


def options(disk: Path, log: Path, **more: Any) -> dict[str, Any]:
    return {
        "driver": "blklogwrites",
        "file": {"driver": "file", "filename": str(disk)},
        "log": {"driver": "file", "filename": str(log)},
        **more,
    }


@asynccontextmanager
async def opened(given: dict[str, Any]) -> AsyncIterator[Backend]:
    graph = Graph(DRIVERS)
    try:
        yield await graph.open_backend(given, writable=True)
    finally:
        await graph.close()


def driver_of(backend: Backend) -> BlklogwritesDriver:
    driver = backend.node.driver
    assert isinstance(driver, BlklogwritesDriver)
    return driver


def replayed(base: bytes, log: Path) -> bytes:
    image = bytearray(base)
    for operation in read_log(log):
        apply(image, operation)
    return bytes(image)


async def test_one_of_each(disk: Path, log: Path) -> None:
    base = disk.read_bytes()
    async with opened(options(disk, log, discard="unmap")) as backend:
        await backend.write(1024, b"x" * 1024)
        await backend.write(10, b"y")
        await backend.write_zeroes(4096, 8192)
        await backend.flush()
        await driver_of(backend).mark("here")
        await backend.discard(65536, 4096)
        await backend.write(0, b"z" * 512, fua=True)
    operations = read_log(log)
    first = base[:10] + b"y" + base[11:512]
    assert operations[:7] == [
        Operation("write", 1024, b"x" * 1024),
        Operation("write", 0, first),
        Operation("write", 4096, bytes(8192)),
        Operation("flush"),
        Operation("mark", 0, b"here"),
        Operation("discard", 65536, bytes(4096)),
        Operation("write", 0, b"z" * 512),
    ]
    assert {operation.kind for operation in operations[7:]} == {"flush"}
    assert replayed(base, log) == disk.read_bytes()


@pytest.mark.parametrize("sector_size", [512, 4096])
async def test_random_requests_replay_to_the_disk(disk: Path, log: Path, sector_size: int) -> None:
    base = disk.read_bytes()
    random_ = random.Random(sector_size)
    oracle = bytearray(base)
    async with opened(options(disk, log, **{"log-sector-size": sector_size})) as backend:
        for _ in range(150):
            await random_request(random_, backend, oracle, 20_000)
            if random_.random() < 0.1:
                await backend.flush()
    assert disk.read_bytes() == oracle
    assert replayed(base, log) == oracle
    assert layout.parse_superblock(log.read_bytes(), "log").sector_size == sector_size


async def test_resizing(disk: Path, log: Path) -> None:
    base = disk.read_bytes()
    async with opened(options(disk, log)) as backend:
        await backend.truncate(SIZE * 2)
        await backend.write(SIZE, b"x" * 512)
        await backend.flush()
        assert replayed(base, log) == disk.read_bytes()
        await backend.truncate(SIZE)
    assert replayed(base, log) == disk.read_bytes() + bytes(SIZE), "a disk does not shrink, but its end is empty"


async def test_write_zeroes_that_the_storage_lacks_are_logged_as_writes(log: Path) -> None:
    given = options(log, log) | {"file": {"driver": "blkdebug", "image": {"driver": "null-co", "size": SIZE}}}
    async with opened(given) as backend:
        await backend.write_zeroes(512, 1024)
    assert [(item.kind, item.end) for item in read_log(log) if item.kind != "flush"] == [("write", 1536)]


async def test_append(disk: Path, log: Path) -> None:
    base = disk.read_bytes()
    async with opened(options(disk, log, **{"log-sector-size": 4096})) as backend:
        await backend.write(0, b"x" * 5000)
    first = read_log(log)
    async with opened(options(disk, log, **{"log-append": True})) as backend:
        assert driver_of(backend).sector_size == 4096
        await backend.write(8192, b"y" * 4096)
    assert read_log(log)[: len(first)] == first
    assert Operation("write", 8192, b"y" * 4096) in read_log(log)[len(first) :]
    assert replayed(base, log) == disk.read_bytes()


async def test_append_to_an_empty_log(disk: Path, log: Path) -> None:
    async with opened(options(disk, log, **{"log-append": True})) as backend:
        await backend.write(0, b"x" * 512)
    assert read_log(log)[0] == Operation("write", 0, b"x" * 512)


async def test_a_new_log_forgets_the_old_one(disk: Path, log: Path) -> None:
    for byte in (b"x", b"y"):
        async with opened(options(disk, log)) as backend:
            await backend.write(0, byte * 512)
    assert [item.data for item in read_log(log) if item.kind == "write"] == [b"y" * 512]


async def test_superblock_is_updated_in_between(disk: Path, log: Path) -> None:
    async with opened(options(disk, log, **{"log-super-update-interval": 3})) as backend:
        for count in range(1, 10):
            await backend.write(0, bytes([count]) * 512)
            assert len(read_log(log)) == count // 3 * 3


async def test_read_only_writes_no_log(disk: Path, log: Path) -> None:
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(options(disk, log))
    await backend.read(0, 512)
    await backend.flush()
    await graph.close()
    assert log.read_bytes() == b""


async def test_what_is_written_during_a_flush_is_logged_behind_it(disk: Path, log: Path) -> None:
    """The flush does not cover it, so no replay may take it as flushed."""
    given = options(disk, log)
    given["file"] = {"driver": "blkdebug", "image": given["file"], "node-name": "slow"}
    graph = Graph(DRIVERS)
    given["file"] = {"driver": "raw", "file": given["file"]}
    backend = await graph.open_backend(given, writable=True)
    slow: Any = graph.node("slow").driver
    async with trio.open_nursery() as nursery:
        await backend.write(0, b"a" * 512)
        slow.set_breakpoint("flush_to_disk", "flush")
        flush = await tasks.start(nursery, backend.flush)
        await slow.wait_suspended("flush")
        write = await tasks.start(nursery, lambda: backend.write(512, b"b" * 512))
        assert backend.node.completed_writes
        slow.resume("flush")
        await flush.join()
        await write.join()
    await graph.close()
    kinds = [(item.kind, item.data[:1]) for item in read_log(log)]
    assert kinds[:3] == [("write", b"a"), ("flush", b""), ("write", b"b")]


async def test_a_failed_flush_is_not_logged(disk: Path, log: Path) -> None:
    given = options(disk, log)
    rule = {"event": "none", "iotype": "flush", "once": True}
    given["file"] = {"driver": "blkdebug", "image": given["file"], "inject-error": [rule]}
    async with opened(given) as backend:
        await backend.write(0, b"x" * 512)
        with pytest.raises(HostError):
            await backend.flush()
        await driver_of(backend).mark("failed")
    assert [item.kind for item in read_log(log)][:2] == ["write", "mark"]


async def test_mark_that_is_too_long(disk: Path, log: Path) -> None:
    async with opened(options(disk, log)) as backend:
        with pytest.raises(OutOfRangeError):
            await driver_of(backend).mark("x" * 481)
        await driver_of(backend).mark("x" * 480)
    assert read_log(log)[0] == Operation("mark", 0, b"x" * 480)


@pytest.mark.parametrize(
    "given",
    [
        {"log-append": True, "log-sector-size": 512},
        {"log-sector-size": 256},
        {"log-sector-size": 1000},
        {"log-super-update-interval": 0},
    ],
)
async def test_options_refused(disk: Path, log: Path, given: dict[str, Any]) -> None:
    graph = Graph(DRIVERS)
    with pytest.raises(OptionError):
        await graph.open_backend(options(disk, log, **given), writable=True)
    await graph.close()


# --- broken logs ----------------------------------------------------------------------------------------

GOOD = Superblock(1, 512).encode() + Entry(0, 1).encode(512) + bytes(512)


@pytest.mark.parametrize(
    "content",
    [
        b"short",
        bytes(512) + GOOD[512:],
        GOOD[:8] + b"\2" + GOOD[9:],
        GOOD[:24] + b"\1" + GOOD[25:],
        Superblock(1, 512).encode(),
        GOOD[:512] + Entry(0, 1, 16).encode(512) + bytes(512),
        GOOD[:512] + Entry(0, 2).encode(512) + bytes(512),
        GOOD[:512] + Entry(0, 1 << 63).encode(512) + bytes(512),
        Superblock(1 << 62, 512).encode() + GOOD[512:],
    ],
)
async def test_broken_log_is_not_appended_to(disk: Path, log: Path, content: bytes) -> None:
    log.write_bytes(content)
    graph = Graph(DRIVERS)
    with pytest.raises(ImageError):
        await graph.open_backend(options(disk, log, **{"log-append": True}), writable=True)
    await graph.close()
    assert log.read_bytes() == content


def test_any_bytes_raise_only_our_errors(log: Path) -> None:
    random_ = random.Random(1)
    for _ in range(500):
        content = bytearray(GOOD)
        for _ in range(random_.randrange(1, 4)):
            content[random_.randrange(1100)] = random_.randrange(256)
        log.write_bytes(content[: random_.randrange(len(content))] if random_.random() < 0.3 else content)
        try:
            read_log(log)
        except FusediskError:
            continue


# --- QEMU -----------------------------------------------------------------------------------------------


def qemu_commands(random_: random.Random, unit: int) -> list[str]:
    """Whole units only: QEMU's filter aborts on a discard of anything else."""
    commands = []
    for _ in range(60):
        length = random_.randrange(1, 9) * unit
        offset = random_.randrange((SIZE - length) // unit) * unit
        kind = random_.choice([f"write -P {random_.randrange(256)}", "write -z", "discard"])
        commands.append(f"{kind} {offset} {length}")
        if random_.random() < 0.2:
            commands.append("flush")
    return commands


def run_qemu(given: dict[str, Any], commands: list[str]) -> None:
    args = [part for command in commands for part in ("-c", command)]
    run_tool("qemu-io", *args, "json:" + json.dumps(given))


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_qemus_log_replays_here(disk: Path, log: Path, sector_size: int) -> None:
    base = disk.read_bytes()
    given = {"driver": "raw", "file": options(disk, log, **{"log-sector-size": sector_size})}
    run_qemu(given, qemu_commands(random.Random(sector_size), sector_size))
    assert len(read_log(log)) > 50
    assert replayed(base, log) == disk.read_bytes()


async def test_our_log_is_the_one_that_qemu_writes(disk: Path, log: Path, tmp_path: Path) -> None:
    theirs, their_log = tmp_path / "theirs.raw", tmp_path / "theirs.log"
    theirs.write_bytes(disk.read_bytes())
    their_log.write_bytes(b"")
    run_qemu(options(theirs, their_log), ["write -P 5 1024 1024", "write -z 4096 8192", "discard 65536 4096", "flush"])
    async with opened(options(disk, log, discard="unmap")) as backend:
        await backend.write(1024, b"\5" * 1024)
        await backend.write_zeroes(4096, 8192)
        await backend.discard(65536, 4096)
        await backend.flush()
    entries = 3 + 17
    assert log.read_bytes()[512 : 512 + entries * 512] == their_log.read_bytes()[512 : 512 + entries * 512]
    # Some versions of qemu-io flush in between.
    ours, qemus = ([item for item in read_log(path) if item.kind != "flush"] for path in (log, their_log))
    assert ours == qemus


async def test_qemu_appends_to_our_log_and_we_to_its(disk: Path, log: Path) -> None:
    base = disk.read_bytes()
    async with opened(options(disk, log)) as backend:
        await backend.write(0, random_bytes(random.Random(1), 8192))
    run_qemu(options(disk, log, **{"log-append": True}), ["write -P 9 4096 8192", "flush"])
    async with opened(options(disk, log, **{"log-append": True})) as backend:
        await backend.write(10 * KIB, b"z" * 5000)
    assert replayed(base, log) == disk.read_bytes()
    assert sum(item.kind == "write" for item in read_log(log)) == 3
