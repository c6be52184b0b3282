"""Requests of any shape on nodes that take only some: aligned, cut to the limits, extended, refused."""

from __future__ import annotations

import random

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.block.request import io
from fusedisk.core.errors import OutOfRangeError, ReadOnlyError
from tests.support.memory import Store, stores
from tests.support.opening import Chain, chain_backend, memory_backend
from tests.support.oracle import random_bytes, random_request
from tests.support.toy import Table

SIZE = 64 * 1024


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("zeroes", [True, False], ids=["zeroes", "no-zeroes"])
@pytest.mark.parametrize("max_transfer", [1 << 30, 8192])
@pytest.mark.parametrize("alignment", [1, 512, 4096])
async def test_random_requests_equal_a_flat_oracle(
    graph: Graph, alignment: int, max_transfer: int, zeroes: bool, seed: int
) -> None:
    rng = random.Random(seed)
    oracle = bytearray(rng.randbytes(SIZE))
    store = Store(
        bytes(oracle),
        zeroes=zeroes,
        request_alignment=alignment,
        max_transfer=max_transfer,
        zeroes_alignment=rng.choice((1, 512, 4096)),
        max_write_zeroes=rng.choice((1 << 40, 12288)),
    )
    async with memory_backend(graph, store) as backend:
        for _ in range(150):
            await random_request(rng, backend, oracle, 3 * 8192)
        assert await backend.read(0, SIZE) == oracle
    assert store.data == oracle


@pytest.mark.parametrize("seed", range(4))
async def test_a_window_that_starts_between_blocks(graph: Graph, seed: int) -> None:
    rng = random.Random(seed)
    content = rng.randbytes(SIZE)
    store, offset, size = Store(content, request_alignment=4096), 1000 + seed, 50_000
    oracle = bytearray(content[offset : offset + size])
    with stores(disk=store):
        options = {"driver": "raw", "offset": offset, "size": size, "file": {"driver": "memory", "filename": "disk"}}
        backend = await graph.open_backend(options, writable=True)
        for _ in range(150):
            await random_request(rng, backend, oracle, 10_000)
        await backend.close()
    assert store.data == content[:offset] + oracle + content[offset + size :]


@pytest.mark.parametrize("alignment", [1, 512])
async def test_a_format_over_a_file_with_alignment(graph: Graph, alignment: int) -> None:
    rng = random.Random(alignment)
    oracle = bytearray(20_000)
    chain = Chain(Table(20_000, 1024), memory={"request_alignment": alignment, "max_transfer": 512})
    async with chain_backend(graph, chain) as backend:
        for _ in range(400):
            await random_request(rng, backend, oracle, 5000)
        assert await backend.read(0, len(oracle)) == oracle


async def test_vectored_write_whose_parts_are_unaligned(graph: Graph) -> None:
    """Longer than one request may be, aligned in all but not in its parts."""
    store = Store(16384, request_alignment=512, max_transfer=1024)
    content = random_bytes(random.Random(1), 4096)
    async with memory_backend(graph, store) as backend:
        parts = [memoryview(content)[start:end] for start, end in ((0, 100), (100, 700), (700, 4096))]
        await io.write(backend.node, 512, parts)
    assert store.data == bytes(512) + content + bytes(16384 - 512 - 4096)


async def test_unaligned_vectored_write(graph: Graph) -> None:
    content = random_bytes(random.Random(2), 3000)
    store = Store(b"\xaa" * 8192, request_alignment=512)
    async with memory_backend(graph, store) as backend:
        await io.write(backend.node, 700, [memoryview(content)[:1], memoryview(content)[1:]])
    assert store.data == b"\xaa" * 700 + content + b"\xaa" * (8192 - 3700)


