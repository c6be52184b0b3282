"""Compressed writes: what QEMU reads of them, how they are packed and counted, and what they free."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import trio

import fusedisk
from fusedisk.block.graph.backend import Backend
from fusedisk.compression.inflate import inflate_by_zlib
from fusedisk.core.errors import HostError, NotSupportedError, OutOfRangeError, ReadOnlyError
from fusedisk.drivers.format.qcow2 import compressed
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, OFFSET_MASK
from tests.conftest import qemu_img, qemu_io
from tests.support.memory import Store
from tests.support.qcow2 import (
    CLUSTER_SIZES,
    assert_clean,
    create_image,
    created_in_memory,
    driver_of,
    in_memory,
    opened,
    raw_content,
)
from tests.support.tasks import start

CLUSTER = 64 << 10
SIZE = 8 << 20


async def new_store(**options: Any) -> Store:
    return await created_in_memory(Store(), size=SIZE, **options)


def compressible(rng: random.Random, length: int, share: float = 0.2) -> bytes:
    """Bytes of which about ``share`` is left when they are compressed."""
    noise = rng.randbytes(int(length * share))
    return noise + bytes([rng.randrange(1, 256)]) * (length - len(noise))


def entry(backend: Backend, index: int) -> int:
    """The descriptor of a guest cluster; of the first L2 table."""
    image = driver_of(backend).image
    table = image.l2.get(image.l1[0] & OFFSET_MASK)
    return table[index * image.geometry.entry_words] if table is not None else 0


def place(backend: Backend, index: int) -> tuple[int, int]:
    """Where the compressed data of a guest cluster lies, and how far that may reach."""
    found = entry(backend, index)
    assert found & COMPRESSED
    return driver_of(backend).image.geometry.compressed_range(found)


def on_disk(store: Store, tmp_path: Path) -> Path:
    (tmp_path / "x.qcow2").write_bytes(store.data)
    return tmp_path / "x.qcow2"


# --- QEMU reads it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
async def test_qemu_reads_what_was_compressed(cluster_size: int, compression: str, tmp_path: Path) -> None:
    rng = random.Random(cluster_size)
    count = 24 if cluster_size <= 64 << 10 else 7
    size = count * cluster_size + 512 * (cluster_size > 512)
    parts = [
        rng.choice((compressible(rng, cluster_size, 0.05), compressible(rng, cluster_size, 0.4), bytes(cluster_size)))
        for _ in range(count)
    ]
    parts[0] = compressible(rng, cluster_size)
    parts[2] = rng.randbytes(cluster_size)
    content = b"".join(parts) + compressible(rng, size - count * cluster_size)
    for extended in (False, True)[: 1 + (cluster_size >= 16 << 10)]:
        image = await create_image(
            tmp_path / f"{extended}.qcow2",
            size=size,
            cluster_size=cluster_size,
            compression_type=compression,
            extended_l2=extended,
        )
        async with opened(image) as backend:
            await backend.write_compressed(0, content)
            assert await backend.read(0, size) == content
            assert entry(backend, 0) & COMPRESSED
            assert not entry(backend, 2) & COMPRESSED, "it does not get shorter"
        assert_clean(image)
        assert raw_content(image, tmp_path) == content
        report = json.loads(qemu_img("check", "--output=json", image))
        compressed = sum(part.strip(b"\0") != b"" and part != parts[2] for part in parts) + (size % cluster_size > 0)
        assert report["compressed-clusters"] == compressed
        async with opened(image) as backend:
            assert await backend.read(0, size) == content


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
async def test_what_qemu_compressed_is_replaced_and_freed(compression: str, tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=SIZE, compression_type=compression)
    qemu_io(image, *(f"write -q -c -P {n + 1} {n * 64}k 64k" for n in range(32)), fmt="qcow2")
    rng = random.Random(1)
    expected = bytearray(b"".join(bytes([n + 1]) * CLUSTER for n in range(32)).ljust(SIZE, b"\0"))
    async with opened(image, discard="unmap") as backend:
        for n in range(0, 32, 2):
            part = compressible(rng, CLUSTER)
            expected[n * CLUSTER : (n + 1) * CLUSTER] = part
            await backend.write_compressed(n * CLUSTER, part)
            assert await backend.read(n * CLUSTER, CLUSTER) == part
    assert_clean(image)
    assert raw_content(image, tmp_path) == expected
    # And on with QEMU.
    qemu_io(image, "write -q -c -P 77 4M 64k", "write -q -P 78 0 100k", "discard 200k 500k", fmt="qcow2")
    assert_clean(image)


async def test_a_window_of_4_kib_is_enough() -> None:
    # The same noise again at a distance that only a larger window reaches.
    noise = random.Random(1).randbytes(8 << 10)
    content = noise * 8
    packed = compressed.deflate_zlib(content)
    assert len(packed) >= len(content)
    near = noise[:2048] * 32
    packed = compressed.deflate_zlib(near)
    assert len(packed) < 4096
    assert inflate_by_zlib(packed, len(near), -12) == near


@pytest.mark.parametrize("options", [{}, {"compression_type": "zstd"}, {"extended_l2": True}])
async def test_a_copy_by_qemu_is_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    rng = random.Random(5)
    content = b"".join(compressible(rng, CLUSTER, rng.random() / 2) for _ in range(40))
    raw = tmp_path / "x.raw"
    raw.write_bytes(content)
    image = await create_image(tmp_path / "x.qcow2", size=len(content), **options)
    async with opened(image) as backend:
        await backend.write_compressed(0, content)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, image)
    settings = ",".join(f"{key}={'on' if value is True else value}" for key, value in options.items())
    qemu_img("convert", "-c", "-O", "qcow2", *(("-o", settings) if settings else ()), raw, tmp_path / "theirs.qcow2")
    ours, theirs = image.stat().st_size, (tmp_path / "theirs.qcow2").stat().st_size
    assert abs(ours - theirs) <= 0.02 * theirs + CLUSTER, "as small as QEMU's"
    async with opened(tmp_path / "theirs.qcow2", writable=False) as backend:
        assert await backend.read(0, backend.length) == content


# --- packing --------------------------------------------------------------------------------------------


async def test_clusters_are_packed_byte_by_byte() -> None:
    rng = random.Random(2)
    async with in_memory(await new_store()) as backend:
        for index in range(20):
            await backend.write_compressed(index * CLUSTER, compressible(rng, CLUSTER, 0.3))
        driver = driver_of(backend)
        for index in range(19):
            start, reach = place(backend, index)
            following, _ = place(backend, index + 1)
            if following // CLUSTER in (start // CLUSTER, start // CLUSTER + 1):
                assert start < following <= start + reach
        first = place(backend, 0)[0] // CLUSTER
        touched = {p // CLUSTER for n in range(20) for p in (place(backend, n)[0], sum(place(backend, n)) - 1)}
        assert len(touched) <= 20 * 0.3 + 3
        users = sum(
            place(backend, n)[0] // CLUSTER <= first <= (sum(place(backend, n)) - 1) // CLUSTER for n in range(20)
        )
        assert await driver.refcounts.get(first) == users > 1


@pytest.mark.parametrize("bits", [1, 2, 4])
async def test_narrow_refcounts_begin_new_clusters(bits: int, tmp_path: Path) -> None:
    rng = random.Random(bits)
    store = await new_store(refcount_bits=bits)
    content = [compressible(rng, CLUSTER, 0.01) for _ in range(40)]
    async with in_memory(store) as backend:
        for index, part in enumerate(content):
            await backend.write_compressed(index * CLUSTER, part)
        driver = driver_of(backend)
        counts = [await driver.refcounts.get(place(backend, index)[0] // CLUSTER) for index in range(40)]
        assert max(counts) == (1 << bits) - 1
        assert await backend.read(0, 40 * CLUSTER) == b"".join(content)
    image = on_disk(store, tmp_path)
    assert_clean(image)
    assert raw_content(image, tmp_path)[: 40 * CLUSTER] == b"".join(content)


async def test_the_open_cluster_is_forgotten_when_it_is_free(tmp_path: Path) -> None:
    rng = random.Random(3)
    store = await new_store()
    async with in_memory(store, discard="unmap") as backend:
        await backend.write_compressed(0, compressible(rng, CLUSTER, 0.1))
        opened_ = place(backend, 0)[0] // CLUSTER
        await backend.discard(0, CLUSTER)
        await backend.flush()
        await backend.write(CLUSTER, b"p" * CLUSTER)
        assert (entry(backend, 1) & OFFSET_MASK) // CLUSTER == opened_, "somebody else has it now"
        part = compressible(rng, CLUSTER, 0.1)
        await backend.write_compressed(2 * CLUSTER, part)
        assert place(backend, 2)[0] // CLUSTER != opened_
        assert await backend.read(CLUSTER, 2 * CLUSTER) == b"p" * CLUSTER + part
    assert_clean(on_disk(store, tmp_path))


async def test_many_at_once_and_reads_between(tmp_path: Path) -> None:
    rng = random.Random(4)
    store = await new_store(cluster_size=4096)
    count = 200
    parts = [compressible(rng, 4096 * rng.choice((1, 1, 3)), 0.3) for _ in range(count)]
    expected = bytearray(SIZE)

    async def writer(backend: Backend, number: int) -> None:
        offset, part = number * 3 * 4096, parts[number]
        await backend.write_compressed(offset, part)
        assert await backend.read(offset, len(part)) == part
        if number % 5 == 0:
            await backend.discard(offset, 4096)
            expected[offset : offset + 4096] = bytes(4096)

    async with in_memory(store, discard="unmap") as backend:
        for number, part in enumerate(parts):
            expected[number * 3 * 4096 : number * 3 * 4096 + len(part)] = part
        for start in range(0, count, 50):
            async with trio.open_nursery() as nursery:
                for number in range(start, start + 50):
                    nursery.start_soon(writer, backend, number)
                nursery.start_soon(backend.flush)
        assert await backend.read(0, SIZE) == expected
    image = on_disk(store, tmp_path)
    assert_clean(image)
    assert raw_content(image, tmp_path) == expected


async def test_others_wait_for_a_compressed_write_of_their_cluster(tmp_path: Path) -> None:
    rng = random.Random(10)
    store = await new_store(cluster_size=4096)
    part, beside = compressible(rng, 4096), compressible(rng, 4096)
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        await backend.write(0, b"t" * 100)
        held = store.steps.hold("write")
        first = await start(nursery, lambda: backend.write_compressed(0, part))
        assert held.reached.is_set()
        reader = await start(nursery, lambda: backend.read(0, 10))
        writer = await start(nursery, lambda: backend.write(50, b"w" * 10))
        other = await start(nursery, lambda: backend.write_compressed(4096, beside))
        assert (reader.done, writer.done, other.done) == (False, False, True)
        held.release()
        for task in (first, reader, writer):
            await task.join()
        assert await backend.read(0, 8192) == part[:50] + b"w" * 10 + part[60:] + beside
    assert_clean(on_disk(store, tmp_path))


async def test_a_cancelled_write_leaks_nothing(tmp_path: Path) -> None:
    rng = random.Random(11)
    store = await new_store(cluster_size=4096)
    old, new = compressible(rng, 4096), compressible(rng, 4096)
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        await backend.write_compressed(0, old)
        held = store.steps.hold("write")
        task = await start(nursery, lambda: backend.write_compressed(0, new))
        assert held.reached.is_set()
        task.scope.cancel()
        await task.ended.wait()
        assert await backend.read(0, 4096) == old
        await backend.write_compressed(4096, new)
        assert await backend.read(0, 8192) == old + new
    assert_clean(on_disk(store, tmp_path))


# --- what was there before ------------------------------------------------------------------------------


async def test_any_cluster_can_be_replaced(tmp_path: Path) -> None:
    rng = random.Random(6)
    store = await new_store()
    async with in_memory(store) as backend:
        await backend.write(0, b"d" * CLUSTER)
        await backend.write_zeroes(CLUSTER, CLUSTER)
        await backend.write_compressed(2 * CLUSTER, compressible(rng, CLUSTER))
        before = entry(backend, 0) & OFFSET_MASK
        content = b"".join(compressible(rng, CLUSTER) for _ in range(4))
        await backend.write_compressed(0, content)
        await backend.flush()
        assert await backend.read(0, 4 * CLUSTER) == content
        assert await driver_of(backend).refcounts.get(before // CLUSTER) == 0
        # Zeroes need no space at all, whatever was there.
        await backend.write_compressed(0, bytes(4 * CLUSTER))
        assert [entry(backend, index) for index in range(4)] == [1, 1, 1, 1]
    assert_clean(on_disk(store, tmp_path))


async def test_a_snapshot_keeps_what_it_had(tmp_path: Path) -> None:
    rng = random.Random(7)
    first, second = (b"".join(compressible(rng, CLUSTER) for _ in range(6)) for _ in range(2))
    image = await create_image(tmp_path / "x.qcow2", size=6 * CLUSTER)
    async with opened(image) as backend:
        await backend.write_compressed(0, first)
    qemu_img("snapshot", "-c", "one", image)
    async with opened(image) as backend:
        await backend.write_compressed(0, second[: 4 * CLUSTER])
        await backend.write(4 * CLUSTER, second[4 * CLUSTER :])
    assert_clean(image)
    assert raw_content(image, tmp_path) == second
    qemu_img("snapshot", "-a", "one", image)
    qemu_img("snapshot", "-d", "one", image)
    assert_clean(image)
    assert raw_content(image, tmp_path) == first


async def test_zeroes_of_version_2_hide_the_backing_file(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * 2 * CLUSTER)
    image = await create_image(
        tmp_path / "x.qcow2", size=2 * CLUSTER, compat="0.10", backing_file="base.raw", backing_fmt="raw"
    )
    async with opened(image) as backend:
        await backend.write_compressed(0, bytes(CLUSTER))
        assert entry(backend, 0) & COMPRESSED
    assert raw_content(image, tmp_path) == bytes(CLUSTER) + b"b" * CLUSTER
    assert_clean(image)


# --- failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", range(4))
async def test_a_failed_write_leaves_the_cluster_as_it_was(skip: int, tmp_path: Path) -> None:
    rng = random.Random(8)
    store = await new_store()
    old = [compressible(rng, CLUSTER) for _ in range(6)]
    new = [compressible(rng, CLUSTER) for _ in range(6)]
    async with in_memory(store) as backend:
        await backend.write_compressed(0, b"".join(old))
        await backend.flush()
        store.steps.fail("write", HostError("no", errno=5), skip=skip)
        with pytest.raises(HostError, match="no"):
            await backend.write_compressed(0, b"".join(new))
        assert store.steps.heal() == 0
        found = await backend.read(0, 6 * CLUSTER)
        parts = [bytes(found[n * CLUSTER : (n + 1) * CLUSTER]) for n in range(6)]
        assert all(part in pair for part, pair in zip(parts, zip(old, new, strict=True), strict=True))
        assert sum(part == fresh for part, fresh in zip(parts, new, strict=True)) < 6
    assert_clean(on_disk(store, tmp_path))


async def test_a_file_too_long_for_descriptors_gets_plain_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    async with in_memory(await new_store()) as backend:
        part = compressible(random.Random(9), CLUSTER)
        await backend.write_compressed(0, part)
        geometry = driver_of(backend).image.geometry
        monkeypatch.setattr(geometry, "compressed_offset_mask", place(backend, 0)[0])
        await backend.write_compressed(CLUSTER, part)
        monkeypatch.undo()
        assert not entry(backend, 1) & COMPRESSED
        assert await backend.read(0, 2 * CLUSTER) == part * 2


@pytest.mark.parametrize(
    ("offset", "length"), [(512, CLUSTER), (0, CLUSTER - 512), (0, CLUSTER + 1), (SIZE - CLUSTER, CLUSTER - 512)]
)
async def test_parts_of_clusters_are_refused(offset: int, length: int) -> None:
    async with in_memory(await new_store()) as backend:
        with pytest.raises(OutOfRangeError, match="whole clusters of 65536 bytes"):
            await backend.write_compressed(offset, b"x" * length)
        assert entry(backend, 0) == 0


async def test_who_cannot_compress_says_so(tmp_path: Path) -> None:
    raw = tmp_path / "x.raw"
    raw.write_bytes(bytes(CLUSTER))
    async with fusedisk.open(raw, format="raw", writable=True) as disk:
        with pytest.raises(NotSupportedError, match="raw does not compress"):
            await disk.write_compressed(0, bytes(CLUSTER))
    image = tmp_path / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'x.data'}", image, "1M")
    async with opened(image) as backend:
        with pytest.raises(NotSupportedError, match="has an external data file, so nothing in it can be compressed"):
            await backend.write_compressed(0, b"c" * CLUSTER)
    async with opened(await create_image(tmp_path / "y.qcow2", size=CLUSTER), writable=False) as backend:
        with pytest.raises(ReadOnlyError):
            await backend.write_compressed(0, b"c" * CLUSTER)


async def test_filters_pass_it_on(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=4 * CLUSTER)
    below = {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
    async with fusedisk.open({"driver": "copy-on-read", "file": below}, writable=True) as disk:
        await disk.write_compressed(CLUSTER, b"c" * CLUSTER)
        assert await disk.read(CLUSTER, CLUSTER) == b"c" * CLUSTER
    assert json.loads(qemu_img("check", "--output=json", image))["compressed-clusters"] == 1


def test_from_outside_trio(tmp_path: Path) -> None:
    image = tmp_path / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "200k")
    with fusedisk.open_sync(image, writable=True) as disk:
        disk.write_compressed(0, b"c" * (200 << 10))
        assert disk.read(0, 200 << 10) == b"c" * (200 << 10)
    assert json.loads(qemu_img("check", "--output=json", image))["compressed-clusters"] == 4
