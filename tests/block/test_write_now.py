"""Writes without a task, where they take no waiting: they do all that other writes do, or nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fusedisk.block.graph import backend as backends
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request import attempts
from fusedisk.core.errors import NoSpaceError
from fusedisk.drivers.format.qcow2.allocation import Allocator
from fusedisk.drivers.format.qcow2.entries import OFFSET_MASK
from fusedisk.drivers.protocol.file import FileDriver
from fusedisk.drivers.protocol.host_file import HostFile
from tests.conftest import qemu_img
from tests.support.qcow2 import assert_clean, driver_of, opened, raw_content
from tests.support.thinning import thinned

pytestmark = pytest.mark.usefixtures("quick_host")
KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB
FEATURES = {
    "plain": "cluster_size=64k",
    "small clusters": "cluster_size=512",
    "subclusters": "extended_l2=on",
    "version 2": "compat=0.10,cluster_size=4k",
    "narrow refcounts": "refcount_bits=1,cluster_size=4k",
    "lazy refcounts": "lazy_refcounts=on",
    "preallocated": "preallocation=metadata",
    "data file": "data_file={folder}/data.raw",
}
features = pytest.mark.parametrize("feature", FEATURES)
backed = pytest.mark.parametrize("backed", [False, True])


def made(folder: Path, feature: str, backed: bool) -> tuple[Path, bytearray]:
    """An image, perhaps with a shorter one behind it, and its content."""
    content = bytearray(SIZE)
    options = FEATURES[feature].format(folder=folder)
    args: list[str | Path] = ["-o", options]
    if backed and feature != "preallocated":
        content[: SIZE - MIB - 512] = random.Random("base").randbytes(SIZE - MIB - 512)
        (folder / "base.raw").write_bytes(content[: SIZE - MIB - 512])
        args += ["-b", folder / "base.raw", "-F", "raw"]
    qemu_img("create", "-q", "-f", "qcow2", *args, folder / "disk.qcow2", str(SIZE))
    return folder / "disk.qcow2", content


@features
@backed
async def test_first_writes_take_no_task(tmp_path: Path, feature: str, backed: bool) -> None:
    path, content = made(tmp_path, feature, backed)
    rng = random.Random(feature)
    async with opened(path) as backend:
        await backend.read(0, SIZE)  # the base is in the page cache
        await backend.write(0, b"first")
        content[:5] = b"first"
        for _ in range(40):
            length = rng.choice((1, 512, 4096, 70000))
            offset = rng.randrange(SIZE - length)
            data = rng.randbytes(length)
            assert backend.write_now(offset, memoryview(data))
            content[offset : offset + length] = data
        assert backend.accounting.writes == 41
        assert backend.accounting.failed == 0
        assert await backend.read(0, SIZE) == content
    assert raw_content(path, tmp_path) == content
    assert_clean(path)


@features
@backed
async def test_first_writes_take_no_coroutine(tmp_path: Path, feature: str, backed: bool) -> None:
    """Once the tables are in memory: new clusters, and subclusters without data, after other clusters were freed."""
    path, content = made(tmp_path, feature, backed)
    rng = random.Random(feature)
    async with opened(path, discard="unmap") as backend:
        await backend.read(0, SIZE)
        unit, span = driver_of(backend).image.geometry.cluster_size, 1 << driver_of(backend).image.geometry.span_bits
        for start in range(0, SIZE, span):
            await backend.write(start, b"first")
            content[start : start + 5] = b"first"
        await backend.write(SIZE // 2, rng.randbytes(4 * unit))
        await backend.write_zeroes(SIZE // 2, 4 * unit, may_unmap=True)
        content[SIZE // 2 : SIZE // 2 + 4 * unit] = bytes(4 * unit)
        await backend.flush()  # the clusters can be allocated again
        for _ in range(60):
            length = rng.choice((1, 512, 4096, 70000))
            offset = rng.randrange(SIZE - length)
            data = rng.randbytes(length)
            assert backend.immediate.write(offset, memoryview(data)) or feature == "small clusters"
            content[offset : offset + length] = data
            if feature == "small clusters":
                await backend.write(offset, data)  # each 32 KiB has a table and most a refcount block of its own
        assert await backend.read(0, SIZE) == content
    assert raw_content(path, tmp_path) == content
    assert_clean(path)


async def test_clusters_that_somebody_has_taken_meanwhile_are_not_given_out(tmp_path: Path) -> None:
    path, _ = made(tmp_path, "plain", False)
    async with opened(path) as backend:
        await backend.write(0, b"first")
        assert backend.write_now(1 * MIB, memoryview(b"second"))
        refcounts = driver_of(backend).refcounts
        async with driver_of(backend).image.mutex:
            taken = await refcounts.allocate(3)
        given = [run for _ in range(5) if (run := refcounts.allocate_now(1)) is not None]
        assert len(given) == 4  # it looked once for what it knew to be free, and then anew
        assert not {run.first for run in given} & set(range(taken.first, taken.first + 3))
        for run in (taken, *given):
            refcounts.return_unused(run)
    assert_clean(path)


async def test_a_cluster_in_which_metadata_lies_is_not_given_out(tmp_path: Path) -> None:
    """Its refcount says that it is free."""
    path, _ = made(tmp_path, "plain", False)
    async with opened(path) as backend:
        await backend.write(0, b"first")
        driver = driver_of(backend)
        table = driver.image.l1[0] & OFFSET_MASK
        block = driver.refcounts.blocks.tables[driver.refcounts.table[0]]
        at = 2 * (table >> 16)
        block[at : at + 2] = bytes(2)
        driver.refcounts._first_free = table >> 16
        assert driver.refcounts.allocate_now(1) is None
        block[at : at + 2] = b"\0\1"
    assert_clean(path)


@pytest.fixture
def reluctant(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes host files wait at random: how often."""
    rng, odds = random.Random(1), [0.0]

    def patched(name: str) -> None:
        method = getattr(HostFile, name)

        def now_and_then(self: HostFile, buffers: Sequence[memoryview], offset: int) -> Sequence[memoryview]:
            return buffers if rng.random() < odds[0] else method(self, buffers, offset)

        monkeypatch.setattr(HostFile, name, now_and_then)

    patched("write_inline")
    patched("read_inline")
    return lambda chance: odds.__setitem__(0, chance)


