"""Compressed clusters that inflate ahead of sequential readers: when, and who waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request import background
from fusedisk.core.errors import CorruptImageError, HostError
from fusedisk.drivers.format import compressed_pieces as compressed
from tests.conftest import qemu_img
from tests.support.compressed import CLUSTER, CONTENT, SIZE, entries, inflated, new_store, read_on, reading
from tests.support.memory import Store, stores
from tests.support.qcow2 import MEMORY_DRIVERS, driver_of, opened
from tests.support.tasks import Task, start


async def test_clusters_inflate_ahead_of_a_sequential_reader() -> None:
    store = await new_store()
    async with reading(store) as backend:
        await read_on(backend, 0, 2)
        await backend.wait_idle()
        assert inflated(backend) == {0, 1}
        await read_on(backend, 2, 1)
        await backend.wait_idle()
        ahead = inflated(backend)
        assert len(ahead) >= 6
        assert ahead == set(range(len(ahead)))
        store.steps.calls.clear()
        await read_on(backend, 3, 3)
        assert inflated(backend) >= ahead
        done = {call.offset for call in store.steps.of("read")}
        places = [driver_of(backend).image.geometry.compressed_range(entry)[0] for entry in entries(backend)[:6]]
        assert all(offset > place for offset in done for place in places), "no place is read twice"
        await backend.wait_idle()


async def test_nothing_inflates_ahead_of_random_readers() -> None:
    store = await new_store()
    async with reading(store) as backend:
        for number in (3, 40, 5, 4, 30, 7, 50):
            await backend.read(number * CLUSTER + 5, 100)
        await backend.wait_idle()
        assert inflated(backend) == {3, 40, 5, 4, 30, 7, 50}


async def test_readers_catch_up_with_what_inflates_ahead() -> None:
    """They wait for it and do not inflate it a second time."""
    store = await new_store()
    async with reading(store) as backend, trio.open_nursery() as nursery:
        await read_on(backend, 0, 2)
        place = driver_of(backend).image.geometry.compressed_range(entries(backend)[3])[0]
        held = store.steps.hold("read", place)
        await read_on(backend, 2, 1)
        await held.reached.wait()
        store.steps.calls.clear()
        task = await start(nursery, lambda: backend.read(3 * CLUSTER, CLUSTER))
        waits = not task.done
        held.release()
        assert waits
        assert place not in {call.offset for call in store.steps.of("read")}
        assert await task.join() == CONTENT[3 * CLUSTER : 4 * CLUSTER]


async def _held_ahead(backend: Backend, store: Store) -> Any:
    """Go ahead of a reader, up to where it reads the host; returns what to release."""
    await read_on(backend, 0, 2)
    held = store.steps.hold("read", driver_of(backend).image.geometry.compressed_range(entries(backend)[3])[0])
    await read_on(backend, 2, 1)
    with trio.fail_after(30):
        await held.reached.wait()
    return held


async def test_what_is_rewritten_while_it_inflates_ahead_is_not_kept() -> None:
    store = await new_store()
    async with reading(store) as backend:
        held = await _held_ahead(backend, store)
        old = entries(backend)[4]
        await backend.write(4 * CLUSTER, b"n" * CLUSTER)
        # Its space is free by now, and may hold anything.
        await backend.flush()
        held.release()
        await backend.wait_idle()
        cache = driver_of(backend).image.inflated
        assert not cache.knows(old)
        assert {3, 5} <= inflated(backend)
        assert await backend.read(3 * CLUSTER, 2 * CLUSTER) == CONTENT[3 * CLUSTER : 4 * CLUSTER] + b"n" * CLUSTER


@pytest.mark.parametrize("what", ["host error", "corrupt"])
async def test_errors_ahead_are_met_by_who_reads_there(what: str, caplog: pytest.LogCaptureFixture) -> None:
    store = await new_store()
    async with reading(store) as backend:
        await read_on(backend, 0, 2)
        place, length = driver_of(backend).image.geometry.compressed_range(entries(backend)[4])
        if what == "corrupt":
            store.data[place : place + length - 512] = b"\xff" * (length - 512)
        else:
            store.steps.fail("read", HostError("broken"), skip=1, times=1)
        await read_on(backend, 2, 1)
        await backend.wait_idle()
        assert backend.node.fenced is None
        await read_on(backend, 3, 1)
        if what == "corrupt":
            wanted = f"guest offset {4 * CLUSTER} that does not inflate to 65536 bytes"
            for _ in range(2):
                with pytest.raises(CorruptImageError, match=wanted):
                    await backend.read(3 * CLUSTER, 3 * CLUSTER)
            await read_on(backend, 5, 3)
        else:
            assert not store.steps.heal(), "the error was met"
            await read_on(backend, 4, 5)
        await backend.wait_idle()
    assert not caplog.records


@pytest.mark.parametrize("how", ["close", "drain", "resize"])
async def test_what_goes_on_ahead_is_waited_for(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "AHEAD_BATCH", CLUSTER)
    monkeypatch.setattr(compressed, "AHEAD_THREADS", 1)
    store = await new_store()
    async with reading(store) as backend, trio.open_nursery() as nursery:
        held = await _held_ahead(backend, store)
        graph, node, first = backend.graph, backend.node, entries(backend)[0]

        async def drain() -> None:
            async with graph.drained(node):
                assert not node.tracked
                assert not store.steps.running["read"]

        task: Task = await start(
            nursery,
            {"close": backend.close, "drain": drain, "resize": lambda: backend.truncate(SIZE - CLUSTER)}[how],
        )
        assert not task.done
        store.steps.calls.clear()
        held.release()
        await task.join()
        data = driver_of(backend).image.geometry.compressed_range(first)[0] if how != "close" else 0
        assert not [call for call in store.steps.of("read") if call.offset >= data], "it ends as soon as it can"
        assert node.closed == (how == "close")
        if how != "close":
            await read_on(backend, 3, 10)
            await backend.wait_idle()


async def test_a_run_of_trio_that_ends_with_it_under_way() -> None:
    """Whoever forgets to close the graph sees no error for it."""
    store = await new_store()

    async def main() -> None:
        graph = Graph(MEMORY_DRIVERS)
        spec = {"driver": "qcow2", "file": {"driver": "memory", "filename": "image"}}
        backends.append(await graph.open_backend(spec, writable=False))
        await driver_of(backends[0]).map(0, 1)
        await _held_ahead(backends[0], store)

    backends: list[Backend] = []
    with stores(image=store):
        await trio.to_thread.run_sync(trio.run, main)
    assert backends[0].in_flight == 0
    assert not backends[0].node.tracked


async def test_who_reads_what_is_cached_is_gone_ahead_of_too() -> None:
    store = await new_store()
    async with reading(store) as backend:
        await read_on(backend, 0, 1)
        await backend.read(CLUSTER, 2 * CLUSTER)
        buffer = memoryview(bytearray(CLUSTER))
        for number in range(3):
            assert driver_of(backend).read_cached(number * CLUSTER, buffer)
        await backend.wait_idle()
        assert {3, 4, 5, 6} <= inflated(backend)


async def test_what_was_wanted_of_a_longer_disk_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing could go ahead of a reader while somebody changed something, and then the disk ends before it."""
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    async with opened(image) as backend:
        for offset in range(0, SIZE, CLUSTER):
            await backend.write_compressed(offset, CONTENT[offset : offset + CLUSTER])
        await backend.create_snapshot(SnapshotInfo("", "short", 0))
        await backend.truncate(4 << 30)
        for number in range(8):
            await backend.write_compressed((3 << 30) + number * CLUSTER, CONTENT[:CLUSTER])
    async with opened(image) as backend:
        with monkeypatch.context() as patch:
            patch.setattr(background, "start", lambda node, work: False)
            for number in range(8):
                await backend.read((3 << 30) + number * CLUSTER, CLUSTER)
        await backend.apply_snapshot("1")
        await read_on(backend, 0, 8)
        await backend.wait_idle()
        assert len(inflated(backend)) > 8
    assert not caplog.records
