"""Observers: they see every change before and after it happens, and every read, whichever way it takes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.reopen import reopen
from fusedisk.block.image.amend import amend_node
from fusedisk.block.model.flags import COPY_ON_READ
from fusedisk.block.model.node import Node
from fusedisk.block.model.observer import Change, Observer
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request import io, space, transfer
from fusedisk.block.request.immediate import Pieces
from fusedisk.block.request.ways import Ways
from fusedisk.core.errors import HostError, OperationBlockedError, OutOfRangeError
from fusedisk.drivers.protocol.host_file import HostFile
from fusedisk.drivers.table import DRIVERS
from tests.block.conftest import assert_idle
from tests.conftest import qemu_img, qemu_io
from tests.support.memory import Store, stores
from tests.support.observers import Recorder
from tests.support.opening import memory_backend
from tests.support.qcow2 import create_image, driver_of, opened
from tests.support.tasks import start

pytestmark = pytest.mark.usefixtures("quick_host", "places_at_once")
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


# --- every way ------------------------------------------------------------------------------------------


def data(length: int) -> memoryview:
    return memoryview(b"n" * length)


async def overwrite_immediately(backend: Backend) -> None:
    assert backend.immediate.write(100, data(512)) or backend.node.before_observers
    if backend.node.before_observers:
        await backend.write(100, data(512))


async def overwrite_two_extents(backend: Backend) -> None:
    """Clusters 0 and 1 do not lie behind each other in the file."""
    assert backend.immediate.write(CLUSTER - 512, data(1024)) or backend.node.before_observers
    if backend.node.before_observers:
        await backend.write(CLUSTER - 512, data(1024))


async def write_at_once(backend: Backend) -> None:
    """An allocating write, without a task."""
    done = backend.write_now(5 * CLUSTER + 100, data(512))
    assert done != bool(backend.node.before_observers)
    if not done:
        await backend.write(5 * CLUSTER + 100, data(512))


async def apply_longer_snapshot(backend: Backend) -> None:
    (found,) = backend.list_snapshots()
    await backend.truncate(8 * CLUSTER)
    await backend.apply_snapshot(found.id)


Way = Callable[[Backend], Awaitable[object]]
CLUSTER = 64 << 10
LENGTH = 16 * CLUSTER

CHANGES: dict[str, tuple[Way, list[tuple[Change, int, int]]]] = {
    "write in a task": (lambda b: b.write(100, data(512), fua=True), [(Change.WRITE, 100, 512)]),
    "allocating write in a task": (
        lambda b: b.write(5 * CLUSTER + 100, data(512), fua=True),
        [(Change.WRITE, 5 * CLUSTER + 100, 512)],
    ),
    "immediate overwrite": (overwrite_immediately, [(Change.WRITE, 100, 512)]),
    "immediate overwrite of two extents": (overwrite_two_extents, [(Change.WRITE, CLUSTER - 512, 1024)]),
    "write at once": (write_at_once, [(Change.WRITE, 5 * CLUSTER + 100, 512)]),
    "detected zeroes": (lambda b: b.write(CLUSTER, bytes(CLUSTER)), [(Change.ZEROES, CLUSTER, CLUSTER)]),
    "write-zeroes": (lambda b: b.write_zeroes(700, 100), [(Change.ZEROES, 700, 100)]),
    "discard": (lambda b: b.discard(0, 2 * CLUSTER + 5), [(Change.DISCARD, 0, 2 * CLUSTER)]),
    "discard of ranges": (
        lambda b: space.discard_ranges(b.node, [(0, CLUSTER), (5, 10), (2 * CLUSTER, CLUSTER)]),
        [(Change.DISCARD, 0, CLUSTER), (Change.DISCARD, 2 * CLUSTER, CLUSTER)],
    ),
    "compressed write": (lambda b: b.write_compressed(CLUSTER, data(CLUSTER)), [(Change.WRITE, CLUSTER, CLUSTER)]),
    "growth": (lambda b: b.truncate(LENGTH + CLUSTER), [(Change.RESIZE, LENGTH, CLUSTER)]),
    "shrinking": (lambda b: b.truncate(LENGTH - CLUSTER), [(Change.RESIZE, LENGTH - CLUSTER, CLUSTER)]),
    "a snapshot": (
        apply_longer_snapshot,
        [(Change.RESIZE, 8 * CLUSTER, 8 * CLUSTER), (Change.SNAPSHOT, 0, LENGTH)],
    ),
    "amend": (
        lambda b: amend_node(b.node, {"size": LENGTH + 2 * CLUSTER}),
        [(Change.AMEND, LENGTH, 2 * CLUSTER)],
    ),
    "preallocation": (lambda b: b.preallocate(8 * CLUSTER, CLUSTER), []),
    "a new snapshot": (lambda b: b.create_snapshot(SnapshotInfo("", "two", 0)), []),
    "other settings": (lambda b: amend_node(b.node, {"lazy_refcounts": "on"}), []),
}
"""By name: a way to change a disk, and the calls that an observer of its node must get."""


@asynccontextmanager
async def warm_disk(folder: Path, name: str) -> AsyncIterator[Backend]:
    """A disk with a base and a snapshot, all of whose short ways were used already."""
    options: dict[str, str] = {"discard": "unmap"}
    if name == "detected zeroes":
        options["detect-zeroes"] = "on"
    base, path = folder / "base.raw", folder / "disk.qcow2"
    base.write_bytes(b"b" * LENGTH)
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path, str(LENGTH))
    async with opened(path, **options) as backend:
        await backend.write(CLUSTER, b"o" * CLUSTER)
        await backend.write(0, b"o" * CLUSTER)
        if "snapshot" in name:
            await backend.create_snapshot(SnapshotInfo("", "one", 0))
        await backend.read(0, LENGTH)
        buffer = memoryview(bytearray(512))
        assert backend.immediate.read(0, buffer)
        assert "snapshot" in name or backend.immediate.write(0, buffer)
        yield backend


@pytest.mark.parametrize("way", CHANGES)
async def test_what_changes_a_disk_is_told(tmp_path: Path, way: str) -> None:
    act, expected = CHANGES[way]
    async with warm_disk(tmp_path, way) as backend:
        seen, below = Recorder(changes=True), Recorder(changes=True)
        storage = backend.node.children["file"].node
        backend.node.observe(seen)
        storage.observe(below)
        counted = backend.node.completed_writes
        await act(backend)
        assert seen.changes == expected
        assert backend.node.completed_writes > counted, "a flush must not skip it"
        await backend.flush()
        assert below.changes or "immediate" in way
        assert not any(kind is Change.STORAGE for kind, _, _ in below.changes)
        backend.node.unobserve(seen)
        await backend.write(0, b"later")
        assert seen.changes == expected


@pytest.mark.parametrize("way", CHANGES)
async def test_what_will_change_a_disk_is_announced(tmp_path: Path, way: str) -> None:
    act, expected = CHANGES[way]
    async with warm_disk(tmp_path, way) as backend:
        seen = Recorder(before=True)
        backend.node.observe(seen)
        await act(backend)
        assert seen.announced == expected


async def test_an_announced_change_has_not_happened(tmp_path: Path) -> None:
    """The old content is still there, for a copy before the change; whichever request holds the range."""
    old: list[bytes] = []

    class Copies(Observer):
        wants_before = True

        async def before_change(self, node: Node, offset: int, length: int, kind: Change) -> None:
            buffer = memoryview(bytearray(length))
            await transfer.read(node, offset, buffer)
            old.append(bytes(buffer))

    async with warm_disk(tmp_path, "a snapshot") as backend:
        backend.node.observe(Copies())
        await overwrite_immediately(backend)
        await backend.write_zeroes(0, CLUSTER)
        await backend.discard(CLUSTER, CLUSTER)
        await backend.write_compressed(2 * CLUSTER, data(CLUSTER))
        await backend.truncate(LENGTH - CLUSTER)
        now = bytes(await backend.read(0, LENGTH - CLUSTER)) + bytes(CLUSTER)
        await backend.apply_snapshot("1")
    assert old[:2] == [b"o" * 512, b"o" * 100 + b"n" * 512 + b"o" * (CLUSTER - 612)]
    assert old[2:5] == [b"o" * CLUSTER, b"b" * CLUSTER, b"b" * CLUSTER]
    assert old[5] == now


async def test_unaligned_writes_and_filters(graph: Graph) -> None:
    """Read-modify-write tells of the guest's range above and of whole blocks below. So does what a filter passes on."""
    top, below = Recorder(before=True, changes=True, reads=True), Recorder(changes=True, reads=True)
    async with memory_backend(graph, Store(OLD, request_alignment=512)) as backend:
        backend.node.observe(top)
        await backend.write(700, b"n" * 10)
        assert top.announced == top.changes == [(Change.WRITE, 700, 10)]
        assert top.reads == [(512, 512)]
        backend.node.unobserve(top)
    disk = {"driver": "memory", "filename": "disk", "copy-on-read": False}
    with stores(disk=Store(OLD, request_alignment=512)):
        backend = await graph.open_backend(
            {"driver": "raw", "offset": 1024, "file": {"driver": "copy-on-read", "file": disk}}, writable=True
        )
        backend.node.observe(top)
        backend.node.children["file"].node.observe(below)
        top.changes.clear()
        await backend.write(700, b"n" * 10)
        assert top.changes == [(Change.WRITE, 700, 10)]
        assert below.changes == [(Change.WRITE, 1724, 10)]
        await backend.close()


