"""Images in memory whose clusters are all compressed, and what of them is inflated."""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fusedisk.block.graph.backend import Backend
from fusedisk.drivers.format.compressed_pieces import CompressedPieces
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, OFFSET_MASK
from tests.support.memory import Store
from tests.support.qcow2 import created_in_memory, driver_of, in_memory

CLUSTER = 64 << 10
COUNT = 64
SIZE = COUNT * CLUSTER


def cluster_content(number: int, version: int = 0, size: int = CLUSTER) -> bytes:
    """A cluster that compresses to about a fifth, and tells what it is in each 16 bytes."""
    rng = random.Random(number << 20 | version)
    stamp = struct.pack("<QQ", number, version)
    return (stamp * (size // 16 // 5 * 4)) + b"".join(
        stamp[:8] + rng.randbytes(8) for _ in range(size // 16 - size // 16 // 5 * 4)
    )


CONTENT = b"".join(cluster_content(number) for number in range(COUNT))


async def new_store(content: bytes = CONTENT, **options: Any) -> Store:
    """An image with compressed clusters only, in order in the file."""
    store = await created_in_memory(Store(), size=len(content), **options)
    async with in_memory(store) as backend:
        size = driver_of(backend).image.geometry.cluster_size
        for offset in range(0, len(content), size):
            await backend.write_compressed(offset, content[offset : offset + size])
    return store


@asynccontextmanager
async def reading(store: Store, **options: Any) -> AsyncIterator[Backend]:
    """The image, opened, with its L2 table in memory and the list of calls empty."""
    async with in_memory(store, **options) as backend:
        await driver_of(backend).map(0, 1)
        store.steps.calls.clear()
        yield backend


def reader_of(backend: Backend) -> CompressedPieces:
    found = driver_of(backend)._compressed
    assert found is not None
    return found


def entries(backend: Backend) -> list[int]:
    image = driver_of(backend).image
    table = image.l2.tables[image.l1[0] & OFFSET_MASK]
    return list(table[:: image.geometry.entry_words])


def inflated(backend: Backend) -> set[int]:
    """Numbers of the guest clusters that are in the cache."""
    cache = driver_of(backend).image.inflated
    wanted = {number: entry for number, entry in enumerate(entries(backend)) if entry & COMPRESSED}
    return {number for number, entry in wanted.items() if cache.knows(entry) and cache.loading(entry) is None}


async def read_on(backend: Backend, first: int = 0, count: int = 3) -> None:
    """Be taken for a sequential reader, a cluster at a time."""
    for number in range(first, first + count):
        assert await backend.read(number * CLUSTER, CLUSTER) == CONTENT[number * CLUSTER : (number + 1) * CLUSTER]
