"""Lookups, block status, caches and compressed clusters: what a reader meets."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import zstandard

from fusedisk.block.model.extent import DATA, UNALLOCATED, ZERO
from fusedisk.block.request.status import chain_status
from fusedisk.compression.inflate import InflateError, inflate_by_zlib, zlib_inflater, zstd_inflater
from fusedisk.core.errors import CorruptImageError, HostError, OptionError
from fusedisk.drivers.format.qcow2.entries import Geometry
from fusedisk.drivers.format.qcow2.layout import Header
from fusedisk.drivers.format.qcow2.options import Qcow2Options, cache_sizes
from tests.conftest import qemu_img, qemu_io
from tests.support.memory import Store
from tests.support.qcow2 import create_image, created_in_memory, driver_of, in_memory, opened
from tests.support.tasks import start

CLUSTER = 65536
SIZE = 64 << 20


async def new_store(**options: Any) -> Store:
    return await created_in_memory(Store(), **{"size": SIZE, **options})


# --- extents --------------------------------------------------------------------------------------------


async def test_neighbouring_clusters_are_one_extent() -> None:
    async with in_memory(await new_store()) as backend:
        driver = driver_of(backend)
        await backend.write(0, b"x" * (2 << 20))
        await backend.write(3 << 20, b"x" * (1 << 20))
        await backend.write_zeroes(1 << 20, 4 * CLUSTER)
        await backend.write_zeroes(3 << 20, 1 << 20)
        edge = backend.node.children["file"]
        data = await driver.map(100, SIZE - 100)
        assert data[:3] == (DATA, (1 << 20) - 100, edge)
        zero = await driver.map(1 << 20, SIZE)
        assert zero == (ZERO, 4 * CLUSTER, edge, data.offset - 100 + (1 << 20), False, False, None)
        assert (await driver.map((1 << 20) + 10, CLUSTER + 10)).length == CLUSTER + 10
        assert await driver.map(2 << 20, SIZE) == (UNALLOCATED, 1 << 20, None, 0, False, False, None)
        assert (await driver.map(3 << 20, SIZE))[:3] == (ZERO, 1 << 20, edge)
        assert await driver.map((4 << 20) + 1, 7) == (UNALLOCATED, 7, None, 0, False, False, None)


async def test_spans_without_a_table_are_one_extent() -> None:
    store = await new_store(size=1 << 42)
    async with in_memory(store) as backend:
        await backend.write((1 << 40) + 5, b"x")
        driver = driver_of(backend)
        extent = await driver.map(7, backend.length - 7)
        assert extent == (UNALLOCATED, (1 << 40) - 7, None, 0, False, False, None)
        assert (await driver.map((1 << 40) + (1 << 29), 1 << 41)).length == 1 << 41, "bounded steps, but large ones"


async def test_a_cached_lookup_does_not_suspend() -> None:
    async with in_memory(await new_store()) as backend:
        await backend.write(0, b"x" * CLUSTER)
        for coroutine in (driver_of(backend).map(5, 10), driver_of(backend).map_write(5, 10)):
            with pytest.raises(StopIteration):
                coroutine.send(None)


def chunks(image: Path) -> Iterator[dict[str, Any]]:
    yield from json.loads(qemu_img("map", "--output=json", image))


@pytest.mark.parametrize("kind", ["plain", "overlay"])
async def test_block_status_equals_qemus(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=4096", base, "1M")
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "qcow2", top, "2M")
    image = base if kind == "plain" else top
    qemu_io(base, *commands(rng, 1 << 20, 4096), fmt="qcow2")
    if image is top:
        qemu_io(top, *commands(rng, 2 << 20, CLUSTER), fmt="qcow2")
    async with opened(image, writable=False) as backend:
        for theirs in chunks(image):
            position, end = theirs["start"], theirs["start"] + theirs["length"]
            while position < end:
                ours = await chain_status(backend.node, position, end - position)
                assert (ours.data, ours.zero) == (theirs["data"], theirs["zero"]), (position, theirs, ours)
                if "offset" in theirs:
                    assert ours.offset == theirs["offset"] + position - theirs["start"]
                if ours.data:
                    assert ours.depth == theirs["depth"]
                position += ours.length


def commands(rng: random.Random, size: int, unit: int) -> list[str]:
    # QEMU compresses only into clusters that are not allocated yet.
    found = [f"write -c -P 2 {offset} {unit}" for offset in rng.sample(range(0, size, unit), 6)]
    for _ in range(30):
        length = rng.randrange(1, 6) * unit
        offset = rng.randrange(0, size - length, unit)
        kind = rng.choice(("write -P 1", "write -z", "write -z -u", "discard"))
        found.append(f"{kind} {offset} {length}")
    return found


async def test_a_preallocated_image_shows_the_holes_of_its_file(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=8 << 20, preallocation="metadata")
    async with opened(image, writable=False) as backend:
        status = await chain_status(backend.node, 0, 8 << 20)
        assert status.zero
        assert status.allocated
    full = await create_image(tmp_path / "full.qcow2", size=8 << 20, preallocation="full")
    async with opened(full, writable=False) as backend:
        assert not (await chain_status(backend.node, 0, 8 << 20)).zero


# --- caches ---------------------------------------------------------------------------------------------


def test_default_cache_sizes_are_qemus() -> None:
    def sizes(size: int, cluster_bits: int = 16, **given: int) -> tuple[int, int]:
        return cache_sizes(Qcow2Options(**given), Header(size=size, cluster_bits=cluster_bits))

    assert sizes(1 << 30) == (2 * CLUSTER, 4 * CLUSTER)
    assert sizes(8 << 30) == (16 * CLUSTER, 4 * CLUSTER)
    assert sizes(1 << 40) == (32 << 20, 4 * CLUSTER)
    assert sizes(1 << 30, 9) == (16 << 20, 256 << 10)
    assert sizes(1 << 40, 16, cache_size=16 << 20) == ((16 << 20) - 4 * CLUSTER, 4 * CLUSTER)
    assert sizes(8 << 30, 16, cache_size=16 << 20) == (1 << 20, 15 << 20)
    assert sizes(1 << 40, 16, cache_size=16 << 20, l2_cache_size=10 << 20) == (10 << 20, 6 << 20)
    assert sizes(1 << 40, 16, cache_size=16 << 20, refcount_cache_size=10 << 20) == (6 << 20, 10 << 20)
    with pytest.raises(OptionError, match="at most the 'cache-size'"):
        sizes(1 << 40, cache_size=1, l2_cache_size=2)
    with pytest.raises(OptionError, match="all set"):
        sizes(1 << 40, cache_size=4, l2_cache_size=2, refcount_cache_size=2)


async def test_the_l2_cache_is_bounded_and_can_be_resized() -> None:
    store = await new_store(size=1 << 24, cluster_size=512)
    async with in_memory(store, **{"l2-cache-size": 4096}) as backend:
        tables = driver_of(backend).image.l2.tables
        for offset in range(0, 1 << 24, 1 << 15):
            await backend.write(offset, b"x")
            assert len(tables) <= 8
        driver = driver_of(backend)
        state = await driver.reopen_prepare(backend.node.config, Qcow2Options(l2_cache_size=1024))
        driver.reopen_commit(state)
        assert len(tables) == 2
        assert await backend.read(5 << 15, 1) == b"x"
        with pytest.raises(OptionError):
            await driver.reopen_prepare(backend.node.config, Qcow2Options(cache_size=1, l2_cache_size=2))


async def test_many_readers_of_a_cold_table_share_one_read() -> None:
    store = await new_store()
    async with in_memory(store) as backend:
        await backend.write(0, b"x" * (1 << 20))
    store.steps.calls.clear()
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        store.steps.calls.clear()
        held = store.steps.hold("read")
        tasks = [await start(nursery, lambda i=i: backend.read(i * CLUSTER, 1)) for i in range(5)]
        held.release()
        assert {bytes(await task.join()) for task in tasks} == {b"x"}
        assert [call.length for call in store.steps.of("read")] == [CLUSTER, 1, 1, 1, 1, 1]


async def test_a_failed_table_read_costs_one_request() -> None:
    store = await new_store()
    async with in_memory(store) as backend:
        await backend.write(0, b"x")
    async with in_memory(store) as backend:
        store.steps.fail("read", HostError("broken"))
        with pytest.raises(HostError):
            await backend.read(0, 1)
        assert await backend.read(0, 1) == b"x"


# --- compressed clusters --------------------------------------------------------------------------------


def raw_deflate(content: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
    return deflate.compress(content) + deflate.flush()


def with_compressed_cluster(store: Store, data: bytes, index: int = 0) -> None:
    """Let a guest cluster of an image with an L2 table be ``data``, put behind the file's end."""
    header_l1 = int.from_bytes(store.data[40:48], "big")
    l2 = int.from_bytes(store.data[header_l1 : header_l1 + 8], "big") & ~(1 << 63)
    geometry = Geometry(Header())
    host = -(-len(store.data) // CLUSTER) * CLUSTER + 100
    store.data += bytes(host - len(store.data)) + data + bytes(512)
    sectors = (host % 512 + len(data) - 1) // 512
    entry = 1 << 62 | sectors << geometry.compressed_size_shift | host
    store.data[l2 + 8 * index : l2 + 8 * index + 8] = entry.to_bytes(8, "big")


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("garbage", b"\xff" * 300),
        ("too short", raw_deflate(b"x" * (CLUSTER - 1))),
        ("nothing", b""),
        ("truncated", raw_deflate(random.Random(1).randbytes(CLUSTER))[:5000]),
    ],
)
async def test_damaged_compressed_data_costs_one_request(what: str, data: bytes) -> None:
    store = await new_store()
    async with in_memory(store) as backend:
        await backend.write(0, b"x" * 2 * CLUSTER)
    with_compressed_cluster(store, data)
    async with in_memory(store) as backend:
        with pytest.raises(CorruptImageError, match="guest offset 0 that does not inflate to 65536 bytes"):
            await backend.read(5, 10)
        assert await backend.read(CLUSTER, 10) == b"x" * 10
        await backend.write(0, b"n" * CLUSTER)
        assert await backend.read(0, 10) == b"n" * 10


