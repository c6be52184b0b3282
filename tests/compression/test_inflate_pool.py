"""Processes that inflate: what they make, and that nobody is the worse for their end."""

from __future__ import annotations

import gc
import os
import random
import signal
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing
import zstandard

from fusedisk.compression import inflate_pool
from fusedisk.compression.inflate_pool import BREAK_EVEN, CONTENT_SIZE, SOURCE_SIZE, Batch, InflatePool, Piece
from tests.support.tasks import start, until

SIZE = 64 << 10
HELD = CONTENT_SIZE // 2 // SIZE + 1
"""Pieces that are not copied."""


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE // 8) * 8


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "fusedisk.compression.inflate_worker" in child.cmdline()
    ]


def inflate_without(pool: InflatePool, size: int) -> None:
    """Have that much inflated by other means."""
    while size:
        part = min(size, CONTENT_SIZE)
        assert pool.begin(1, part) is None
        size -= part


@asynccontextmanager
async def running(processes: int = 2, capacity: int = 0) -> AsyncIterator[InflatePool]:
    """A pool with processes; they end with the trio run."""
    pool = InflatePool(processes, capacity)
    for _ in range(100):
        assert pool.begin(1, CONTENT_SIZE + 1) is None
    inflate_without(pool, BREAK_EVEN - 1)
    await trio.testing.wait_all_tasks_blocked()
    assert not workers(), "that was not worth it"
    inflate_without(pool, 1)
    await until(lambda: pool.parallel(1))
    assert len(workers()) == processes
    yield pool


def begin(pool: InflatePool) -> Batch:
    batch = pool.begin(SOURCE_SIZE, CONTENT_SIZE)
    assert batch is not None
    return batch


def fill(batch: Batch, sources: list[bytes]) -> list[Piece]:
    pieces, place = [], 0
    for source in sources:
        batch.source[place : place + len(source)] = source
        pieces.append((place, len(source)))
        place += len(source)
    return pieces


