"""The ``host_device`` driver on loop devices."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.extent import DATA
from fusedisk.block.model.flags import MAY_UNMAP
from fusedisk.core.errors import FusediskError, GateError, LockConflictError, NoSpaceError, NotSupportedError
from fusedisk.drivers.protocol import host_device, hostcalls
from fusedisk.drivers.protocol.host_device import HostDeviceDriver
from fusedisk.drivers.protocol.hostcalls import Geometry
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_io, require_root, require_tool, run_tool

pytestmark = pytest.mark.root

KIB = 1 << 10
MIB = 1 << 20


@contextlib.contextmanager
def attached(path: Path, *options: str) -> Iterator[Path]:
    require_root()
    require_tool("losetup")
    device = Path(run_tool("losetup", "-f", "--show", *options, path).strip())
    try:
        yield device
    finally:
        run_tool("losetup", "-d", device)


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.write_bytes(random.Random(1).randbytes(4 * MIB))
    return path


@pytest.fixture
def device(backing: Path) -> Iterator[Path]:
    with attached(backing) as device:
        yield device


@contextlib.asynccontextmanager
async def opened(
    device: Path, *, writable: bool = True, **options: Any
) -> AsyncIterator[tuple[Backend, HostDeviceDriver]]:
    graph = Graph(DRIVERS)
    try:
        given = {"driver": "host_device", "filename": str(device), "discard": "unmap", **options}
        backend = await graph.open_backend(given, writable=writable)
        assert isinstance(backend.node.driver, HostDeviceDriver)
        yield backend, backend.node.driver
    finally:
        await graph.close()


async def test_the_guess_that_a_device_is_raw_is_not_told(device: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(device))
    assert backend.node.guards_probe
    await graph.close()
    assert caplog.messages == []


async def test_a_plain_name_of_a_device_opens_it(device: Path) -> None:
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(device), format="raw")
    assert isinstance(backend.node.children["file"].node.driver, HostDeviceDriver)
    assert backend.length == 4 * MIB
    await graph.close()


@pytest.mark.parametrize("direct", [False, True])
async def test_random_operations_against_an_oracle(device: Path, backing: Path, direct: bool) -> None:
    oracle = bytearray(backing.read_bytes())
    chance = random.Random(2)
    async with opened(device, cache={"direct": direct}) as (backend, driver):
        assert (driver.file.alignment is not None) == direct
        assert backend.length == 4 * MIB
        for _ in range(200):
            offset = chance.randrange(len(oracle))
            length = min(len(oracle) - offset, chance.choice((1, 512, 4096, 5000, 70000)))
            match chance.randrange(4):
                case 0:
                    assert await backend.read(offset, length) == oracle[offset : offset + length]
                case 1 | 2:
                    data = chance.randbytes(length)
                    await backend.write(offset, data)
                    oracle[offset : offset + length] = data
                case 3:
                    await backend.write_zeroes(offset, length, may_unmap=chance.random() < 0.5)
                    oracle[offset : offset + length] = bytes(length)
        await backend.flush()
        assert await backend.read(0, len(oracle)) == oracle
    assert backing.read_bytes() == oracle


async def test_sizes_and_geometry(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(device) as (backend, driver):
        assert driver.information() == {"logical-block-size": 512, "physical-block-size": 512}
        monkeypatch.setattr(host_device, "device_geometry", lambda fd: Geometry(16, 63, 8))
        assert driver.information()["geometry"] == {"heads": 16, "sectors": 63, "cylinders": 8}
        assert backend.node.limits.zeroes_alignment == 512
        assert backend.node.limits.discard_alignment == 4096
        assert not driver.has_zero_init()
        assert (await driver.map(0, 4 * MIB)).status == DATA


async def test_blocks_of_4096_bytes(backing: Path) -> None:
    with attached(backing, "--sector-size", "4096") as device:
        async with opened(device, cache={"direct": True}) as (backend, driver):
            assert driver.information()["logical-block-size"] == 4096
            assert backend.node.limits.request_alignment == 4096
            await backend.write(4095, b"ab")
            await backend.write_zeroes(10_000, 20_000)
            assert await backend.read(4095, 2) == b"ab"
            assert await backend.read(10_000, 20_000) == bytes(20_000)


def test_geometry_that_a_device_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = bytes([255, 63]) + (1024).to_bytes(2, "little") + bytes(4) + (2048).to_bytes(8, "little")
    monkeypatch.setattr(hostcalls.fcntl, "ioctl", lambda fd, request, argument: claimed)
    assert hostcalls.device_geometry(0) == (255, 63, 1024)
    monkeypatch.setattr(hostcalls.fcntl, "ioctl", lambda fd, request, argument: bytes(len(argument)))
    assert hostcalls.device_geometry(0) is None


async def test_discard_and_zeroes_reach_the_device(device: Path, backing: Path) -> None:
    def used() -> int:
        return backing.stat().st_blocks * 512

    async with opened(device) as (backend, driver):
        os.sync()
        full = used()
        await backend.discard(100, MIB)  # only whole granules of it
        assert full - MIB <= used() <= full - MIB + 8 * KIB
        await driver.write_zeroes(MIB, MIB, MAY_UNMAP)
        assert await backend.read(8 * KIB, 2 * MIB - 8 * KIB) == bytes(2 * MIB - 8 * KIB)
        await driver.write_zeroes(2 * MIB, MIB, 0)
        assert await backend.read(2 * MIB, MIB) == bytes(MIB)
        assert any(await backend.read(3 * MIB, MIB))


async def test_no_resizing_but_taking_note(device: Path, backing: Path) -> None:
    async with opened(device) as (backend, _):
        with pytest.raises(NotSupportedError, match="is a block device of 4194304 bytes, it cannot be resized to 10"):
            await backend.truncate(10)
        os.truncate(backing, 6 * MIB)
        run_tool("losetup", "-c", device)
        await backend.truncate(6 * MIB)
        assert backend.length == 6 * MIB
        with pytest.raises(NoSpaceError, match=f"Could not write to '{device}'"):
            await backend.node.driver.pwritev(6 * MIB, [memoryview(b"x" * 512)], 0)


async def test_locks_keep_qemu_out(device: Path) -> None:
    async with opened(device):
        with pytest.raises(AssertionError, match='Failed to get "write" lock'):
            qemu_io(device, "read 0 4k", fmt="raw")
        with pytest.raises(LockConflictError):
            await HostDeviceDriver.create_file(str(device), MIB, "off", False)
    qemu_io(device, "read 0 4k", fmt="raw")


async def test_a_read_only_device(backing: Path) -> None:
    with attached(backing, "--read-only") as device:
        with pytest.raises(FusediskError, match=f"Could not open '{device}': Read-only file system"):
            async with opened(device):
                pass
        graph = Graph(DRIVERS)
        options = {"driver": "host_device", "filename": str(device), "auto-read-only": True, "read-only": False}
        backend = await graph.open_backend(options)
        assert backend.node.config.read_only
        assert await backend.read(0, 512) == backing.read_bytes()[:512]
        await graph.close()


async def test_what_is_no_block_device_is_refused(backing: Path) -> None:
    for path, words in (
        (backing, "is a regular file"),
        ("/dev/null", "is a character device"),
        ("/", "is a directory"),
    ):
        with pytest.raises(FusediskError, match=f"{words}, but 'host_device' opens block devices"):
            async with opened(Path(path)):
                pass
        with pytest.raises(FusediskError, match="opens block devices"):
            await HostDeviceDriver.create_file(str(path), 0, "off", False)


async def test_create_wipes_the_head(device: Path, backing: Path) -> None:
    before = backing.read_bytes()
    with pytest.raises(NotSupportedError, match="an image of 8388608 does not fit"):
        await HostDeviceDriver.create_file(str(device), 8 * MIB, "off", False)
    with pytest.raises(NotSupportedError, match="nothing to preallocate"):
        await HostDeviceDriver.create_file(str(device), MIB, "full", False)
    assert backing.read_bytes() == before
    await HostDeviceDriver.create_file(str(device), MIB, "off", False)
    assert backing.read_bytes() == bytes(512) + before[512:]


async def test_an_image_on_a_device_has_no_directory_of_its_own(device: Path, tmp_path: Path) -> None:
    """What else lies in /dev is none of its guest's business; the user may say which device is."""
    base = tmp_path / "base"
    base.write_bytes(b"secret".ljust(MIB))
    with attached(base) as other:
        run_tool("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", other, "-F", "raw", device, "1M")
        graph = Graph(DRIVERS)
        with pytest.raises(GateError) as caught:
            await graph.open_backend(str(device))
        assert str(caught.value).endswith(f"(allow it with --allow-path {other} if you trust the image).")
        await graph.close()
        graph = Graph(DRIVERS, Gate([str(other)]))
        backend = await graph.open_backend(str(device))
        assert await backend.read(0, 6) == b"secret"
        await graph.close()
