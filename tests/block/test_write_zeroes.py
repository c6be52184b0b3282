"""Write-zeroes and what stands in for it; detect-zeroes; discard."""

from __future__ import annotations

import random

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.extent import ZERO
from fusedisk.block.model.flags import MAY_UNMAP, NO_FALLBACK
from fusedisk.block.request import io
from fusedisk.core.errors import HostError, NotSupportedError
from tests.support.memory import Store
from tests.support.opening import Chain, chain_backend, memory_backend
from tests.support.oracle import random_request
from tests.support.toy import Table

CLUSTER = 1024
FULL = b"\xff"


@pytest.mark.parametrize("may_unmap", [False, True])
async def test_whole_units_go_to_the_driver_and_edges_are_written(graph: Graph, may_unmap: bool) -> None:
    store = Store(FULL * 8192, zeroes_alignment=1024)
    async with memory_backend(graph, store, discard="unmap") as backend:
        store.steps.calls.clear()
        await backend.write_zeroes(1000, 3000, may_unmap=may_unmap)
    assert [call[1:] for call in store.steps.of("zero")] == [(1024, 2048, MAY_UNMAP if may_unmap else 0)]
    assert [call[1:3] for call in store.steps.of("write")] == [(1000, 24), (3072, 928)]
    assert store.data == FULL * 1000 + bytes(3000) + FULL * (8192 - 4000)


async def test_zeroes_inside_one_unit_are_written(graph: Graph) -> None:
    store = Store(FULL * 4096, zeroes_alignment=1024)
    async with memory_backend(graph, store) as backend:
        await backend.write_zeroes(1030, 10)
    assert not store.steps.of("zero")
    assert store.data == FULL * 1030 + bytes(10) + FULL * (4096 - 1040)


async def test_without_the_operation_zeroes_are_written(graph: Graph) -> None:
    store = Store(FULL * (3 << 20), zeroes=False, max_transfer=1 << 19)
    async with memory_backend(graph, store) as backend:
        await backend.write_zeroes(1, (3 << 20) - 2)
        with pytest.raises(NotSupportedError):
            await io.write_zeroes(backend.node, 0, 1 << 20, NO_FALLBACK)
    assert store.data == FULL + bytes((3 << 20) - 2) + FULL


async def test_may_unmap_needs_discard_unmap(graph: Graph) -> None:
    for discard, flags in (("ignore", 0), ("unmap", MAY_UNMAP)):
        store = Store(FULL * 4096)
        async with memory_backend(graph, store, discard=discard) as backend:
            await backend.write_zeroes(0, 4096, may_unmap=True)
        assert store.steps.of("zero")[0].flags == flags


async def test_a_part_of_a_cluster_that_reads_zero_anyway_stays_unallocated(graph: Graph) -> None:
    base, top = Table(4 * CLUSTER, CLUSTER), Table(6 * CLUSTER, CLUSTER)
    async with chain_backend(graph, Chain(base, top)) as backend:
        await backend.write_zeroes(100, 5 * CLUSTER)
        assert not top.clusters()
        assert top.clusters(ZERO) == set(range(6))


async def test_zeroing_a_part_keeps_the_rest_of_the_cluster(graph: Graph) -> None:
    base, top = Table(4 * CLUSTER, CLUSTER), Table(4 * CLUSTER, CLUSTER)
    chain = Chain(base, top)
    base.put(*range(4))
    chain.files[0].data[:] = FULL * base.end
    async with chain_backend(graph, chain) as backend:
        await backend.write_zeroes(100, 2 * CLUSTER)
        expected = FULL * 100 + bytes(2 * CLUSTER) + FULL * (2 * CLUSTER - 100)
        assert await backend.read(0, backend.length) == expected
        assert top.clusters(ZERO) == {1}


async def test_the_unaligned_end_of_a_disk_is_zeroed_as_a_unit(graph: Graph) -> None:
    table = Table(2 * CLUSTER + 100, CLUSTER)
    async with chain_backend(graph, Chain(table)) as backend:
        await backend.write(0, FULL * backend.length)
        await backend.write_zeroes(2 * CLUSTER, 100)
        assert await backend.read(0, backend.length) == FULL * 2 * CLUSTER + bytes(100)
        assert table.clusters() == {0, 1}


@pytest.mark.parametrize(("detect", "flags"), [("off", None), ("on", 0), ("unmap", MAY_UNMAP)])
async def test_detect_zeroes(graph: Graph, detect: str, flags: int | None) -> None:
    store = Store(FULL * 8192, request_alignment=512)
    async with memory_backend(graph, store, **{"detect-zeroes": detect, "discard": "unmap"}) as backend:
        await backend.write(512, bytes(1024))
        await backend.write(4096, bytes(511) + b"x")
    assert [call.flags for call in store.steps.of("zero")] == ([] if flags is None else [flags])
    assert store.data == FULL * 512 + bytes(1024) + FULL * (4096 - 1536) + bytes(511) + b"x" + FULL * 3584


@pytest.mark.parametrize("detect", ["on", "unmap"])
async def test_detect_zeroes_changes_no_content(graph: Graph, detect: str) -> None:
    rng = random.Random(detect)
    chain = Chain(Table(40_000, CLUSTER), Table(30_000, CLUSTER))
    oracle = bytearray(30_000)
    async with chain_backend(graph, chain, **{"detect-zeroes": detect}) as backend:
        for _ in range(300):
            await random_request(rng, backend, oracle, 5000)
            offset = rng.randrange(25_000)
            await backend.write(offset, bytes(3000))
            oracle[offset : offset + 3000] = bytes(3000)
        assert await backend.read(0, len(oracle)) == oracle
        assert chain.layers[1].clusters(ZERO)


async def test_discard_is_narrowed_to_whole_units(graph: Graph) -> None:
    store = Store(FULL * 8100, discard_alignment=1024)
    async with memory_backend(graph, store, discard="unmap") as backend:
        await backend.discard(1000, 3000)
        await backend.discard(10, 500)
        await backend.discard(7000, 1100)
    assert [call[1:3] for call in store.steps.of("discard")] == [(1024, 2048), (7168, 932)]


async def test_discard_is_dropped_unless_asked_for(graph: Graph) -> None:
    store = Store(FULL * 8192)
    async with memory_backend(graph, store) as backend:
        await backend.discard(0, 8192)
    assert not store.steps.of("discard")


async def test_discard_without_the_operation_leaves_everything(graph: Graph) -> None:
    store = Store(FULL * 8192, discard=False)
    async with memory_backend(graph, store, discard="unmap") as backend:
        await backend.discard(0, 8192)
        store.discard = True
        store.steps.fail("discard", HostError("no such luck"))
        with pytest.raises(HostError, match="no such luck"):
            await backend.discard(0, 8192)
        assert backend.accounting.failed == 1
    assert store.data == FULL * 8192


async def test_discard_in_an_overlay_shows_no_old_data(graph: Graph) -> None:
    base, top = Table(4 * CLUSTER, CLUSTER), Table(4 * CLUSTER, CLUSTER)
    chain = Chain(base, top)
    base.put(0, 1)
    chain.files[0].data[:] = b"o" * base.end
    async with chain_backend(graph, chain, discard="unmap") as backend:
        await backend.write(0, b"n" * CLUSTER)
        await backend.discard(0, 2 * CLUSTER)
        assert await backend.read(0, 2 * CLUSTER) == bytes(2 * CLUSTER)