def test_a_bomb_inflates_to_one_cluster_at_most() -> None:
    bomb = raw_deflate(bytes(50 << 20))
    assert inflate_by_zlib(bytearray(bomb), CLUSTER, -12) == bytes(CLUSTER)
    assert zlib_inflater(-12)(bytearray(bomb), CLUSTER) == bytes(CLUSTER)
    frame = zstandard.ZstdCompressor().compress(bytes(50 << 20))
    assert zstd_inflater()(bytearray(frame), CLUSTER) == bytes(CLUSTER)


def test_libdeflate_and_zlib_agree() -> None:
    rng = random.Random(2)
    inflate = zlib_inflater(-12)
    for _ in range(200):
        content = b"".join(rng.choice((b"abc", rng.randbytes(5), bytes(9))) for _ in range(2000))[:8192]
        data = bytearray(raw_deflate(content) + bytes(rng.randrange(600)))
        assert inflate(data, 8192) == inflate_by_zlib(data, 8192, -12) == content
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        results = []
        for function in (inflate, lambda data, size: inflate_by_zlib(data, size, -12)):
            try:
                results.append(function(data, 8192))
            except InflateError:
                results.append(b"")
        assert results[0] == results[1]


async def test_small_reads_of_a_compressed_cluster_inflate_it_once() -> None:
    store = await new_store()
    async with in_memory(store) as backend:
        await backend.write(0, b"x")
    content = random.Random(3).randbytes(1000) * 65 + bytes(CLUSTER - 65000)
    with_compressed_cluster(store, raw_deflate(content))
    async with in_memory(store) as backend:
        assert await backend.read(0, 4096) == content[:4096]
        store.steps.calls.clear()
        assert await backend.read(4096, CLUSTER - 4096) == content[4096:]
        assert store.steps.of("read") == []


async def test_a_compressed_cluster_rewritten_while_it_is_read() -> None:
    """Its old data is freed, and taken and overwritten by somebody else, before the reader's own read returns."""
    store = await new_store()
    async with in_memory(store) as backend:
        await backend.write(0, b"x" * 2 * CLUSTER)
        await backend.write(CLUSTER, b"y")
    path_content = b"c" * CLUSTER
    with_compressed_cluster(store, raw_deflate(path_content))
    # The refcount of the compressed data's cluster.
    block = int.from_bytes(store.data[CLUSTER : CLUSTER + 8], "big")
    host = (len(store.data) - 1) // CLUSTER
    store.data[block + 2 * host : block + 2 * host + 2] = b"\0\x01"
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        assert await backend.read(CLUSTER, 1) == b"y"  # the L2 table is cached
        held = store.steps.hold("read")
        reader = await start(nursery, lambda: backend.read(10, 10))
        assert held.reached.is_set()
        await backend.write(0, b"n" * CLUSTER)
        await backend.write(10 * CLUSTER, b"o" * CLUSTER)
        held.release()
        assert await reader.join() == b"n" * 10
        assert not len(driver_of(backend).image.inflated)