def parts(content: memoryview, missing: list[int], size: int = SIZE) -> list[memoryview | None]:
    """The pieces, with None for those that are missing."""
    return [
        None if number in missing else content[number * size : (number + 1) * size]
        for number in range(len(content) // size)
    ]


async def inflate(pool: InflatePool, numbers: range, processes: int = 1) -> list[memoryview | None]:
    """What becomes of some pieces, by way of a batch."""
    sources = [deflated(content(number)) for number in numbers]
    batch = pool.begin(sum(map(len, sources)), SIZE * len(sources))
    assert batch is not None
    try:
        pieces = fill(batch, sources)
        return parts(*await batch.inflate("deflate-4k", pieces, SIZE, processes))
    finally:
        batch.leave()


@pytest.mark.parametrize("processes", [1, 2, 3])
async def test_pieces_come_back_in_order(processes: int) -> None:
    async with running() as pool:
        found = await inflate(pool, range(7), processes)
        assert found == [content(number) for number in range(7)]


async def test_every_codec() -> None:
    packers = {"deflate-4k": deflated, "zstd": zstandard.ZstdCompressor().compress}
    async with running() as pool:
        for codec, pack in packers.items():
            batch = begin(pool)
            found = await batch.inflate(codec, fill(batch, [pack(content(1)), pack(content(2))]), SIZE)
            assert parts(*found) == [content(1), content(2)], codec
            batch.leave()


async def test_a_damaged_piece_is_left_to_the_caller() -> None:
    async with running() as pool:
        batch = begin(pool)
        sources = [deflated(content(1)), b"\xff" * 100, deflated(content(2)[:-1]), deflated(content(3))]
        found = await batch.inflate("deflate-4k", fill(batch, sources), SIZE, 2)
        assert parts(*found) == [content(1), None, None, content(3)]
        batch.leave()


def is_shared(pieces: list[memoryview | None]) -> bool:
    """Whether they are in the memory that is shared with the processes."""
    assert pieces[0] is not None
    return not isinstance(pieces[0].obj, bytearray)


def memory_of(pool: InflatePool) -> int:
    """Bytes of shared memory."""
    assert pool._crew is not None
    return os.fstat(pool._crew.descriptor).st_blocks * 512


async def test_content_stays_for_as_long_as_it_is_held() -> None:
    async with running(capacity=40 * CONTENT_SIZE) as pool:
        held = {number: await inflate(pool, range(number, number + HELD)) for number in range(60)}
        shared = [number for number, pieces in held.items() if is_shared(pieces)]
        assert 40 <= len(shared) < 60, "what finds no room is copied"
        for number, pieces in held.items():
            assert pieces == [content(number + more) for more in range(HELD)]
        full = memory_of(pool)
        del pieces
        held.clear()
        assert memory_of(pool) <= full // 2, "some of it is given back"
        again = await inflate(pool, range(HELD))
        assert is_shared(again), "the room is free again"


async def test_what_was_in_use_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the kernel must find and clear takes as long as half of the inflating."""
    released: list[tuple[int, int]] = []
    monkeypatch.setattr(inflate_pool._Crew, "_release", lambda crew, *part: released.append(part))
    async with running(capacity=200 * CONTENT_SIZE) as pool:
        for number in range(5):
            held = [await inflate(pool, range(number, number + HELD)) for _ in range(10)]
            del held
        assert not released
        assert 0 < memory_of(pool) <= 10 * CONTENT_SIZE + pool.batches * SOURCE_SIZE


async def test_a_batch_of_the_smallest_pieces() -> None:
    count = CONTENT_SIZE // 512
    async with running() as pool:
        batch = begin(pool)
        packed = deflated(bytes(512))
        batch.source[: len(packed)] = packed
        found = await batch.inflate("deflate-4k", [(0, len(packed))] * count, 512)
        batch.leave()
        assert parts(*found, 512) == [bytes(512)] * count


async def test_a_little_is_copied() -> None:
    async with running(capacity=40 * CONTENT_SIZE) as pool:
        assert not is_shared(await inflate(pool, range(3)))


async def test_memory_goes_with_the_processes_but_for_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(capacity=40 * CONTENT_SIZE) as pool:
        crew = pool._crew
        assert crew is not None
        held = [await inflate(pool, range(number, number + HELD)) for number in range(20)]
        waiting = begin(pool)
        fill(waiting, [deflated(content(1))])
        workers()[0].kill()
        await until(lambda: not pool.parallel(1))
        assert not workers()
        del held[1:], held[0][1:]
        assert held[0] == [content(0)]
        assert os.fstat(crew.descriptor).st_blocks * 512 <= CONTENT_SIZE + SOURCE_SIZE
        _, missing = await waiting.inflate("deflate-4k", [(0, 100)], SIZE)
        assert missing == [0]
        waiting.leave()
        assert os.fstat(crew.descriptor).st_blocks * 512 <= CONTENT_SIZE


async def test_there_is_room_for_so_many_and_no_more() -> None:
    async with running() as pool:
        batches = [begin(pool) for _ in range(pool.batches)]
        assert pool.begin(1, 1) is None
        batches.pop().leave()
        batches.append(begin(pool))
        for batch in batches:
            batch.leave()
        assert pool.begin(SOURCE_SIZE + 1, 1) is None
        assert pool.begin(1, CONTENT_SIZE + 1) is None


async def test_a_process_that_is_killed_costs_nothing() -> None:
    async with running() as pool:
        first, second = workers()
        for worker in (first, second):  # an answer in between would have the next task go to who gave it
            worker.send_signal(signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            tasks = [await start(nursery, partial(inflate, pool, range(number, number + 1))) for number in range(4)]
            second.send_signal(signal.SIGCONT)
            await until(lambda: sum(task.done for task in tasks) == 2)
            first.kill()
            found = [(await task.join())[0] for task in tasks]
        assert sorted(piece is None for piece in found) == [False, False, True, True]
        await until(lambda: not second.is_running())
        assert not pool.parallel(1), "one alone is not worth it"
        inflate_without(pool, BREAK_EVEN)
        await until(lambda: pool.parallel(1))
        assert await inflate(pool, range(1)) == [content(0)], "others start"


async def test_without_work_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflate_pool, "_IDLE_SECONDS", 0.0)
    pool = InflatePool(2, 0)
    inflate_without(pool, BREAK_EVEN)
    assert pool._starting
    await until(lambda: not pool._starting)
    assert not pool._failed
    assert not workers()
    monkeypatch.setattr(inflate_pool, "_IDLE_SECONDS", 30.0)
    inflate_without(pool, BREAK_EVEN)
    await until(lambda: pool.parallel(1))
    assert await inflate(pool, range(1)) == [content(0)]


async def test_processes_that_do_not_answer_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflate_pool, "_UNANSWERED", 0.01)
    async with running() as pool:
        stopped = workers()
        for worker in stopped:
            worker.send_signal(signal.SIGSTOP)
        assert await inflate(pool, range(4), processes=2) == [None] * 4
        assert not any(worker.is_running() for worker in stopped)


async def test_a_caller_that_is_cancelled_waits_for_the_process() -> None:
    async with running(processes=1) as pool:
        (worker,) = workers()
        worker.send_signal(signal.SIGSTOP)
        async with trio.open_nursery() as nursery:
            task = await start(nursery, partial(inflate, pool, range(1)))
            task.scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert not task.done, "the process may write yet"
            worker.send_signal(signal.SIGCONT)
            assert await task.join() == [content(0)]


@pytest.mark.parametrize(
    "program", [None, "exit 0", "exit 1", "exec 1>&-; kill -9 $$", "sleep 60"], ids=["none", "0", "1", "killed", "slow"]
)
async def test_what_cannot_start_is_not_tried_again(
    program: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executable = tmp_path / "python"
    if program is not None:
        executable.write_text(f"#!/bin/sh\n{program}\n")
        executable.chmod(0o755)
        if "sleep" in program:
            monkeypatch.setattr(inflate_pool, "_PATIENCE", 0.1)
    monkeypatch.setattr("sys.executable", str(executable))
    pool = InflatePool(2, 0)
    for _ in range(2):
        inflate_without(pool, BREAK_EVEN)
        await until(lambda: pool._failed)
        assert not pool._starting
        assert not pool.parallel(1)
    assert not psutil.Process().children()


async def test_no_thread_to_start_them_is_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", fail)
    pool = InflatePool(2, 0)
    inflate_without(pool, BREAK_EVEN)
    await until(lambda: pool._failed)


def test_processes_and_descriptors_end_with_the_run() -> None:
    async def use() -> None:
        async with running() as pool:
            assert await inflate(pool, range(2)) == [content(0), content(1)]

    trio.run(use)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    trio.run(use)
    gc.collect()
    assert not psutil.Process().children()
    assert len(os.listdir("/proc/self/fd")) == before
