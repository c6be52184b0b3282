"""Resizing: who may, who is told, and that the new space reads as zeroes."""

from __future__ import annotations

import random

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model import permissions
from fusedisk.block.model.node import NodeConfig
from fusedisk.core.errors import (
    HostError,
    NotSupportedError,
    OperationBlockedError,
    OutOfRangeError,
    PermissionConflictError,
)
from tests.support.memory import Store, stores
from tests.support.opening import Chain, chain_backend, memory_backend
from tests.support.toy import Table


async def test_users_are_told(graph: Graph) -> None:
    with stores(disk=Store(4096)):
        backend = await graph.open_backend("memory:disk", format="raw", writable=True)
        told: list[int] = []
        backend.on_resize.append(told.append)
        await backend.truncate(8192)
        await backend.truncate(100)
        assert told == [8192, 100]
        assert backend.length == 100
        assert graph.node(backend.node.children["file"].node.name).length == 100
        await backend.close()


async def test_a_failed_resize_changes_nothing(graph: Graph) -> None:
    store = Store(4096)
    async with memory_backend(graph, store) as backend:
        store.steps.fail("truncate", HostError("no"))
        with pytest.raises(HostError):
            await backend.truncate(8192)
        assert backend.length == 4096
        assert backend.accounting.failed == 1


@pytest.mark.parametrize("length", [-1, 1 << 63])
async def test_impossible_lengths(graph: Graph, length: int) -> None:
    store = Store(4096)
    async with memory_backend(graph, store) as backend:
        with pytest.raises(OutOfRangeError) as caught:
            await backend.truncate(length)
        assert str(caught.value) == f"'memory:disk' cannot be {length} bytes long, expected 0 to 2^63 - 1."
        assert not store.steps.of("truncate")


async def test_blockers_refuse_with_their_reason(graph: Graph) -> None:
    async with memory_backend(graph, Store(4096)) as backend:
        node = backend.node
        node.block_operation("resize", "the backup job 'b' reads it")
        node.block_operation("resize", "another")
        with pytest.raises(OperationBlockedError) as caught:
            await backend.truncate(1)
        assert str(caught.value) == f"Node '{node.name}' cannot do resize now: the backup job 'b' reads it."
        node.unblock_operation("resize", "the backup job 'b' reads it")
        with pytest.raises(OperationBlockedError, match="another"):
            await backend.truncate(1)
        node.unblock_operation("resize", "another")
        await backend.truncate(1)


async def test_resizing_needs_its_permission(graph: Graph) -> None:
    with stores(disk=Store(4096)):
        node = await graph.open_node({"driver": "memory", "filename": "disk"}, NodeConfig(read_only=False))
        perm = permissions.CONSISTENT_READ | permissions.WRITE
        backend = graph.attach(node, "writer", writable=True, perm=perm)
        with pytest.raises(PermissionConflictError) as caught:
            await backend.truncate(1)
        assert str(caught.value) == f"No user of node '{node.name}' has asked for the resize permission."
        await backend.close()


async def test_raw_with_a_fixed_window_cannot_be_resized(graph: Graph) -> None:
    with stores(disk=Store(4096)):
        options = {"driver": "raw", "size": 1024, "file": {"driver": "memory", "filename": "disk"}}
        backend = await graph.open_backend(options, writable=True)
        with pytest.raises(NotSupportedError, match="fixed window"):
            await backend.truncate(2048)
        await backend.close()


@pytest.mark.parametrize("seed", range(6))
async def test_growing_over_a_longer_backing_file_shows_zeroes(graph: Graph, seed: int) -> None:
    rng = random.Random(seed)
    base, top = Table(20_000, 1024), Table(rng.randrange(1, 10_000), 1024)
    chain = Chain(base, top)
    base.put(*range(20))
    chain.files[0].data[:] = b"\xbb" * base.end
    oracle = bytearray(b"\xbb" * top.length)
    async with chain_backend(graph, chain) as backend:
        while len(oracle) < 25_000:
            if oracle and rng.random() < 0.5:
                offset = rng.randrange(len(oracle))
                await backend.write(offset, b"w" * 10 if offset + 10 <= len(oracle) else b"")
                oracle[offset : offset + 10] = b"w" * 10 if offset + 10 <= len(oracle) else oracle[offset : offset + 10]
            oracle += bytes(rng.randrange(1, 6000))
            await backend.truncate(len(oracle))
            assert await backend.read(0, len(oracle)) == oracle
