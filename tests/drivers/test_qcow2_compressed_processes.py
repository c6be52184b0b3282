"""Compressed clusters that inflate in processes: the same content, the same errors, and nothing that is out of date."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.compression import inflate_pool
from fusedisk.compression.inflate_pool import InflatePool
from fusedisk.core.errors import CorruptImageError
from tests.support.compressed import CLUSTER, CONTENT, COUNT, SIZE, cluster_content, entries, new_store, reading
from tests.support.qcow2 import driver_of
from tests.support.tasks import start, until

CAPACITY = 8 << 20


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A little is worth a process here."""
    monkeypatch.setattr(inflate_pool, "BREAK_EVEN", 1)


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "fusedisk.compression.inflate_worker" in child.cmdline()]


@asynccontextmanager
async def pool() -> AsyncIterator[InflatePool]:
    """Processes that are ready."""
    made = InflatePool(2, CAPACITY)
    inflate_pool._pool().set(made)
    assert made.begin(1, 1) is None
    await until(lambda: made.parallel(1))
    yield made


def kept(backend: Backend) -> dict[int, type]:
    """What kind of memory the inflated clusters are in."""
    cache = driver_of(backend).image.inflated
    found = {number: cache.get(entry) for number, entry in enumerate(entries(backend))}
    return {number: type(content) for number, content in found.items() if content is not None}


@pytest.mark.parametrize("codec", ["zlib", "zstd"])
async def test_all_of_it_reads_the_same(codec: str) -> None:
    store = await new_store(compression_type=codec)
    async with pool(), reading(store) as backend:
        for offset in range(0, SIZE, 32 * CLUSTER):
            assert await backend.read(offset, 32 * CLUSTER) == CONTENT[offset : offset + 32 * CLUSTER]
        assert kept(backend) == dict.fromkeys(range(COUNT), memoryview)
        rng = random.Random(1)
        for _ in range(200):
            offset = rng.randrange(SIZE)
            length = min(rng.randrange(1, 6 * CLUSTER), SIZE - offset)
            assert await backend.read(offset, length) == CONTENT[offset : offset + length]


async def test_what_is_asked_for_again_keeps_no_neighbours() -> None:
    store = await new_store()
    async with pool(), reading(store) as backend:
        cache = driver_of(backend).image.inflated
        cache._proof = 16 * CLUSTER
        await backend.read(0, 8 * CLUSTER)
        await backend.read(8 * CLUSTER, 32 * CLUSTER)
        assert await backend.read(3 * CLUSTER, CLUSTER) == CONTENT[3 * CLUSTER : 4 * CLUSTER]
        assert kept(backend)[3] is bytes


async def test_a_damaged_cluster_is_told_as_ever() -> None:
    store = await new_store()
    told = []
    for processes in (False, True):
        async with reading(store) as backend:
            place, _ = driver_of(backend).image.geometry.compressed_range(entries(backend)[5])
            store.data[place + 8 : place + 40] = bytes(32)
        async with reading(store) as backend:
            if processes:
                async with pool():
                    with pytest.raises(CorruptImageError) as caught:
                        await backend.read(0, 16 * CLUSTER)
                    assert await backend.read(6 * CLUSTER, 4 * CLUSTER) == CONTENT[6 * CLUSTER : 10 * CLUSTER]
            else:
                with pytest.raises(CorruptImageError) as caught:
                    await backend.read(0, 16 * CLUSTER)
            told.append(str(caught.value))
    assert told[0] == told[1]


async def test_what_is_rewritten_meanwhile_is_not_kept() -> None:
    store = await new_store()
    async with pool(), reading(store, writable=True) as backend, trio.open_nursery() as nursery:
        for worker in workers():
            worker.send_signal(signal.SIGSTOP)
        task = await start(nursery, lambda: backend.read(0, 4 * CLUSTER))
        assert not task.done
        new = cluster_content(2, version=1)
        writing = await start(nursery, lambda: backend.write(2 * CLUSTER, new))
        for worker in workers():
            worker.send_signal(signal.SIGCONT)
        await writing.join()
        content = await task.join()
        old = CONTENT[2 * CLUSTER : 3 * CLUSTER]
        assert content[2 * CLUSTER : 3 * CLUSTER] in (old, new)
        assert await backend.read(2 * CLUSTER, CLUSTER) == new


async def test_when_all_processes_are_killed_reading_goes_on() -> None:
    store = await new_store()
    async with pool(), reading(store) as backend, trio.open_nursery() as nursery:
        stopped = workers()
        for worker in stopped:
            worker.send_signal(signal.SIGSTOP)
        task = await start(nursery, lambda: backend.read(0, 4 * CLUSTER))
        assert not task.done
        for worker in stopped:
            os.kill(worker.pid, signal.SIGKILL)
        assert await task.join() == CONTENT[: 4 * CLUSTER]
        assert await backend.read(0, 8 * CLUSTER) == CONTENT[: 8 * CLUSTER]
