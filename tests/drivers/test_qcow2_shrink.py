"""Shrinking qcow2 images."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request import snapshot as snapshots
from fusedisk.core.errors import CorruptImageError, NotSupportedError, OptionError, OutOfRangeError
from tests.conftest import qemu_img, qemu_io
from tests.support.qcow2 import assert_clean, create_image, driver_of, opened, raw_content

CLUSTER = 65536
MIB = 1 << 20


@pytest.mark.parametrize("cluster_size", [512, 4096, CLUSTER])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_shrinking_and_growing_at_random(tmp_path: Path, cluster_size: int, compat: str) -> None:
    random_ = random.Random(cluster_size)
    image = await create_image(tmp_path / "x.qcow2", size=MIB, cluster_size=cluster_size, compat=compat)
    oracle = bytearray(MIB)
    for _ in range(4):
        async with opened(image, discard="unmap") as backend:
            for _ in range(12):
                length = random_.randrange(2 * MIB // 512) * 512
                await backend.truncate(length)
                assert backend.length == length
                oracle[length:] = bytes(max(0, length - len(oracle)))
                for _ in range(min(length // 512, 3)):
                    offset = random_.randrange(length)
                    data = random_.randbytes(min(random_.randrange(1, 100_000), length - offset))
                    await backend.write(offset, data)
                    oracle[offset : offset + len(data)] = data
                assert await backend.read(0, length) == oracle
        assert_clean(image)
        assert raw_content(image, tmp_path) == oracle


async def test_the_file_gets_shorter(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=16 * MIB)
    async with opened(image) as backend:
        await backend.write(0, b"x" * 16 * MIB)
        await backend.truncate(MIB)
        await backend.flush()
        assert image.stat().st_size <= MIB + 6 * CLUSTER
        await backend.truncate(2 * MIB)
        assert await backend.read(0, 2 * MIB) == b"x" * MIB + bytes(MIB)
    assert_clean(image)


async def test_whole_l2_tables_go(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=MIB, cluster_size=512)
    async with opened(image) as backend:
        await backend.write(0, b"x" * MIB)
        await backend.truncate(100 * 512)
        assert sum(map(bool, driver_of(backend).image.l1)) == 2
    assert_clean(image)


async def test_snapshots_keep_what_the_disk_loses(tmp_path: Path) -> None:
    image = tmp_path / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "1M")
    qemu_io(image, "write -P 7 0 1M", fmt="qcow2")
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, "write -P 8 300k 100k", fmt="qcow2")
    async with opened(image) as backend:
        await backend.truncate(64 << 10)
        await backend.truncate(256 << 10)
        assert await backend.read(0, 256 << 10) == b"\7" * (64 << 10) + bytes(192 << 10)
    assert_clean(image)
    qemu_img("snapshot", "-a", "one", image)
    assert raw_content(image, tmp_path) == b"\7" * MIB
    assert_clean(image)


async def test_qemu_reads_an_overlay_that_shrank(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * MIB)
    image = tmp_path / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image)
    async with opened(image) as backend:
        await backend.write(MIB - 100, b"t" * 100)
        await backend.truncate(MIB // 2 + 512)
        await backend.truncate(MIB)
        expected = b"b" * (MIB // 2 + 512) + bytes(MIB // 2 - 512)
        assert await backend.read(0, MIB) == expected
    assert_clean(image)
    assert raw_content(image, tmp_path) == expected


async def test_what_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", image, "1M")
    async with opened(image) as backend:
        with pytest.raises(OptionError, match="cannot shrink to 512 with preallocation"):
            await backend.truncate(512, "full")
        with pytest.raises(OptionError, match="multiple of 512"):
            await backend.truncate(513)
    qemu_img("snapshot", "-c", "one", image)
    before = image.read_bytes()
    async with opened(image) as backend:
        with pytest.raises(NotSupportedError, match="version 2 with snapshots"):
            await backend.truncate(512)
    assert image.read_bytes() == before


async def test_an_entry_that_leads_into_metadata_is_not_freed(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=MIB, cluster_size=512)
    async with opened(image) as backend:
        await backend.write(0, b"x" * MIB)
        await backend.flush()
        l2 = driver_of(backend).image.l1[20] & ~(1 << 63)
        l1 = driver_of(backend).image.header.l1_table_offset
    content = bytearray(image.read_bytes())
    content[l2 : l2 + 8] = (1 << 63 | l1).to_bytes(8, "big")
    image.write_bytes(content)
    async with _closing_fails(image) as backend:
        with pytest.raises(CorruptImageError, match="where its L1 table lies"):
            await backend.truncate(512)


@asynccontextmanager
async def _closing_fails(image: Path) -> AsyncIterator[Backend]:
    """What was changed before the corruption was found cannot be written any more, and that is said."""
    with pytest.raises(CorruptImageError, match="before all changes of its metadata were written"):
        async with opened(image) as backend:
            yield backend


@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_a_table_that_a_shrinking_disk_lost_is_forgotten(tmp_path: Path, cluster_size: int) -> None:
    """Its cluster becomes another table's, and that one's content is to be read from there."""
    unit = (cluster_size // 512) ** 2
    path = await create_image(tmp_path / "disk.qcow2", size=512 * 512 * unit, cluster_size=cluster_size)
    async with opened(path) as backend:
        await backend.write(261632 * unit, b"w" * 512)
        await backend.write(99328 * unit, b"w" * cluster_size)
        await backend.truncate(221696 * unit)
        await snapshots.create_snapshot(backend.node, SnapshotInfo("", "s", 0))
        await backend.truncate(128000 * unit)
        assert await backend.read(99328 * unit, 512) == b"w" * 512
    assert_clean(path)


@pytest.mark.parametrize("how", ["apply", "truncate"])
@pytest.mark.parametrize("what", ["write", "zero", "compressed", "discard", "preallocate", "read"])
async def test_requests_that_waited_for_a_disk_to_become_shorter(tmp_path: Path, how: str, what: str) -> None:
    path = await create_image(tmp_path / "disk.qcow2", size=64 << 10, cluster_size=512)
    async with opened(path, discard="unmap") as backend:
        kept = await snapshots.create_snapshot(backend.node, SnapshotInfo("", "s", 0))
        await backend.truncate(2 << 20)
        await backend.write(0, b"z" * 512)
        request = {
            "write": lambda: backend.write(2000 << 10, b"x" * 512),
            "zero": lambda: backend.write_zeroes(2000 << 10, 512),
            "compressed": lambda: backend.write_compressed(2000 << 10, b"x" * 512),
            "discard": lambda: backend.discard(2000 << 10, 512),
            "preallocate": lambda: backend.preallocate(2000 << 10, 512),
            "read": lambda: backend.read(2000 << 10, 512),
        }[what]
        async with trio.open_nursery() as nursery:
            if how == "apply":
                nursery.start_soon(snapshots.apply_snapshot, backend.node, kept.id)
            else:
                nursery.start_soon(backend.truncate, 64 << 10)
            while not backend.node.serialising:
                await trio.lowlevel.checkpoint()
            if what == "read":
                assert await request() == bytes(512)
            elif what == "discard":
                await request()
            else:
                with pytest.raises(OutOfRangeError, match=r"goes past the end of .* at 65536"):
                    await request()
        assert backend.length == 64 << 10
        assert await backend.read(0, 512) == (b"z" * 512 if how == "truncate" else bytes(512))
    assert_clean(path)
