"""Write-zeroes, discard and resize: what becomes of entries, refcounts and host space, and what is read then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.core.errors import FusediskError, NotSupportedError, OptionError
from tests.conftest import qemu_img, qemu_io
from tests.support.memory import Store
from tests.support.qcow2 import (
    assert_clean,
    create_image,
    created_in_memory,
    driver_of,
    in_memory,
    opened,
    raw_content,
)

CLUSTER = 65536
SIZE = 64 << 20
COPIED = 1 << 63


async def new_store(**options: Any) -> Store:
    return await created_in_memory(Store(), size=SIZE, **options)


def entry(backend: Backend, index: int) -> int:
    image = driver_of(backend).image
    table = image.l2.get(image.l1[0] & ~COPIED)
    return table[index] if table is not None else 0


def host_of(value: int) -> int:
    return value & 0x00FFFFFFFFFFFE00


# --- write-zeroes ---------------------------------------------------------------------------------------


async def test_zeroes_keep_the_space_unless_it_may_go() -> None:
    async with in_memory(await new_store(), discard="unmap") as backend:
        await backend.write(0, b"x" * 4 * CLUSTER)
        kept = entry(backend, 0)
        await backend.write_zeroes(0, CLUSTER)
        await backend.write_zeroes(CLUSTER, CLUSTER, may_unmap=True)
        await backend.write_zeroes(10 * CLUSTER, CLUSTER)
        assert entry(backend, 0) == kept | 1
        assert entry(backend, 1) == 1
        assert entry(backend, 10) == 0, "it read as zeroes already"
        assert await backend.read(0, 3 * CLUSTER) == bytes(2 * CLUSTER) + b"x" * CLUSTER
        # The space that was kept is used again, and that of the other can be taken by anybody.
        freed = host_of(kept) + CLUSTER
        await backend.write(100, b"n")
        assert entry(backend, 0) == kept
        await backend.flush()
        await backend.write(20 * CLUSTER, b"n")
        assert host_of(entry(backend, 20)) == freed
        assert await backend.read(0, CLUSTER) == bytes(100) + b"n" + bytes(CLUSTER - 101)


async def test_zeroing_a_shared_cluster_leaves_the_snapshot_alone(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=1 << 20)
    async with opened(image) as backend:
        await backend.write(0, b"x" * (1 << 20))
    qemu_img("snapshot", "-c", "one", image)
    async with opened(image, discard="unmap") as backend:
        await backend.write_zeroes(0, 2 * CLUSTER)
        await backend.write_zeroes(2 * CLUSTER, 2 * CLUSTER, may_unmap=True)
        await backend.discard(4 * CLUSTER, CLUSTER)
        await backend.write(CLUSTER, b"n" * 10)
        assert await backend.read(0, 6 * CLUSTER) == (
            bytes(CLUSTER) + b"n" * 10 + bytes(4 * CLUSTER - 10) + b"x" * CLUSTER
        )
    assert_clean(image)
    qemu_img("snapshot", "-a", "one", image)
    assert raw_content(image, tmp_path) == b"x" * (1 << 20)


async def test_a_zero_write_of_version_2_frees_clusters_or_writes() -> None:
    async with in_memory(await new_store(compat="0.10")) as backend:
        await backend.write(0, b"x" * 2 * CLUSTER)
        await backend.write_zeroes(0, CLUSTER)
        assert entry(backend, 0) == 0
        assert await backend.read(0, 2 * CLUSTER) == bytes(CLUSTER) + b"x" * CLUSTER


async def test_version_2_with_a_backing_file_cannot_discard_but_can_write_zeroes(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 4 * CLUSTER)
    top = await create_image(
        tmp_path / "top.qcow2", size=4 * CLUSTER, compat="0.10", backing_file="base.raw", backing_fmt="raw"
    )
    async with opened(top, discard="unmap") as backend:
        await backend.write_zeroes(0, 2 * CLUSTER, may_unmap=True)
        await backend.discard(3 * CLUSTER, CLUSTER)
        assert await backend.read(0, 4 * CLUSTER) == bytes(2 * CLUSTER) + b"b" * 2 * CLUSTER
        with pytest.raises(NotSupportedError, match="version 2"):
            await driver_of(backend).write_zeroes(0, CLUSTER, 0)
        with pytest.raises(NotSupportedError, match="version 2"):
            await driver_of(backend).discard(0, CLUSTER)
    assert_clean(top)


# --- discard --------------------------------------------------------------------------------------------


async def test_discarded_clusters_read_as_zeroes_over_a_backing_file(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 8 * CLUSTER)
    top = await create_image(tmp_path / "top.qcow2", size=8 * CLUSTER, backing_file="base.raw", backing_fmt="raw")
    async with opened(top, discard="unmap") as backend:
        await backend.write(0, b"x" * CLUSTER)
        await backend.discard(0, 2 * CLUSTER)
        assert await backend.read(0, 3 * CLUSTER) == bytes(2 * CLUSTER) + b"b" * CLUSTER
    # Also when the backing file was not open meanwhile.
    async with opened(top, discard="unmap", backing=None) as backend:
        await backend.discard(4 * CLUSTER, CLUSTER)
    async with opened(top) as backend:
        assert await backend.read(4 * CLUSTER, 2 * CLUSTER) == bytes(CLUSTER) + b"b" * CLUSTER
    assert_clean(top)


async def test_discards_reach_the_host_file(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=SIZE)
    async with opened(image, discard="unmap") as backend:
        await backend.write(0, b"x" * (8 << 20))
        await backend.flush()
        full = image.stat().st_blocks
        await backend.discard(CLUSTER, 6 << 20)
        assert image.stat().st_blocks == full, "before a flush the file may need it still"
        await backend.flush()
        assert image.stat().st_blocks * 512 <= full * 512 - (6 << 20)
        assert await backend.read(0, 8 << 20) == b"x" * CLUSTER + bytes(6 << 20) + b"x" * ((2 << 20) - CLUSTER)
    async with opened(image) as backend:
        blocks = image.stat().st_blocks
        await backend.discard(0, 8 << 20)
        assert image.stat().st_blocks == blocks, "discard=ignore is the default"
    assert_clean(image)


async def test_the_last_part_of_the_disk_counts_as_a_whole_cluster() -> None:
    store = await created_in_memory(Store(), size=3 * CLUSTER + 1024)
    async with in_memory(store, discard="unmap") as backend:
        await backend.write(0, b"x" * backend.length)
        await backend.discard(2 * CLUSTER, CLUSTER + 1024)
        assert entry(backend, 3) == 1
        await backend.write(3 * CLUSTER, b"x" * 1024)
        await backend.write_zeroes(3 * CLUSTER, 1024, may_unmap=True)
        assert entry(backend, 3) == 1


async def test_a_discard_of_nothing_writes_nothing() -> None:
    store = await created_in_memory(Store(), size=1 << 45)
    async with in_memory(store, discard="unmap") as backend:
        await backend.discard(0, backend.length)
        await backend.write(0, b"x")
        await backend.discard(0, CLUSTER)
        store.steps.calls.clear()
        await backend.discard(0, backend.length)
        assert store.steps.of("write", "discard") == []


# --- resize ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
async def test_growing_in_steps(tmp_path: Path, cluster_size: int, compat: str) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=512, cluster_size=cluster_size, compat=compat)
    oracle = bytearray()
    async with opened(image) as backend:
        for length in (1024, 3 * cluster_size, 3 * cluster_size + 512, 1 << 20, 40 << 20, (40 << 20) + 512):
            await backend.truncate(length)
            assert backend.length == length
            oracle += bytes(length - len(oracle))
            data = b"x" * min(700, length)
            await backend.write(length - len(data), data)
            oracle[length - len(data) :] = data
            assert await backend.read(0, length) == oracle
    assert_clean(image)
    assert raw_content(image, tmp_path) == oracle


async def test_what_cannot_be_resized_says_so() -> None:
    async with in_memory(await new_store()) as backend:
        with pytest.raises(OptionError, match="cannot shrink"):
            await backend.truncate(SIZE - 512, "falloc")
        with pytest.raises(OptionError, match="multiple of 512"):
            await backend.truncate(SIZE + 1)
        with pytest.raises(FusediskError, match="at most 4194304 are possible"):
            await backend.truncate(1 << 60)
        assert backend.length == SIZE
        await backend.truncate(SIZE)


async def tail_in_qemu(tmp_path: Path, how: str) -> Path:
    """An image whose last cluster holds bytes behind the disk's end."""
    image = tmp_path / "x.qcow2"
    qemu_img("create", "-f", "qcow2", image, str(4 * CLUSTER))
    qemu_io(image, f"write {'-c' if how == 'compressed' else ''} -P 7 {3 * CLUSTER} {CLUSTER}", fmt="qcow2")
    if how == "snapshot":
        qemu_img("snapshot", "-c", "one", image)
    # QEMU's own shrink drops whole clusters only; the size in the header does the rest.
    content = bytearray(image.read_bytes())
    content[24:32] = (3 * CLUSTER + 512).to_bytes(8, "big")
    image.write_bytes(content)
    return image


