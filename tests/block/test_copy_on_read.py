"""Copy-on-read: what was read once is in the overlay, and guest writes are never overwritten by it."""

from __future__ import annotations

import random

import pytest
import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.extent import ZERO
from fusedisk.block.model.flags import COPY_ON_READ
from fusedisk.block.request import io
from fusedisk.core.errors import CorruptImageError, FusediskError, NoSpaceError, ReadOnlyError
from tests.support.memory import Store, stores
from tests.support.opening import Chain, chain_backend
from tests.support.oracle import random_bytes, random_range
from tests.support.tasks import start
from tests.support.toy import Table, tables

CLUSTER = 1024


def _filled(length: int, cluster_size: int, seed: int = 1) -> tuple[Table, bytes]:
    """A base image full of data (some of it zeroes), and its content; its file is ``content`` behind 512 bytes."""
    rng = random.Random(seed)
    content = b"".join(
        rng.choice((bytes(cluster_size), random_bytes(rng, cluster_size))) for _ in range(-(-length // cluster_size))
    )
    table = Table(length, cluster_size)
    table.put(*range(len(content) // cluster_size))
    return table, content


def _chain(length: int, top: Table, base_cluster: int = 512) -> tuple[Chain, bytes]:
    base, content = _filled(length, base_cluster)
    chain = Chain(base, top)
    chain.files[0].data[:] = bytes(512) + content
    return chain, content[:length]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("top_length", [20_000, 33_333])
async def test_after_one_pass_the_backing_file_is_not_touched(graph: Graph, top_length: int, seed: int) -> None:
    rng = random.Random(seed)
    chain, content = _chain(25_000, Table(top_length, CLUSTER))
    expected = content[:top_length].ljust(top_length, b"\0")
    async with chain_backend(graph, chain, **{"copy-on-read": True}) as backend:
        while (offset := len(chain.layers[1].clusters()) + len(chain.layers[1].clusters(ZERO))) * CLUSTER < min(
            top_length, 25_000
        ):
            offset, length = random_range(rng, top_length, 5000)
            assert await backend.read(offset, length) == expected[offset : offset + length]
        assert await backend.read(0, top_length) == expected
        chain.files[0].steps.calls.clear()
        assert await backend.read(0, top_length) == expected
        assert not chain.files[0].steps.of("read")
        assert chain.layers[1].clusters(ZERO), "what is zero in the base stays without space"


async def test_only_whole_clusters_are_copied(graph: Graph) -> None:
    chain, content = _chain(8 * CLUSTER, Table(8 * CLUSTER, CLUSTER))
    async with chain_backend(graph, chain, **{"copy-on-read": True}) as backend:
        assert await backend.read(3 * CLUSTER + 5, 10) == content[3 * CLUSTER + 5 :][:10]
        table = chain.layers[1]
        assert table.clusters() | table.clusters(ZERO) == {3}
        assert await backend.read(3 * CLUSTER, CLUSTER) == content[3 * CLUSTER : 4 * CLUSTER]


async def test_the_filter(graph: Graph) -> None:
    chain, content = _chain(8 * CLUSTER, Table(8 * CLUSTER, CLUSTER))
    with chain.known():
        backend = await graph.open_backend({"driver": "copy-on-read", "file": chain.options()}, writable=True)
        assert await backend.read(0, 8 * CLUSTER) == content
        await backend.write(10, b"new")
        assert await backend.read(0, 20) == content[:10] + b"new" + content[13:20]
        table = chain.layers[1]
        assert table.clusters() | table.clusters(ZERO) == set(range(8))
        await backend.close()


async def test_the_filter_needs_a_writable_node(graph: Graph) -> None:
    with stores(file=Store(512)), tables(only=Table(512)):
        below = {"driver": "toy", "table": "only", "file": {"driver": "memory", "filename": "file"}}
        with pytest.raises(ReadOnlyError, match=r"^'memory:file' is open read-only, but .* needs to write to it\.$"):
            await graph.open_backend({"driver": "copy-on-read", "file": below})
    assert not graph.nodes


async def test_a_guest_write_is_not_overwritten_by_a_copy(graph: Graph) -> None:
    chain, content = _chain(4 * CLUSTER, Table(4 * CLUSTER, CLUSTER))
    async with (
        chain_backend(graph, chain, **{"copy-on-read": True}) as backend,
        trio.open_nursery() as nursery,
    ):
        held = chain.files[0].steps.hold("read")
        reader = await start(nursery, lambda: backend.read(0, 4 * CLUSTER))
        writer = await start(nursery, lambda: backend.write(100, b"new"))
        assert not writer.done
        held.release()
        assert await reader.join() == content
        await writer.join()
        expected = bytearray(content)
        expected[100:103] = b"new"
        assert await backend.read(0, 4 * CLUSTER) == expected


async def test_a_copy_waits_for_a_guest_write(graph: Graph) -> None:
    chain, content = _chain(4 * CLUSTER, Table(4 * CLUSTER, CLUSTER))
    async with (
        chain_backend(graph, chain, **{"copy-on-read": True}) as backend,
        trio.open_nursery() as nursery,
    ):
        held = chain.files[1].steps.hold("write")
        writer = await start(nursery, lambda: backend.write(100, b"new"))
        reader = await start(nursery, lambda: backend.read(0, CLUSTER))
        assert not reader.done
        held.release()
        await writer.join()
        assert await reader.join() == content[:100] + b"new" + content[103:CLUSTER]


@pytest.mark.parametrize("seed", range(6))
async def test_concurrent_reads_and_writes(graph: Graph, seed: int) -> None:
    rng = random.Random(seed)
    size = 30 * CLUSTER + 77
    chain, content = _chain(25 * CLUSTER + 300, Table(size, CLUSTER))
    for part in (*chain.layers, *chain.files):
        part.steps.eager = False
    oracle = bytearray(content.ljust(size, b"\0"))
    async with chain_backend(graph, chain, **{"copy-on-read": True, "discard": "unmap"}) as backend:
        for _ in range(10):
            expected = bytes(oracle)
            slots = rng.sample(range(size // 500), 6)

            async def read(offset: int, length: int, expected: bytes, slots: list[int]) -> None:
                found = await backend.read(offset, length)
                if not any(slot * 500 < offset + length and offset < slot * 500 + 500 for slot in slots):
                    assert found == expected[offset : offset + length]

            async with trio.open_nursery() as nursery:
                for slot in slots:
                    new = random_bytes(rng, 500)
                    nursery.start_soon(backend.write, slot * 500, new)
                    oracle[slot * 500 : slot * 500 + 500] = new
                for _ in range(8):
                    nursery.start_soon(read, *random_range(rng, size, 6000), expected, slots)
            assert await backend.read(0, size) == oracle


@pytest.mark.parametrize("flags", [0, COPY_ON_READ])
async def test_clusters_larger_than_a_copy(graph: Graph, flags: int) -> None:
    """2 MiB clusters are copied in two steps."""
    size = 2 << 20
    chain, content = _chain(size + 1000, Table(2 * size, size), base_cluster=65536)
    async with chain_backend(graph, chain) as backend:
        buffer = bytearray(2000)
        await io.read(backend.node, size - 1000, memoryview(buffer), flags)
        assert buffer == content[size - 1000 : size + 1000]
        table = chain.layers[1]
        assert table.clusters() | table.clusters(ZERO) == ({0, 1} if flags else set())
        assert await backend.read(0, len(content)) == content


async def test_no_room_for_the_copy_fails_the_read(graph: Graph) -> None:
    chain, content = _chain(4 * CLUSTER, Table(4 * CLUSTER, CLUSTER))
    async with chain_backend(graph, chain, **{"copy-on-read": True}) as backend:
        for _ in range(2):
            chain.files[1].steps.fail("write", NoSpaceError("no room"))
        chain.layers[1].steps.fail("zero", NoSpaceError("no room"))
        with pytest.raises(FusediskError, match="no room"):
            await backend.read(0, 4 * CLUSTER)
        chain.files[1].steps.heal()
        chain.layers[1].steps.heal()
        assert await backend.read(0, 4 * CLUSTER) == content


async def test_a_fenced_node_is_read_but_not_written(graph: Graph) -> None:
    chain, content = _chain(4 * CLUSTER, Table(4 * CLUSTER, CLUSTER))
    async with chain_backend(graph, chain, **{"copy-on-read": True}) as backend:
        backend.node.fence("the L2 table points at the header.")
        assert await backend.read(0, 4 * CLUSTER) == content
        assert not chain.layers[1].clusters()
        with pytest.raises(CorruptImageError) as caught:
            await backend.write(0, b"x")
        assert str(caught.value) == (
            "'memory:file1' accepts no writes since corruption was found: the L2 table points at the header."
        )
