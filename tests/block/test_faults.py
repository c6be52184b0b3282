"""What a failed request costs (an error, a bug in a driver, a caller that gave up): itself, nothing else."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import FusediskError, HostError, NoSpaceError
from tests.block.conftest import assert_idle
from tests.support.memory import Store
from tests.support.opening import Chain, chain_backend, memory_backend
from tests.support.stepping import Steps
from tests.support.tasks import start
from tests.support.toy import Table

CLUSTER = 512
SIZE = 16 * CLUSTER

Request = Callable[[Backend], Awaitable[object]]

REQUESTS: dict[str, Request] = {
    "read": lambda backend: backend.read(100, 3000),
    "write": lambda backend: backend.write(100, b"n" * 3000),
    "write-fua": lambda backend: backend.write(100, b"n" * 3000, fua=True),
    "zeroes": lambda backend: backend.write_zeroes(100, 3000),
    "unmap": lambda backend: backend.write_zeroes(512, 2048, may_unmap=True),
    "discard": lambda backend: backend.discard(512, 2048),
    "flush": lambda backend: backend.flush(),
    "grow": lambda backend: backend.truncate(SIZE + 4096),
    "status": lambda backend: backend.block_status(0, SIZE),
}


def _chain() -> tuple[Chain, bytes]:
    base, top = Table(SIZE - 300, CLUSTER), Table(SIZE, CLUSTER)
    base.put(*range(16))
    base.invert(4, bytes(CLUSTER))
    chain = Chain(base, top, memory={"request_alignment": 512})
    chain.files[0].data[:] = b"o" * base.end
    content = bytearray(b"o" * (SIZE - 300) + bytes(300))
    content[4 * CLUSTER : 5 * CLUSTER] = b"\xff" * CLUSTER
    return chain, bytes(content)


def _all_steps(chain: Chain) -> list[Steps]:
    return [part.steps for part in (*chain.layers, *chain.files)]


async def _trace(graph: Graph, request: Request, **options: object) -> list[tuple[int, str]]:
    """The suspension points of a request on a fresh chain: which part of the chain, which operation; in order."""
    chain, _ = _chain()
    found: list[tuple[int, str]] = []
    async with chain_backend(graph, chain, **options) as backend:
        await backend.write(0, b"w" * 10)
        for steps in _all_steps(chain):
            steps.calls.clear()
        await request(backend)
        for index, steps in enumerate(_all_steps(chain)):
            found += [(index, call.operation) for call in steps.calls]
    return found


async def _prove_usable(graph: Graph, backend: Backend, expected: list[bytes]) -> None:
    """Nothing is stuck, the content is one of ``expected``, and requests of all kinds work."""
    for node in graph.nodes.values():
        assert_idle(node)
    with trio.fail_after(30):
        content = await backend.read(0, SIZE)
        differing = [sum(a != b for a, b in zip(content, each, strict=True)) for each in expected]
        assert 0 in differing, f"bytes that differ from each legal content: {differing}"
        await backend.write(7, b"fine" * 400)
        await backend.write_zeroes(2000, 1000)
        await backend.discard(4096, 1024)
        await backend.flush()
        assert await backend.read(7, 1600) == b"fine" * 400
        assert await backend.read(2000, 1000) == bytes(1000)


def _legal(kind: str, before: bytes, found: bytes) -> list[bytes]:
    """What the disk may hold after a request that stopped somewhere: each byte of its range old or new."""
    start, length, new = {
        "write": (100, 3000, b"n"),
        "write-fua": (100, 3000, b"n"),
        "zeroes": (100, 3000, b"\0"),
        "unmap": (512, 2048, b"\0"),
        "discard": (512, 2048, b"\0"),
    }.get(kind, (0, 0, b"\0"))
    mixed = bytearray(before)
    for position in range(start, start + length):
        if found[position : position + 1] == new:
            mixed[position] = new[0]
    return [bytes(mixed)]


@pytest.mark.parametrize("error", [HostError("no luck"), NoSpaceError("no room"), RuntimeError("a bug")])
@pytest.mark.parametrize("copy_on_read", [False, True], ids=["plain", "cor"])
@pytest.mark.parametrize("kind", REQUESTS)
async def test_a_failing_step_costs_one_request(graph: Graph, kind: str, copy_on_read: bool, error: Exception) -> None:
    options = {"discard": "unmap", "copy-on-read": copy_on_read}
    trace = await _trace(graph, REQUESTS[kind], **options)
    assert trace
    for index, operation in trace:
        skip = trace[: trace.index((index, operation))].count((index, operation))
        chain, content = _chain()
        async with chain_backend(graph, chain, **options) as backend:
            await backend.write(0, b"w" * 10)
            before = b"w" * 10 + content[10:]
            _all_steps(chain)[index].fail(operation, error, skip=skip)
            with pytest.raises(type(error), match=str(error)) as caught:
                await REQUESTS[kind](backend)
            if isinstance(caught.value, FusediskError) and kind != "status":
                assert caught.value.operation is not None
            _all_steps(chain)[index].heal()
            found = bytes(await backend.read(0, SIZE))
            await _prove_usable(graph, backend, _legal(kind, before, found))


@pytest.mark.parametrize("copy_on_read", [False, True], ids=["plain", "cor"])
@pytest.mark.parametrize("kind", REQUESTS)
async def test_a_request_cancelled_anywhere_leaves_the_node_usable(graph: Graph, kind: str, copy_on_read: bool) -> None:
    options = {"discard": "unmap", "copy-on-read": copy_on_read}
    for number, (index, operation) in enumerate(trace := await _trace(graph, REQUESTS[kind], **options)):
        before_it = [step for step in trace[:number] if step == (index, operation)]
        chain, content = _chain()
        async with chain_backend(graph, chain, **options) as backend, trio.open_nursery() as nursery:
            await backend.write(0, b"w" * 10)
            before = b"w" * 10 + content[10:]
            steps = _all_steps(chain)[index]
            skipped = [steps.hold(operation) for _ in before_it]
            held = steps.hold(operation)
            task = await start(nursery, lambda: REQUESTS[kind](backend))
            for each in skipped:
                each.release()
                await trio.testing.wait_all_tasks_blocked()
            assert held.reached.is_set()
            # Others wait for it or not, but all of them end.
            others = [
                await start(nursery, lambda: backend.read(0, SIZE)),
                await start(nursery, lambda: backend.write(5000, b"other")),
            ]
            task.scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            held.release()
            for each in (task, *others):
                await each.join()
            before = before[:5000] + b"other" + before[5005:]
            found = bytes(await backend.read(0, SIZE))
            await _prove_usable(graph, backend, _legal(kind, before, found))


@pytest.mark.parametrize("kind", ["write", "zeroes"])
async def test_waiters_of_a_failed_allocation_go_on(graph: Graph, kind: str) -> None:
    chain, content = _chain()
    async with chain_backend(graph, chain) as backend, trio.open_nursery() as nursery:
        held = chain.files[1].steps.hold("write")
        first = await start(nursery, lambda: backend.write(0, b"1" * 10))
        other = (lambda: backend.write(10, b"2" * 10)) if kind == "write" else (lambda: backend.write_zeroes(10, 10))
        second = await start(nursery, other)
        assert not second.done
        first.scope.cancel()
        await first.join()
        held.release()
        await second.join()
        expected = content[:10] + (b"2" * 10 if kind == "write" else bytes(10)) + content[20:]
        assert await backend.read(0, SIZE) == expected
        assert len(chain.layers[1].free) <= 1, "abandoned space is used again"


async def test_a_driver_that_answers_nonsense_costs_the_request(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedisk.block.model.extent import ZERO, Extent
    from fusedisk.block.request.transfer import DriverBug
    from tests.support.toy import ToyDriver

    async def overlong(self: ToyDriver, offset: int, length: int) -> Extent:
        return Extent(ZERO, length + 1)

    async with chain_backend(graph, _chain()[0]) as backend:
        with monkeypatch.context() as patch:
            patch.setattr(ToyDriver, "map", overlong)
            with pytest.raises(DriverBug, match="toy answered 101 of 100 bytes on 'layer1'"):
                await backend.read(0, 100)
        await backend.read(0, 100)


@pytest.mark.parametrize("seed", range(5))
async def test_random_faults_under_load(graph: Graph, seed: int) -> None:
    """A tenth of all operations fail; reads that succeed are right, and at the end nothing is stuck."""
    rng = random.Random(seed)
    store = Store(SIZE, request_alignment=512)
    store.steps.eager = False
    async with memory_backend(graph, store) as backend:

        async def work(index: int) -> None:
            mine = random.Random(seed * 10 + index)
            for _ in range(40):
                offset = index * 1200 + mine.randrange(300)
                if mine.random() < 0.1:
                    store.steps.fail(
                        mine.choice(("read", "write", "zero")), rng.choice((HostError("x"), RuntimeError("y")))
                    )
                try:
                    await backend.write(offset, b"z" * 900)
                    assert await backend.read(offset, 900) == b"z" * 900
                except (HostError, RuntimeError):
                    pass

        async with trio.open_nursery() as nursery:
            for index in range(6):
                nursery.start_soon(work, index)
        store.steps.heal()
        assert_idle(backend.node)
        assert backend.accounting.failed
        await backend.write(0, bytes(SIZE))
        assert await backend.read(0, SIZE) == bytes(SIZE)