@pytest.mark.parametrize("how", ["plain", "snapshot", "compressed"])
async def test_old_bytes_behind_the_end_do_not_come_back(tmp_path: Path, how: str) -> None:
    image = await tail_in_qemu(tmp_path, how)
    async with opened(image) as backend:
        await backend.truncate(4 * CLUSTER)
        found = await backend.read(3 * CLUSTER, CLUSTER)
        assert found == b"\x07" * 512 + bytes(CLUSTER - 512)
    assert_clean(image)
    if how == "snapshot":
        qemu_img("snapshot", "-a", "one", image)
        assert raw_content(image, tmp_path)[3 * CLUSTER :] == b"\x07" * CLUSTER


async def test_whole_clusters_behind_the_end_do_not_come_back(tmp_path: Path) -> None:
    image = await tail_in_qemu(tmp_path, "plain")
    content = bytearray(image.read_bytes())
    content[24:32] = (2 * CLUSTER).to_bytes(8, "big")
    image.write_bytes(content)
    async with opened(image) as backend:
        await backend.truncate(4 * CLUSTER)
        assert await backend.read(0, 4 * CLUSTER) == bytes(4 * CLUSTER)
    assert_clean(image)


async def test_stale_host_bytes_do_not_show_behind_the_end(tmp_path: Path) -> None:
    """The cluster at the disk's end may have been somebody else's before; QEMU lets a disk grow without zeroing."""
    image = await create_image(tmp_path / "x.qcow2", size=2 * CLUSTER + 512)
    async with opened(image, discard="unmap", **{"file.discard": "ignore"}) as backend:
        await backend.write(0, b"s" * CLUSTER)
        await backend.discard(0, CLUSTER)
        await backend.write(2 * CLUSTER, b"e")
    qemu_img("resize", image, str(3 * CLUSTER))
    assert raw_content(image, tmp_path)[2 * CLUSTER :] == b"e" + bytes(CLUSTER - 1)


