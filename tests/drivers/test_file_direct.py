"""The ``file`` driver past the page cache (O_DIRECT), and reopening it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import mmap
import os
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.reopen import reopen
from fusedisk.block.model.extent import DATA, ZERO
from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.errors import FusediskError, HostError, LockConflictError, NotSupportedError
from fusedisk.drivers.protocol import direct_io, host_file
from fusedisk.drivers.protocol.direct_io import Alignment, address_of, find_alignment, is_aligned
from fusedisk.drivers.protocol.file import FileDriver
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_io

KIB = 1 << 10
MIB = 1 << 20
LENGTH = MIB + 1000
"""Ends inside a block."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(LENGTH))
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError:
        pytest.skip("the temporary directory's filesystem has no O_DIRECT")
    return path


@contextlib.asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[tuple[Backend, FileDriver]]:
    graph = Graph(DRIVERS)
    try:
        given = {"driver": "file", "filename": str(path), "cache": {"direct": True}, "discard": "unmap", **options}
        backend = await graph.open_backend(given, writable=True)
        assert isinstance(backend.node.driver, FileDriver)
        yield backend, backend.node.driver
    finally:
        await graph.close()


# --- alignment ------------------------------------------------------------------------------------------


async def test_limits_are_the_files(disk: Path) -> None:
    async with opened(disk) as (backend, driver):
        alignment = driver.file.alignment
        assert alignment is not None
        assert alignment.request in (512, 1024, 2048, 4096)
        assert backend.node.limits.request_alignment == alignment.request
        assert backend.node.limits.memory_alignment == alignment.memory
    async with opened(disk, cache={"direct": False}) as (backend, _):
        assert backend.node.limits.request_alignment == 1


