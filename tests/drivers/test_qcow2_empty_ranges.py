"""Discarding and zeroing what reads as zeroes already and has no host cluster: the image stays as it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.core.errors import NotSupportedError
from fusedisk.export import ranges
from fusedisk.export.export import Export
from tests.conftest import qemu_img
from tests.support.memory import Store
from tests.support.qcow2 import assert_clean, create_image, created_in_memory, driver_of, in_memory, opened

CLUSTER = 65536
SPAN = 512 << 20
"""What one L2 table maps."""
HUGE = 64 << 40

Request = Callable[[Backend, int, int], Awaitable[None]]


async def discard(backend: Backend, offset: int, length: int) -> None:
    await backend.discard(offset, length)


async def unmap(backend: Backend, offset: int, length: int) -> None:
    await backend.write_zeroes(offset, length, may_unmap=True)


async def zero(backend: Backend, offset: int, length: int) -> None:
    await backend.write_zeroes(offset, length)


REQUESTS = [discard, unmap, zero]


def tables(backend: Backend) -> list[int]:
    """Which spans have an L2 table."""
    return [index for index, entry in enumerate(driver_of(backend).image.l1) if entry]


def refuse_changes(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the image fail before its first change."""

    async def fail(disk: bool) -> None:
        raise AssertionError("nothing was to change")

    monkeypatch.setattr(driver_of(backend).image, "before_change", fail)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("options", [{}, {"compat": "0.10"}, {"extended_l2": True}], ids=["v3", "v2", "extended-l2"])
