"""Changing the graph while requests run: drain, replace, insert, remove."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.node import NodeConfig
from fusedisk.core.errors import OptionError, PermissionConflictError
from tests.block.conftest import assert_idle
from tests.support.memory import Store, stores
from tests.support.opening import Chain, chain_backend, memory_backend
from tests.support.oracle import random_request
from tests.support.tasks import start
from tests.support.toy import Table

SIZE = 16 * 1024


@asynccontextmanager
async def _load(backend: Backend, seed: int, writers: int = 4) -> AsyncIterator[bytearray]:
    """Tasks that read, write and compare, each in its own part of the disk, while the block runs."""
    oracle = bytearray(await backend.read(0, backend.length))
    part = backend.length // writers
    done = [0] * writers

    async def work(index: int) -> None:
        rng = random.Random(seed * 100 + index)
        window = _Window(backend, index * part, part)
        mine = bytearray(oracle[index * part : (index + 1) * part])
        while True:
            await random_request(rng, window, mine, 2000)  # type: ignore[arg-type]
            oracle[index * part : (index + 1) * part] = mine
            done[index] += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for index in range(writers):
            nursery.start_soon(work, index)
        yield oracle
        # Whatever was changed, requests go on.
        target = [count + 3 for count in done]
        with trio.fail_after(30):
            while any(count < wanted for count, wanted in zip(done, target, strict=True)):
                await trio.lowlevel.checkpoint()
        async with backend.graph.drained(backend.node):
            nursery.cancel_scope.cancel()


async def _let_others_run() -> None:
    for _ in range(20):
        await trio.lowlevel.checkpoint()


class _Window:
    """A part of a backend, for tasks that must not disturb each other."""

    def __init__(self, backend: Backend, offset: int, length: int) -> None:
        self._backend, self._offset, self.length = backend, offset, length

    async def read(self, offset: int, length: int) -> bytearray:
        return await self._backend.read(self._offset + offset, length)

    async def write(self, offset: int, data: bytes) -> None:
        await self._backend.write(self._offset + offset, data)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        await self._backend.write_zeroes(self._offset + offset, length, may_unmap=may_unmap)


async def test_drained_means_nothing_in_flight(graph: Graph) -> None:
    chain = Chain(Table(SIZE), Table(SIZE))
    for part in (*chain.layers, *chain.files):
        part.steps.eager = False
    async with chain_backend(graph, chain) as backend:
        async with _load(backend, 1) as oracle:
            for _ in range(10):
                async with graph.drained(graph.node("layer0")):
                    assert all(not sum(part.steps.running.values()) for part in (*chain.layers, *chain.files))
                    for node in graph.nodes.values():
                        assert_idle(node)
                    before = len(chain.files[1].steps.calls)
                    await _let_others_run()
                    assert len(chain.files[1].steps.calls) == before
        assert await backend.read(0, SIZE) == oracle


async def test_drained_sections_nest(graph: Graph) -> None:
    async with memory_backend(graph, Store(SIZE)) as backend, trio.open_nursery() as nursery:
        async with graph.drained(backend.node):
            async with graph.drained(backend.node):
                pass
            waiting = await start(nursery, lambda: backend.read(0, 1))
            assert not waiting.done
        await waiting.join()


async def test_a_cancelled_drain_lets_requests_go_on(graph: Graph) -> None:
    store = Store(SIZE)
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        held = store.steps.hold("read")
        reader = await start(nursery, lambda: backend.read(0, 1))

        async def drain() -> None:
            async with graph.drained(backend.node):
                raise AssertionError("a request is in flight")

        draining = await start(nursery, drain)
        draining.scope.cancel()
        await draining.join()
        await (await start(nursery, lambda: backend.read(1, 1))).join()
        held.release()
        await reader.join()


@pytest.mark.parametrize("waits", [True, False], ids=["while it waits", "in the section"])
async def test_a_user_that_attaches_during_a_drain_is_held_back_too(graph: Graph, waits: bool) -> None:
    store = Store(SIZE)
    async with memory_backend(graph, store, **{"node-name": "d"}) as backend, trio.open_nursery() as nursery:
        held = store.steps.hold("read")
        reader = await start(nursery, lambda: backend.read(0, 1))
        if not waits:
            held.release()
            await reader.join()
        inside, leave = trio.Event(), trio.Event()

        async def drain() -> None:
            async with graph.drained(backend.node):
                inside.set()
                await leave.wait()
                assert not any(user.in_flight for user in graph.backends_over(backend.node))

        draining = await start(nursery, drain)
        assert inside.is_set() is not waits
        other = graph.attach(backend.node, "other", writable=False)
        late = await start(nursery, lambda: other.read(5, 1))
        held.release()
        await reader.join()
        await trio.testing.wait_all_tasks_blocked()
        assert inside.is_set()
        assert other.in_flight == 0
        assert not late.done
        leave.set()
        await late.join()
        await draining.join()
        await other.close()


@pytest.mark.parametrize("seed", range(3))
async def test_filters_come_and_go_under_load(graph: Graph, seed: int) -> None:
    base, top = Table(SIZE), Table(SIZE)
    base.put(*range(SIZE // 512))
    chain = Chain(base, top)
    chain.files[0].data[:] = random.Random(seed).randbytes(base.end)
    for part in (*chain.layers, *chain.files):
        part.steps.eager = False
    async with chain_backend(graph, chain) as backend:
        node = backend.node
        async with _load(backend, seed) as oracle:
            for _ in range(5):
                generation = node.generation
                added = await graph.insert_filter(node, {"driver": "copy-on-read"})
                assert backend.node is added
                assert added.children["file"].node is node
                await _let_others_run()
                await graph.remove_filter(added)
                assert backend.node is node
                assert added.closed
                assert node.generation >= generation
                storage = node.children["file"].node
                below = await graph.insert_filter(storage, {"driver": "copy-on-read"})
                assert node.children["file"].node is below
                await graph.replace(below, storage)
                assert node.children["file"].node is storage
                assert below.closed
        assert await backend.read(0, SIZE) == oracle
        assert len(graph.nodes) == 4


async def test_replacing_moves_all_parents_and_bumps_generations(graph: Graph) -> None:
    chain = Chain(Table(SIZE), Table(SIZE))
    copy = Store(SIZE)
    with stores(copy=copy):
        async with chain_backend(graph, chain) as backend:
            base = graph.node("layer0")
            new = await graph.open_node(
                {"driver": "raw", "file": {"driver": "memory", "filename": "copy"}}, NodeConfig()
            )
            before = backend.node.generation
            await graph.replace(base, new)
            assert backend.node.backing is not None
            assert backend.node.backing.node is new
            assert backend.node.generation > before
            assert base.closed
            assert chain.layers[0].opened == chain.files[0].opened == 0
            copy.data[:5] = b"hello"
            assert await backend.read(0, 5) == b"hello"


async def test_users_of_a_replaced_node_learn_the_new_length(graph: Graph) -> None:
    with stores(one=Store(100), two=Store(200)):
        backend = await graph.open_backend({"driver": "memory", "filename": "one"})
        new = await graph.open_node({"driver": "memory", "filename": "two"}, NodeConfig())
        told: list[int] = []
        backend.on_resize.append(told.append)
        await graph.replace(backend.node, new)
        assert told == [200]
        assert backend.length == 200
        await backend.close()


async def test_a_loop_is_refused(graph: Graph) -> None:
    chain = Chain(Table(SIZE), Table(SIZE), Table(SIZE))
    async with chain_backend(graph, chain) as backend:
        with pytest.raises(OptionError) as caught:
            await graph.replace(graph.node("layer0"), backend.node)
        assert str(caught.value) == "node 'layer2' cannot replace 'layer0': the graph would have a loop."
        assert graph.node("layer1").backing is not None
        assert await backend.read(0, 1) == b"\0"


async def test_permissions_that_do_not_fit_change_nothing(graph: Graph) -> None:
    with stores(one=Store(100), two=Store(100)):
        writer = await graph.open_backend({"driver": "memory", "filename": "one", "node-name": "one"}, writable=True)
        other = await graph.open_backend({"driver": "memory", "filename": "two", "node-name": "two"}, writable=True)
        old, new = writer.node, other.node
        with pytest.raises(PermissionConflictError):
            await graph.replace(old, new)
        assert writer.node is old
        assert other.node is new
        await writer.write(0, b"x")
        await other.write(0, b"y")
        await writer.close()
        await other.close()


async def test_only_filters_are_taken_out(graph: Graph) -> None:
    async with memory_backend(graph, Store(100), **{"node-name": "m"}) as backend:
        with pytest.raises(OptionError, match=r"^node 'm' is memory, only filters can be removed\.$"):
            await graph.remove_filter(backend.node)


async def test_a_filter_that_cannot_be_opened_leaves_all_as_it_was(graph: Graph) -> None:
    chain = Chain(Table(SIZE))
    async with chain_backend(graph, chain) as backend:
        node = backend.node
        with pytest.raises(OptionError, match="no option 'nonsense'"):
            await graph.insert_filter(node, {"driver": "copy-on-read", "nonsense": 1})
        assert backend.node is node
        assert len(graph.nodes) == 2
        await backend.write(0, b"x")
