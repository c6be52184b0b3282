"""What lies between a backend and its requests: throttle, error policy, measurement; and requests that are parked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.node import NodeConfig
from fusedisk.block.request.accounting import Kind
from fusedisk.block.request.policies import Decision
from fusedisk.block.request.ways import Ways
from fusedisk.core.errors import (
    FusediskError,
    HostError,
    NoMediumError,
    NoSpaceError,
    OperationBlockedError,
    OutOfRangeError,
)
from tests.support.memory import Store, stores
from tests.support.opening import memory_backend
from tests.support.tasks import Task, start

OLD = b"o" * 8192


class Gate:
    """A throttle that admits what the test lets through."""

    def __init__(self) -> None:
        self.open = trio.Event()
        self.asked: list[tuple[Kind, int]] = []

    async def admit(self, kind: Kind, length: int) -> None:
        self.asked.append((kind, length))
        await self.open.wait()


class Always:
    """An error policy with one decision."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self.failed: list[tuple[Kind, int, int, FusediskError]] = []

    def decide(self, kind: Kind, offset: int, length: int, error: FusediskError) -> Decision:
        self.failed.append((kind, offset, length, error))
        return self.decision


@asynccontextmanager
async def parked(graph: Graph, store: Store, how: str) -> AsyncIterator[tuple[Backend, Task, Callable[[], None]]]:
    """A disk, a write that is parked, and what lets it go on."""
    async with memory_backend(graph, store) as backend, trio.open_nursery() as nursery:
        resume: Callable[[], None]
        if how == "throttled":
            backend.throttle = gate = Gate()
            resume = gate.open.set
        else:
            backend.on_error = Always(Decision.STOP)
            store.steps.fail("write", NoSpaceError("full"))
            resume = backend.retry_stopped
        task = await start(nursery, lambda: backend.write(0, b"n" * 4))
        assert not task.done
        yield backend, task, resume


hows = pytest.mark.parametrize("how", ["throttled", "stopped"])


@hows
async def test_a_parked_request_goes_on(graph: Graph, how: str) -> None:
    store = Store(OLD)
    async with parked(graph, store, how) as (backend, task, resume):
        assert backend.in_flight == 0
        assert store.data == OLD
        resume()
        await task.join()
        assert store.data[:5] == b"nnnno"
        assert (backend.accounting.writes, backend.accounting.bytes_written) == (1, 4)
        assert backend.accounting.failed == (how == "stopped")


@hows
async def test_parked_requests_do_not_keep_the_graph(graph: Graph, how: str) -> None:
    """A filter gets inserted, the disk gets another node and another length; the request goes where it belongs then."""
    store, other = Store(OLD), Store(b"p" * 8192)
    async with parked(graph, store, how) as (backend, task, resume):
        with trio.fail_after(10):
            above = await graph.insert_filter(backend.node, {"driver": "copy-on-read"})
            assert backend.node is above
            async with graph.drained(above):
                resume()
                await wait_all_tasks_blocked()
                assert not task.done, "a drained section holds back what was parked"
            await task.join()
            assert store.data[:5] == b"nnnno"
            with stores(other=other):
                new = await graph.open_node({"driver": "memory", "filename": "other"}, NodeConfig(read_only=False))
                await graph.replace(backend.node, new)
        await backend.write(0, b"m")
        assert other.data[:2] == b"mp"


@hows
async def test_a_parked_request_begins_anew_on_the_new_node(graph: Graph, how: str) -> None:
    store, other = Store(OLD), Store(b"p" * 8192)
    async with parked(graph, store, how) as (backend, task, resume):
        with stores(other=other):
            new = await graph.open_node({"driver": "memory", "filename": "other"}, NodeConfig(read_only=False))
            await graph.replace(backend.node, new)
        resume()
        await task.join()
    assert other.data[:5] == b"nnnnp"
    assert store.data == OLD


@hows
async def test_a_parked_request_checks_the_new_length(graph: Graph, how: str) -> None:
    async with parked(graph, Store(OLD), how) as (backend, task, resume):
        await backend.truncate(2)
        resume()
        with pytest.raises(OutOfRangeError):
            await task.join()


@hows
async def test_closing_ends_what_is_parked(graph: Graph, how: str) -> None:
    store = Store(OLD)
    async with parked(graph, store, how) as (backend, task, _):
        with trio.fail_after(10):
            await backend.close()
        with pytest.raises(NoMediumError, match="'disk' is closed"):
            await task.join()
    assert store.data == OLD


@hows
async def test_a_parked_request_may_be_cancelled(graph: Graph, how: str) -> None:
    async with parked(graph, Store(OLD), how) as (backend, task, _):
        task.scope.cancel()
        await task.join()
        assert not backend._parked
        assert backend.in_flight == 0