async def test_a_snapshot_changes_the_filters_above_it(tmp_path: Path) -> None:
    async with warm_disk(tmp_path, "a snapshot") as backend:
        above = await backend.graph.insert_filter(backend.node, {"driver": "copy-on-read"})
        seen = Recorder(before=True, changes=True)
        above.observe(seen)
        await backend.apply_snapshot("1")
        assert seen.announced == seen.changes == [(Change.SNAPSHOT, 0, LENGTH)]


async def test_a_window_that_moves_changes_the_disk_and_the_filters_above(graph: Graph) -> None:
    """The old bytes are still there when it is announced, for a copy before the change."""
    old: list[bytes] = []

    class Copies(Recorder):
        async def before_change(self, node: Node, offset: int, length: int, kind: Change) -> None:
            await super().before_change(node, offset, length, kind)
            buffer = memoryview(bytearray(length))
            await transfer.read(node, offset, buffer)
            old.append(bytes(buffer))

    disk = {"driver": "raw", "size": 512, "file": {"driver": "memory", "filename": "disk"}}
    with stores(disk=Store(b"a" * 512 + b"b" * 1024)):
        backend = await graph.open_backend({"driver": "copy-on-read", "file": disk}, writable=True)
        window = backend.node.children["file"].node
        seen = [Copies(before=True, changes=True) for _ in range(2)]
        backend.node.observe(seen[0])
        window.observe(seen[1])
        below = Recorder(before=True, changes=True)
        window.children["file"].node.observe(below)
        await reopen(graph, {window: {"offset": 512, "size": 1024}})
        for observer in seen:
            assert observer.announced == [(Change.REOPEN, 0, 512)]
            assert observer.changes == [(Change.REOPEN, 0, 1024)]
        assert old == [b"a" * 512] * 2
        assert await backend.read(0, 1024) == b"b" * 1024
        await reopen(graph, {window: {"detect-zeroes": "on"}})
        assert [len(observer.changes) for observer in seen] == [1, 1]
        assert (below.announced, below.changes) == ([], [])
        await backend.close()


