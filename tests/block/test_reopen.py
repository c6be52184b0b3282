"""Reopening: one transaction over many nodes, all or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.reopen import reopen
from fusedisk.core.errors import HostError, NotSupportedError, OptionError, ReadOnlyError
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, qemu_io
from tests.support.memory import Store, stores
from tests.support.opening import Chain, chain_backend, memory_backend
from tests.support.toy import Table


def _operations(store: Store) -> list[str]:
    return [call.operation for call in store.steps.calls if call.operation.startswith("reopen")]


async def test_children_follow_their_parent(graph: Graph) -> None:
    chain = Chain(Table(4096), Table(4096))
    async with chain_backend(graph, chain) as backend:
        top = backend.node
        assert top.backing is not None
        await reopen(graph, {top: {"cache.no-flush": True}})
        assert top.config.cache_no_flush
        assert top.children["file"].node.config.cache_no_flush
        assert top.backing.node.config.cache_no_flush
        assert top.backing.node.config.read_only
        assert not top.config.read_only


async def test_what_a_child_was_told_itself_stays(graph: Graph) -> None:
    with stores(disk=Store(4096)):
        options = {"driver": "raw", "file": {"driver": "memory", "filename": "disk", "cache": {"no-flush": False}}}
        backend = await graph.open_backend(options, writable=True)
        await reopen(graph, {backend.node: {"cache.no-flush": True, "detect-zeroes": "on"}})
        storage = backend.node.children["file"].node
        assert backend.node.config.cache_no_flush
        assert backend.node.config.detect_zeroes == "on"
        assert not storage.config.cache_no_flush
        assert storage.config.detect_zeroes == "off"
        await backend.close()


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_a_failure_at_any_node_leaves_all_as_they_were(graph: Graph, failing: int) -> None:
    chain = Chain(Table(4096), Table(4096), Table(4096))
    async with chain_backend(graph, chain) as backend:
        before = {node: node.config for node in graph.nodes.values()}
        permissions = {name: [*store.permissions] for name, store in enumerate(chain.files)}
        chain.files[failing].steps.fail("reopen", HostError("the disk is gone."))
        with pytest.raises(HostError, match="the disk is gone"):
            await reopen(graph, {backend.node: {"cache.no-flush": True}})
        assert {node: node.config for node in graph.nodes.values()} == before
        assert all(not node.config.cache_no_flush for node in graph.nodes.values())
        for index, store in enumerate(chain.files):
            calls = _operations(store)
            assert "reopen-commit" not in calls
            # Whoever was prepared is aborted, once; whoever failed or was never asked is not.
            assert calls.count("reopen-abort") == (calls.count("reopen") if index != failing else 0)
            assert store.permissions[-1] == permissions[index][-1]
        await backend.write(0, b"still there")
        assert await backend.read(0, 11) == b"still there"


async def test_a_writer_forbids_read_only(graph: Graph) -> None:
    store = Store(4096)
    async with memory_backend(graph, store) as backend:
        with pytest.raises(ReadOnlyError, match="needs to write"):
            await reopen(graph, {backend.node: {"read-only": True}})
        assert not backend.node.config.read_only
        assert _operations(store) == []
        await backend.write(0, b"x")


async def test_refused_options(graph: Graph) -> None:
    async with memory_backend(graph, Store(4096)) as backend:
        with pytest.raises(OptionError, match="no option 'nonsense'"):
            await reopen(graph, {backend.node: {"nonsense": 1}})
        with pytest.raises(NotSupportedError, match="cannot change while open"):
            await reopen(graph, {backend.node: {"filename": "other"}})
        assert backend.node.driver.options.filename == "disk"


async def test_no_request_runs_meanwhile(graph: Graph) -> None:
    store = Store(4096)
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        write = store.steps.hold("write")
        nursery.start_soon(backend.write, 0, b"before")
        await write.reached.wait()
        prepare = store.steps.hold("reopen")
        nursery.start_soon(reopen, graph, {backend.node: {"cache.no-flush": True}})
        await trio.testing.wait_all_tasks_blocked()
        assert not prepare.reached.is_set()
        write.release()
        await prepare.reached.wait()
        nursery.start_soon(backend.write, 100, b"after")
        await trio.testing.wait_all_tasks_blocked()
        assert len(store.steps.of("write")) == 1
        prepare.release()
    assert bytes(store.data[100:105]) == b"after"


async def test_the_window_of_a_raw_image_moves(graph: Graph) -> None:
    with stores(disk=Store(b"A" * 512 + b"B" * 512)):
        backend = await graph.open_backend(
            {"driver": "raw", "size": 512, "file": {"driver": "memory", "filename": "disk"}}, writable=True
        )
        assert await backend.read(0, 4) == b"AAAA"
        await reopen(graph, {backend.node: {"offset": 512}})
        assert await backend.read(0, 4) == b"BBBB"
        await reopen(graph, {backend.node: {"offset": 768, "size": 256}})
        assert backend.length == 256
        with pytest.raises(OptionError, match="ask for more than the 1024 bytes"):
            await reopen(graph, {backend.node: {"size": 1024}})
        assert backend.length == 256
        await backend.close()


async def test_a_real_chain_under_load(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", str(base), "4M")
    qemu_io(str(base), "write -q -P 7 0 4M", fmt="qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(top))
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(top), writable=True)
    stop = trio.Event()
    written = bytearray(b"\x07" * (4 << 20))

    async def load(start: int) -> None:
        step = 0
        while not stop.is_set():
            offset = start + step * 4096 % (1 << 20)
            data = bytes([step % 251 + 1]) * 4096
            await backend.write(offset, data)
            written[offset : offset + 4096] = data
            step += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for task in range(4):
            nursery.start_soon(load, task << 20)
        for turn in range(10):
            await reopen(graph, {backend.node: {"cache.direct": turn % 2 == 0}})
            direct = backend.node.children["file"].node.driver.file.alignment is not None  # type: ignore[attr-defined]
            assert direct == (turn % 2 == 0)
        stop.set()
    assert await backend.read(0, 4 << 20) == written
    await graph.close()
    qemu_img("check", "-q", str(top))
    flat = tmp_path / "flat"
    qemu_img("convert", "-O", "raw", str(top), str(flat))
    assert flat.read_bytes() == written


async def test_an_aborted_reopening_gives_image_locks_back(graph: Graph, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(4096))
    with stores(other=Store(4096)):
        disk = await graph.open_backend({"driver": "file", "filename": str(image)})
        other = await graph.open_backend({"driver": "memory", "filename": "other"})
        locks = disk.node.driver.locks  # type: ignore[attr-defined]
        held = set(locks._held)
        assert disk.root is not None
        disk.root.shared = 0
        other.node.driver.store.steps.fail("reopen", HostError("no."))  # type: ignore[attr-defined]
        with pytest.raises(HostError, match=r"no\."):
            await reopen(graph, {disk.node: {"read-only": False}, other.node: {"read-only": False}})
        assert disk.node.driver.locks is locks  # type: ignore[attr-defined]
        assert locks._held == held
        await disk.close()
        await other.close()
