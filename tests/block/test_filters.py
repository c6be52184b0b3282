"""Filters pass everything on, and a driver may have a list of children."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.reopen import reopen
from fusedisk.block.image.create import create_image
from fusedisk.block.image.information import image_information
from fusedisk.block.model.flags import COMPRESSED
from fusedisk.block.request import io, space
from fusedisk.block.request.status import chain_status, is_allocated_above
from fusedisk.core.errors import HostError, OptionError
from fusedisk.drivers.table import DRIVERS
from tests.block.conftest import assert_idle
from tests.support import tasks
from tests.support.filters import CONTRACT_DRIVERS, TicketsDriver

KIB = 1 << 10
MIB = 1 << 20


@asynccontextmanager
async def opened(options: dict[str, Any], **settings: Any) -> AsyncIterator[Backend]:
    graph = Graph(CONTRACT_DRIVERS)
    try:
        yield await graph.open_backend(options, **{"writable": True, **settings})
        for node in graph.nodes.values():
            assert_idle(node)
    finally:
        with trio.CancelScope(shield=True):
            await graph.close()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * MIB)
    return path


def of_file(path: Path) -> dict[str, Any]:
    return {"driver": "file", "filename": str(path)}


async def of_qcow2(tmp_path: Path, **options: Any) -> dict[str, Any]:
    path = tmp_path / "disk.qcow2"
    await create_image(DRIVERS, "qcow2", str(path), {"size": MIB, **options})
    return {"driver": "qcow2", "file": of_file(path)}


def used(path: Path) -> int:
    return path.stat().st_blocks * 512


FILTERS = [("bare", "file"), ("blkdebug", "image"), ("blklogwrites", "file"), ("tickets", "file")]


@pytest.fixture(params=FILTERS, ids=[name for name, _ in FILTERS])
def filter_over(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Makes options of a filter over a node."""
    driver, child = request.param
    more: dict[str, Any] = {"tickets": 1 << 40} if driver == "tickets" else {}
    if driver == "blklogwrites":
        (tmp_path / "log").touch()
        more["log"] = of_file(tmp_path / "log")
    return lambda below: {"driver": driver, child: below, "discard": "unmap", **more}


# --- space and size -------------------------------------------------------------------------------------


async def test_discards_free_space(raw: Path, filter_over: Any) -> None:
    before = used(raw)
    async with opened(filter_over(of_file(raw))) as backend:
        await backend.discard(0, 512 * KIB)
        assert used(raw) <= before - 512 * KIB
        await backend.write_zeroes(512 * KIB, 256 * KIB, may_unmap=True)
        assert used(raw) <= before - 768 * KIB
        await space.discard_ranges(backend.node, [(768 * KIB, 64 * KIB), (896 * KIB, 64 * KIB)])
        assert used(raw) <= before - 896 * KIB


async def test_a_filter_that_overrides_discard_sees_each_of_many_ranges(raw: Path) -> None:
    rule = {"event": "none", "iotype": "discard", "sector": 200}
    options = {"driver": "blkdebug", "image": of_file(raw), "inject-error": [rule], "discard": "unmap"}
    async with opened(options) as backend:
        await space.discard_ranges(backend.node, [(0, 512), (64 * KIB, 512)])
        with pytest.raises(HostError):
            await space.discard_ranges(backend.node, [(0, 512), (200 * 512, 512)])


async def test_preallocation_reserves_space(tmp_path: Path, filter_over: Any) -> None:
    path = tmp_path / "hole.raw"
    with path.open("wb") as file:
        file.truncate(MIB)
    async with opened(filter_over(of_file(path))) as backend:
        await backend.preallocate(0, MIB)
        assert used(path) >= MIB
        await backend.truncate(2 * MIB, "falloc")
        assert used(path) >= 2 * MIB


async def test_every_filter_above_has_the_new_length(raw: Path) -> None:
    """Whether the disk, its file or a node in between is resized, or a write makes the file longer."""
    options = {"driver": "bare", "node-name": "top", "file": {"driver": "bare", "node-name": "middle"}}
    options["file"]["file"] = of_file(raw) | {"node-name": "storage"}  # type: ignore[index]
    graph = Graph(CONTRACT_DRIVERS)
    everything = 0xFF
    told: list[int] = []
    backends = []
    for name in ("top", "middle", "storage"):
        if not backends:
            backends.append(await graph.open_backend(options, writable=True))
            backends[0].on_resize.append(told.append)
            edge = backends[0].root
            assert edge is not None
            edge.shared = everything
            for node in graph.nodes.values():
                for each in node.parents:
                    each.shared = everything
        else:
            backends.append(graph.attach(graph.node(name), name, writable=True, shared=everything))
    for number, backend in enumerate(backends, 2):
        await backend.truncate(number * MIB)
        assert [node.length for node in graph.nodes.values()] == [number * MIB] * 3
        assert told[-1] == number * MIB
        assert len(told) == number - 1, "told once for each change"
    await io.write(graph.node("storage"), 5 * MIB, (memoryview(b"new"),))
    assert [node.length for node in graph.nodes.values()] == [5 * MIB + 3] * 3
    assert await backends[0].read(5 * MIB, 3) == b"new"
    await graph.close()