async def test_a_throttle_sees_every_request_that_moves_data(graph: Graph) -> None:
    async with memory_backend(graph, Store(OLD), discard="unmap") as backend:
        backend.throttle = gate = Gate()
        gate.open.set()
        await backend.read(0, 10)
        await backend.write(0, b"n" * 20)
        await backend.write_zeroes(0, 30)
        await backend.discard(0, 40)
        await backend.flush()
        await backend.truncate(8000)
        with pytest.raises(OutOfRangeError):
            await backend.write(8000, b"n")
    kinds = [Kind.READ, Kind.WRITE, Kind.ZEROES, Kind.DISCARD, Kind.FLUSH]
    assert gate.asked == list(zip(kinds, (10, 20, 30, 40, 0), strict=True))


REQUESTS: dict[Kind, tuple[str, Callable[[Backend], Awaitable[object]], int]] = {
    Kind.READ: ("read", lambda b: b.read(0, 10), 10),
    Kind.WRITE: ("write", lambda b: b.write(0, b"n" * 20), 20),
    Kind.ZEROES: ("zero", lambda b: b.write_zeroes(0, 30), 30),
    Kind.DISCARD: ("discard", lambda b: b.discard(0, 40), 40),
    Kind.FLUSH: ("flush-to-os", lambda b: b.flush(), 0),
}
"""A step of the driver, the request that breaks there, its length."""


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.value)
@pytest.mark.parametrize("decision", [None, *Decision], ids=str)
async def test_a_policy_decides_about_a_failed_request(graph: Graph, kind: Kind, decision: Decision | None) -> None:
    step, request, length = REQUESTS[kind]
    store, error = Store(OLD), HostError("broken")
    async with memory_backend(graph, store, discard="unmap") as backend, trio.open_nursery() as nursery:
        policy = Always(decision or Decision.REPORT)
        backend.on_error = policy if decision is not None else None
        store.steps.fail(step, error)
        task = await start(nursery, lambda: request(backend))
        if decision in (None, Decision.REPORT):
            with pytest.raises(HostError, match="broken"):
                await task.join()
        elif decision is Decision.STOP:
            assert not task.done
            backend.retry_stopped()
        result = await task.join() if decision not in (None, Decision.REPORT) else None
        if kind is Kind.READ and result is not None:
            assert result == (bytes(10) if decision is Decision.IGNORE else b"o" * 10)
        assert policy.failed == ([(kind, 0, length, error)] if decision is not None else [])
        assert backend.accounting.failed == 1


async def test_an_ignored_error_does_not_show_old_memory(graph: Graph) -> None:
    store = Store(OLD)
    async with memory_backend(graph, store) as backend:
        backend.on_error = Always(Decision.IGNORE)
        store.steps.fail("read", HostError("broken"))
        buffer = bytearray(b"secret")
        await backend.read_into(0, memoryview(buffer))
        assert buffer == bytes(6)


async def test_a_policy_does_not_see_what_moves_no_data(graph: Graph) -> None:
    store = Store(OLD)
    async with memory_backend(graph, store) as backend:
        backend.on_error = policy = Always(Decision.STOP)
        store.steps.fail("truncate", HostError("broken"))
        with pytest.raises(HostError):
            await backend.truncate(100)
        assert not policy.failed


async def test_what_was_done_adds_up(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr("fusedisk.block.graph.backend.perf_counter", lambda: float(next(now)))
    done: list[tuple[Kind, int, float]] = []
    store = Store(OLD)
    async with memory_backend(graph, store, discard="unmap") as backend:
        backend.on_done = lambda *each: done.append(each)
        for _, request, _ in REQUESTS.values():
            await request(backend)
            await request(backend)
        store.steps.fail("write", HostError("broken"))
        with pytest.raises(HostError):
            await backend.write(0, b"n")
        accounting = backend.accounting
        assert done == [(kind, length, 1.0) for kind, (_, _, length) in REQUESTS.items() for _ in range(2)]
        assert (accounting.reads, accounting.bytes_read) == (2, 20)
        assert (accounting.writes, accounting.bytes_written) == (2, 40)
        assert (accounting.zeroes, accounting.bytes_zeroed) == (2, 60)
        assert (accounting.discards, accounting.bytes_discarded) == (2, 80)
        assert (accounting.flushes, accounting.failed) == (2, 1)
        backend.on_done = None
        await backend.write(0, b"n")
        assert len(done) == 10
        assert next(now) == 21, "no clock is asked unless somebody wants to know"


@pytest.mark.parametrize(
    ("name", "policy"), [("throttle", Gate()), ("on_error", Always(Decision.REPORT)), ("on_done", lambda *each: None)]
)
async def test_policies_close_the_short_ways(graph: Graph, name: str, policy: Any) -> None:
    async with memory_backend(graph, Store(OLD)) as backend:
        before = backend.immediate.ways()
        assert before.reads
        setattr(backend, name, policy)
        assert backend.immediate.ways() == Ways()
        setattr(backend, name, None)
        assert backend.immediate.ways() == before
        backend.begin_passthrough()
        with pytest.raises(OperationBlockedError, match="cannot get a policy for its requests now"):
            setattr(backend, name, policy)
        setattr(backend, name, None)
        backend.end_passthrough()
        setattr(backend, name, policy)
        setattr(backend, name, None)
