"""A disk that the kernel serves past us cannot be watched, and one that is watched is not passed through."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.node import Node
from fusedisk.block.model.observer import Change, Observer
from fusedisk.core.errors import OperationBlockedError
from fusedisk.drivers.table import DRIVERS
from fusedisk.export.export import Export
from fusedisk.export.opening import ImageRequest, OpenSettings, open_exports
from fusedisk.export.registry import Registry as ExportRegistry
from fusedisk.mount import umount_calls
from fusedisk.mount.operations import Operations
from fusedisk.mount.session import Session, mount_options
from fusedisk.mount.settings import Passthrough, ServeSettings
from tests.mount.test_passthrough import pytestmark as needs_passthrough
from tests.support.tasks import until

MIB = 1 << 20
pytestmark = needs_passthrough


class Watcher(Observer):
    """Records each call."""

    wants_changes = True
    wants_reads = True

    def __init__(self) -> None:
        self.changes: list[tuple[Change, int, int]] = []
        self.reads: list[tuple[int, int]] = []

    def changed(self, node: Node, offset: int, length: int, kind: Change) -> None:
        self.changes.append((kind, offset, length))

    def read(self, node: Node, offset: int, length: int) -> None:
        self.reads.append((offset, length))


@asynccontextmanager
async def mounted(folder: Path) -> AsyncIterator[tuple[Export, Path]]:
    """A raw disk, mounted by this process; the kernel may access its file."""
    (folder / "disk.raw").write_bytes(b"o" * MIB)
    (folder / "mnt").mkdir()
    graph = Graph(DRIVERS)
    request = ImageRequest(str(folder / "disk.raw"), str(folder / "disk.raw"))
    exports = await open_exports(graph, [request], OpenSettings(format="raw"))
    session = Session(
        str(folder / "mnt"),
        Operations(ExportRegistry(graph, exports)),
        mount_options([str(folder)], read_only=False, allow_other=False),
        ServeSettings(passthrough=Passthrough.ON),
    )
    session.start()
    try:
        async with trio.open_nursery() as nursery:
            ready = trio.Event()
            nursery.start_soon(session.serve, ready.set)
            await ready.wait()
            yield exports[0], folder / "mnt" / exports[0].name
            await trio.to_thread.run_sync(umount_calls.unmount, str(folder / "mnt"))
    finally:
        session.close()
        await graph.close()


def _use(path: Path, then: bytes) -> int:
    """Read and write the file with one handle, which is left open."""
    handle = os.open(path, os.O_RDWR)
    assert os.pread(handle, 4096, 0) == b"o" * 4096
    assert os.pwrite(handle, then, 8192) == len(then)
    return handle


async def test_a_file_in_use_by_the_kernel_cannot_be_watched_until_it_is_closed(tmp_path: Path) -> None:
    watcher = Watcher()
    async with mounted(tmp_path) as (export, path):
        nodes = export.backend.node.with_all_below()
        handle = await trio.to_thread.run_sync(_use, path, b"past us")
        assert not export.backend.accounting.reads, "it is passed through"
        for node in nodes:
            with pytest.raises(OperationBlockedError, match="the kernel accesses its host file directly"):
                node.observe(watcher)
        counted = export.backend.node.completed_writes
        await trio.to_thread.run_sync(os.close, handle)
        await until(lambda: not export._passed_through)
        assert export.backend.node.completed_writes > counted, "a flush must not skip what the kernel has written"
        export.backend.node.observe(watcher)
        handle = await trio.to_thread.run_sync(_use, path, b"seen")
        await trio.to_thread.run_sync(os.fsync, handle)
        assert watcher.changes == [(Change.WRITE, 8192, 4)]
        assert watcher.reads
        assert all(offset + length <= MIB for offset, length in watcher.reads)
        await trio.to_thread.run_sync(os.close, handle)
    assert (tmp_path / "disk.raw").read_bytes()[8192:8200] == b"seen" + b" us" + b"o"
