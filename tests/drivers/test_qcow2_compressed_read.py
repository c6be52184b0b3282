"""Reading compressed clusters: runs of them, several readers of one, what is there at once, beside writers."""

from __future__ import annotations

import gc
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.model.extent import DATA, SPECIAL, ZERO
from fusedisk.compression.inflate import InflateError
from fusedisk.core.errors import CorruptImageError, HostError
from fusedisk.drivers.format import compressed_pieces as compressed
from fusedisk.drivers.format.qcow2.entries import OFFSET_MASK
from tests.conftest import qemu_img
from tests.support.compressed import (
    CLUSTER,
    CONTENT,
    SIZE,
    cluster_content,
    entries,
    inflated,
    new_store,
    reader_of,
    reading,
)
from tests.support.memory import Store
from tests.support.qcow2 import CLUSTER_SIZES, created_in_memory, driver_of, in_memory, opened
from tests.support.tasks import start

# --- runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"extended_l2": True}], ids=["plain", "extended"])
async def test_neighbours_are_one_extent(options: dict[str, Any]) -> None:
    async with reading(await new_store(**options)) as backend:
        driver = driver_of(backend)
        found = await driver.map(100, SIZE - 100)
        assert found[:2] == (SPECIAL, SIZE - 100)
        assert found.compressed
        assert list(found.token) == entries(backend)[: SIZE // CLUSTER]  # type: ignore[call-overload]
        await backend.write(5 * CLUSTER, b"n" * CLUSTER)
        await backend.write_zeroes(9 * CLUSTER, CLUSTER)
        lengths = []
        position = 0
        while position < 12 * CLUSTER:
            found = await driver.map(position, 12 * CLUSTER - position)
            lengths.append((found.status, found.length // CLUSTER))
            position += found.length
        assert lengths == [(SPECIAL, 5), (DATA, 1), (SPECIAL, 3), (ZERO, 1), (SPECIAL, 2)]
        assert (await driver.map(CLUSTER + 7, CLUSTER)).length == CLUSTER
        assert (await driver.map(CLUSTER + 7, 5)).length == 5


async def test_an_entry_that_cannot_be_ends_a_run_and_is_met_by_who_reads_it() -> None:
    store = await new_store(extended_l2=True)
    async with reading(store) as backend:
        image = driver_of(backend).image
        table = image.l2.tables[image.l1[0] & OFFSET_MASK]
        table[2 * 4 + 1] = 1  # subclusters of a compressed cluster
        assert await backend.read(0, 4 * CLUSTER) == CONTENT[: 4 * CLUSTER]
        with pytest.raises(CorruptImageError, match=f"guest offset {4 * CLUSTER} is .* as the cluster is compressed"):
            await backend.read(3 * CLUSTER, 2 * CLUSTER)


async def test_a_run_is_read_from_the_host_at_once() -> None:
    store = await new_store()
    async with reading(store) as backend:
        assert await backend.read(CLUSTER + 100, 1 << 20) == CONTENT[CLUSTER + 100 : CLUSTER + 100 + (1 << 20)]
        assert len(store.steps.of("read")) == 1
        assert await backend.read(0, SIZE) == CONTENT
        await backend.wait_idle()
        total = sum(call.length for call in store.steps.of("read"))
        assert total < 1.1 * len(store.data), "none of it twice"


async def test_what_lies_far_apart_is_not_read_along() -> None:
    store = await new_store()
    async with in_memory(store) as backend:
        await backend.write(20 * CLUSTER, b"far" * CLUSTER)
        # Behind the rest of the file.
        await backend.write_compressed(CLUSTER, cluster_content(1))
    async with reading(store) as backend:
        assert await backend.read(0, 3 * CLUSTER) == CONTENT[: 3 * CLUSTER]
        calls = store.steps.of("read")
        assert len(calls) == 2
        assert sum(call.length for call in calls) < CLUSTER


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [CLUSTER_SIZES[0], 4096, CLUSTER, CLUSTER_SIZES[-1]])
async def test_what_qemu_compressed(cluster_size: int, compression: str, tmp_path: Path) -> None:
    rng = random.Random(cluster_size)
    size = max(40 * cluster_size, 3 << 20) + 5 * 512
    parts = [cluster_content(n, size=4096) if rng.random() < 0.9 else bytes(4096) for n in range(size // 4096 + 1)]
    content = b"".join(parts)[:size]
    (tmp_path / "x.raw").write_bytes(content)
    image = tmp_path / "x.qcow2"
    options = f"cluster_size={cluster_size},compression_type={compression}"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, tmp_path / "x.raw", image)
    async with opened(image, writable=False) as backend:

        async def random_reads(seed: int) -> None:
            own = random.Random(seed)
            for _ in range(20):
                offset = own.randrange(size)
                length = own.randrange(1, min(3 * cluster_size + 10000, size - offset + 1))
                assert await backend.read(offset, length) == content[offset : offset + length]

        async def sequential_reads(step: int) -> None:
            for offset in range(0, size, step):
                length = min(step, size - offset)
                assert await backend.read(offset, length) == content[offset : offset + length]

        async with trio.open_nursery() as nursery:
            for seed in range(3):
                nursery.start_soon(random_reads, seed)
            for step in (100_000, 1 << 20):
                nursery.start_soon(sequential_reads, step)
        assert await backend.read(0, size) == content
        await backend.wait_idle()
        assert not backend.node.tracked
        assert all(run.finished for run in driver_of(backend).image.inflated._runs.values())


# --- several readers ------------------------------------------------------------------------------------


async def test_readers_of_one_cluster_share_its_inflation() -> None:
    store = await new_store()
    async with reading(store) as backend, trio.open_nursery() as nursery:
        held = store.steps.hold("read")
        tasks = [await start(nursery, lambda i=i: backend.read(i * CLUSTER // 2, 2 * CLUSTER)) for i in range(4)]
        held.release()
        for i, task in enumerate(tasks):
            assert await task.join() == CONTENT[i * CLUSTER // 2 :][: 2 * CLUSTER]
        geometry = driver_of(backend).image.geometry
        places = [geometry.compressed_range(entry) for entry in entries(backend)[:4]]
        read = [0] * 4
        for call in store.steps.of("read"):
            for number, (place, length) in enumerate(places):
                # Neighbours share a sector of the host.
                read[number] += call.offset < place + length - 512 and place + 512 < call.offset + call.length
        assert read == [1, 1, 1, 1]


async def test_who_waited_for_a_read_that_failed_reads_again() -> None:
    store = await new_store()
    async with reading(store) as backend, trio.open_nursery() as nursery:
        held = store.steps.hold("read")
        store.steps.fail("read", HostError("broken"))
        first = await start(nursery, lambda: backend.read(0, 10))
        others = [await start(nursery, lambda i=i: backend.read(i, 10)) for i in (1, 2)]
        held.release()
        with pytest.raises(HostError, match="broken"):
            await first.join()
        for i, task in zip((1, 2), others, strict=True):
            assert await task.join() == CONTENT[i : i + 10]
        assert len(store.steps.of("read")) == 2


async def test_who_waited_for_one_that_was_cancelled_reads_again() -> None:
    store = await new_store()
    async with reading(store) as backend, trio.open_nursery() as nursery:
        store.steps.hold("read")
        first = await start(nursery, lambda: backend.read(0, 10))
        second = await start(nursery, lambda: backend.read(5, 10))
        first.scope.cancel()
        assert await second.join() == CONTENT[5:15]


async def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BATCH", "AHEAD_BATCH"):
        monkeypatch.setattr(compressed, name, 2 * CLUSTER)
    store = await new_store()
    async with reading(store) as backend:
        cache = driver_of(backend).image.inflated
        cache.capacity = 5 * CLUSTER
        for offset in range(0, SIZE, 3 * CLUSTER):
            length = min(3 * CLUSTER, SIZE - offset)
            assert await backend.read(offset, length) == CONTENT[offset : offset + length]
            assert cache.size <= 5 * CLUSTER
        assert await backend.read(0, SIZE) == CONTENT
        await backend.wait_idle()
        assert cache.size <= 5 * CLUSTER
        assert cache.size == len(cache) * CLUSTER


# --- what is there at once ------------------------------------------------------------------------------


async def test_read_cached_answers_what_is_inflated_and_nothing_else() -> None:
    store = await new_store()
    async with reading(store) as backend:
        driver = driver_of(backend)
        buffer = memoryview(bytearray(2 * CLUSTER))
        assert not driver.read_cached(0, buffer[:10])
        await backend.read(CLUSTER + 5, 2 * CLUSTER)  # clusters 1 to 3
        store.steps.calls.clear()
        for offset, length in ((CLUSTER, 1), (CLUSTER + 77, 4096), (CLUSTER + 77, 2 * CLUSTER), (3 * CLUSTER, CLUSTER)):
            part = buffer[:length]
            part[:] = bytes(length)
            assert driver.read_cached(offset, part)
            assert part == CONTENT[offset : offset + length]
        assert not driver.read_cached(CLUSTER - 1, buffer[:2])
        assert not driver.read_cached(4 * CLUSTER - 1, buffer[:2])
        assert not store.steps.of("read")
        found = reader_of(backend).cached(entries(backend)[2], 100, 50)
        assert found == CONTENT[2 * CLUSTER + 100 :][:50]
        await backend.write(2 * CLUSTER, b"n")
        assert not driver.read_cached(2 * CLUSTER, buffer[:10])
        assert not driver.read_cached(CLUSTER, buffer)
        assert driver.read_cached(CLUSTER, buffer[:CLUSTER])


async def test_the_first_look_at_a_cluster_is_given_no_more_than_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    path.write_bytes((await new_store()).data)
    async with opened(path) as backend:
        await backend.read(0, 1)
        read = backend.immediate.read
        buffer = bytearray(4096)
        assert read(3 * CLUSTER, buffer)
        assert inflated(backend) == {0, 3}, "there is room for all of it"
        cache = driver_of(backend).image.inflated
        cache.capacity = cache.size
        for number in (5, 9):
            place = number * CLUSTER + 8192
            assert read(place, buffer)
            assert buffer == CONTENT[place : place + 4096]
            assert inflated(backend) == {0, 3}
        assert read(5 * CLUSTER + 40960, buffer), "the second look"
        assert buffer == CONTENT[5 * CLUSTER + 40960 :][:4096]
        assert inflated(backend) == {3, 5}
        assert read(7 * CLUSTER + 60_000, memoryview(buffer)[:4000]), "not much less than all of it"
        assert buffer[:4000] == CONTENT[7 * CLUSTER + 60_000 :][:4000]
        assert inflated(backend) == {5, 7}


async def test_random_looks_see_what_is_there(tmp_path: Path) -> None:
    content = bytearray(CONTENT)
    rng = random.Random(7)
    for number in range(0, SIZE // CLUSTER, 3):
        # What does not compress lies between what does, at some place of the cluster.
        place, length = number * CLUSTER + rng.randrange(CLUSTER // 2), rng.randrange(CLUSTER // 4)
        content[place : place + length] = rng.randbytes(length)
    path = tmp_path / "image.qcow2"
    path.write_bytes((await new_store(bytes(content))).data)
    async with opened(path) as backend:
        driver_of(backend).image.inflated.capacity = 20 * CLUSTER
        for _ in range(1500):
            offset = rng.randrange(SIZE)
            length = min(rng.randrange(1, 8192), SIZE - offset)
            buffer = bytearray(length)
            if not backend.immediate.read(offset, buffer):
                await backend.read_into(offset, memoryview(buffer))
            assert buffer == content[offset : offset + length]


async def test_damage_behind_what_is_looked_at_is_for_who_reads_it(tmp_path: Path) -> None:
    store = await new_store()
    async with reading(store) as backend:
        start, length = driver_of(backend).image.geometry.compressed_range(entries(backend)[5])
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    packed = packer.compress(CONTENT[5 * CLUSTER :][: CLUSTER // 2]) + packer.flush(zlib.Z_SYNC_FLUSH) + b"\xff" * 100
    assert len(packed) < length
    store.data[start : start + len(packed)] = packed
    path = tmp_path / "image.qcow2"
    path.write_bytes(store.data)
    async with opened(path) as backend:
        await backend.read(0, 1)
        driver_of(backend).image.inflated.capacity = CLUSTER
        buffer = bytearray(512)
        assert backend.immediate.read(5 * CLUSTER, buffer)
        assert buffer == CONTENT[5 * CLUSTER :][:512]
        with pytest.raises(CorruptImageError, match=f"compressed cluster for guest offset {5 * CLUSTER}"):
            await backend.read(5 * CLUSTER, CLUSTER)


async def test_damage_keeps_nothing_in_memory_but_why() -> None:
    """What an exception has in its reach is all compressed data that was read along with the damage."""
    store = await new_store()
    async with reading(store) as backend:
        start, _ = driver_of(backend).image.geometry.compressed_range(entries(backend)[2])
    store.data[start : start + 100] = b"\xff" * 100
    async with reading(store) as backend:
        for offset in (CLUSTER, 2 * CLUSTER):  # in the middle of several, and alone
            with pytest.raises(CorruptImageError, match=f"compressed cluster for guest offset {2 * CLUSTER}"):
                await backend.read(offset, 2 * CLUSTER if offset == CLUSTER else CLUSTER)
        assert inflated(backend) >= {1}
        gc.collect()
        assert not any(isinstance(each, InflateError) for each in gc.get_objects())


# --- beside writers -------------------------------------------------------------------------------------


async def test_space_used_again_under_the_same_entry() -> None:
    """A cluster is freed, and another one compressed to the very same place: nobody gets the old one for it."""
    content = [cluster_content(number, size=512) for number in range(8)]
    store = await created_in_memory(Store(), size=1 << 20, cluster_size=512)
    async with in_memory(store) as backend:
        seen: dict[int, set[int]] = {}
        rng = random.Random(3)
        current: dict[int, bytes] = {}
        for step in range(400):
            number = rng.randrange(8)
            if rng.random() < 0.3:
                current[number] = bytes([step % 255 + 1]) * 512
                await backend.write(number * 512, current[number])
                await backend.flush()
            else:
                current[number] = rng.choice(content)
                await backend.write_compressed(number * 512, current[number])
                seen.setdefault(entries(backend)[number], set()).add(hash(current[number]))
                if rng.random() < 0.2:
                    await backend.flush()
            for other, expected in current.items():
                assert await backend.read(other * 512, 512) == expected
        assert any(len(contents) > 1 for contents in seen.values()), "no entry was used twice"


@pytest.mark.parametrize("seed", range(4))
async def test_readers_beside_writers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sector that is read is one that was there at some instant of the request."""
    size, count = 4096, 48
    monkeypatch.setattr(compressed, "AHEAD_BATCH", 4 * size)
    rng = random.Random(seed)
    versions = [[0, 0] for _ in range(count)]  # written for sure, begun
    store = await new_store(b"".join(cluster_content(n, size=size) for n in range(count)), cluster_size=size)
    async with in_memory(store) as backend:
        store.steps.eager = False
        driver_of(backend).image.inflated.capacity = rng.choice((8, 1000)) * size

        async def write(own: random.Random, numbers: range) -> None:
            for _ in range(60):
                number = own.choice(numbers)
                versions[number][1] += 1
                data = cluster_content(number, versions[number][1], size)
                await (backend.write_compressed if own.random() < 0.6 else backend.write)(number * size, data)
                versions[number][0] = versions[number][1]
                if own.random() < 0.2:
                    await backend.flush()

        async def read(own: random.Random) -> None:
            first = 0
            while not done.is_set():
                await trio.lowlevel.checkpoint()
                first = own.randrange(count) if own.random() < 0.1 else (first + 3) % count
                length = min(own.randrange(1, 12), count - first)
                before = [low for low, _ in versions[first : first + length]]
                data = await backend.read(first * size, length * size)
                for index, low in enumerate(before):
                    number = first + index
                    part = data[index * size : (index + 1) * size]
                    found, version = struct.unpack_from("<QQ", part)
                    assert found == number
                    assert low <= version <= versions[number][1]
                    assert part == cluster_content(number, version, size)

        done = trio.Event()
        with trio.fail_after(120):
            async with trio.open_nursery() as readers:
                for number in range(3):
                    readers.start_soon(read, random.Random(seed * 100 + number))
                async with trio.open_nursery() as writers:
                    for number in range(3):
                        writers.start_soon(write, random.Random(seed * 7 + number), range(number, count, 3))
                done.set()
        store.steps.eager = True
        for number in range(count):
            expected = cluster_content(number, versions[number][0], size)
            assert await backend.read(number * size, size) == expected
