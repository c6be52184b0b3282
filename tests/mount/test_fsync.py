"""fsync(2) through the mount: without a task where the host's disk is quick, and never too early."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import HostError
from fusedisk.drivers.protocol import file as file_driver
from fusedisk.drivers.protocol.file import FileDriver
from fusedisk.drivers.protocol.host_file import FlushPace
from fusedisk.mount import live, wire
from fusedisk.mount.answers import Work
from fusedisk.mount.channel import Channel
from tests.conftest import qemu_img, require_fuse
from tests.support.qcow2 import raw_content

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB


@asynccontextmanager
async def mounted(folder: Path) -> AsyncIterator[Path]:
    require_fuse()
    qemu_img("create", "-q", "-f", "qcow2", folder / "disk.qcow2", str(SIZE))
    (folder / "mnt").mkdir()
    async with live.serve(folder / "disk.qcow2", folder / "mnt"):
        yield folder / "mnt" / "disk"


def write_and_sync(path: Path, offset: int, data: bytes) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.pwrite(handle, data, offset)
        os.fsync(handle)
    finally:
        os.close(handle)


@pytest.mark.parametrize("quick", [True, False])
async def test_what_was_synced_is_in_the_image(tmp_path: Path, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlushPace, "is_quick", lambda self, writes: quick)
    tasks: list[int] = []
    copies: list[Path] = []  # looked at later: a new process would wait for the mount that this one serves
    work = Channel._work

    async def counted(self: Channel, unique: int, how: Work, opcode: int, scope: trio.CancelScope) -> None:
        if opcode == wire.FSYNC:
            tasks.append(unique)
        await work(self, unique, how, opcode, scope)

    async with mounted(tmp_path) as path:
        await trio.to_thread.run_sync(write_and_sync, path, 0, b"first")
        handle = await trio.to_thread.run_sync(os.open, path, os.O_RDWR)
        monkeypatch.setattr(Channel, "_work", counted)
        for number in range(1, 5):
            await trio.to_thread.run_sync(os.pwrite, handle, b"%d" % number * KIB, number * 100 * KIB)
            await trio.to_thread.run_sync(os.fsync, handle)
            copy = tmp_path / f"copy{number}.qcow2"
            copy.write_bytes((tmp_path / "disk.qcow2").read_bytes())
            assert not tasks or not quick
            copies.append(copy)
        await trio.to_thread.run_sync(os.close, handle)
    assert bool(tasks) is not quick
    for number, copy in enumerate(copies, 1):
        content = raw_content(copy, tmp_path)
        assert content[number * 100 * KIB :][: KIB + 1] == b"%d" % number * KIB + b"\0"


async def test_a_slow_flush_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlushPace, "is_quick", lambda self, writes: False)
    begun, go_on = trio.Event(), trio.Event()

    async def slow(fd: int) -> None:
        refuse_to_wait()
        begun.set()
        await go_on.wait()

    async with mounted(tmp_path) as path:
        await trio.to_thread.run_sync(write_and_sync, path, 0, b"first")
        handle = await trio.to_thread.run_sync(os.open, path, os.O_RDWR)
        await trio.to_thread.run_sync(os.pwrite, handle, b"slow", 0)
        synced = trio.Event()

        async def sync() -> None:
            await trio.to_thread.run_sync(os.fsync, handle)
            synced.set()

        monkeypatch.setattr(file_driver, "flush_file", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sync)
            await begun.wait()
            # Not a write: the kernel lets none into a file during its fsync.
            assert await trio.to_thread.run_sync(os.pread, handle, 4, 2 * MIB) == bytes(4)
            assert not synced.is_set()
            go_on.set()
        await trio.to_thread.run_sync(os.close, handle)


async def test_an_error_of_the_disk_reaches_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: FileDriver) -> None:
        raise HostError("the test's disk is broken.", errno=errno.EIO)

    async with mounted(tmp_path) as path:
        await trio.to_thread.run_sync(write_and_sync, path, 0, b"first")
        handle = await trio.to_thread.run_sync(os.open, path, os.O_RDWR)
        await trio.to_thread.run_sync(os.pwrite, handle, b"more", 0)
        with monkeypatch.context() as patch:
            patch.setattr(FileDriver, "flush_to_disk", broken)
            with pytest.raises(OSError, match="Input/output error"):
                await trio.to_thread.run_sync(os.fsync, handle)
        await trio.to_thread.run_sync(os.fsync, handle)
        await trio.to_thread.run_sync(os.close, handle)
