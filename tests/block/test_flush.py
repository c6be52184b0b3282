"""Flushes: what is on stable storage when, and how rarely the disk is asked."""

from __future__ import annotations

import pytest
import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import HostError
from tests.support.memory import Store, stores
from tests.support.opening import Chain, chain_backend, memory_backend
from tests.support.tasks import start
from tests.support.toy import Table


async def test_flush_goes_down_to_the_disk(graph: Graph) -> None:
    table = Table(4096)
    chain = Chain(Table(4096), table)
    async with chain_backend(graph, chain) as backend:
        await backend.write(0, b"x" * 100)
        chain.files[1].steps.calls.clear()
        await backend.flush()
        assert table.steps.of("flush-to-os")
        assert [call.operation for call in chain.files[1].steps.calls] == ["flush-to-os", "flush"]
        assert not chain.files[0].steps.of("flush"), "nobody writes to a backing file"
        assert b"x" * 100 in chain.files[1].durable


async def test_flush_without_writes_does_not_reach_the_disk(graph: Graph) -> None:
    store = Store(4096)
    async with memory_backend(graph, store) as backend:
        await backend.flush()
        await backend.write(0, b"x")
        await backend.flush()
        await backend.flush()
        assert len(store.steps.of("flush")) == 1
        for change in (
            lambda: backend.write_zeroes(0, 1),
            lambda: backend.truncate(5000),
            lambda: backend.write(1, b"y"),
        ):
            await change()
            await backend.flush()
        assert len(store.steps.of("flush")) == 4
        assert store.durable == store.data


async def test_flushes_at_the_same_time_share_one(graph: Graph) -> None:
    store = Store(4096)
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        await backend.write(0, b"1")
        held = store.steps.hold("flush")
        first = await start(nursery, backend.flush)
        await backend.write(1, b"2")
        waiting = [await start(nursery, backend.flush) for _ in range(5)]
        held.release()
        for task in (first, *waiting):
            await task.join()
        assert len(store.steps.of("flush")) == 2, "one for the first, one for all who came while it ran"
        assert store.durable[:2] == b"12"


async def test_a_write_during_a_flush_is_not_taken_for_flushed(graph: Graph) -> None:
    store = Store(4096)
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        await backend.write(0, b"1")
        held = store.steps.hold("flush")
        first = await start(nursery, backend.flush)
        await backend.write(1, b"2")
        held.release()
        await first.join()
        assert store.durable[:2] == b"1\0"
        await backend.flush()
        assert store.durable[:2] == b"12"


async def test_a_failed_write_is_flushed_as_it_may_be_there(graph: Graph) -> None:
    store = Store(4096)
    async with memory_backend(graph, store) as backend:
        await backend.flush()
        store.steps.fail("write", HostError("the disk said no"))
        with pytest.raises(HostError):
            await backend.write(0, b"x")
        await backend.flush()
        assert len(store.steps.of("flush")) == 1


async def test_a_failed_flush_is_asked_again(graph: Graph) -> None:
    store = Store(4096)
    async with memory_backend(graph, store) as backend:
        await backend.write(0, b"1")
        store.steps.fail("flush", HostError("the disk is gone"))
        with pytest.raises(HostError, match="the disk is gone") as caught:
            await backend.flush()
        assert caught.value.operation == "flush"
        assert backend.accounting.failed == 1
        await backend.flush()
        assert store.durable == store.data


async def test_fua_writes_are_durable_when_answered(graph: Graph) -> None:
    chain = Chain(Table(4096))
    async with chain_backend(graph, chain) as backend:
        await backend.write(0, b"x" * 100, fua=True)
        assert b"x" * 100 in chain.files[0].durable


@pytest.mark.parametrize("write_cache", [True, False])
async def test_write_through(graph: Graph, write_cache: bool) -> None:
    store = Store(b"\xff" * 4096)
    async with memory_backend(graph, store, write_cache=write_cache) as backend:
        await backend.write(0, b"x")
        await backend.write_zeroes(1, 1)
        assert (store.durable[:2] == b"x\0") is not write_cache


async def test_no_flush(graph: Graph) -> None:
    chain = Chain(Table(4096))
    async with chain_backend(graph, chain, **{"cache.no-flush": True}) as backend:
        await backend.write(0, b"x")
        await backend.flush()
        assert chain.layers[0].steps.of("flush-to-os"), "the death of the process must lose nothing"
        assert not chain.files[0].steps.of("flush")


async def test_closing_flushes(graph: Graph) -> None:
    store = Store(4096)
    async with memory_backend(graph, store) as backend:
        await backend.write(0, b"x")
    assert store.durable == store.data


async def test_flush_of_a_read_only_node_is_nothing(graph: Graph) -> None:
    store = Store(4096)
    with stores(disk=store):
        backend = await graph.open_backend("memory:disk")
        await backend.flush()
        await backend.close()
    assert not store.steps.of("flush", "flush-to-os")
