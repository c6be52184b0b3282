"""In what pieces snapshots are made and deleted: others wait for one of them at most, and no work is done twice."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.model.node import Node
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request import space
from fusedisk.drivers.format.qcow2.counts import Counts
from fusedisk.drivers.format.qcow2.refcount import Refcounts
from fusedisk.drivers.format.qcow2.snapshots import switch as snapshot_switch
from fusedisk.drivers.format.qcow2.snapshots.references import L2Table
from fusedisk.drivers.format.qcow2.snapshots.switch import Switch
from tests.support.memory import Store
from tests.support.qcow2 import created_in_memory, driver_of, in_memory
from tests.support.tasks import start

HERE = SnapshotInfo(id="", name="here", date=0)
CLUSTER = 512
SPAN = 32 << 10
"""What one L2 table maps."""


async def spread(backend: Backend, tables: int) -> None:
    """Fill so many L2 tables, each with one run of clusters."""
    for number in range(tables):
        await backend.write(number * SPAN, bytes([1 + number % 255]) * SPAN)


async def test_others_run_between_two_new_refcount_blocks_for_an_l1_table(
    every_pause: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long L1 table needs hundreds of them, which are written one by one."""
    store = await created_in_memory(Store(), size=(1 << 17) * SPAN, cluster_size=CLUSTER)
    since_pause = most = added = 0
    run_others, add_block = Switch.run_others, Refcounts._add_block

    async def count(refcounts: Refcounts, index: int) -> None:
        nonlocal since_pause, most, added
        added, since_pause = added + 1, since_pause + 1
        most = max(most, since_pause)
        await add_block(refcounts, index)

    async def run(switch: Switch) -> None:
        nonlocal since_pause
        assert not switch.image.mutex.locked
        since_pause = 0
        await run_others(switch)

    async with in_memory(store) as backend:
        await backend.write(0, b"x" * CLUSTER)
        monkeypatch.setattr(Refcounts, "_add_block", count)
        monkeypatch.setattr(Switch, "run_others", run)
        await backend.create_snapshot(HERE)
    assert added > 10
    assert most == 1


async def test_writes_go_on_while_the_l1_table_of_the_snapshot_is_read() -> None:
    store = await created_in_memory(Store(), size=64 * SPAN, cluster_size=CLUSTER)
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        await spread(backend, 4)
        await backend.create_snapshot(HERE)
        read = store.steps.hold("read", driver_of(backend).snapshots[0].l1_table_offset)
        work = await start(nursery, lambda: backend.delete_snapshot("1"))
        await read.reached.wait()
        with trio.fail_after(20):
            await backend.write(8 * SPAN, b"w" * CLUSTER)
        assert not work.done
        read.release()
        await work.join()


@pytest.mark.parametrize("operation", ["create", "delete"])
async def test_others_run_when_the_work_has_gone_on_for_a_while(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pauses(seconds_by_look: float) -> int:
        now, times = itertools.count(1), 0
        run_others = Switch.run_others

        async def run(switch: Switch) -> None:
            nonlocal times
            times += not switch.done  # afterwards space is given back, in pieces of its own
            await run_others(switch)

        store = await created_in_memory(Store(), size=2048 * SPAN, cluster_size=CLUSTER)
        async with in_memory(store) as backend:
            await spread(backend, 600)
            if operation == "delete":
                await backend.create_snapshot(HERE)
            with monkeypatch.context() as patch:
                clock = SimpleNamespace(monotonic=lambda: next(now) * seconds_by_look)
                patch.setattr(snapshot_switch, "time", clock)
                patch.setattr(Switch, "run_others", run)
                await (backend.create_snapshot(HERE) if operation == "create" else backend.delete_snapshot("1"))
        return times

    assert await pauses(1e-9) == 1, "at once, and never again"
    always = await pauses(1)
    assert always > 9
    assert 1 < await pauses(snapshot_switch.STEP_SECONDS / 3) < always


async def test_what_a_deleted_snapshot_shares_with_the_disk_is_looked_through_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []
    find_run = L2Table._find_run

    def find(table: L2Table) -> int:
        looked.append(table.offset)
        return find_run(table)

    store = await created_in_memory(Store(), size=64 * SPAN, cluster_size=CLUSTER)
    async with in_memory(store) as backend:
        await spread(backend, 8)
        await backend.create_snapshot(HERE)
        await backend.write(0, b"changed" + bytes(CLUSTER - 7))
        monkeypatch.setattr(L2Table, "_find_run", find)
        await backend.delete_snapshot("1")
    assert len(looked) == len(set(looked)) == 9, "eight of the snapshot's, and one that is not shared any longer"


async def test_space_goes_back_that_only_the_snapshot_had_and_nobody_took_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = 4096
    store = await created_in_memory(Store(), size=1 << 20, cluster_size=cluster)
    returned: set[int] = set()
    give_back, discard = space.discard_ranges, Switch.discard

    async def record(node: Node, ranges: list[tuple[int, int]]) -> None:
        for offset, length in ranges:
            returned.update(range(offset // cluster, (offset + length) // cluster))
        await give_back(node, ranges)

    async def used() -> set[int]:
        refcounts = driver_of(backend).refcounts
        return {number for number in range(len(store.data) // cluster) if await refcounts.get(number)}

    async with in_memory(store, discard="unmap") as backend:
        await backend.write(0, b"a" * 64 * cluster)
        await backend.discard(5 * cluster, 20 * cluster)  # free already, in front of what gets free
        await backend.flush()
        await backend.flush()
        await backend.create_snapshot(HERE)
        await backend.discard(25 * cluster, 20 * cluster)
        await backend.flush()
        before = await used()
        freed: set[int] = set()

        async def take_some(switch: Switch) -> None:
            freed.update(before - await used())
            for number in range(200, 230):
                await backend.write(number * cluster, b"c" * cluster)
            await backend.discard(221 * cluster, 4 * cluster)
            await backend.flush()
            await backend.flush()
            await discard(switch)

        monkeypatch.setattr(Switch, "discard", take_some)
        monkeypatch.setattr(snapshot_switch.space, "discard_ranges", record)
        await backend.delete_snapshot("1")
        assert len(freed) >= 20
        assert 4 < len(freed & await used()) < len(freed)
        assert returned == freed - await used()


def test_counters_that_are_zero_again_are_none() -> None:
    counts = Counts(100)
    counts.add_run(10, 5)
    part = counts.part(8, 4)
    assert part is not None
    assert part.tolist() == [0, 0, 1, 1]
    counts.add_run(10, 5, -1)
    assert counts.part(8, 4) is None
