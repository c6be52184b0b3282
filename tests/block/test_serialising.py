"""Overlapping requests at the same time: who waits for whom, and that nobody's bytes are lost."""

from __future__ import annotations

import random

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.request import io, space
from tests.block.conftest import assert_idle
from tests.support.memory import Store
from tests.support.opening import Chain, chain_backend, memory_backend
from tests.support.oracle import random_range
from tests.support.tasks import start
from tests.support.thinning import thinned
from tests.support.toy import Table

BLOCK = 512


async def test_two_unaligned_writers_of_one_block_lose_nothing(graph: Graph) -> None:
    store = Store(BLOCK, request_alignment=BLOCK)
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        held = store.steps.hold("write")
        first = await start(nursery, lambda: backend.write(0, b"1" * 100))
        second = await start(nursery, lambda: backend.write(100, b"2" * 100))
        assert not second.done
        assert len(store.steps.of("read")) == 1, "the second must not read the block before the first has written it"
        held.release()
        await first.join()
        await second.join()
    assert store.data == b"1" * 100 + b"2" * 100 + bytes(312)


async def test_an_aligned_write_waits_for_a_read_modify_write(graph: Graph) -> None:
    store = Store(4 * BLOCK, request_alignment=BLOCK)
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        held = store.steps.hold("write")
        first = await start(nursery, lambda: backend.write(BLOCK + 1, b"1"))
        overlapping = await start(nursery, lambda: backend.write(BLOCK, b"2" * BLOCK))
        beside = await start(nursery, lambda: backend.write(2 * BLOCK, b"3" * BLOCK))
        reader = await start(nursery, lambda: backend.read(BLOCK, BLOCK))
        assert beside.done
        assert not overlapping.done
        assert not reader.done
        held.release()
        for task in (first, overlapping, reader):
            await task.join()
        assert_idle(backend.node)
    assert store.data == bytes(BLOCK) + b"2" * BLOCK + b"3" * BLOCK + bytes(BLOCK)


async def test_a_read_modify_write_waits_for_a_plain_write(graph: Graph) -> None:
    store = Store(2 * BLOCK, request_alignment=BLOCK)
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        held = store.steps.hold("write")
        plain = await start(nursery, lambda: backend.write(0, b"p" * BLOCK))
        unaligned = await start(nursery, lambda: backend.write(10, b"u"))
        assert not store.steps.of("read"), "it must not read a block that is being written"
        held.release()
        await plain.join()
        await unaligned.join()
    assert store.data[:BLOCK] == b"p" * 10 + b"u" + b"p" * (BLOCK - 11)


async def test_plain_requests_do_not_wait_for_each_other(graph: Graph) -> None:
    store = Store(2 * BLOCK)
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        held = store.steps.hold("write")
        first = await start(nursery, lambda: backend.write(0, b"1" * BLOCK))
        assert (await start(nursery, lambda: backend.write(0, b"2" * BLOCK))).done
        assert (await start(nursery, lambda: backend.read(0, BLOCK))).done
        held.release()
        await first.join()


async def test_a_chain_of_waiters_goes_in_order_of_arrival(graph: Graph) -> None:
    store = Store(8 * BLOCK, request_alignment=BLOCK)
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        held = store.steps.hold("write")
        tasks = [
            await start(nursery, lambda n=n: backend.write(n * BLOCK + 1, bytes([65 + n]) * BLOCK)) for n in range(5)
        ]
        assert [task.done for task in tasks] == [False] * 5
        held.release()
        for task in tasks:
            await task.join()
    expected = bytearray(8 * BLOCK)
    for n in range(5):
        expected[n * BLOCK + 1 : (n + 1) * BLOCK + 1] = bytes([65 + n]) * BLOCK
    assert store.data == expected