async def test_a_filter_may_grow_by_a_write_as_its_file_does(raw: Path) -> None:
    """A format over a filter over a file allocates behind the file's end."""
    async with opened({"driver": "bare", "file": of_file(raw)}) as backend:
        await io.write(backend.node, MIB, (memoryview(b"new"),))
        assert backend.length == MIB + 3
        assert await backend.read(MIB, 3) == b"new"
    assert raw.stat().st_size == MIB + 3


async def test_a_new_length_keeps_the_unit_of_what_is_below(tmp_path: Path, filter_over: Any) -> None:
    below = await of_qcow2(tmp_path)
    async with opened(filter_over(below)) as backend:
        assert backend.node.limits.length_unit == 512
        assert backend.node.limits.cluster_size == 64 * KIB


# --- everything else ------------------------------------------------------------------------------------


async def test_compressed_writes(tmp_path: Path) -> None:
    below = await of_qcow2(tmp_path)
    async with opened({"driver": "bare", "file": below}) as backend:
        await backend.write_compressed(0, b"c" * 64 * KIB)
        assert (await backend.block_status(0, 64 * KIB)).compressed
        await io.write(backend.node, 64 * KIB, (memoryview(b"d" * 64 * KIB),), COMPRESSED)
        assert (await backend.block_status(64 * KIB, 64 * KIB)).compressed
        assert await backend.read(64 * KIB - 1, 2) == b"cd"


async def test_fast_path(tmp_path: Path) -> None:
    """Without a task: reads, overwrites, lent pages, compressed clusters, writes that allocate."""
    below = await of_qcow2(tmp_path)
    async with opened({"driver": "bare", "file": below}) as backend:
        await backend.write_compressed(0, b"c" * 64 * KIB)
        await backend.write(64 * KIB, b"d" * 64 * KIB)
        assert await backend.read(0, 1) == b"c"
        buffer = memoryview(bytearray(4096))
        assert backend.immediate.read(4096, buffer)
        assert buffer == b"c" * 4096
        assert backend.immediate.lend(0, 4096) is not None
        assert backend.immediate.lend(64 * KIB, 4096) is not None
        assert backend.immediate.write(64 * KIB, memoryview(b"e" * 4096))
        assert backend.immediate.ways().at_once
        assert backend.write_now(512 * KIB, memoryview(b"f" * 64 * KIB))
        assert await backend.read(512 * KIB, 1) == b"f"


async def test_information(tmp_path: Path, filter_over: Any) -> None:
    below = await of_qcow2(tmp_path)
    async with opened(below, writable=False) as backend:
        plain = await image_information(backend.node)
    async with opened(filter_over(below), writable=False) as backend:
        found = await image_information(backend.node)
        for key in ("virtual-size", "cluster-size", "actual-size", "dirty-flag"):
            assert found[key] == plain[key]
        assert found["format"] == backend.node.driver.name
        assert "format-specific" not in found


async def test_allocation_is_that_of_the_layers_below(tmp_path: Path) -> None:
    """A filter in a backing chain neither holds data itself nor hides what is below it."""
    await create_image(DRIVERS, "qcow2", str(tmp_path / "base"), {"size": MIB})
    base = {"driver": "qcow2", "file": of_file(tmp_path / "base")}
    async with opened(base) as backend:
        await backend.write(0, b"x" * 64 * KIB)
    top = await of_qcow2(tmp_path)
    options = {"driver": "bare", "file": top | {"backing": {"driver": "bare", "file": base}}}
    async with opened(options) as backend:
        await backend.write(64 * KIB, b"y" * 64 * KIB)
        node = backend.node.unfiltered.backing
        assert node is not None
        assert await is_allocated_above(backend.node, node.node, 0, 64 * KIB) == (False, 64 * KIB)
        assert (await chain_status(backend.node, 0, 64 * KIB)).depth == 1
        assert not (await chain_status(backend.node, 0, 64 * KIB, node.node)).allocated
        assert not (await chain_status(backend.node, 0, 64 * KIB, backend.node.unfiltered)).allocated
        assert (await is_allocated_above(backend.node, node.node, 64 * KIB, 64 * KIB))[0]
        assert (await is_allocated_above(backend.node, None, 0, 64 * KIB))[0]
        assert not (await is_allocated_above(backend.node, None, 128 * KIB, 64 * KIB))[0]