@features
@backed
@pytest.mark.parametrize("seed", thinned(range(3)))
async def test_what_takes_waiting_is_written_later(
    tmp_path: Path,
    feature: str,
    backed: bool,
    seed: int,
    reluctant: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempts, "MAX_SKIPPED_ATTEMPTS", 0)
    path, content = made(tmp_path, feature, backed)
    rng = random.Random(f"{feature} {seed}")
    at_once = later = 0
    reluctant(0.3)
    async with opened(path) as backend:
        for number in range(150):
            length = rng.choice((1, 512, 4096, 70000))
            offset = rng.randrange(SIZE - length)
            data = rng.randbytes(length)
            if backend.write_now(offset, memoryview(data)):
                at_once += 1
            else:
                later += 1
                await backend.write(offset, data)
            content[offset : offset + length] = data
            if rng.random() < 0.05:
                await backend.flush()
            if number % 50 == 25 and feature not in ("data file", "narrow refcounts"):
                await backend.create_snapshot(SnapshotInfo("", f"s{number}", 0))
        assert await backend.read(0, SIZE) == content
    assert at_once > 20
    assert later > 10
    assert raw_content(path, tmp_path) == content
    assert_clean(path)


async def test_a_host_that_always_waits_is_seldom_tried(
    tmp_path: Path, reluctant: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try that fails leaves a cluster that must be filled up when it is taken."""
    monkeypatch.setattr(attempts, "MAX_SKIPPED_ATTEMPTS", 1 << 12)
    path, _ = made(tmp_path, "plain", backed=False)
    tries: list[int] = []

    def counted(coroutine: object) -> None:
        tries.append(1)
        run_at_once(coroutine)  # type: ignore[arg-type]

    run_at_once = backends.run_at_once
    monkeypatch.setattr(backends, "run_at_once", counted)
    async with opened(path) as backend:
        await backend.write(0, b"first")
        reluctant(1.0)
        for cluster in range(1, 64):
            assert not backend.write_now(cluster * 64 * KIB, memoryview(b"x" * 4096))
            await backend.write(cluster * 64 * KIB, b"x" * 4096)
        assert len(tries) <= 6
        reluctant(0.0)
        while not backend.write_now(SIZE - 64, memoryview(b"y" * 64)):
            await backend.write(SIZE - 64, b"y" * 64)
    assert_clean(path)


async def test_nobody_is_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "MAX_SKIPPED_ATTEMPTS", 0)
    path, _ = made(tmp_path, "plain", backed=False)
    data = memoryview(b"x" * 4096)
    async with opened(path) as backend:
        await backend.write(0, data)
        mutex = driver_of(backend).image.mutex
        await mutex.acquire()
        assert not backend.write_now(MIB, data)
        mutex.release()
        backend.drain_count += 1
        assert not backend.write_now(MIB, data)
        backend.drain_count -= 1
        assert not backend.write_now(SIZE - 4095, data)
        assert backend.write_now(MIB, data)
        assert backend.accounting.writes == 2
    async with opened(path, writable=False) as backend:
        assert not backend.write_now(2 * MIB, data)
    async with opened(path, **{"detect-zeroes": "on"}) as backend:
        await backend.write(0, data)
        assert not backend.write_now(2 * MIB, data)
    assert_clean(path)


async def test_errors_are_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = made(tmp_path, "plain", backed=False)

    async def full(*args: object) -> None:
        raise NoSpaceError("the test's disk is full.")

    async with opened(path) as backend:
        await backend.write(0, b"x" * 4096)
        with monkeypatch.context() as patch:
            patch.setattr(FileDriver, "pwritev", full)
            patch.setattr(Allocator, "map_write_now", lambda *args: None)
            with pytest.raises(NoSpaceError, match="the test's disk is full"):
                backend.write_now(MIB, memoryview(b"y" * 4096))
        assert (backend.accounting.failed, backend.accounting.writes) == (1, 1)
        assert backend.write_now(MIB, memoryview(b"z" * 4096))
    content[:4096], content[MIB : MIB + 4096] = b"x" * 4096, b"z" * 4096
    assert raw_content(path, tmp_path) == content
    assert_clean(path)
