"""Snapshots beside other requests: reads and overwrites go on, and no step of the work is long."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing

from fusedisk.block.graph.backend import Backend
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request import snapshot
from fusedisk.drivers.format.qcow2 import image as image_module
from fusedisk.drivers.format.qcow2.entries import ENTRIES_AT_ONCE, OFFSET_MASK
from tests.support.memory import Store
from tests.support.qcow2 import created_in_memory, driver_of, in_memory
from tests.support.tasks import start

CLUSTER = 65536
HERE = SnapshotInfo(id="", name="here", date=0)


async def settle(backend: Backend) -> None:
    """Leave nothing to write: what a commit frees is written by the next."""
    await backend.flush()
    await backend.flush()


# --- readers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["create", "apply", "delete"])
async def test_reads_go_on_while_tables_are_written(operation: str) -> None:
    """While one is applied, a writer waits until the end, also one that came before the reader."""
    store = await created_in_memory(Store(), size=1 << 20)
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 30
        await backend.write(0, b"1" * CLUSTER)
        if operation != "create":
            await backend.create_snapshot(HERE)
            await backend.write(0, b"2" * CLUSTER)
        await settle(backend)
        before = await backend.read(0, CLUSTER)
        held = store.steps.hold("write")
        work = await start(
            nursery,
            lambda: {
                "create": lambda: snapshot.create_snapshot(backend.node, HERE),
                "apply": lambda: snapshot.apply_snapshot(backend.node, "1"),
                "delete": lambda: snapshot.delete_snapshot(backend.node, "1"),
            }[operation](),
        )
        await held.reached.wait()
        writer = await start(nursery, lambda: backend.write(CLUSTER, b"w"))
        assert await backend.read(0, CLUSTER) == before
        assert (await backend.block_status(0, CLUSTER)).data
        if operation == "apply":
            await backend.flush()
        assert not writer.done
        assert not work.done
        held.release()
        await work.join()
        await writer.join()
        assert await backend.read(0, 1) == (b"1" if operation != "delete" else b"2")


async def test_applying_waits_for_readers_and_then_holds_them_back() -> None:
    store = await created_in_memory(Store(), size=1 << 20)
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 30
        await backend.write(0, b"1" * CLUSTER)
        await backend.create_snapshot(HERE)
        await backend.write(0, b"2" * CLUSTER)
        await settle(backend)
        tables = store.steps.hold("write")
        header = store.steps.hold("write", 24)
        work = await start(nursery, lambda: snapshot.apply_snapshot(backend.node, "1"))
        await tables.reached.wait()
        slow_read = store.steps.hold("read")
        early = await start(nursery, lambda: backend.read(0, CLUSTER))
        await slow_read.reached.wait()
        tables.release()
        await trio.testing.wait_all_tasks_blocked()
        assert not header.reached.is_set(), "somebody reads what the new state has no use for"
        late = await start(nursery, lambda: backend.read(0, CLUSTER))
        assert not late.done
        slow_read.release()
        await header.reached.wait()
        assert await early.join() == b"2" * CLUSTER
        assert not late.done
        header.release()
        assert await late.join() == b"1" * CLUSTER
        await work.join()


async def test_a_reader_behind_a_waiting_writer_does_not_stop_applying() -> None:
    """It waits for the writer, which waits for the snapshot, which must not wait for it."""
    store = await created_in_memory(Store(), size=1 << 20)
    async with in_memory(store, discard="unmap") as backend, trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 30
        await backend.write(0, b"1" * CLUSTER)
        await backend.create_snapshot(HERE)
        await backend.write(0, b"2" * CLUSTER)
        await settle(backend)
        held = store.steps.hold("write")
        work = await start(nursery, lambda: snapshot.apply_snapshot(backend.node, "1"))
        await held.reached.wait()
        discard = await start(nursery, lambda: backend.discard(0, CLUSTER))
        reader = await start(nursery, lambda: backend.read(0, CLUSTER))
        held.release()
        with trio.fail_after(10):
            await work.join()
            await discard.join()
            assert await reader.join() == bytes(CLUSTER)


# --- the event loop -------------------------------------------------------------------------------------


class Steps(trio.abc.Instrument):
    """Counts in which step of any task we are, and the most table entries that were looked at in one."""

    def __init__(self) -> None:
        self.entries = self.most = self.all = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.entries = 0

    def look(self, entries: int) -> None:
        """So many entries are looked at."""
        self.entries += entries
        self.all += entries
        self.most = max(self.most, self.entries)


class Watched(array):  # type: ignore[type-arg]
    """A table that tells how many of its entries are looked at."""

    steps: Steps

    def __getitem__(self, key: Any) -> Any:
        self.steps.look(len(range(*key.indices(len(self)))) if isinstance(key, slice) else 1)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[int]:
        self.steps.look(len(self))
        return super().__iter__()

    def tobytes(self) -> bytes:
        self.steps.look(len(self))
        return super().tobytes()


@pytest.mark.usefixtures("every_pause")
async def test_no_step_looks_at_more_than_a_piece_of_the_l1_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """With small clusters it has millions of entries. Here all of them lead to one L2 table, as hostile as that is."""
    entries, cluster = 1 << 18, 512
    store = await created_in_memory(Store(), size=entries * 64 * cluster, cluster_size=cluster, refcount_bits=32)
    async with in_memory(store) as backend:
        await backend.write(0, b"x")
        image = driver_of(backend).image
        l1, table = image.header.l1_table_offset, image.l1[0] & OFFSET_MASK
        data = (image.l2.tables[table][0] & OFFSET_MASK) // cluster
        blocks = driver_of(backend).refcounts.table[:]
    store.data[l1 : l1 + 8 * entries] = table.to_bytes(8, "big") * entries
    for number in (table // cluster, data):
        place = blocks[number // 128] + number % 128 * 4
        store.data[place : place + 4] = entries.to_bytes(4, "big")
    store.data[table] &= 0x7F  # neither it nor its data is COPIED

    steps = Steps()
    watched = type("Watched", (Watched,), {"steps": steps})
    read_table = image_module.read_table

    async def read_watched(file: Any, offset: int, count: int) -> array[int]:
        found = await read_table(file, offset, count)
        table: array[int] = watched("Q", found.tobytes()) if count >= entries else found
        return table

    monkeypatch.setattr(image_module, "read_table", read_watched)
    trio.lowlevel.add_instrument(steps)
    try:
        async with in_memory(store) as backend:
            await backend.create_snapshot(HERE)
            await backend.delete_snapshot("1")
            await backend.create_snapshot(HERE)
            await backend.apply_snapshot("1")
            assert await backend.read((entries - 1) * 64 * cluster, 2) == b"x\0"
    finally:
        trio.lowlevel.remove_instrument(steps)
    assert steps.all > 10 * entries, "the tables were looked at by other ways"
    assert steps.most <= 2 * ENTRIES_AT_ONCE
