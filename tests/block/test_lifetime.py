"""How long nodes live: as long as somebody uses them, and not at all where opening failed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.node import Node, NodeConfig
from fusedisk.core.errors import FusediskError, HostError, NodeNotFoundError, NoMediumError, OptionError
from tests.support.memory import MemoryDriver, Store, stores
from tests.support.opening import Chain, chain_backend
from tests.support.tasks import start
from tests.support.toy import Table


async def test_everything_closes_with_the_last_user(graph: Graph) -> None:
    chain = Chain(Table(512), Table(512), Table(512))
    with chain.known():
        backend = await graph.open_backend(chain.options(), writable=True)
        reader = graph.attach(backend.node, "reader", writable=False)
        assert len(graph.nodes) == 6
        await backend.close()
        assert len(graph.nodes) == 6
        await reader.close()
        assert not graph.nodes
        assert all(part.opened == 0 for part in (*chain.layers, *chain.files))


async def test_a_shared_backing_file_stays_for_the_other(graph: Graph) -> None:
    base, one, two = Table(512), Table(512), Table(512)
    chain = Chain(base, one, two)
    with chain.known():
        first = await graph.open_backend(chain.options(backing=None), name="two", writable=True)
        node = await graph.open_node(
            {
                "driver": "toy",
                "table": "layer0",
                "node-name": "base",
                "file": {"driver": "memory", "filename": "file0"},
            },
            NodeConfig(),
        )
        node.kept_by_name = True
        options = {"driver": "toy", "table": "layer1", "file": {"driver": "memory", "filename": "file1"}}
        second = await graph.open_backend({**options, "backing": "base"}, name="one", writable=True)
        third = await graph.open_backend(
            {"driver": "memory", "filename": "file2", "node-name": "extra", "read-only": True}, name="three"
        )
        node.kept_by_name = False
        await first.close()
        assert base.opened == 1
        await second.close()
        assert base.opened == 0
        with pytest.raises(NodeNotFoundError, match=r"^there is no node 'base'\.$"):
            graph.node("base")
        await third.close()


async def test_nodes_kept_by_name_stay_without_users(graph: Graph) -> None:
    with stores(disk=Store(512)):
        backend = await graph.open_backend({"driver": "memory", "filename": "disk", "node-name": "d"})
        node = backend.node
        node.kept_by_name = True
        await backend.close()
        assert graph.node("d") is node
        node.kept_by_name = False
        await graph.close_if_unused(node)
        assert not graph.nodes


async def test_close_notifiers(graph: Graph) -> None:
    chain = Chain(Table(512), Table(512))
    told: list[str] = []
    async with chain_backend(graph, chain) as backend:
        for name in ("layer0", "layer1"):
            graph.node(name).close_notifiers.append(lambda node: told.append(node.name))
        assert backend.length == 512
        assert not told
    assert told == ["layer1", "layer0"]


async def test_a_closed_backend_answers_with_an_error(graph: Graph) -> None:
    with stores(disk=Store(512)):
        backend = await graph.open_backend("memory:disk", name="d")
        await backend.close()
        await backend.close()
        with pytest.raises(NoMediumError, match=r"^'d' is closed\.$"):
            await backend.read(0, 1)
        with pytest.raises(NoMediumError):
            await backend.flush()
        assert not backend.writable


async def test_closing_waits_for_requests_and_takes_no_new_ones(graph: Graph) -> None:
    store = Store(512)
    with stores(disk=store):
        backend = await graph.open_backend("memory:disk", format="raw", name="d", writable=True)
        async with trio.open_nursery() as nursery:
            held = store.steps.hold("write")
            writer = await start(nursery, lambda: backend.write(0, b"x"))
            closing = await start(nursery, backend.close)
            late = await start(nursery, lambda: backend.write(1, b"y"))
            assert not closing.done
            assert store.opened
            held.release()
            await writer.join()
            await closing.join()
            with pytest.raises(NoMediumError):
                await late.join()
        assert store.durable[:2] == b"x\0"


async def test_closing_twice_at_once(graph: Graph) -> None:
    store = Store(512)
    with stores(disk=store):
        backend = await graph.open_backend("memory:disk", format="raw", writable=True)
        async with trio.open_nursery() as nursery:
            await backend.write(0, b"x")
            held = store.steps.hold("flush")
            first = await start(nursery, backend.close)
            second = await start(nursery, backend.close)
            held.release()
            await first.join()
            await second.join()
        assert not graph.nodes


async def test_a_cancelled_close_can_be_repeated(graph: Graph) -> None:
    store = Store(512)
    with stores(disk=store):
        backend = await graph.open_backend("memory:disk", format="raw", writable=True)
        async with trio.open_nursery() as nursery:
            held = store.steps.hold("read")
            reader = await start(nursery, lambda: backend.read(0, 1))
            closing = await start(nursery, backend.close)
            closing.scope.cancel()
            await closing.join()
            held.release()
            await reader.join()
            await backend.write(0, b"x")
        await backend.close()
        assert not graph.nodes


@pytest.mark.parametrize("error", [HostError("the disk is gone"), RuntimeError("a bug")])
@pytest.mark.parametrize("operation", ["flush", "close"])
async def test_closing_releases_everything_whatever_fails(graph: Graph, operation: str, error: Exception) -> None:
    chain = Chain(Table(512), Table(512))
    with chain.known():
        backend = await graph.open_backend(chain.options(), writable=True)
        await backend.write(0, b"x")
        chain.files[1].steps.fail(operation, error)
        with pytest.raises((FusediskError, RuntimeError), match=str(error)):
            await backend.close()
        assert not graph.nodes
        assert all(part.opened == 0 for part in (*chain.layers, *chain.files))
        await graph.close()


async def test_the_graph_closes_all_even_if_some_fail(graph: Graph) -> None:
    names = [f"disk{n}" for n in range(4)]
    found = {name: Store(512) for name in names}
    with stores(**found):
        for name in names:
            await graph.open_backend(f"memory:{name}", format="raw", writable=True)
        found["disk0"].steps.fail("close", RuntimeError("a bug"))
        found["disk2"].steps.fail("close", HostError("the disk is gone"))
        with pytest.raises((FusediskError, RuntimeError), match="a bug"):
            await graph.close()
        assert not graph.nodes
        assert all(store.opened == 0 for store in found.values())


@pytest.mark.parametrize("operation", ["open", "length"])
@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("error", [HostError("no luck"), RuntimeError("a bug")])
async def test_a_failed_open_leaves_nothing(graph: Graph, part: int, operation: str, error: Exception) -> None:
    chain = Chain(Table(512), Table(512), Table(512))
    parts = (*chain.layers, *chain.files)
    with chain.known():
        parts[part].steps.fail(operation, error)
        with pytest.raises(type(error), match=str(error)):
            await graph.open_backend(chain.options(), writable=True)
        assert not graph.nodes
        assert [each.opened for each in parts] == [0] * 6
        backend = await graph.open_backend(chain.options(), writable=True)
        await backend.close()


@pytest.mark.parametrize("operation", ["open", "length", "close"])
@pytest.mark.parametrize("part", range(6))
async def test_a_cancelled_open_leaves_nothing(graph: Graph, part: int, operation: str) -> None:
    chain = Chain(Table(512), Table(512), Table(512))
    parts = (*chain.layers, *chain.files)
    with chain.known():
        async with trio.open_nursery() as nursery:
            held = parts[part].steps.hold(operation)
            if operation == "close":
                parts[0].steps.fail("length", HostError("no luck"))
            opening = await start(nursery, lambda: graph.open_backend(chain.options(), writable=True))
            opening.scope.cancel()
            held.release()
            try:
                await opening.join()
            except HostError:
                assert operation == "close"
            else:
                if opening.result is not None:
                    await opening.result.close()
        assert not graph.nodes
        assert [each.opened for each in parts] == [0] * 6


async def test_attaching_refused_closes_what_was_opened(graph: Graph) -> None:
    store = Store(512)
    with stores(disk=store):
        with pytest.raises(FusediskError):
            await graph.open_backend(
                {"driver": "memory", "filename": "disk", "read-only": True}, name="writer", writable=True
            )
        assert not graph.nodes
        assert store.opened == 0


async def test_real_files_are_closed_again(graph: Graph, tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    before = sorted(os.listdir("/proc/self/fd"))
    for spec in (
        {"driver": "raw", "size": 8192, "file": {"driver": "file", "filename": str(path)}},
        {"driver": "raw", "nonsense": 1, "file": {"driver": "file", "filename": str(path)}},
        {"driver": "file", "filename": str(path), "node-name": "a", "locking": "maybe"},
        {"driver": "toy", "table": "none", "file": {"driver": "file", "filename": str(path)}},
        {"file": {"driver": "file", "filename": str(tmp_path / "absent")}},
        {"file": {"driver": "file", "filename": str(tmp_path)}},
    ):
        with pytest.raises((FusediskError, KeyError)):
            await graph.open_backend(spec, writable=True)
        assert not graph.nodes
        assert sorted(os.listdir("/proc/self/fd")) == before


async def test_names_are_unique(graph: Graph) -> None:
    with stores(disk=Store(512)):
        options = {"driver": "memory", "filename": "disk", "node-name": "d"}
        backend = await graph.open_backend(options)
        with pytest.raises(OptionError, match=r"^a node named 'd' exists already, names must be unique\.$"):
            await graph.open_backend(options)
        assert list(graph.nodes) == ["d"]
        await backend.close()


async def test_nobody_can_attach_to_a_node_that_is_closing(graph: Graph) -> None:
    store = Store(512)
    with stores(disk=store):
        backend = await graph.open_backend({"driver": "memory", "filename": "disk", "node-name": "d"})
        found: list[Node] = []
        async with trio.open_nursery() as nursery:
            held = store.steps.hold("close")
            closing = await start(nursery, backend.close)
            with pytest.raises(NodeNotFoundError):
                found.append(graph.node("d"))
            held.release()
            await closing.join()
        assert not found


async def test_a_neighbour_that_refuses_to_loosen_does_not_stop_the_closing(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(Table(512), Table(512))
    with chain.known():
        base = await graph.open_node({"driver": "memory", "filename": "file0", "node-name": "base"}, NodeConfig())
        base.kept_by_name = True
        options = {"driver": "toy", "table": "layer1", "file": {"driver": "memory", "filename": "file1"}}
        below = {"driver": "toy", "table": "layer0", "file": "base"}
        backend = await graph.open_backend({**options, "backing": below}, writable=True)

        def check(self: MemoryDriver, perm: int, shared: int) -> None:
            raise HostError("Could not unlock.")

        monkeypatch.setattr(MemoryDriver, "check_permissions", check)
        with pytest.raises(HostError, match="Could not unlock"):
            await backend.close()
        monkeypatch.undo()
        assert list(graph.nodes) == ["base"]
        base.kept_by_name = False
        await graph.close_if_unused(base)
        assert [part.opened for part in (*chain.layers, *chain.files)] == [0] * 4
