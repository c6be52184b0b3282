"""Allocating writes, step by step in memory: host writes and their order, concurrent requests, failures."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.core.errors import CorruptImageError, FusediskError, HostError, NoSpaceError
from tests.conftest import qemu_img, qemu_io
from tests.support.files import largest_file
from tests.support.memory import Store
from tests.support.oracle import random_bytes
from tests.support.qcow2 import (
    Snapshots,
    assert_clean,
    assert_not_corrupt,
    created_in_memory,
    driver_of,
    in_memory,
    opened,
    raw_content,
    saved,
)
from tests.support.tasks import start

CLUSTER = 65536


def no_space() -> NoSpaceError:
    return NoSpaceError("the test's disk is full.")


# --- what reaches the host ------------------------------------------------------------------------------


async def test_writes_are_of_data_alone_until_a_flush_writes_refcounts_and_entries_once(store: Store) -> None:
    async with in_memory(store) as backend:
        await backend.write(0, b"t")  # makes the L2 table
        await backend.flush()
        store.steps.calls.clear()
        await backend.write(1 << 20, b"x" * (1 << 20))
        await backend.write(2 << 20, b"x" * (1 << 20))
        assert [call.length for call in store.steps.of("write")] == [1 << 20, 1 << 20]
        store.steps.calls.clear()
        await backend.flush()
        assert [call.length for call in store.steps.of("write")] == [32 * 2, 32 * 8]
        store.steps.calls.clear()
        await backend.write(1 << 20, b"y" * (1 << 20))
        assert [(call.operation, call.length) for call in store.steps.of("read", "write")] == [("write", 1 << 20)]
        store.steps.calls.clear()
        assert await backend.read((1 << 20) + 5, 500000) == b"y" * 500000
        assert len(store.steps.of("read")) == 1


@pytest.mark.parametrize("tables", [1, 2, 3, 8])
async def test_first_writes_everywhere_wait_for_no_host_flush(tables: int) -> None:
    """With all tables dirty at once, as long as the cache holds them all."""
    span = 512 * 4096
    store = await created_in_memory(Store(), size=tables * span, cluster_size=4096)
    async with in_memory(store) as backend:
        for cluster in range(20):
            for table in range(tables):
                await backend.write(table * span + cluster * 4096, b"x" * 4096)
        assert not store.steps.of("flush")


async def test_first_writes_everywhere_are_committed_where_the_cache_is_too_small_for_all_tables() -> None:
    span = 512 * 4096
    store = await created_in_memory(Store(), size=8 * span, cluster_size=4096)
    async with in_memory(store, **{"l2-cache-size": 4 * 4096}) as backend:
        for table in range(8):
            await backend.write(table * span, b"x" * 4096)
        assert len(driver_of(backend).image.dirty.l2) <= 4
        assert store.steps.of("flush")


async def test_a_partial_cluster_behind_the_end_of_the_file_takes_nothing_but_the_data(store: Store) -> None:
    async with in_memory(store) as backend:
        await backend.write(0, b"t")
        store.steps.calls.clear()
        await backend.write(5 * CLUSTER + 100, b"x")
        assert [call.length for call in store.steps.of("write")] == [1]
        assert await backend.read(5 * CLUSTER + 99, 3) == b"\0x\0"


async def test_a_partial_cluster_in_used_space_is_written_once_with_what_surrounds_it(
    store: Store, tmp_path: Path
) -> None:
    async with in_memory(store, discard="unmap", **{"file.discard": "ignore"}) as backend:
        store.discard = False
        await backend.write(0, b"old!" * (CLUSTER // 2))
        await backend.discard(0, CLUSTER)
        await backend.flush()
        store.steps.calls.clear()
        await backend.write(5 * CLUSTER + 100, b"x")
        assert [call.length for call in store.steps.of("write")] == [CLUSTER]
        assert await backend.read(5 * CLUSTER, CLUSTER) == bytes(100) + b"x" + bytes(CLUSTER - 101)
    assert_clean(saved(store, tmp_path))


async def test_clusters_that_a_failed_write_may_have_touched_do_not_count_as_fresh(store: Store) -> None:
    async with in_memory(store) as backend:
        await backend.write(0, b"t")
        # The data reaches the file, but we are told that it did not.
        store.steps.fail("written", no_space())
        with pytest.raises(NoSpaceError):
            await backend.write(3 * CLUSTER, b"junk" * 1000)
        await backend.write(7 * CLUSTER + 8000, b"x")
        assert await backend.read(7 * CLUSTER, CLUSTER) == bytes(8000) + b"x" + bytes(CLUSTER - 8001)


async def test_half_a_refcount_block_is_no_zeroes(tmp_path: Path) -> None:
    """One that could not be written whole, at the end of the file, lies where guest data may lie later."""
    path, cluster = tmp_path / "disk.qcow2", 8192
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster},refcount_bits=64", path, "64M")
    async with opened(path, discard="unmap") as backend:
        storage = backend.node.children["file"].node
        count = 0
        while storage.length < 1024 * cluster:  # what the first block counts
            await backend.write(count * cluster, b"x" * cluster)
            count += 1
        with largest_file(1024 * cluster + 4096), pytest.raises(FusediskError):
            await backend.write(count * cluster, b"y" * cluster)
        await backend.discard(0, cluster)
        await backend.flush()
        await backend.flush()
        await backend.write((count + 1) * cluster + 4096, b"z" * 4200)
        found = await backend.read((count + 1) * cluster, 2 * cluster)
        assert found == bytes(4096) + b"z" * 4200 + bytes(2 * cluster - 4096 - 4200)
    assert_clean(path)


async def test_order_of_a_first_write_and_its_flush(store: Store, tmp_path: Path) -> None:
    async with in_memory(store) as backend:
        header = driver_of(backend).image.header
        store.steps.calls.clear()
        await backend.write(0, b"t")
        await backend.flush()
        l2_offset = driver_of(backend).image.l1[0] & ~(1 << 63)
        refcounts = driver_of(backend).refcounts.table[0]
        calls = store.steps.of("write", "flush")
        assert [(call.operation, call.offset, call.length) for call in calls] == [
            ("write", l2_offset, CLUSTER),
            ("write", l2_offset + CLUSTER, 1),
            ("write", refcounts + l2_offset // CLUSTER * 2, 4),
            ("flush", 0, 0),
            ("write", l2_offset, 8),
            ("write", header.l1_table_offset, 8),
            ("flush", 0, 0),
        ]
    assert_clean(saved(store, tmp_path))


async def test_discards_and_overwrites_need_one_host_flush_for_each_of_the_guests(store: Store) -> None:
    async with in_memory(store, discard="unmap", **{"file.discard": "ignore"}) as backend:
        await backend.write(0, b"x" * 4 * CLUSTER)
        await backend.flush()
        store.steps.calls.clear()
        await backend.write(CLUSTER, b"y")
        await backend.flush()
        assert len(store.steps.of("flush")) == 1
        store.steps.calls.clear()
        await backend.discard(0, CLUSTER)
        await backend.flush()
        assert len(store.steps.of("flush")) == 1


# --- the process dies -----------------------------------------------------------------------------------


async def workload(backend: Backend, rng: random.Random, size: int, count: int) -> None:
    for _ in range(count):
        length = rng.choice((1, 512, 3000, 20000))
        offset = rng.randrange(size - length)
        kind = rng.random()
        if kind < 0.6:
            await backend.write(offset, random_bytes(rng, length))
        elif kind < 0.8:
            await backend.write_zeroes(offset, length, may_unmap=True)
        else:
            await backend.discard(offset, length)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_death_between_any_two_host_writes_leaks_at_worst(tmp_path: Path, compat: str) -> None:
    """With the smallest clusters, so that L2 tables, refcount blocks and the refcount table grow on the way."""
    size = 512 << 10
    store = await created_in_memory(Store(), size=size, cluster_size=512, refcount_bits=16, compat=compat)
    snapshots = Snapshots()
    snapshots.watch(store)
    async with in_memory(store, discard="unmap") as backend:
        await workload(backend, random.Random(5), size, 40)
        await backend.write(0, b"f" * (200 << 10))
        await backend.truncate(size + (300 << 10))
        await workload(backend, random.Random(6), size + (300 << 10), 10)
        assert driver_of(backend).image.header.refcount_table_clusters >= 1
    chosen = snapshots.taken[:: max(1, len(snapshots.taken) // 150)]
    assert len(chosen) >= 100
    for content in chosen:
        assert_not_corrupt(saved(content, tmp_path))
    assert_clean(saved(store, tmp_path))


@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_death_while_shared_and_compressed_clusters_are_replaced(tmp_path: Path, cluster_size: int) -> None:
    store = await prepared(cluster_size, tmp_path)
    snapshots = Snapshots()
    snapshots.watch(store)
    async with in_memory(store, discard="unmap") as backend:
        await workload(backend, random.Random(8), 256 << 10, 25)
    for content in snapshots.taken[:150]:
        assert_not_corrupt(saved(content, tmp_path))
    assert_clean(saved(store, tmp_path))


@pytest.mark.slow
async def test_death_during_growth_of_the_refcount_table(tmp_path: Path) -> None:
    size = 20 << 20
    store = await created_in_memory(Store(), size=size, cluster_size=512, refcount_bits=64)
    snapshots = Snapshots()
    async with in_memory(store) as backend:
        image = driver_of(backend).image
        grown = 0
        for offset in range(0, size, 64 << 10):
            before = image.header.refcount_table_clusters
            snapshots.taken.clear()
            if not snapshots.store:
                snapshots.watch(store)
            await backend.write(offset, b"x" * (64 << 10))
            if image.header.refcount_table_clusters > before:
                grown += 1
                for content in snapshots.taken:
                    assert_not_corrupt(saved(content, tmp_path))
            if grown == 2:
                break
        assert grown == 2
    assert_clean(saved(store, tmp_path))


# --- failures -------------------------------------------------------------------------------------------


async def prepared(cluster_size: int, tmp_path: Path) -> Store:
    """An image of 256 KiB with a snapshot, and clusters of all kinds."""
    path = saved(await created_in_memory(Store(), size=256 << 10, cluster_size=cluster_size), tmp_path)
    qemu_io(path, "write -P 1 0 30k", "write -c -P 3 64k 64k", "write -c -P 4 192k 64k", fmt="qcow2")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 10k 30k", fmt="qcow2")
    return Store(path.read_bytes())


@pytest.mark.parametrize("operation", ["write", "written"])
@pytest.mark.parametrize(
    "request_",
    [
        lambda backend: backend.write(0, b"n" * 5000),
        lambda backend: backend.write(60 << 10, b"n" * (40 << 10)),
        lambda backend: backend.write_zeroes(0, 180 << 10, may_unmap=True),
        lambda backend: backend.discard(0, 180 << 10),
        lambda backend: backend.truncate(1 << 20),
    ],
    ids=["copy on write", "allocation", "zeroes", "discard", "growth"],
)
async def test_no_space_at_any_host_write(tmp_path: Path, request_: Any, operation: str) -> None:
    """Before the host write had an effect, or (``written``) after it."""
    original = await prepared(512, tmp_path)
    failures = 0
    for skip in range(10000):
        store = Store(bytes(original.data))
        async with in_memory(store, discard="unmap") as backend:
            store.steps.fail(operation, no_space(), skip=skip)
            error = None
            try:
                await request_(backend)
                await backend.flush()
            except NoSpaceError as exc:
                error = exc
            store.steps.heal()
            failures += error is not None
            # The node goes on: what was not asked for is as before, and the request works now.
            assert await backend.read(192 << 10, 64 << 10) == b"\4" * (64 << 10)
            await request_(backend)
            await backend.write(250 << 10, b"after" * 1000)
            assert await backend.read(250 << 10, 5000) == b"after" * 1000
        if skip % 5 == 0 or error is None:
            assert_not_corrupt(saved(store, tmp_path))
        if len(store.steps.of(operation)) <= skip:
            break
    assert failures >= 2


async def test_clusters_of_a_failed_write_are_used_by_the_next(store: Store, tmp_path: Path) -> None:
    async with in_memory(store) as backend:
        await backend.write(0, b"t")
        end = len(store.data)
        store.steps.fail("write", no_space())
        with pytest.raises(NoSpaceError):
            await backend.write(10 * CLUSTER, b"x" * 3 * CLUSTER)
        await backend.write(20 * CLUSTER, b"y" * 2 * CLUSTER)
        assert len(store.data) == -(-end // CLUSTER) * CLUSTER + 2 * CLUSTER
        store.steps.fail("write", no_space())
        with pytest.raises(NoSpaceError):
            await backend.write(30 * CLUSTER, b"x" * 5 * CLUSTER)
    assert_clean(saved(store, tmp_path))


async def test_a_commit_that_failed_is_made_again(store: Store, tmp_path: Path) -> None:
    async with in_memory(store, discard="unmap") as backend:
        await backend.write(0, b"t")
        await backend.flush()
        for operation in ("write", "written", "flush"):
            for skip in range(2):
                await backend.write(CLUSTER, b"a" * CLUSTER)
                await backend.discard(0, CLUSTER)
                await backend.write((2 + skip) * CLUSTER, b"b" * CLUSTER)
                store.steps.fail(operation, HostError("broken", errno=errno.EIO), skip=skip)
                with pytest.raises(HostError):
                    await backend.flush()
                store.steps.heal()
                await backend.flush()
                assert await backend.read(CLUSTER, CLUSTER) == b"a" * CLUSTER
                assert await backend.read((2 + skip) * CLUSTER, CLUSTER) == b"b" * CLUSTER
                await backend.discard(CLUSTER, 3 * CLUSTER)
    assert_clean(saved(store, tmp_path))


async def test_a_failed_header_write_that_took_effect_counts(store: Store, tmp_path: Path) -> None:
    async with in_memory(store) as backend:
        header = driver_of(backend).image.header
        old = header.l1_table_offset
        writes = len(store.steps.of("written"))
        store.steps.fail("written", HostError("broken", errno=errno.EIO), skip=2)
        await backend.truncate(4 << 30)
        assert header.l1_table_offset != old
        assert len(store.steps.of("written")) > writes
        await backend.write(3 << 30, b"far")
    assert_clean(saved(store, tmp_path))


async def test_a_header_write_that_fails_half_way_fences(store: Store) -> None:
    class Half(Snapshots):
        async def take(self, operation: str, offset: int = 0, length: int = 0, flags: int = 0) -> None:
            if operation == "write" and offset == 36 and self.store is not None:
                self.store.data[36:42] = (1 << 16).to_bytes(6, "little")
                raise HostError("broken", errno=errno.EIO)
            await super().take(operation, offset, length, flags)

    async with in_memory(store) as backend:
        half = Half()
        half.watch(store)
        with pytest.raises(HostError):
            await backend.truncate(4 << 30)
        with pytest.raises(CorruptImageError, match="half-way"):
            await backend.write(0, b"x")
        assert await backend.read(0, 10) == bytes(10)


# --- concurrency ----------------------------------------------------------------------------------------


async def test_two_writers_of_one_new_cluster(store: Store, tmp_path: Path) -> None:
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        await backend.write(0, b"t")
        held = store.steps.hold("write", driver_of(backend).image.l1[0] % (1 << 63) + 2 * CLUSTER + 10)
        first = await start(nursery, lambda: backend.write(CLUSTER + 10, b"1" * 10))
        second = await start(nursery, lambda: backend.write(CLUSTER + 30, b"2" * 10))
        beside = await start(nursery, lambda: backend.write(2 * CLUSTER, b"3" * CLUSTER))
        assert held.reached.is_set()
        assert not second.done
        assert beside.done, "an allocation in flight stops nobody else"
        held.release()
        await first.join()
        await second.join()
        assert await backend.read(CLUSTER, 50) == bytes(10) + b"1" * 10 + bytes(10) + b"2" * 10 + bytes(10)
    assert_clean(saved(store, tmp_path))


async def test_a_writer_goes_up_to_an_allocation_in_flight_and_waits_there(store: Store, tmp_path: Path) -> None:
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        await backend.write(0, b"t")
        held = store.steps.hold("write", driver_of(backend).image.l1[0] % (1 << 63) + 2 * CLUSTER + 100)
        first = await start(nursery, lambda: backend.write(5 * CLUSTER + 100, b"1" * 10))
        assert held.reached.is_set()
        across = await start(nursery, lambda: backend.write(4 * CLUSTER, b"2" * 3 * CLUSTER))
        assert not across.done
        assert await backend.read(4 * CLUSTER, 10) == b"2" * 10
        held.release()
        await first.join()
        await across.join()
        found = await backend.read(4 * CLUSTER, 3 * CLUSTER)
        assert found == b"2" * 3 * CLUSTER
    assert_clean(saved(store, tmp_path))


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_who_waits_for_an_allocation_that_never_comes_goes_on(store: Store, tmp_path: Path, how: str) -> None:
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        await backend.write(0, b"t")
        held = store.steps.hold("write", driver_of(backend).image.l1[0] % (1 << 63) + 2 * CLUSTER + 10)
        first = await start(nursery, lambda: backend.write(CLUSTER + 10, b"1" * 10))
        assert held.reached.is_set()
        second = await start(nursery, lambda: backend.write(CLUSTER + 30, b"2" * 10))
        if how == "fails":
            store.steps.fail("write", no_space())
            held.release()
            await first.ended.wait()
            assert isinstance(first.error, NoSpaceError)
        else:
            first.scope.cancel()
        await second.join()
        assert await backend.read(CLUSTER, 50) == bytes(30) + b"2" * 10 + bytes(10)
    assert_clean(saved(store, tmp_path))


async def test_requests_interleaved_everywhere(tmp_path: Path) -> None:
    """Every host operation gives way to other tasks, and tables and blocks are evicted all the time."""
    size, unit = 2 << 20, 8192
    store = await created_in_memory(Store(), size=size, cluster_size=512)
    oracle = bytearray(size)
    rng = random.Random(11)

    async def region(backend: Backend, start_: int, end: int) -> None:
        # Each task has cells of its own, cluster by cluster between those of others.
        for _ in range(60):
            length = rng.randrange(1, 1500)
            offset = rng.randrange(start_, end - length)
            kind = rng.random()
            if kind < 0.7:
                data = random_bytes(rng, length)
                await backend.write(offset, data)
                oracle[offset : offset + length] = data
            elif kind < 0.85:
                await backend.write_zeroes(offset, length, may_unmap=True)
                oracle[offset : offset + length] = bytes(length)
            else:
                assert await backend.read(offset, length) == oracle[offset : offset + length]

    async with in_memory(store, **{"l2-cache-size": 1024, "refcount-cache-size": 2048, "discard": "unmap"}) as backend:
        store.steps.eager = False
        async with trio.open_nursery() as nursery:
            for index in range(24):
                # Regions meet in the middle of clusters.
                nursery.start_soon(region, backend, index * unit + 100, (index + 1) * unit + 100)
        assert await backend.read(0, size) == oracle
    path = saved(store, tmp_path)
    assert_clean(path)
    assert raw_content(path, tmp_path) == oracle


async def test_cancelled_writers_leave_a_consistent_image(tmp_path: Path) -> None:
    size = 1 << 20
    store = await created_in_memory(Store(), size=size, cluster_size=512)
    rng = random.Random(12)

    async def cancelled(backend: Backend, steps: int) -> None:
        offset = rng.randrange(size - 40000)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(backend.write, offset, random_bytes(rng, rng.randrange(1, 40000)))
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

    async with in_memory(store, **{"l2-cache-size": 1024, "refcount-cache-size": 2048}) as backend:
        store.steps.eager = False
        for steps in range(80):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(cancelled, backend, steps)
        store.steps.eager = True
        data = random_bytes(rng, size)
        await backend.write(0, data)
        assert await backend.read(0, size) == data
    path = saved(store, tmp_path)
    assert_not_corrupt(path)
    assert raw_content(path, tmp_path) == data
