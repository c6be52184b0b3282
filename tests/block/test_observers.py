"""Observers: they see every change before and after it happens, and every read, whichever way it takes."""

from __future__ import annotations

import pytest
import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.node import Node
from fusedisk.block.model.observer import Change, Observer
from fusedisk.core.errors import HostError
from tests.block.conftest import assert_idle
from tests.support.memory import Store
from tests.support.opening import memory_backend
from tests.support.tasks import start

OLD = b"o" * 8192


class Guard(Observer):
    """Waits, or fails, before changes at ``offset``."""

    wants_before = True

    def __init__(self, offset: int, *, error: HostError | None = None) -> None:
        self.offset, self.error = offset, error
        self.gate = trio.Event()
        self.seen: list[int] = []

    async def before_change(self, node: Node, offset: int, length: int, kind: Change) -> None:
        self.seen.append(offset)
        if offset == self.offset:
            if self.error is not None:
                raise self.error
            await self.gate.wait()


async def test_a_change_waits_for_its_observer_and_others_do_not(graph: Graph) -> None:
    store, guard = Store(OLD), Guard(0)
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        backend.node.observe(guard)
        held = await start(nursery, lambda: backend.write(0, b"n"))
        assert (await start(nursery, lambda: backend.write(4096, b"n"))).done
        assert store.data[0:1] == b"o"
        guard.gate.set()
        await held.join()
        assert store.data[0:1] == b"n"


async def test_an_observer_that_goes_does_not_hide_the_next(graph: Graph) -> None:
    """A job that ends while a write waits for it must not cost another job its turn, and is not asked any more."""
    first, second, gone = Guard(0), Guard(-1), Guard(-1)
    async with memory_backend(graph, Store(OLD)) as backend, trio.open_nursery() as nursery:
        for observer in (first, gone, second):
            backend.node.observe(observer)
        task = await start(nursery, lambda: backend.write(0, b"n"))
        backend.node.unobserve(first)
        backend.node.unobserve(gone)
        first.gate.set()
        await task.join()
    assert (first.seen, gone.seen, second.seen) == ([0], [], [0])


async def test_an_observer_that_fails_costs_the_change(graph: Graph) -> None:
    store, guard = Store(OLD), Guard(0, error=HostError("the copy could not be made"))
    async with memory_backend(graph, store) as backend:
        backend.node.observe(guard)
        with pytest.raises(HostError, match="the copy could not be made"):
            await backend.write(0, b"n")
        assert_idle(backend.node)
    assert store.data == OLD
