"""Before-write hooks: they see every change before it happens."""

from __future__ import annotations

import pytest
import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import HostError
from tests.block.conftest import assert_idle
from tests.support.memory import Store
from tests.support.opening import memory_backend
from tests.support.tasks import start

OLD = b"o" * 8192


async def test_hooks_see_every_change_before_it_happens(graph: Graph) -> None:
    store = Store(OLD, request_alignment=512)
    seen: list[tuple[int, int, bytes]] = []

    async def hook(offset: int, length: int) -> None:
        seen.append((offset, length, bytes(store.data[offset : offset + length])))

    async with memory_backend(graph, store, **{"discard": "unmap", "detect-zeroes": "on"}) as backend:
        backend.node.before_write.append(hook)
        await backend.write(0, b"n" * 512)
        await backend.write(700, b"n" * 10)
        await backend.write_zeroes(1024, 512)
        await backend.write(2048, bytes(512))
        await backend.discard(4096, 1024)
        await backend.read(0, 8192)
        await backend.flush()
        backend.node.before_write.remove(hook)
        await backend.write(6000, b"n")
    assert [(offset, length) for offset, length, _ in seen] == [
        (0, 512),
        (700, 10),
        (1024, 512),
        (2048, 512),
        (4096, 1024),
    ]
    assert all(content == b"o" * length for _, length, content in seen)


async def test_a_write_waits_for_its_hook_and_others_do_not(graph: Graph) -> None:
    store = Store(OLD)
    gate = trio.Event()

    async def hook(offset: int, length: int) -> None:
        if offset == 0:
            await gate.wait()

    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        backend.node.before_write.append(hook)
        held = await start(nursery, lambda: backend.write(0, b"n"))
        assert (await start(nursery, lambda: backend.write(4096, b"n"))).done
        assert store.data[0:1] == b"o"
        gate.set()
        await held.join()
        assert store.data[0:1] == b"n"


async def test_a_hook_that_goes_does_not_hide_the_next(graph: Graph) -> None:
    """A job that ends while a write waits in its hook must not cost another job its turn."""
    store = Store(OLD)
    gate, seen = trio.Event(), []

    async def first(offset: int, length: int) -> None:
        await gate.wait()

    async def second(offset: int, length: int) -> None:
        seen.append(offset)

    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        backend.node.before_write += [first, second]
        task = await start(nursery, lambda: backend.write(0, b"n"))
        backend.node.before_write.remove(first)
        gate.set()
        await task.join()
    assert seen == [0]


async def test_a_hook_that_fails_costs_the_write(graph: Graph) -> None:
    store = Store(OLD)

    async def hook(offset: int, length: int) -> None:
        raise HostError("the copy could not be made")

    async with memory_backend(graph, store) as backend:
        backend.node.before_write.append(hook)
        with pytest.raises(HostError, match="the copy could not be made"):
            await backend.write(0, b"n")
        assert_idle(backend.node)
    assert store.data == OLD