@pytest.mark.parametrize("end", [CLUSTER + 512, 2 * CLUSTER])
async def test_a_longer_backing_file_does_not_show_in_new_space(tmp_path: Path, end: int) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * 8 * CLUSTER)
    top = await create_image(tmp_path / "top.qcow2", size=end, backing_file="base.raw", backing_fmt="raw")
    async with opened(top) as backend:
        await backend.truncate(6 * CLUSTER)
        assert await backend.read(0, 6 * CLUSTER) == b"b" * end + bytes(6 * CLUSTER - end)
    assert_clean(top)
    old = await create_image(
        tmp_path / "old.qcow2", size=end, backing_file="base.raw", backing_fmt="raw", compat="0.10"
    )
    async with opened(old) as backend:
        with pytest.raises(NotSupportedError, match="longer backing file"):
            await backend.truncate(6 * CLUSTER)
        assert backend.length == end


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
async def test_growing_with_preallocation(tmp_path: Path, mode: str) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=2 * CLUSTER + 512)
    async with opened(image, discard="unmap", **{"file.discard": "ignore"}) as backend:
        await backend.write(0, b"s" * 2 * CLUSTER)
        await backend.discard(0, CLUSTER)  # leaves a free cluster with old bytes in the file
        await backend.truncate(6 << 20, preallocation=mode)
        assert await backend.read(0, 6 << 20) == bytes(CLUSTER) + b"s" * CLUSTER + bytes((6 << 20) - 2 * CLUSTER)
        length = image.stat().st_size
        await backend.write(3 * CLUSTER, b"n" * (5 << 20))
        assert image.stat().st_size == length
    assert_clean(image)


async def test_version_2_with_snapshots_is_not_resized(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=1 << 20, compat="0.10")
    qemu_img("snapshot", "-c", "one", image)
    async with opened(image) as backend:
        with pytest.raises(NotSupportedError, match="with snapshots"):
            await backend.truncate(2 << 20)