async def test_a_huge_empty_disk_stays_as_it_is(
    request_: Request, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await created_in_memory(Store(), size=HUGE // 2, **options)
    async with in_memory(store, discard="unmap") as backend:
        before = bytes(store.data)
        refuse_changes(backend, monkeypatch)
        await request_(backend, 0, backend.length)
        await request_(backend, 3 * CLUSTER, CLUSTER)
        await request_(backend, SPAN + 4096, 8192)
        await backend.flush()
        assert not tables(backend)
        assert store.data == before


@pytest.mark.parametrize("request_", REQUESTS)
async def test_zeroes_that_have_no_space_are_not_written_again(
    request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=HUGE)
    async with opened(image, discard="unmap") as backend:
        for place in (0, HUGE // 2 + CLUSTER, HUGE - CLUSTER):
            await backend.write(place, b"x" * CLUSTER)
    # Their L2 tables are shared, and would be copied by any change.
    qemu_img("snapshot", "-c", "one", image)
    async with opened(image, discard="unmap") as backend:
        refuse_changes(backend, monkeypatch)
        await request_(backend, CLUSTER, HUGE // 2)
        await request_(backend, HUGE // 2 + 2 * CLUSTER, HUGE // 2 - 3 * CLUSTER)
        monkeypatch.undo()
        await request_(backend, 0, HUGE)
        assert tables(backend) == [0, HUGE // 2 // SPAN, HUGE // SPAN - 1]
        assert await backend.read(HUGE // 2, 2 * CLUSTER) == bytes(2 * CLUSTER)
        refuse_changes(backend, monkeypatch)
        await request_(backend, 0, HUGE)
        monkeypatch.undo()
    assert_clean(image)


@pytest.mark.parametrize("request_", REQUESTS)
async def test_only_data_of_the_backing_file_is_hidden(request_: Request, tmp_path: Path) -> None:
    base = await create_image(tmp_path / "base.qcow2", size=HUGE // 2)
    async with opened(base) as backend:
        await backend.write(HUGE // 4, b"b" * CLUSTER)
    top = await create_image(tmp_path / "top.qcow2", size=HUGE, backing_file="base.qcow2", backing_fmt="qcow2")
    async with opened(top, discard="unmap") as backend:
        await request_(backend, 0, HUGE)
        assert tables(backend) == [HUGE // 4 // SPAN]
        # Another file may take the place of one that is not open: all of its length must be hidden.
        assert await backend.read(HUGE // 4, CLUSTER) == bytes(CLUSTER)
    assert_clean(top)
    async with opened(top, discard="unmap", backing=None) as backend:
        await request_(backend, HUGE // 2 + SPAN, CLUSTER)
        assert tables(backend) == [HUGE // 4 // SPAN, HUGE // 2 // SPAN + 1]
    assert_clean(top)


async def test_entries_over_the_end_of_the_backing_file_are_hidden_up_to_there(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * (2 * CLUSTER + 100))
    for extended in (False, True):
        top = await create_image(
            tmp_path / "top.qcow2", size=SPAN, backing_file="base.raw", backing_fmt="raw", extended_l2=extended
        )
        async with opened(top, discard="unmap") as backend:
            await backend.discard(0, SPAN)
            table = driver_of(backend).image.l2.get(driver_of(backend).image.l1[0] & ~(1 << 63))
            assert table is not None
            assert len([entry for entry in table if entry]) == 3
            assert await backend.read(0, 4 * CLUSTER) == bytes(4 * CLUSTER)
        assert_clean(top)


async def test_version_2_needs_no_zero_clusters_where_no_data_shows_through(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * CLUSTER)
    top = await create_image(
        tmp_path / "top.qcow2", size=HUGE // 2, compat="0.10", backing_file="base.raw", backing_fmt="raw"
    )
    async with opened(top, discard="unmap") as backend:
        await backend.write(2 * CLUSTER, b"x" * CLUSTER)
        await backend.write_zeroes(CLUSTER, HUGE // 2 - CLUSTER, may_unmap=True)
        assert tables(backend) == [0]
        assert await backend.read(0, 3 * CLUSTER) == b"b" * CLUSTER + bytes(2 * CLUSTER)
        with pytest.raises(NotSupportedError, match="version 2"):
            await driver_of(backend).discard(0, 2 * CLUSTER)
    assert_clean(top)


async def test_a_data_file_keeps_no_table_for_what_is_empty(tmp_path: Path) -> None:
    data = tmp_path / "data.raw"
    data.touch()
    image = await create_image(tmp_path / "x.qcow2", size=1 << 40, data_file=str(data))
    async with opened(image, discard="unmap") as backend:
        await backend.write(0, b"x" * CLUSTER)
        await backend.discard(0, 1 << 40)
        await backend.write_zeroes(SPAN, 1 << 39)
        assert tables(backend) == [0]
        assert await backend.read(0, CLUSTER) == bytes(CLUSTER)
    assert_clean(image)


async def test_growing_over_an_empty_backing_file_hides_nothing(tmp_path: Path) -> None:
    await create_image(tmp_path / "base.qcow2", size=HUGE // 4)
    top = await create_image(tmp_path / "top.qcow2", size=SPAN, backing_file="base.qcow2", backing_fmt="qcow2")
    async with opened(top) as backend:
        await backend.truncate(HUGE // 4)
        assert not tables(backend)
    assert_clean(top)


async def test_a_discard_of_many_spans_can_be_cancelled(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=HUGE)
    async with opened(image, discard="unmap") as backend:
        await backend.write(HUGE - CLUSTER, b"x" * CLUSTER)
        with trio.CancelScope() as scope:
            scope.cancel()
            await backend.discard(0, HUGE)
        assert scope.cancelled_caught
        assert await backend.read(HUGE - CLUSTER, CLUSTER) == b"x" * CLUSTER


async def test_a_hole_of_the_whole_disk_takes_few_requests(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=HUGE)
    async with opened(image, discard="unmap") as backend:
        await backend.write(HUGE // 2, b"x" * CLUSTER)
        export = await Export.open(backend, "disk", 77)
        await ranges.zero(export, 0, HUGE, punch=True, keep_size=True)
        assert backend.accounting.zeroes < 100
        assert await backend.read(HUGE // 2, CLUSTER) == bytes(CLUSTER)