async def test_empty_requests_do_nothing(graph: Graph) -> None:
    store = Store(SIZE, request_alignment=512)
    async with memory_backend(graph, store) as backend:
        store.steps.calls.clear()
        for offset in (0, 100, SIZE):
            assert await backend.read(offset, 0) == b""
            await backend.write(offset, b"")
            await backend.write_zeroes(offset, 0)
            await backend.discard(offset, 0)
            assert (await backend.block_status(offset, 0)).length == 0
        assert not store.steps.calls


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (-1, 1), (1 << 63, 1), (0, SIZE + 1)])
async def test_past_the_end_is_refused(graph: Graph, offset: int, length: int) -> None:
    store = Store(SIZE)
    async with memory_backend(graph, store) as backend:
        for request in (
            lambda: backend.read(offset, length),
            lambda: backend.write(offset, bytes(length)),
            lambda: backend.write_zeroes(offset, length),
            lambda: backend.discard(offset, length),
            lambda: backend.block_status(offset, length),
        ):
            with pytest.raises(OutOfRangeError) as caught:
                await request()
            if offset < 0:
                sentence = f"a request for {length} bytes at {offset} of 'disk': neither number may be negative."
            else:
                sentence = f"'disk' is {SIZE} bytes long, a request for {length} bytes at {offset} goes past its end."
            assert str(caught.value) == sentence


async def test_reads_of_a_parent_past_the_end_give_zeroes(graph: Graph) -> None:
    async with memory_backend(graph, Store(b"\xff" * 1000, request_alignment=512)) as backend:
        buffer = bytearray(b"\xee" * 2000)
        await io.read(backend.node, 900, memoryview(buffer))
        assert buffer == b"\xff" * 100 + bytes(1900)


async def test_a_format_refuses_writes_past_its_end(graph: Graph) -> None:
    async with chain_backend(graph, Chain(Table(1000))) as backend:
        for write in (
            lambda: io.write(backend.node, 999, [memoryview(b"ab")]),
            lambda: io.write_zeroes(backend.node, 999, 2),
        ):
            with pytest.raises(OutOfRangeError, match=r"goes past the end of '.*' at 1000\.$"):
                await write()


async def test_storage_grows_where_a_parent_writes_past_its_end(graph: Graph) -> None:
    store = Store(100)
    async with memory_backend(graph, store) as backend:
        await io.write(backend.node, 200, [memoryview(b"x")])
        assert backend.length == 201
        await io.write_zeroes(backend.node, 250, 50)
        assert backend.length == 300
    assert store.data == bytes(200) + b"x" + bytes(99)


async def test_requests_longer_than_the_limits_are_cut(graph: Graph) -> None:
    store = Store(SIZE, max_transfer=4096, max_write_zeroes=8192, max_discard=16384)
    async with memory_backend(graph, store, discard="unmap") as backend:
        store.steps.calls.clear()
        await backend.write(10, b"x" * 10_000)
        await backend.read(10, 10_000)
        await backend.write_zeroes(0, 20_000)
        await backend.discard(0, 40_000)
    lengths = {name: [call.length for call in store.steps.of(name)] for name in ("write", "read", "zero", "discard")}
    assert lengths == {
        "write": [4096, 4096, 1808],
        "read": [4096, 4096, 1808],
        "zero": [8192, 8192, 3616],
        "discard": [16384, 16384, 7232],
    }


async def test_read_only_nodes_refuse_all_changes(graph: Graph) -> None:
    with stores(disk=Store(SIZE)):
        backend = await graph.open_backend("memory:disk", name="disk")
        for change in (
            lambda: backend.write(0, b"x"),
            lambda: backend.write_zeroes(0, 1),
            lambda: backend.discard(0, 1),
            lambda: backend.truncate(1),
        ):
            with pytest.raises(ReadOnlyError, match=r"^'memory:disk' is open read-only, a write needs it writable\.$"):
                await change()
        assert not backend.writable
        await backend.close()


async def test_zeroing_is_cut_to_whole_units(graph: Graph) -> None:
    """Also where the most that fits in a request is no multiple of the alignment."""
    store = Store(b"\xff" * 2048, request_alignment=512, max_write_zeroes=1000)
    async with memory_backend(graph, store) as backend:
        store.steps.calls.clear()
        await backend.write_zeroes(0, 2048)
    assert [call.length for call in store.steps.of("zero")] == [512] * 4
    assert store.data == bytes(2048)