async def test_a_discard_waits_for_a_write_into_its_clusters(graph: Graph) -> None:
    """And what comes after waits for it: the freed host space may be used again at once."""
    table = Table(8 * BLOCK, BLOCK)
    chain = Chain(table)
    async with chain_backend(graph, chain, discard="unmap") as backend, trio.open_nursery() as nursery:
        await backend.write(0, b"o" * BLOCK)
        held = chain.files[0].steps.hold("write")
        writer = await start(nursery, lambda: backend.write(10, b"w"))
        discard = await start(nursery, lambda: backend.discard(0, BLOCK))
        reader = await start(nursery, lambda: backend.read(0, BLOCK))
        assert not table.steps.of("discard")
        assert not reader.done
        held.release()
        await writer.join()
        await discard.join()
        assert await reader.join() == bytes(BLOCK)
        assert not table.clusters()


async def test_a_long_discard_holds_only_what_is_not_done(graph: Graph) -> None:
    """It comes in pieces. Writes to finished pieces go on; those to the others wait, or their data would be lost."""
    store = Store(b"o" * 8 * BLOCK, discard_alignment=BLOCK, max_discard=2 * BLOCK + 100)
    async with memory_backend(graph, store, discard="unmap") as backend, trio.open_nursery() as nursery:
        first = store.steps.hold("discard")
        discard = await start(nursery, lambda: backend.discard(0, 7 * BLOCK))
        done = await start(nursery, lambda: backend.write(10, b"1"))
        later = await start(nursery, lambda: backend.write(5 * BLOCK, b"2"))
        assert (await start(nursery, lambda: backend.write(7 * BLOCK, b"3"))).done
        assert not done.done
        second = store.steps.hold("discard")
        first.release()
        await done.join()
        assert not later.done
        assert not discard.done
        second.release()
        await discard.join()
        await later.join()
        assert_idle(backend.node)
    pieces = [(call.offset, call.length) for call in store.steps.of("discard")]
    assert pieces == [(0, 2 * BLOCK), (2 * BLOCK, 2 * BLOCK), (4 * BLOCK, 2 * BLOCK), (6 * BLOCK, BLOCK)]
    expected = bytearray(7 * BLOCK) + b"o" * BLOCK
    expected[10], expected[5 * BLOCK], expected[7 * BLOCK] = b"123"
    assert store.data == expected


@pytest.mark.parametrize("long", [(), ((3 * BLOCK, 3 * BLOCK),)], ids=["short", "one-too-long"])
async def test_a_discard_of_ranges_lets_requests_between_them_pass(
    graph: Graph, long: tuple[tuple[int, int], ...]
) -> None:
    store = Store(b"o" * 8 * BLOCK, max_discard=2 * BLOCK)
    ranges = [(0, 10), (20, BLOCK), *long, (7 * BLOCK, 10)]
    held_range = long[0] if long else ranges[0]
    async with memory_backend(graph, store, discard="unmap") as backend, trio.open_nursery() as nursery:
        held = store.steps.hold("discard")
        discard = await start(nursery, lambda: space.discard_ranges(backend.node, ranges))
        within = await start(nursery, lambda: backend.write(held_range[0], b"w"))
        assert (await start(nursery, lambda: backend.write(2 * BLOCK, b"b"))).done
        assert not within.done
        held.release()
        for task in (discard, within):
            await task.join()
        assert_idle(backend.node)
    pieces = [(call.offset, call.length) for call in store.steps.of("discard")]
    expected = [(3 * BLOCK, 2 * BLOCK), (5 * BLOCK, BLOCK)] if long else []
    assert pieces == [*expected, (0, 10), (20, BLOCK), (7 * BLOCK, 10)]


@pytest.mark.parametrize("cluster_size", [512, 4096])
async def test_second_write_into_a_new_cluster_waits_for_the_first(graph: Graph, cluster_size: int) -> None:
    table = Table(2 * cluster_size, cluster_size)
    chain = Chain(table)
    async with chain_backend(graph, chain) as backend, trio.open_nursery() as nursery:
        held = table.steps.hold("publish")
        first = await start(nursery, lambda: backend.write(0, b"1" * 100))
        second = await start(nursery, lambda: backend.write(100, b"2" * 100))
        assert not second.done
        held.release()
        await first.join()
        await second.join()
        assert await backend.read(0, cluster_size) == b"1" * 100 + b"2" * 100 + bytes(cluster_size - 200)
        assert len(table.clusters()) == 1