async def test_a_drain_passes_requests_that_a_filter_holds_back(raw: Path) -> None:
    options = {"driver": "bare", "file": {"driver": "tickets", "tickets": 1, "file": of_file(raw), "node-name": "t"}}
    async with opened(options) as backend:
        driver = backend.graph.node("t").driver  # type: ignore[attr-defined]
        assert isinstance(driver, TicketsDriver)
        async with trio.open_nursery() as nursery:
            first = await tasks.start(nursery, lambda: backend.read(0, 512))
            second = await tasks.start(nursery, lambda: backend.read(0, 512))
            await first.join()
            assert driver.waiting == 1
            assert not second.done
            with trio.fail_after(30):
                async with backend.graph.drained(backend.node):
                    assert driver.waiting == 0
                    async with backend.graph.drained(backend.node):
                        pass
                    assert driver._drains
            await second.join()
            assert not driver._drains
            third = await tasks.start(nursery, lambda: backend.read(0, 512))
            await trio.testing.wait_all_tasks_blocked()
            assert not third.done
            driver.issue(100)
            await third.join()


# --- several children -----------------------------------------------------------------------------------


async def joined(tmp_path: Path, count: int = 3) -> dict[str, Any]:
    parts = []
    for index in range(count):
        path = tmp_path / f"part{index}"
        path.write_bytes(bytes([index]) * 64 * KIB)
        parts.append({"driver": "raw", "file": of_file(path), "node-name": f"part{index}"})
    return {"driver": "joined", "children": parts}


async def test_children_in_a_list(tmp_path: Path) -> None:
    options = await joined(tmp_path)
    async with opened(options) as backend:
        node = backend.node
        assert list(node.children) == ["children.0", "children.1", "children.2"]
        assert [edge.node.name for edge in node.children.values()] == ["part0", "part1", "part2"]
        assert backend.length == 3 * 64 * KIB
        await backend.write(64 * KIB - 2, b"aaaa")
        assert node.full_options()["children"][1]["node-name"] == "part1"
        name = node.printable_name
        assert node.filtered is None
        assert node.storage is None
        assert await node.driver.allocated_size() == 3 * 64 * KIB
    assert "node-name" not in name
    async with opened(name) as backend:  # type: ignore[arg-type]
        assert backend.node.printable_name == name
        assert await backend.read(64 * KIB - 3, 6) == b"\0aaaa\1"


async def test_children_in_dotted_options_and_by_name(tmp_path: Path) -> None:
    options = await joined(tmp_path, 2)
    dotted: dict[str, Any] = {"driver": "joined", "children.0": "first", "children.1.driver": "raw"}
    dotted["children.1.file.filename"] = str(tmp_path / "part1")
    graph = Graph(CONTRACT_DRIVERS)
    await graph.open_backend(options["children"][0] | {"node-name": "first"})
    backend = await graph.open_backend(dotted)
    assert await backend.read(64 * KIB - 1, 2) == b"\0\1"
    assert backend.node.children["children.0"].node is graph.node("first")
    await graph.close()


@pytest.mark.parametrize("children", [{}, {"children": []}, {"children": "x"}, {"children": [5]}, {"children": {}}])
async def test_children_refused(children: dict[str, Any]) -> None:
    graph = Graph(CONTRACT_DRIVERS)
    with pytest.raises(OptionError) as caught:
        await graph.open_backend({"driver": "joined", **children})
    assert "children" in str(caught.value)
    assert not graph.nodes


async def test_many_children_are_flushed_and_reopened(tmp_path: Path) -> None:
    options = await joined(tmp_path)
    graph = Graph(CONTRACT_DRIVERS)
    backend = await graph.open_backend(options | {"node-name": "all"})
    await reopen(graph, {graph.node("all"): {"read-only": False}})
    assert not any(node.config.read_only for node in graph.nodes.values())
    writer = graph.attach(backend.node, "writer", writable=True)
    await writer.write(0, b"w" * 3 * 64 * KIB)
    await writer.flush()
    assert b"".join((tmp_path / f"part{index}").read_bytes() for index in range(3)) == b"w" * 3 * 64 * KIB
    for node in graph.nodes.values():
        assert not node.driver.is_protocol or node.writes_flushed == node.completed_writes > 0
    await graph.close()
