"""Compressed pieces of a format that is not qcow2: zlib streams one behind the other, as in cloop."""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Iterable, Sequence

import pytest
import trio
import trio.testing

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.registry import Registry
from fusedisk.block.model.children import ChildSpec, Role
from fusedisk.block.model.driver import Driver
from fusedisk.block.model.extent import SPECIAL, Extent
from fusedisk.block.model.flags import Buffer
from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.compression.inflated_cache import InflatedCache
from fusedisk.core.errors import CorruptImageError
from fusedisk.drivers.format.compressed_pieces import CompressedPieces
from fusedisk.drivers.format.inflating import Where
from tests.support.memory import Store, stores

SIZE = 4096
COUNT = 64


class Zipped:
    """Where the pieces lie: a table of ``COUNT + 1`` offsets, then the pieces."""

    size = SIZE
    codec = "zlib"
    length = COUNT * SIZE

    def __init__(self, storage: Node, offsets: Sequence[int]) -> None:
        self.storage = storage
        self.offsets = offsets

    def place(self, key: int) -> tuple[int, int]:
        return self.offsets[key], self.offsets[key + 1] - self.offsets[key]

    def places(self, keys: Iterable[int]) -> list[Where]:
        return [(*self.place(key), key) for key in keys]

    def lookup(self, offset: int, length: int) -> Extent:
        keys = range(offset // SIZE, (offset + length - 1) // SIZE + 1)
        return Extent(SPECIAL, length, compressed=True, token=array("Q", keys))

    async def read(self, start: int, buffer: memoryview) -> None:
        await io.read(self.storage, start, buffer)

    def damaged(self, offset: int, reason: str) -> CorruptImageError:
        return CorruptImageError(f"the piece at {offset} is damaged ({reason}).")


class ZippedDriver(Driver):
    """Its disk is nothing but pieces."""

    name = "zipped"
    can_run_at_once = True
    child_specs = (ChildSpec("file", Role.FILE),)

    async def open(self) -> None:
        storage = self.node.children["file"].node
        raw = memoryview(bytearray(8 * (COUNT + 1)))
        await io.read(storage, 0, raw)
        self.source = Zipped(storage, array("Q", raw.tobytes()))
        self.pieces = CompressedPieces(self.node, self.source, InflatedCache(16 * SIZE))

    async def length(self) -> int:
        return self.source.length

    async def map(self, offset: int, length: int) -> Extent:
        return self.source.lookup(offset, length)

    async def read_special(self, extent: Extent, offset: int, buffer: Buffer) -> None:
        done = 0
        while done < len(buffer):
            rest = self.source.lookup(offset + done, len(buffer) - done)
            done += await self.pieces.read(rest, offset + done, buffer[done:])


DRIVERS = Registry(
    {
        "zipped": "tests.drivers.test_compressed_pieces:ZippedDriver",
        "memory": "tests.support.memory:MemoryDriver",
        "raw": "fusedisk.drivers.format.raw:RawDriver",
    },
    prefixes={"memory": "memory"},
    probed=("raw",),
)

_rng = random.Random(11)
CONTENT = b"".join(_rng.randbytes(64) * (SIZE // 64) for _ in range(COUNT))


def image(damaged: int | None = None) -> Store:
    pieces = [zlib.compress(CONTENT[start : start + SIZE]) for start in range(0, len(CONTENT), SIZE)]
    if damaged is not None:
        pieces[damaged] = pieces[damaged][:5] + bytes(len(pieces[damaged]) - 5)
    offsets = array("Q", [8 * (COUNT + 1)])
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    return Store(offsets.tobytes() + b"".join(pieces))


async def opened(graph: Graph) -> Backend:
    return await graph.open_backend({"driver": "zipped", "file": {"driver": "memory", "filename": "image"}})


@pytest.mark.parametrize("way", ["in order", "anywhere"])
async def test_reads(way: str) -> None:
    rng = random.Random(way)
    graph = Graph(DRIVERS)
    with stores(image=image()):
        disk = await opened(graph)
        for number in range(COUNT // 2):
            length = 2 * SIZE if way == "in order" else rng.randrange(1, 5 * SIZE)
            offset = 2 * number * SIZE if way == "in order" else rng.randrange(len(CONTENT) - length)
            assert await disk.read(offset, length) == CONTENT[offset : offset + length]
        await graph.close()


async def test_one_inflation_for_all_who_wait() -> None:
    graph = Graph(DRIVERS)
    store = image()
    with stores(image=store):
        disk = await opened(graph)
        offset, _ = disk.node.driver.source.place(40)  # type: ignore[attr-defined]
        hold = store.steps.hold("read", offset)
        store.steps.calls.clear()
        found: list[bytes] = []

        async def read() -> None:
            found.append(bytes(await disk.read(40 * SIZE + 7, 100)))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(read)
            await hold.reached.wait()
            await trio.testing.wait_all_tasks_blocked()
            hold.release()
        assert found == [CONTENT[40 * SIZE + 7 : 40 * SIZE + 107]] * 5
        assert len([call for call in store.steps.of("read") if call.offset == offset]) == 1
        await graph.close()


async def test_a_damaged_piece_is_named_and_the_others_are_read() -> None:
    graph = Graph(DRIVERS)
    with stores(image=image(damaged=3)):
        disk = await opened(graph)
        with pytest.raises(CorruptImageError, match=f"the piece at {3 * SIZE} is damaged"):
            await disk.read(0, 8 * SIZE)
        assert await disk.read(4 * SIZE, 4 * SIZE) == CONTENT[4 * SIZE : 8 * SIZE]
        await graph.close()