async def _request(rng: random.Random, backend: Backend, number: int) -> tuple[int, int, int]:
    """One write (or write-zeroes, value 0) of whole bytes with one value; returns offset, length and value."""
    offset, length = random_range(rng, backend.length, 3000)
    value = 1 + number % 255
    if rng.random() < 0.2:
        value = 0
        await backend.write_zeroes(offset, length, may_unmap=True)
    else:
        await backend.write(offset, bytes([value]) * length)
    return offset, length, value


@pytest.mark.parametrize("seed", thinned(range(8)))
@pytest.mark.parametrize("kind", ["aligned-file", "format"])
async def test_overlapping_writers_leave_some_order_of_theirs(graph: Graph, kind: str, seed: int) -> None:
    """Each byte holds what one of the writers of the last batch put there, or the old byte where none wrote."""
    rng = random.Random(seed)
    size = 12_000
    if kind == "format":
        chain = Chain(Table(size, 1024), memory={"request_alignment": 512})
        chain.layers[0].steps.eager = chain.files[0].steps.eager = False
        opened = chain_backend(graph, chain, discard="unmap")
    else:
        store = Store(size // 512 * 512, request_alignment=512, max_transfer=1024)
        store.steps.eager = False
        opened = memory_backend(graph, store)
    async with opened as backend:
        before = bytearray(backend.length)
        for batch in range(12):
            written: list[tuple[int, int, int]] = []

            async def one(number: int, written: list[tuple[int, int, int]] = written) -> None:
                written.append(await _request(rng, backend, number))

            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    for number in range(8):
                        nursery.start_soon(one, batch * 8 + number)
            assert_idle(backend.node)
            after = await backend.read(0, backend.length)
            possible = [{value} for value in before]
            for offset, length, value in written:
                for position in range(offset, offset + length):
                    possible[position].add(value)
            for offset, length, _ in written:
                for position in range(offset, offset + length):
                    possible[position].discard(before[position])
                    possible[position] |= {v for o, n, v in written if o <= position < o + n}
            wrong = [position for position, value in enumerate(after) if value not in possible[position]]
            assert not wrong, f"batch {batch}: byte {wrong[0]} is {after[wrong[0]]}, of {possible[wrong[0]]}"
            before = after


async def test_a_resize_waits_for_requests_in_flight(graph: Graph) -> None:
    table = Table(4 * BLOCK, BLOCK)
    chain = Chain(table)
    async with chain_backend(graph, chain) as backend, trio.open_nursery() as nursery:
        held = chain.files[0].steps.hold("write")
        writer = await start(nursery, lambda: backend.write(0, b"w" * BLOCK))
        resize = await start(nursery, lambda: backend.truncate(8 * BLOCK))
        later = await start(nursery, lambda: backend.read(0, BLOCK))
        assert not table.steps.of("truncate"), "drivers were promised that nothing is in flight"
        assert not later.done
        held.release()
        for task in (writer, resize, later):
            await task.join()
        assert later.result == b"w" * BLOCK
        assert backend.length == 8 * BLOCK


async def test_waiting_requests_can_be_cancelled(graph: Graph) -> None:
    store = Store(BLOCK, request_alignment=BLOCK)
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        held = store.steps.hold("write")
        first = await start(nursery, lambda: backend.write(0, b"1"))
        second = await start(nursery, lambda: backend.write(1, b"2"))
        third = await start(nursery, lambda: backend.write(2, b"3"))
        second.scope.cancel()
        await second.join()
        assert not third.done
        held.release()
        await first.join()
        await third.join()
        await io.flush(backend.node)
    assert store.data[:3] == b"1\x003"
