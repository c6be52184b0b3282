"""The block table apart from any format: what it writes in which order, what it refuses, bitmaps for each block."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest
import trio
import trio.testing

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.registry import Registry
from fusedisk.block.model.children import BackingReference
from fusedisk.block.model.edge import Child
from fusedisk.block.model.extent import DATA, UNALLOCATED, ZERO
from fusedisk.block.model.node import Node
from fusedisk.core.errors import CorruptImageError, HostError, ImageError, NotSupportedError
from fusedisk.drivers.format.block_checks import flat_table, two_level_table
from fusedisk.drivers.format.block_entries import Area, Entries
from fusedisk.drivers.format.block_storage import Level
from fusedisk.drivers.format.block_table import BlockTable
from fusedisk.drivers.format.table_driver import TableDriver
from tests.hostile.sentence import assert_sentence
from tests.support.memory import Store, stores

SECTOR = 512
BLOCK = 2048
FIRST = 4096
COUNT = 64
ENTRIES = Entries(4, "little", unit=SECTOR, kinds={0xFFFF_FFFF: UNALLOCATED, 0xFFFF_FFFE: ZERO})
FREE = struct.pack("<I", 0xFFFF_FFFF)

Setup = Callable[[Node, Child], Awaitable[BlockTable]]


class BlocksDriver(TableDriver):
    """Whatever table the test sets up, over a disk of ``COUNT`` blocks."""

    name = "blocks"
    supports_backing = True
    setup: Setup

    def backing_reference(self) -> BackingReference | None:
        return None

    async def open(self) -> None:
        self.disk_length = COUNT * BLOCK
        self.table = await type(self).setup(self.node, self.node.children["file"])


DRIVERS = Registry(
    {
        "blocks": "tests.drivers.test_block_table:BlocksDriver",
        "memory": "tests.support.memory:MemoryDriver",
        "raw": "fusedisk.drivers.format.raw:RawDriver",
    },
    prefixes={"memory": "memory"},
    probed=("raw",),
)


def area(edge: Child, **more: Any) -> Area:
    return Area(FIRST, edge.node.length, size=BLOCK, align=more.pop("align", BLOCK), **more)


async def flat(node: Node, edge: Child) -> BlockTable:
    return await flat_table(node, edge, ENTRIES, area(edge), count=COUNT, places=(SECTOR,))


async def tree(node: Node, edge: Child) -> BlockTable:
    """A directory of 8 entries at 512, its copy at 1024; 8 blocks a table; two tables in memory."""
    return await two_level_table(
        node, edge, ENTRIES, ENTRIES, area(edge, align=SECTOR), count=8, places=(512, 1024), per_table=8, cache_size=64
    )


def empty(entries: int = COUNT) -> Store:
    """An image without blocks."""
    store = Store((bytes(SECTOR) + FREE * entries).ljust(FIRST, b"\xff"))
    store.durable = bytes(store.data)
    return store


@asynccontextmanager
async def opened(setup: Setup, store: Store, below: bytes | None = None, **options: Any) -> AsyncIterator[Backend]:
    BlocksDriver.setup = staticmethod(setup)  # type: ignore[assignment]
    graph = Graph(DRIVERS)
    spec: dict[str, Any] = {"driver": "blocks", "file": {"driver": "memory", "filename": "image"}, **options}
    if below is not None:
        spec["backing"] = {"driver": "raw", "file": {"driver": "memory", "filename": "below"}}
    with stores(image=store, below=Store(below or b"")):
        try:
            yield await graph.open_backend(spec, writable=True)
        finally:
            store.steps.heal()
            await graph.close()


def entry(store: Store, block: int) -> int:
    return int(struct.unpack_from("<I", store.data, SECTOR + 4 * block)[0])


# --- order ----------------------------------------------------------------------------------------------


async def test_data_is_durable_before_the_entry_that_leads_to_it() -> None:
    store = empty()
    async with opened(flat, store) as disk:
        await disk.write(5 * BLOCK, b"x" * BLOCK)
        assert entry(store, 5) == 0xFFFF_FFFF, "entries are written by a flush"
        store.steps.calls.clear()
        await disk.flush()
        assert [(call.operation, call.offset) for call in store.steps.of("write", "flush")] == [
            ("flush", 0),
            ("write", SECTOR),
            ("flush", 0),
        ]
        assert entry(store, 5) == FIRST // SECTOR
        store.steps.calls.clear()
        await disk.flush()
        assert not store.steps.of("write", "flush")


async def test_tables_are_durable_before_the_directories_that_lead_to_them() -> None:
    store = empty()
    async with opened(tree, store) as disk:
        await disk.write(9 * BLOCK, b"x")
        store.steps.calls.clear()
        await disk.flush()
        calls = [(call.operation, call.offset) for call in store.steps.of("write", "flush")]
        kinds = ["directory" if call[1] in (512, 1024) else call[0] for call in calls]
        assert kinds == ["flush", "write", "write", "flush", "directory", "directory", "flush"]


async def test_what_is_published_during_the_barrier_waits_for_the_next() -> None:
    store = empty()
    async with opened(flat, store) as disk:
        await disk.write(0, b"x" * BLOCK)
        held = store.steps.hold("flush")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.flush)
            await held.reached.wait()
            await disk.write(BLOCK, b"y" * BLOCK)
            held.release()
        assert entry(store, 0) != 0xFFFF_FFFF
        assert entry(store, 1) == 0xFFFF_FFFF
        await disk.flush()
        assert entry(store, 1) != 0xFFFF_FFFF


async def test_a_failed_write_of_the_table_is_made_again() -> None:
    store = empty()
    async with opened(flat, store) as disk:
        await disk.write(0, b"x" * BLOCK)
        store.steps.fail("write", HostError("no such luck"))
        with pytest.raises(HostError):
            await disk.flush()
        await disk.flush()
        assert entry(store, 0) != 0xFFFF_FFFF


async def test_a_freed_block_is_used_again_when_its_entry_is_gone_from_the_disk() -> None:
    store = empty()
    async with opened(flat, store, discard="unmap") as disk:
        await disk.write(0, b"x" * BLOCK)
        await disk.flush()
        await disk.discard(0, BLOCK)
        for flushes in range(2):
            await disk.write((2 + flushes) * BLOCK, b"y" * BLOCK)
            await disk.flush()
            assert entry(store, 2 + flushes) != FIRST // SECTOR, f"after {flushes} flushes"
        await disk.write(4 * BLOCK, b"z" * BLOCK)
        await disk.flush()
        assert entry(store, 4) == FIRST // SECTOR
    assert len(store.data) == FIRST + 3 * BLOCK


# --- requests at the same time --------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
async def test_the_second_writer_of_a_block_waits_for_the_first(fails: bool) -> None:
    store = empty()
    async with opened(flat, store) as disk:
        held = store.steps.hold("write")
        if fails:
            store.steps.fail("write", HostError("no such luck"))

        async def first() -> None:
            with pytest.raises(HostError) if fails else nullcontext():
                await disk.write(0, b"x" * 100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await held.reached.wait()
            nursery.start_soon(disk.write, 100, b"y" * 100)
            await trio.testing.wait_all_tasks_blocked()
            assert len(store.steps.of("write")) == 1
            held.release()
        expected = (bytes(100) if fails else b"x" * 100) + b"y" * 100
        assert await disk.read(0, 300) == expected + bytes(100)
    assert len(store.data) == FIRST + BLOCK, "both are in one block"


async def test_neighbours_are_allocated_and_found_together() -> None:
    store = empty()
    async with opened(flat, store) as disk:
        store.steps.calls.clear()
        await disk.write(0, b"x" * (10 * BLOCK))
        assert [call.length for call in store.steps.of("write")] == [10 * BLOCK]
        assert disk.node.driver.lookup(100, 20 * BLOCK)[:2] == (DATA, 10 * BLOCK - 100)  # type: ignore[index]
        assert disk.node.driver.lookup(10 * BLOCK, 99 * BLOCK)[:2] == (UNALLOCATED, 54 * BLOCK)  # type: ignore[index]
        assert disk.node.driver.lookup_in_place(100, 20 * BLOCK)[0] == 10 * BLOCK - 100  # type: ignore[index]


async def test_new_space_is_not_filled_with_zeroes() -> None:
    store = empty()
    async with opened(flat, store) as disk:
        store.steps.calls.clear()
        await disk.write(600, b"x")
        assert [call.length for call in store.steps.of("write")] == [1]
        assert await disk.read(0, BLOCK) == bytes(600) + b"x" + bytes(BLOCK - 601)


async def test_changed_tables_stay_few_in_memory() -> None:
    store = empty()
    async with opened(tree, store) as disk:
        for block in range(0, COUNT, 3):
            await disk.write(block * BLOCK, bytes([block]))
        tables = disk.node.driver.table.tables  # type: ignore[attr-defined]
        assert len(tables._cache.tables) <= 3
        for block in range(0, COUNT, 3):
            assert await disk.read(block * BLOCK, 1) == bytes([block])


# --- opening --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({3: 1}, "has a block at 512, in front of the first block at 4096"),
        ({3: 12}, "has a block at 6144, past the end of the file at 6144"),
        ({3: 9}, "has a block at 4608, which is not 4096 plus a multiple of 2048"),
        ({3: 8, 5: 8}, "has a block at 4096, where another block lies"),
    ],
)
@pytest.mark.parametrize("setup", [flat, tree])
async def test_entries_that_lead_to_wrong_places(entries: dict[int, int], sentence: str, setup: Setup) -> None:
    store = empty()
    store.data += bytes(BLOCK)
    at = SECTOR
    if setup is tree:
        struct.pack_into("<I", store.data, 512, 4)
        struct.pack_into("<I", store.data, 1024, 4)
        store.data[2048:2080] = FREE * 8
        at = 2048
        if "multiple" in sentence:
            return  # blocks lie as they come there
    for block, word in entries.items():
        struct.pack_into("<I", store.data, at + 4 * block, word)
    with pytest.raises(CorruptImageError, match=sentence) as caught:
        async with opened(setup, store) as disk:
            await disk.read(0, BLOCK)
    assert_sentence(caught.value)


@pytest.mark.parametrize(
    ("count", "sentence"),
    [(1024, "has its block table at 512, 4096 bytes long, but the file ends at 4096"), (1 << 30, "at most 536870912")],
)
async def test_tables_that_are_too_long(count: int, sentence: str) -> None:
    async def setup(node: Node, edge: Child) -> BlockTable:
        return await flat_table(node, edge, ENTRIES, area(edge), count=count, places=(SECTOR,))

    with pytest.raises(ImageError, match=sentence) as caught:
        async with opened(setup, empty()):
            pass
    assert_sentence(caught.value)


async def test_holes_of_an_earlier_run_are_filled() -> None:
    store = empty()
    store.data += b"o" * (3 * BLOCK)
    struct.pack_into("<I", store.data, SECTOR, (FIRST + 2 * BLOCK) // SECTOR)
    async with opened(flat, store) as disk:
        await disk.write(BLOCK, b"x")
        assert await disk.read(BLOCK, 2) == b"x\0", "what the hole held does not show"
    assert entry(store, 1) == FIRST // SECTOR
    assert len(store.data) == FIRST + 3 * BLOCK


async def test_what_follows_the_blocks_of_an_unchanged_image_is_left_alone() -> None:
    store = empty()
    store.data += b"signature"
    async with opened(flat, store) as disk:
        await disk.read(0, BLOCK)
    assert store.data.endswith(b"signature")


async def test_a_table_without_its_copy_gets_one_when_it_changes() -> None:
    store = empty()
    async with opened(tree, store) as disk:
        await disk.write(0, b"one")
    first, second = (struct.unpack_from("<I", store.data, at)[0] * SECTOR for at in (512, 1024))
    assert store.data[first : first + 32] == store.data[second : second + 32]
    store.data[1024:1028] = FREE
    async with opened(tree, store) as disk:
        await disk.write(BLOCK, b"two")
    third = struct.unpack_from("<I", store.data, 1024)[0] * SECTOR
    assert third not in (first, second)
    assert store.data[first : first + 32] == store.data[third : third + 32]


async def test_tables_may_lie_in_any_buffer() -> None:
    made: list[bytearray] = []

    def allocate(size: int) -> bytearray:
        made.append(bytearray(size))
        return made[-1]

    async def setup(node: Node, edge: Child) -> BlockTable:
        return await flat_table(node, edge, ENTRIES, area(edge), count=COUNT, places=(SECTOR,), allocate=allocate)

    async with opened(setup, empty()) as disk:
        await disk.write(BLOCK, b"x")
        assert memoryview(made[0]).cast("I")[:3].tolist() == [0xFFFF_FFFF, FIRST // SECTOR, 0xFFFF_FFFF]


async def test_entries_of_another_kind_between_those_of_blocks() -> None:
    async def setup(node: Node, edge: Child) -> BlockTable:
        return await flat_table(node, edge, ENTRIES, area(edge), count=COUNT + 15, places=(SECTOR,), interleave=4)

    store = empty(COUNT + 15)
    for index in range(4, COUNT + 15, 5):
        struct.pack_into("<I", store.data, SECTOR + 4 * index, 0xAAAA)
    async with opened(setup, store) as disk:
        await disk.write(0, b"x" * (9 * BLOCK))
        assert await disk.read(0, 10 * BLOCK) == b"x" * (9 * BLOCK) + bytes(BLOCK)
    words = [entry(store, index) for index in range(11)]
    assert words == [8, 12, 16, 20, 0xAAAA, 24, 28, 32, 36, 0xAAAA, 40]


# --- what a format cannot say ---------------------------------------------------------------------------

PLAIN = Entries(4, "little", unit=SECTOR, kinds={0xFFFF_FFFF: UNALLOCATED})


async def plain(node: Node, edge: Child) -> BlockTable:
    return await flat_table(node, edge, PLAIN, area(edge), count=COUNT, places=(SECTOR,))


async def test_zeroes_over_a_backing_file_without_an_entry_for_them() -> None:
    async with opened(plain, empty(), b"b" * (COUNT * BLOCK)) as disk:
        with pytest.raises(NotSupportedError):
            await disk.node.driver.write_zeroes(0, BLOCK, 0)
        await disk.write_zeroes(0, BLOCK)
        assert await disk.read(0, BLOCK + 1) == bytes(BLOCK) + b"b"


# --- a bitmap for each block ----------------------------------------------------------------------------

WORDS = Entries(4, "little", unit=1, kinds={0: UNALLOCATED})


class Bitmaps:
    """A sector in front of each block, a bit for each sector of it, as VHD has them."""

    unit = SECTOR

    def __init__(self, storage: Node) -> None:
        self.storage = storage
        self.levels: dict[int, Level] = {}

    def lookup(self, block: int, place: int, inside: int, length: int) -> tuple[int, int] | None:
        level = self.levels.get(block)
        if level is None:
            return None
        bits, first = level.table[0], inside // SECTOR
        present = bits >> first & 1
        last = first + 1
        while last * SECTOR < inside + length and bits >> last & 1 == present:
            last += 1
        return DATA if present else UNALLOCATED, min(last * SECTOR - inside, length)

    async def load(self, block: int, place: int) -> None:
        level = Level(self.storage, WORDS, SECTOR // 4, (place - SECTOR,))
        await level.read()
        self.levels[block] = level

    async def wrote(self, block: int, place: int, inside: int, length: int, *, new: bool) -> None:
        if new:
            self.levels[block] = Level(self.storage, WORDS, SECTOR // 4, (place - SECTOR,))
            self.levels[block].mark(0, SECTOR // 4)
        level = self.levels[block]
        level.table[0] |= (1 << length // SECTOR) - 1 << inside // SECTOR
        level.mark(0)

    def changed(self) -> list[Level]:
        return [level for level in self.levels.values() if level.dirty]


async def with_bitmaps(node: Node, edge: Child) -> BlockTable:
    own = area(edge, align=SECTOR + BLOCK, lead=SECTOR)
    entries = Entries(4, "little", unit=SECTOR, base=SECTOR, kinds={0xFFFF_FFFF: UNALLOCATED})
    parts = Bitmaps(edge.node)
    return await flat_table(node, edge, entries, own, count=COUNT, places=(SECTOR,), parts=parts)


async def test_sectors_that_are_not_present_show_the_backing_file() -> None:
    store = empty()
    below = bytes(random.Random(1).randbytes(COUNT * BLOCK))
    expected = bytearray(below)
    rng = random.Random(2)
    async with opened(with_bitmaps, store, below) as disk:

        async def write(number: int) -> None:
            for _ in range(20):
                offset, length = rng.randrange(8 * BLOCK) // 100 * 100, 25
                offset += 25 * number
                expected[offset : offset + length] = bytes([number + 1]) * length
                await disk.write(offset, bytes([number + 1]) * length)

        store.steps.eager = False
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(write, number)
        assert await disk.read(0, COUNT * BLOCK) == expected
        store.steps.calls.clear()
        await disk.flush()
        calls = store.steps.of("write", "flush")
        kinds = [call.operation if call.offset < FIRST else "bitmap" for call in calls]
        assert [kind for kind, _ in itertools.groupby(kinds)] == ["flush", "bitmap", "flush", "write", "flush"]
    async with opened(with_bitmaps, store, below) as disk:
        assert await disk.read(0, COUNT * BLOCK) == expected
    first = entry(store, 0) * SECTOR
    bits = int.from_bytes(store.data[first : first + 4], "little")
    written = {at // SECTOR for at in range(BLOCK) if expected[at] != below[at]}
    assert {sector for sector in range(BLOCK // SECTOR) if bits >> sector & 1} == written, "only what was written"