async def test_copy_on_read_changes_the_file_only(tmp_path: Path) -> None:
    async with warm_disk(tmp_path, "copy on read") as backend:
        seen, below = Recorder(before=True, changes=True), Recorder(changes=True)
        backend.node.observe(seen)
        backend.node.children["file"].node.observe(below)
        counted = backend.node.completed_writes
        await io.read(backend.node, 5 * CLUSTER, memoryview(bytearray(512)), COPY_ON_READ)
        assert (seen.announced, seen.changes) == ([], [])
        assert backend.node.completed_writes > counted
        assert any(length == CLUSTER for _, _, length in below.changes)


async def test_an_attempt_that_fails_half_way_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has written the first of two extents when the second turns out to take waiting."""
    async with warm_disk(tmp_path, "half") as backend:
        seen = Recorder(changes=True)
        backend.node.observe(seen)
        async with driver_of(backend).image.mutex:  # cluster 2 is not allocated
            assert not backend.immediate.write(2 * CLUSTER - 512, data(1024))
        assert seen.changes == [(Change.WRITE, 2 * CLUSTER - 512, 512)]
        assert (await backend.read(2 * CLUSTER - 512, 512)) == data(512)
        seen.changes.clear()
        file = Recorder(changes=True)
        backend.node.children["file"].node.observe(file)
        monkeypatch.setattr(HostFile, "write_inline", lambda self, buffers, offset: (buffers[0][100:],))
        assert not backend.immediate.write(0, data(512))
        assert seen.changes == [(Change.WRITE, 0, 512)]
        assert [length for _, _, length in file.changes] == [100]
        assert not backend.write_now(0, data(512))
        assert {(offset, length) for _, offset, length in seen.changes} == {(0, 512)}


async def test_a_failed_change_is_told(graph: Graph) -> None:
    store, seen = Store(OLD), Recorder(changes=True)
    async with memory_backend(graph, store, discard="unmap") as backend:
        backend.node.observe(seen)
        for step in ("write", "zero", "discard", "truncate"):
            store.steps.fail(step, HostError("broken"))
        for request in (
            backend.write(0, b"n" * 10),
            backend.write_zeroes(512, 20),
            backend.discard(1024, 30),
            backend.truncate(8000),
        ):
            with pytest.raises(HostError):
                await request
        store.steps.heal()
    assert seen.changes == [
        (Change.WRITE, 0, 10),
        (Change.ZEROES, 512, 20),
        (Change.DISCARD, 1024, 30),
        (Change.RESIZE, 8000, 192),
    ]


async def test_what_was_refused_is_not_told(graph: Graph) -> None:
    store, seen = Store(OLD, discard=False), Recorder(changes=True)
    async with memory_backend(graph, store, discard="unmap") as backend:
        backend.node.observe(seen)
        with pytest.raises(OutOfRangeError):
            await backend.write(8000, b"n" * 500)
        await backend.discard(0, 512)
    assert seen.changes == []


async def test_a_write_from_outside_is_told(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(OLD)
    graph, nodes = Graph(DRIVERS), [Recorder(changes=True), Recorder(changes=True)]
    backend = await graph.open_backend(str(tmp_path / "disk"), format="raw", writable=True)
    for node, seen in zip(backend.node.with_all_below(), nodes, strict=True):
        node.observe(seen)
    os.truncate(tmp_path / "disk", 10000)
    backend.note_external_write()
    assert [seen.changes for seen in nodes] == [[(Change.OUTSIDE, 0, 10000)]] * 2
    await graph.close()


# --- reads ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def warm_chain(folder: Path) -> AsyncIterator[Backend]:
    """Three layers; cluster N lies in layer N, counted from the base. All short ways were used already."""
    below: list[str | Path] = []
    for number in range(3):
        path = folder / f"{number}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", *below, path, str(LENGTH))
        qemu_io(path, f"write -P {number + 1} {number * CLUSTER} 64k", fmt="qcow2")
        below = ["-b", path, "-F", "qcow2"]
    async with opened(path) as backend:
        for number in range(3):
            for _ in range(2):
                await backend.read_into(number * CLUSTER, memoryview(bytearray(4096)))
            assert backend.immediate.read(number * CLUSTER, memoryview(bytearray(4096)))
            assert backend.immediate.lend(number * CLUSTER, 4096)
            assert number * CLUSTER >> 16 in backend.immediate._places.known
        yield backend


def layers(backend: Backend) -> list[Node]:
    """The base first."""
    found = [backend.node]
    while (edge := found[0].backing) is not None:
        found.insert(0, edge.node)
    return found


@pytest.mark.parametrize("watched", range(3), ids=lambda number: f"layer {number}")
@pytest.mark.parametrize("storage", [False, True], ids=["image", "file"])
@pytest.mark.parametrize("way", ["remembered place", "lent", "in a task"])
async def test_what_is_read_is_told(tmp_path: Path, watched: int, storage: bool, way: str) -> None:
    """Layer N is asked for what no layer above it holds; its file only for what it holds itself."""
    async with warm_chain(tmp_path) as backend:
        seen, node = Recorder(reads=True), layers(backend)[watched]
        (node.children["file"].node if storage else node).observe(seen)
        buffer = memoryview(bytearray(4096))
        for number in range(3):
            offset = number * CLUSTER + 512
            if way == "remembered place":
                assert not backend.immediate.read(offset, buffer)
            elif way == "lent":
                assert backend.immediate.lend(offset, len(buffer)) is None
            await backend.read_into(offset, buffer)
            assert buffer[0] == number + 1
        if storage:
            assert len([length for _, length in seen.reads if length == 4096]) == 1
        else:
            assert seen.reads == [(number * CLUSTER + 512, 4096) for number in range(watched + 1)]


async def test_a_read_over_several_layers_is_told_once(tmp_path: Path) -> None:
    async with warm_chain(tmp_path) as backend:
        seen = [Recorder(reads=True) for _ in range(3)]
        for node, observer in zip(layers(backend), seen, strict=True):
            node.observe(observer)
        await backend.read(0, 4 * CLUSTER)
        assert seen[2].reads == [(0, 4 * CLUSTER)]
        assert sorted(seen[1].reads) == [(0, 2 * CLUSTER), (3 * CLUSTER, CLUSTER)]
        assert sorted(seen[0].reads) == [(0, CLUSTER), (3 * CLUSTER, CLUSTER)]


async def test_reads_of_inflated_clusters_are_told(tmp_path: Path) -> None:
    path = await create_image(tmp_path / "disk.qcow2", size=LENGTH)
    async with opened(path) as backend:
        await backend.write_compressed(0, data(CLUSTER))
        buffer = memoryview(bytearray(512))
        for _ in range(2):
            await backend.read_into(0, buffer)
        assert backend.immediate.read(0, buffer)
        assert isinstance(backend.immediate.lend(0, 512), Pieces)
        seen = Recorder(reads=True)
        backend.node.observe(seen)
        assert backend.immediate.lend(0, 512) is None
        await backend.read_into(0, buffer)
        assert seen.reads == [(0, 512)]
        backend.node.unobserve(seen)
        assert backend.immediate.read(0, buffer)


async def test_reads_before_a_part_is_written_back_are_told(tmp_path: Path) -> None:
    """The first write to a cluster copies the rest of it from the base, also without a task."""
    async with warm_disk(tmp_path, "copy") as backend:
        seen, base = Recorder(reads=True), backend.node.backing
        assert base is not None
        base.node.observe(seen)
        assert backend.write_now(5 * CLUSTER + 512, data(CLUSTER - 1024))
        assert sorted(seen.reads) == [(5 * CLUSTER, 512), (6 * CLUSTER - 512, 512)]


# --- the predicate --------------------------------------------------------------------------------------


async def test_only_what_must_be_closed_is_closed(tmp_path: Path) -> None:
    async with warm_disk(tmp_path, "ways") as backend:
        opened_ways = backend.immediate.ways()
        assert opened_ways == Ways(reads=True, writes=True, at_once=True, passthrough=True)
        for observer, expected in (
            (Recorder(changes=True), Ways(reads=True, writes=True, at_once=True)),
            (Recorder(before=True), Ways(reads=True)),
            (Recorder(reads=True), Ways(writes=True, at_once=True)),
        ):
            for node in backend.node.with_all_below():
                node.observe(observer)
                assert backend.immediate.ways() == expected
                node.unobserve(observer)
                assert backend.immediate.ways() == opened_ways


async def test_what_the_kernel_accesses_cannot_be_watched(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(OLD)
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(tmp_path / "disk"), format="raw", writable=True)
    backend.begin_passthrough()
    for node in backend.node.with_all_below():
        with pytest.raises(OperationBlockedError, match="cannot be watched now: the kernel accesses its host file"):
            node.observe(Recorder(changes=True))
        with pytest.raises(OperationBlockedError):
            await graph.insert_filter(node, {"driver": "copy-on-read"})
    backend.end_passthrough()
    backend.node.observe(Recorder(changes=True))
    await graph.close()
