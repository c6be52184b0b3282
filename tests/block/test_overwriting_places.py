"""Small writes find where to overwrite in a table of places, and only there where nothing has changed since."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.block.model.observer import Change
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.drivers.format.qcow2.entries import OFFSET_MASK
from fusedisk.drivers.protocol.host_file import HostFile
from tests.support.observers import Recorder
from tests.support.qcow2 import assert_clean, create_image, driver_of, opened, raw_content

pytestmark = pytest.mark.usefixtures("quick_host", "places_at_once")
KIB, MIB = 1 << 10, 1 << 20
OLD, NEW = memoryview(b"o" * 4096), memoryview(b"n" * 4096)


@asynccontextmanager
async def warm(path: Path, **options: str) -> AsyncIterator[Backend]:
    """A disk whose first MiB is allocated, and whose first 64 KiB are known as a place to overwrite."""
    async with opened(path, **options) as backend:
        await backend.write(0, b"o" * MIB)
        assert backend.immediate.write(0, OLD)
        assert backend.immediate._places.known[0][4] is not None
        yield backend


async def test_a_second_write_takes_no_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lookup(offset: int, length: int) -> NoReturn:
        raise AssertionError("the place was not remembered")

    path = await create_image(tmp_path / "disk.qcow2", size=4 * MIB)
    async with warm(path) as backend:
        seen, below = Recorder(changes=True), Recorder(changes=True)
        backend.node.observe(seen)
        backend.node.children["file"].node.observe(below)
        assert backend.immediate.write(0, OLD)  # observing was a change of the graph
        seen.changes.clear()
        below.changes.clear()
        monkeypatch.setattr(backend.node.driver, "lookup_in_place", no_lookup)
        monkeypatch.setattr(backend.node.driver, "lookup", no_lookup)
        for offset in (0, 4096, 60 * KIB, 128 * KIB):
            assert backend.immediate.write(offset, NEW)
        assert [what[1:] for what in seen.changes] == [(at, 4096) for at in (0, 4096, 60 * KIB, 128 * KIB)]
        assert {kind for kind, _, _ in below.changes} == {Change.WRITE}
        assert len(below.changes) == 4
        assert backend.accounting.writes == 7
    content = raw_content(path, tmp_path)
    for offset in (0, 4096, 60 * KIB, 128 * KIB):
        assert content[offset : offset + 4096] == NEW
    assert content[8192:12288] == OLD


async def test_what_a_snapshot_shares_is_copied(tmp_path: Path) -> None:
    path = await create_image(tmp_path / "disk.qcow2", size=4 * MIB)
    async with warm(path) as backend:
        made = await backend.create_snapshot(SnapshotInfo("", "before", 0))
        assert backend.write_now(0, NEW)
        assert await backend.read(0, 8192) == bytes(NEW) + bytes(OLD)
        await backend.apply_snapshot(made.id)
        assert await backend.read(0, 8192) == bytes(OLD) * 2
    assert_clean(path)


def place_block(backend: Backend, host: int) -> None:
    driver_of(backend).image.place_block(host)


def place_snapshot_table(backend: Backend, host: int) -> None:
    image = driver_of(backend).image
    image.header.snapshots_offset, image.snapshot_table_size = host, 100
    image.place_fixed()


def place_blocks(backend: Backend, host: int) -> None:
    image = driver_of(backend).image
    image.place_blocks([*driver_of(backend).refcounts.table, host])


@pytest.mark.parametrize("place", [place_block, place_blocks, place_snapshot_table])
async def test_metadata_that_lies_there_since_is_not_overwritten(
    tmp_path: Path, place: Callable[[Backend, int], None]
) -> None:
    """The refcounts of the image called its cluster free."""
    path = await create_image(tmp_path / "disk.qcow2", size=4 * MIB)
    async with warm(path) as backend:
        image = driver_of(backend).image
        (table,) = image.l2.tables.values()
        place(backend, table[0] & OFFSET_MASK)
        assert not backend.immediate.write(0, NEW)
        assert backend.immediate.write(64 * KIB, NEW)


async def test_requests_that_must_end_first_are_not_overtaken(tmp_path: Path) -> None:
    path = await create_image(tmp_path / "disk.qcow2", size=4 * MIB)
    async with warm(path) as backend:
        leaf = backend.node.children["file"].node
        for node in (backend.node, leaf):
            node.serialising += 1
            assert not backend.immediate.write(0, NEW)
            node.serialising -= 1
        leaf.fenced, fenced = "broken", leaf.fenced
        assert not backend.immediate.write(0, NEW)
        leaf.fenced = fenced
        assert backend.immediate.write(0, NEW)


async def test_half_a_write_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = await create_image(tmp_path / "disk.qcow2", size=4 * MIB)
    async with warm(path) as backend:
        counted = backend.node.completed_writes
        monkeypatch.setattr(HostFile, "write_inline", lambda self, buffers, offset: (buffers[0][100:],))
        assert not backend.immediate.write(0, NEW)
        assert backend.node.completed_writes > counted


async def test_a_read_only_image_is_not_written(tmp_path: Path) -> None:
    path = await create_image(tmp_path / "disk.qcow2", size=4 * MIB)
    async with warm(path):
        pass
    async with opened(path, writable=False) as backend:
        buffer = memoryview(bytearray(4096))
        await backend.read(0, MIB)
        assert backend.immediate.read(0, buffer)
        assert backend.immediate._places.known[0][4] is None
        assert not backend.immediate.write(0, NEW)
