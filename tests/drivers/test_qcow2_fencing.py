"""Writes to a corrupt qcow2 image: they are refused before they make it worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.core.errors import CorruptImageError, FusediskError
from tests.support.memory import Store
from tests.support.qcow2 import (
    assert_clean,
    driver_of,
    in_memory,
    saved,
)

CLUSTER = 65536


def l2_entry_at(store: Store, backend: Backend, index: int) -> int:
    return (driver_of(backend).image.l1[0] & ~(1 << 63)) + 8 * index


BAD_ENTRIES = [
    ("unaligned", (1 << 63 | 5 * CLUSTER + 512), "multiple of 65536"),
    ("reserved bits", (1 << 63 | 1 << 60 | 5 * CLUSTER), "reserved bits"),
]


@pytest.mark.parametrize(("what", "entry", "found"), BAD_ENTRIES)
@pytest.mark.parametrize(
    "request_",
    [
        lambda backend: backend.read(2 * CLUSTER + 5, 10),
        lambda backend: backend.write(2 * CLUSTER + 5, b"n"),
        lambda backend: backend.discard(CLUSTER, 2 * CLUSTER),
        lambda backend: backend.write_zeroes(0, 4 * CLUSTER),
    ],
    ids=["read", "write", "discard", "zeroes"],
)
@pytest.mark.parametrize("written", [True, False], ids=["written to before", "untouched"])
async def test_bad_l2_entries_fence_the_image(
    store: Store, what: str, entry: int, found: str, request_: Any, written: bool
) -> None:
    async with in_memory(store) as backend:
        await backend.write(0, b"x" * 4 * CLUSTER)
        at = l2_entry_at(store, backend, 2)
    store.data[at : at + 8] = entry.to_bytes(8, "big")
    untouched = bytes(store.data)
    async with in_memory(store, discard="unmap") as backend:
        if written:
            await backend.write(0, b"x")
        with pytest.raises(CorruptImageError, match=found):
            await request_(backend)
        assert await backend.read(0, CLUSTER) == b"x" * CLUSTER, "the rest is readable"
        with pytest.raises(CorruptImageError, match="no writes"):
            await backend.write(0, b"n")
    if store.data[79] == 2:
        with pytest.raises(FusediskError, match="marked corrupt"):
            async with in_memory(store):
                pass
    else:
        assert not written, "marked corrupt only where we have changed it"
        assert store.data == untouched
    async with in_memory(store, writable=False) as backend:
        assert await backend.read(0, CLUSTER) == b"x" * CLUSTER


@pytest.mark.parametrize("entry", [1 << 63 | 512, 1 << 63 | 1, 1 << 62 | CLUSTER])
async def test_bad_l1_entries_fence_the_image(store: Store, entry: int) -> None:
    async with in_memory(store) as backend:
        await backend.truncate(1 << 30)
        await backend.write(600 << 20, b"x")
        at = driver_of(backend).image.header.l1_table_offset
    store.data[at : at + 8] = (entry | 4 * CLUSTER).to_bytes(8, "big")
    async with in_memory(store) as backend:
        with pytest.raises(CorruptImageError, match="L1 entry 0"):
            await backend.read(0, 10)
        assert await backend.read(600 << 20, 1) == b"x"


async def test_an_l2_table_that_is_other_metadata_is_never_written(store: Store) -> None:
    async with in_memory(store) as backend:
        await backend.write(0, b"x")
        header = driver_of(backend).image.header
        block = driver_of(backend).refcounts.table[0]
    for place, what in ((header.l1_table_offset, "L1 table"), (block, "refcount block")):
        hostile = Store(bytes(store.data))
        at = header.l1_table_offset
        hostile.data[at : at + 8] = (1 << 63 | place).to_bytes(8, "big")
        async with in_memory(hostile) as backend:
            with pytest.raises(CorruptImageError, match=f"L1 entry 0 leads to {place}, where its {what} lies"):
                await backend.write(50 * CLUSTER, b"n")


async def test_an_entry_that_leads_into_metadata_is_never_written_through(store: Store) -> None:
    async with in_memory(store) as backend:
        await backend.write(0, b"x" * 4 * CLUSTER)
        at = l2_entry_at(store, backend, 1)
        l1_offset = driver_of(backend).image.header.l1_table_offset
    store.data[at : at + 8] = (1 << 63 | l1_offset).to_bytes(8, "big")
    async with in_memory(store) as backend:
        await backend.write(0, b"y" * CLUSTER)
        with pytest.raises(CorruptImageError, match=f"leads to {l1_offset}, where its L1 table lies"):
            await backend.write(CLUSTER, b"evil" * 100)
    assert store.data[l1_offset : l1_offset + 4] != b"evil"


@pytest.mark.parametrize("what", ["header", "L1 table", "refcount table", "refcount block", "L2 table"])
async def test_metadata_is_never_allocated_whatever_the_refcounts_say(store: Store, what: str) -> None:
    async with in_memory(store) as backend:
        await backend.write(0, b"x")
        driver = driver_of(backend)
        header = driver.image.header
        block = driver.refcounts.table[0]
        place = {
            "header": 0,
            "L1 table": header.l1_table_offset,
            "refcount table": header.refcount_table_offset,
            "refcount block": block,
            "L2 table": driver.image.l1[0] & ~(1 << 63),
        }[what]
    at = block + place // CLUSTER * 2
    store.data[at : at + 2] = b"\0\0"
    async with in_memory(store) as backend:
        with pytest.raises(CorruptImageError, match=f"its {what} lies there"):
            await backend.write(9 * CLUSTER, b"n")
        with pytest.raises(CorruptImageError):
            await backend.write(0, b"n")
        assert await backend.read(0, 1) == b"x"


async def test_a_cluster_in_use_with_a_refcount_of_zero(store: Store) -> None:
    async with in_memory(store) as backend:
        await backend.write(0, b"x" * CLUSTER)
        block = driver_of(backend).refcounts.table[0]
        l2_offset = driver_of(backend).image.l1[0] & ~(1 << 63)
    host = int.from_bytes(store.data[l2_offset : l2_offset + 8], "big") & ~(1 << 63)
    store.data[l2_offset] &= 0x7F  # not COPIED: the refcount decides
    at = block + host // CLUSTER * 2
    store.data[at : at + 2] = b"\0\0"
    async with in_memory(store) as backend:
        with pytest.raises(CorruptImageError, match="refcount is 0"):
            await backend.write(10, b"n")
        assert await backend.read(0, 20) == b"x" * 20


async def test_an_unmarked_cluster_of_ours_is_adopted(store: Store, tmp_path: Path) -> None:
    async with in_memory(store) as backend:
        await backend.write(0, b"x" * CLUSTER)
        l2_offset = driver_of(backend).image.l1[0] & ~(1 << 63)
        l1_offset = driver_of(backend).image.header.l1_table_offset
    store.data[l2_offset] &= 0x7F
    store.data[l1_offset] &= 0x7F
    end = len(store.data)
    async with in_memory(store) as backend:
        await backend.write(10, b"n")
        assert await backend.read(9, 3) == b"xnx"
    assert len(store.data) == end
    assert_clean(saved(store, tmp_path))


async def test_autoclear_bits_go_with_the_first_change(store: Store) -> None:
    store.data[88:96] = (3 | 1 << 50).to_bytes(8, "big")
    async with in_memory(store, writable=False):
        pass
    assert store.data[88:96] == (3 | 1 << 50).to_bytes(8, "big")
    async with in_memory(store) as backend:
        await backend.read(0, CLUSTER)
        await backend.flush()
        assert not store.steps.of("write"), "nothing is touched by reading"
        await backend.write(0, b"x")
        assert store.steps.of("write")[0].offset == 88
        assert store.durable[88:96] == bytes(8), "before anything else"
    assert store.data[88:96] == bytes(8)
