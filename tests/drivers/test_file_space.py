"""The ``file`` driver: zeroes, holes, sizes, creating."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.model.extent import DATA, ZERO
from fusedisk.block.model.flags import MAY_UNMAP
from fusedisk.block.request import io
from fusedisk.core.errors import (
    FusediskError,
    LockConflictError,
    NotSupportedError,
    OptionError,
)
from fusedisk.drivers.protocol import host_ranges, hostcalls, resize
from fusedisk.drivers.protocol.file import FileDriver
from tests.conftest import qemu_img
from tests.support.files import KIB, MIB, opened

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


async def test_zeroing_at_the_end_cuts_off_nothing_that_is_written_behind(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(disk, discard="unmap") as (_, driver):
        sizes: list[int] = []

        def looked_at(fd: int) -> os.stat_result:
            found = real(fd)
            if found.st_size < 3 * MIB and threading.get_ident() != here:
                sizes.append(found.st_size)
                with disk.open("r+b") as file:
                    file.seek(3 * MIB)
                    file.write(b"behind")
            return found

        real, here = os.fstat, threading.get_ident()
        monkeypatch.setattr(os, "fstat", looked_at)
        await driver.write_zeroes(MIB, 64 * KIB, MAY_UNMAP)
        assert sizes == [MIB]
        assert disk.stat().st_size == 3 * MIB + 6
        assert disk.read_bytes()[MIB:] == bytes(2 * MIB) + b"behind"
        assert blocks(disk) <= MIB + 8 * KIB


async def test_missing_fallocate_is_remembered(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def unsupported(fd: int, mode: int, offset: int, length: int) -> None:
        calls.append(mode)
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(host_ranges, "fallocate", unsupported)
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
        with pytest.raises(
            NotSupportedError, match="no preallocation mode 'metadata', expected one of off, falloc, full"
        ):
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


async def test_a_file_that_cannot_be_so_large_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(FusediskError) as caught:
        await FileDriver.create_file(str(tmp_path / "old"), (1 << 63) - 1, "off", False)
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "old").read_bytes() == b"old"


async def test_creating_through_a_link_makes_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("new")
    await FileDriver.create_file(str(tmp_path / "link"), MIB, "off", False)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").stat().st_size == MIB


async def test_create_refusals(tmp_path: Path) -> None:
    async def refused(name: str, preallocation: str = "off") -> FusediskError:
        with pytest.raises(FusediskError) as caught:
            await FileDriver.create_file(str(tmp_path / name), 100, preallocation, False)
        return caught.value

    assert (await refused("none/new")).errno == errno.ENOENT
    assert (await refused(".")).errno == errno.EISDIR
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe, so it is not replaced" in str(await refused("pipe"))
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