def test_alignment_is_probed_where_the_kernel_does_not_say(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(direct_io, "direct_io_alignment", lambda fd: None)
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    try:
        found = find_alignment(fd)
        assert found is not None
        assert found.request <= 4096

        def picky(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if len(buffers[0]) % 2048:
                raise OSError(errno.EINVAL, "")
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", picky)
        assert find_alignment(fd) == Alignment(mmap.PAGESIZE, 2048)
        os.truncate(disk, 0)
        assert find_alignment(fd) == Alignment(mmap.PAGESIZE, 4096)
    finally:
        os.close(fd)


async def test_filesystems_without_direct_io_are_named(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "")
        return real_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(NotSupportedError, match=f"The filesystem of '{disk}' has no O_DIRECT"):
        async with opened(disk):
            pass


def test_address_of() -> None:
    area = memoryview(mmap.mmap(-1, 8192))
    assert address_of(area) % mmap.PAGESIZE == 0
    assert address_of(area[100:]) == address_of(area) + 100
    assert address_of(memoryview(b"abc")[1:]) % 1 == 0
    alignment = Alignment(512, 512)
    assert is_aligned([area[:512], area[1024:]], alignment)
    assert not is_aligned([area[:512], area[1:513]], alignment)
    assert not is_aligned([area[:100]], alignment)


# --- data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
async def test_buffers_of_any_address(disk: Path, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "_BOUNCE_SIZE", 64 * KIB)
    length = 200 * 4096
    area = memoryview(mmap.mmap(-1, length + shift))[shift:]
    cuts = (0, 8192, 8192 + 100, 8192 + 4096, length)
    buffers = [area[start:end] for start, end in itertools.pairwise(cuts)]
    async with opened(disk) as (_, driver):
        await driver.preadv(4096, buffers)
        assert area == disk.read_bytes()[4096 : 4096 + length]
        area[:] = random.Random(2).randbytes(length)
        await driver.pwritev(8192, buffers, 0)
    assert disk.read_bytes()[8192 : 8192 + length] == area


async def test_the_last_block_keeps_its_length(disk: Path) -> None:
    before = disk.read_bytes()
    async with opened(disk) as (backend, driver):
        assert await backend.read(MIB - 10, 1010) == before[MIB - 10 :]
        buffer = memoryview(bytearray(b"\xff" * 2000))
        await io.read(driver.node, MIB, buffer)
        assert buffer == before[MIB:] + bytes(1000)
        await backend.write(LENGTH - 3, b"end")
        await backend.flush()
        assert backend.length == disk.stat().st_size == LENGTH
        await backend.write(LENGTH - 4, b"END")
    assert disk.read_bytes() == before[:-4] + b"ENDd"


async def test_growing_by_unaligned_writes(disk: Path) -> None:
    before = disk.read_bytes()
    async with opened(disk) as (backend, driver):
        for piece in (b"one", b"two", b"three" * 1000):
            end = backend.length
            await io.write(driver.node, end, (memoryview(piece),))
            assert backend.length == end + len(piece)
            await backend.flush()
            assert disk.stat().st_size == backend.length
    assert disk.read_bytes() == before + b"onetwo" + b"three" * 1000


async def test_closing_cuts_what_no_flush_did(disk: Path) -> None:
    before = disk.read_bytes()
    async with opened(disk, cache={"direct": True, "no-flush": True}) as (_, driver):
        await io.write(driver.node, LENGTH, (memoryview(b"end"),))
    assert disk.read_bytes() == before + b"end"


async def test_a_flush_during_growth_cuts_nothing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = disk.read_bytes()
    write_direct = host_file.write_direct

    async with opened(disk) as (_, driver):

        def write_then_flush(*args: Any) -> None:
            write_direct(*args)
            trio.from_thread.run(driver.flush_to_disk)

        monkeypatch.setattr(host_file, "write_direct", write_then_flush)
        await io.write(driver.node, LENGTH, (memoryview(b"end"),))
    assert disk.read_bytes() == before + b"end"


async def test_buffers_past_the_end_are_zeroed(disk: Path) -> None:
    async with opened(disk) as (_, driver):
        for start in (MIB, 2 * MIB):
            area = memoryview(mmap.mmap(-1, 16 * KIB))
            area[:] = b"\xff" * len(area)
            await driver.preadv(start, [area[: 8 * KIB], area[8 * KIB :]])
            assert area == (disk.read_bytes()[start:] + bytes(16 * KIB))[: 16 * KIB]


async def test_concurrent_growth_is_not_cut(disk: Path) -> None:
    expected = bytearray(disk.read_bytes())
    chance = random.Random(3)

    async def write(node: Node, offset: int, length: int) -> None:
        data = chance.randbytes(length)
        expected[offset : offset + length] = data
        await io.write(node, offset, (memoryview(data),))

    async with opened(disk) as (backend, driver):
        for _ in range(20):
            expected += bytes(64 * KIB)
            start = backend.length
            async with trio.open_nursery() as nursery:
                for slot in range(8):
                    offset = start + slot * 8 * KIB + chance.randrange(4096)
                    nursery.start_soon(write, driver.node, offset, chance.randrange(1, 4096))
                nursery.start_soon(backend.flush)
            await backend.flush()
            assert disk.stat().st_size == backend.length
            del expected[backend.length :]
    assert disk.read_bytes() == expected


async def test_random_operations_against_an_oracle(disk: Path) -> None:
    oracle = bytearray(disk.read_bytes())
    chance = random.Random(4)
    async with opened(disk) as (backend, _):
        for _ in range(400):
            offset = chance.randrange(len(oracle))
            length = min(len(oracle) - offset, chance.choice((1, 511, 512, 4096, 5000, 70000)))
            match chance.randrange(6):
                case 0 | 1:
                    assert await backend.read(offset, length) == oracle[offset : offset + length]
                case 2 | 3:
                    data = chance.randbytes(length)
                    await backend.write(offset, data)
                    oracle[offset : offset + length] = data
                case 4:
                    await backend.write_zeroes(offset, length, may_unmap=chance.random() < 0.5)
                    oracle[offset : offset + length] = bytes(length)
                case 5:
                    new = chance.randrange(LENGTH // 2, LENGTH)
                    await backend.truncate(new)
                    del oracle[new:]
                    oracle += bytes(new - len(oracle))
        assert await backend.read(0, len(oracle)) == oracle
    assert disk.read_bytes() == oracle


async def test_preallocation_and_holes(disk: Path) -> None:
    async with opened(disk) as (backend, driver):
        await backend.truncate(2 * MIB + 10, "full")
        assert backend.length == disk.stat().st_size == 2 * MIB + 10
        await backend.truncate(4 * MIB + 10)
        extent = await driver.map(0, 8 * MIB)
        assert extent.status == DATA
        assert 2 * MIB <= extent.length <= 2 * MIB + 4096
        extent = await driver.map(extent.length, 8 * MIB)
        assert extent.status == ZERO
        assert extent.length == 8 * MIB


async def test_a_failed_flush_may_succeed_later(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(fd: int) -> None:
        raise OSError(errno.EIO, "")

    async with opened(disk) as (backend, _):
        await backend.write(0, b"x" * 4096)
        with monkeypatch.context() as patch:
            patch.setattr("fusedisk.drivers.protocol.file.flush_file", fail)
            with pytest.raises(HostError):
                await backend.flush()
        await backend.flush()


async def test_failed_requests_are_reported(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev

    async with opened(disk) as (backend, _):

        def half_then_full(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
            if len(buffers[0]) < 8192:
                raise OSError(errno.ENOSPC, "")
            return pwritev(fd, [buffers[0][:4096]], offset)

        monkeypatch.setattr(os, "pwritev", half_then_full)
        with pytest.raises(FusediskError, match=r"Could not write to .*: No space left on device"):
            await backend.write(0, b"x" * 8192)


async def test_qemu_reads_what_was_written(disk: Path) -> None:
    async with opened(disk) as (backend, _):
        await backend.write(1000, b"\x07" * 100_000)
    qemu_io(disk, "read -P 7 1000 100000", fmt="raw", options="-r")


# --- reopening ------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_reopen_changes_everything_and_carries_locks(disk: Path) -> None:
    before = descriptors()
    async with opened(disk, cache={"direct": False}) as (backend, driver):
        node, graph = backend.node, backend.graph
        await backend.write(0, b"buffered")
        moved = disk.rename(disk.with_name("moved"))
        disk.write_bytes(b"a stranger of the same name")
        await reopen(graph, {node: {"cache.direct": True}})
        assert driver.file.alignment is not None
        assert node.limits.request_alignment > 1
        assert await backend.read(0, 8) == b"buffered"
        await backend.write(3, b"DIRECT")
        with pytest.raises(LockConflictError):
            async with opened(moved):
                pass
        await reopen(graph, {node: {"cache.direct": False}})
        assert node.limits.request_alignment == 1
        assert await backend.read(0, 9) == b"bufDIRECT"
    assert moved.read_bytes()[:9] == b"bufDIRECT"
    assert moved.stat().st_size == LENGTH
    assert descriptors() <= before + 3  # what trio keeps for its threads
    async with opened(moved):
        pass


async def test_reopen_read_only_and_back(disk: Path) -> None:
    graph = Graph(DRIVERS)
    backend = await graph.open_backend({"driver": "file", "filename": str(disk)}, writable=False)
    node = backend.node
    driver = node.driver
    assert isinstance(driver, FileDriver)
    assert driver.file.read_only
    await reopen(graph, {node: {"read-only": False}})
    assert not driver.file.read_only
    user = graph.attach(node, "writer", writable=True)
    await user.write(0, b"written")
    await graph.detach(user)
    await reopen(graph, {node: {"read-only": True}})
    assert driver.file.read_only
    assert await backend.read(0, 7) == b"written"
    await graph.close()


async def test_failed_reopen_changes_nothing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "")
        return real_open(path, flags, *rest)

    async with opened(disk, cache={"direct": False}) as (backend, driver):
        fd, count = driver.file.fd, descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refuse)
            with pytest.raises(NotSupportedError, match=f"The filesystem of '{disk}' has no O_DIRECT"):
                await reopen(backend.graph, {backend.node: {"cache.direct": True}})
        with pytest.raises(NotSupportedError, match="filename, locking"):
            await reopen(backend.graph, {backend.node: {"locking": "off"}})
        state = await driver.reopen_prepare(dataclasses.replace(driver.node.config, cache_direct=True), driver.options)
        driver.reopen_abort(state)
        assert driver.file.fd == fd
        assert descriptors() <= count + 3
        assert not backend.node.config.cache_direct
        with pytest.raises(LockConflictError):
            async with opened(disk):
                pass
        await backend.write(0, b"still here")
    assert disk.read_bytes()[:10] == b"still here"
