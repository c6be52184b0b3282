"""Block status and what is allocated above, along chains of unequal lengths."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.extent import BlockStatus
from fusedisk.block.model.node import Node
from fusedisk.block.request.status import chain_status, is_allocated_above
from fusedisk.core.errors import OutOfRangeError
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img
from tests.support.memory import Store, stores
from tests.support.opening import Chain, chain_backend
from tests.support.toy import Table

CLUSTER = 512


async def _all_status(backend: Backend) -> list[BlockStatus]:
    """Status of the whole disk, asserted to cover it without gaps."""
    found, offset = [], 0
    while offset < backend.length:
        status = await backend.block_status(offset, backend.length - offset)
        assert 0 < status.length <= backend.length - offset
        found.append(status)
        offset += status.length
    return found


async def test_each_kind_of_extent(graph: Graph) -> None:
    base, top = Table(5 * CLUSTER), Table(6 * CLUSTER)
    base.put(0)
    base.put(1)
    top.put(1)
    top.zero(2)
    top.invert(3, bytes(CLUSTER))
    async with chain_backend(graph, Chain(base, top)) as backend:
        assert await _all_status(backend) == [
            BlockStatus(CLUSTER, data=True, zero=False, allocated=True, depth=1, offset=512, filename="memory:file0"),
            BlockStatus(CLUSTER, data=True, zero=False, allocated=True, depth=0, offset=512, filename="memory:file1"),
            BlockStatus(CLUSTER, data=False, zero=True, allocated=True, depth=0),
            BlockStatus(CLUSTER, data=True, zero=False, allocated=True, depth=0, compressed=True),
            BlockStatus(CLUSTER, data=False, zero=True, allocated=False, depth=1),
            BlockStatus(CLUSTER, data=False, zero=True, allocated=False, depth=0),
        ]


async def test_holes_of_the_file_below_raw(graph: Graph) -> None:
    with stores(disk=Store(bytes(100) + b"x" * 100 + bytes(100))):
        options = {"driver": "raw", "offset": 50, "file": {"driver": "memory", "filename": "disk"}}
        backend = await graph.open_backend(options)
        assert await _all_status(backend) == [
            BlockStatus(50, data=False, zero=True, allocated=True, offset=50, filename="memory:disk"),
            BlockStatus(100, data=True, zero=False, allocated=True, offset=100, filename="memory:disk"),
            BlockStatus(100, data=False, zero=True, allocated=True, offset=200, filename="memory:disk"),
        ]
        await backend.close()


@pytest.mark.parametrize("seed", range(6))
async def test_status_tells_the_truth_about_what_is_read(graph: Graph, seed: int) -> None:
    """What is said to be zero reads as zeroes; what is said to lie in a file lies there."""
    rng = random.Random(seed)
    layers = []
    for _ in range(rng.randrange(1, 5)):
        table = Table(rng.randrange(1, 40 * CLUSTER), CLUSTER)
        for cluster in range(-(-table.length // CLUSTER)):
            kind = rng.choice(("data", "zero", "special", "none", "none"))
            if kind == "data":
                table.put(cluster)
            elif kind == "zero":
                table.zero(cluster)
            elif kind == "special":
                table.invert(cluster, rng.randbytes(CLUSTER))
        layers.append(table)
    chain = Chain(*layers)
    for file, table in zip(chain.files, layers, strict=True):
        file.data[:] = rng.randbytes(table.end)
    async with chain_backend(graph, chain) as backend:
        content, offset = await backend.read(0, backend.length), 0
        for status in await _all_status(backend):
            part = content[offset : offset + status.length]
            assert not status.zero or part == bytes(status.length)
            if status.offset is not None and status.filename is not None:
                store = chain.files[int(status.filename[-1])]
                assert store.data[status.offset : status.offset + status.length] == part
            offset += status.length


async def _allocated(top: Node, base: Node | None) -> list[tuple[int, bool]]:
    """(length, allocated) over the whole of ``top``."""
    found, offset = [], 0
    while offset < top.length:
        allocated, length = await is_allocated_above(top, base, offset, top.length - offset)
        found.append((length, allocated))
        offset += length
    return found


async def test_is_allocated_above(graph: Graph) -> None:
    base, middle, top = Table(4 * CLUSTER), Table(4 * CLUSTER), Table(4 * CLUSTER)
    base.put(0)
    middle.put(1)
    top.put(2)
    async with chain_backend(graph, Chain(base, middle, top)) as backend:
        nodes = [graph.node(f"layer{index}") for index in range(3)]
        assert backend.node is nodes[2]
        above_base = await _allocated(nodes[2], nodes[0])
        assert above_base == [(CLUSTER, False), (CLUSTER, True), (CLUSTER, True), (CLUSTER, False)]
        assert await _allocated(nodes[2], nodes[1]) == [(2 * CLUSTER, False), (CLUSTER, True), (CLUSTER, False)]
        assert (await is_allocated_above(nodes[2], None, 0, CLUSTER))[0]


async def test_a_short_layer_in_between_hides_what_lies_below(graph: Graph) -> None:
    """Behind its end there are zeroes, whatever the base holds: not to be mistaken for the base's data."""
    base, middle, top = Table(4 * CLUSTER), Table(CLUSTER), Table(4 * CLUSTER)
    for cluster in range(4):
        base.put(cluster)
    chain = Chain(base, middle, top)
    chain.files[0].data[:] = b"\xff" * base.end
    async with chain_backend(graph, chain) as backend:
        assert await backend.read(0, backend.length) == b"\xff" * CLUSTER + bytes(3 * CLUSTER)
        bottom = graph.node("layer0")
        assert await _allocated(backend.node, bottom) == [(CLUSTER, False), (3 * CLUSTER, True)]
        status = await chain_status(backend.node, CLUSTER, CLUSTER, bottom)
        assert status.zero
        assert not status.data


@pytest.mark.parametrize("filters", [[], ["copy-on-read"], ["copy-on-read", "blkdebug"]], ids=len)
async def test_status_comes_before_or_after_a_snapshot_of_a_shorter_disk(tmp_path: Path, filters: list[str]) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    qemu_img("snapshot", "-c", "short", image)
    qemu_img("resize", "-q", image, "4G")
    graph = Graph(DRIVERS)
    options: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}
    for name in filters:
        options = {"driver": name, "image" if name == "blkdebug" else "file": options}
    backend = await graph.open_backend(options, writable=True)
    found: list[str] = []
    applied = False

    async def look() -> None:
        while not applied:
            try:
                await backend.block_status(3 << 30, 65536)
                found.append("there")
            except OutOfRangeError:
                found.append("gone")
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        nursery.start_soon(look)
        await trio.lowlevel.checkpoint()
        await backend.apply_snapshot("1")
        applied = True
    await graph.close()
    assert found
    assert found == sorted(found, reverse=True)
