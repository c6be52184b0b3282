"""Snapshots beside requests that change the disk: these need not wait, and the snapshot is one moment."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request import snapshot
from fusedisk.core.errors import NoSpaceError
from fusedisk.drivers.format.qcow2.snapshots import active as snapshot_active
from fusedisk.drivers.format.qcow2.snapshots.switch import Switch
from tests.conftest import qemu_img
from tests.support.memory import Store
from tests.support.qcow2 import assert_clean, created_in_memory, driver_of, in_memory, opened, saved
from tests.support.tasks import start

pytestmark = pytest.mark.usefixtures("every_pause")

HERE = SnapshotInfo(id="", name="here", date=0)
SIZE = 256 << 10

FORMATS: dict[str, dict[str, Any]] = {
    "small": {"cluster_size": 512},
    "plain": {"cluster_size": 4096, "refcount_bits": 8},
    "version 2": {"cluster_size": 1024, "version": 2},
    "subclusters": {"cluster_size": 16384, "extended_l2": True},
}


def created(kind: str) -> dict[str, Any]:
    options = dict(FORMATS[kind])
    if options.pop("version", 3) == 2:
        options["compat"] = "v2"
    return options


class Stop:
    """Stops an operation in one of its pauses, by number, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = -1) -> None:
        self.pauses = 0
        self.reached = trio.Event()
        self.go_on = trio.Event()
        run_others = Switch.run_others

        async def stop(switch: Switch) -> None:
            self.pauses += 1
            if self.pauses - 1 == at:
                self.reached.set()
                await self.go_on.wait()
            await run_others(switch)

        monkeypatch.setattr(Switch, "run_others", stop)


def operation_on(backend: Backend, operation: str) -> Callable[[], Awaitable[object]]:
    if operation == "create":
        return lambda: snapshot.create_snapshot(backend.node, HERE)
    return lambda: snapshot.delete_snapshot(backend.node, "10")


class Disk:
    """A disk and the bytes that it must have."""

    def __init__(self, backend: Backend, size: int = SIZE) -> None:
        self.backend = backend
        self.expected = bytearray(size)

    async def write(self, offset: int, data: bytes, **flags: Any) -> None:
        self.expected[offset : offset + len(data)] = data
        await self.backend.write(offset, data, **flags)

    async def write_compressed(self, offset: int, data: bytes) -> None:
        self.expected[offset : offset + len(data)] = data
        await self.backend.write_compressed(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        self.expected[offset : offset + length] = bytes(length)
        await self.backend.write_zeroes(offset, length, may_unmap=True)

    async def discard(self, offset: int, length: int) -> None:
        self.expected[offset : offset + length] = bytes(length)
        await self.backend.discard(offset, length)

    async def fill(self) -> None:
        """Data everywhere but in the last quarter, some of it shared with a snapshot of its own (``kept``)."""
        await self.write(0, b"a" * (SIZE * 3 // 4))

    async def change(self, byte: bytes, cluster: int) -> None:
        """Every kind of change, of each kind of cluster."""
        await self.write(512, byte * 512)
        await self.write(SIZE - 8 * cluster, byte * (cluster + 512))
        await self.write(30 * 1024, byte * 8192)
        await self.write(SIZE * 3 // 4 - 512, byte * (cluster + 1024))
        await self.zero(64 * 1024, 2 * cluster)
        await self.discard(96 * 1024, 32 * 1024)
        await self.backend.flush()
        await self.write(102 * 1024, byte * 3 * 512)
        await self.write(128 * 1024, byte * cluster)

    async def check(self) -> None:
        assert await self.backend.read(0, len(self.expected)) == self.expected


@asynccontextmanager
async def disk_for(operation: str, kind: str) -> AsyncIterator[tuple[Store, Disk, int]]:
    store = await created_in_memory(Store(), size=SIZE, **created(kind))
    async with in_memory(store, discard="unmap") as backend:
        disk = Disk(backend)
        await disk.fill()
        await backend.create_snapshot(SnapshotInfo(id="9", name="kept", date=0))
        await disk.write(0, b"b" * (SIZE // 2))
        if operation == "delete":
            await backend.create_snapshot(HERE)
            await disk.write(1024, b"c" * (SIZE // 4))
        await disk.write(16 * 1024, b"d" * 5000)
        yield store, disk, FORMATS[kind]["cluster_size"]


async def pauses_of(operation: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        async with disk_for(operation, kind) as (_, disk, _):
            stop = Stop(patch)
            await operation_on(disk.backend, operation)()
    return stop.pauses


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("operation", ["create", "delete"])
async def test_all_changes_go_on_in_each_pause(
    operation: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new snapshot holds them, since they are answered before it is there."""
    pauses = await pauses_of(operation, kind, monkeypatch)
    assert pauses >= 6
    for number in range(pauses):
        with monkeypatch.context() as patch:
            async with disk_for(operation, kind) as (store, disk, cluster), trio.open_nursery() as nursery:
                stop = Stop(patch, number)
                work = await start(nursery, operation_on(disk.backend, operation))
                assert stop.reached.is_set()
                try:
                    with trio.fail_after(20):
                        await disk.change(b"e", cluster)
                        await disk.check()
                    assert not work.done
                finally:
                    stop.go_on.set()
                await work.join()
                held = bytes(disk.expected)
                await disk.change(b"f", cluster)
                await disk.check()
                if operation == "create":
                    await disk.backend.apply_snapshot("10")
                    assert await disk.backend.read(0, SIZE) == held
                await disk.backend.apply_snapshot("9")
                assert await disk.backend.read(0, SIZE) == b"a" * (SIZE * 3 // 4) + bytes(SIZE // 4)
        assert_clean(saved(store, tmp_path))


async def test_compressed_writes_go_on_in_each_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They put several clusters of the disk into one of the file, whose refcount counts them."""
    pauses = await pauses_of("create", "plain", monkeypatch)
    for number in range(pauses):
        with monkeypatch.context() as patch:
            async with disk_for("create", "plain") as (store, disk, cluster), trio.open_nursery() as nursery:
                await disk.write_compressed(8 * cluster, b"x" * 4 * cluster)
                stop = Stop(patch, number)
                work = await start(nursery, operation_on(disk.backend, "create"))
                assert stop.reached.is_set()
                try:
                    with trio.fail_after(20):
                        await disk.write_compressed(10 * cluster, b"y" * 4 * cluster)
                        await disk.write(9 * cluster, b"z" * 512)
                finally:
                    stop.go_on.set()
                await work.join()
                held = bytes(disk.expected)
                await disk.write_compressed(8 * cluster, b"v" * 8 * cluster)
                await disk.check()
                await disk.backend.apply_snapshot("10")
                assert await disk.backend.read(0, SIZE) == held
        assert_clean(saved(store, tmp_path))


@pytest.mark.parametrize("operation", ["create", "delete"])
async def test_the_first_change_after_opening_goes_on(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk_for(operation, "plain") as (store, disk, _):
        expected = bytearray(disk.expected)
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        stop = Stop(monkeypatch, 2)
        work = await start(nursery, operation_on(backend, operation))
        assert stop.reached.is_set()
        assert not driver_of(backend).first_write.disk
        try:
            with trio.fail_after(20):
                await backend.write(5000, b"w" * 512)
        finally:
            stop.go_on.set()
        await work.join()
        expected[5000:5512] = b"w" * 512
        assert await backend.read(0, SIZE) == expected
    assert_clean(saved(store, tmp_path))


@pytest.mark.parametrize("operation", ["create", "delete"])
async def test_an_encrypted_disk_changes_meanwhile(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    encryption = {"encrypt_format": "aes", "encrypt_key_file": str(key)}
    store = await created_in_memory(Store(), size=SIZE, cluster_size=4096, **encryption)
    async with (
        in_memory(store, discard="unmap", **{"encrypt.key-file": str(key)}) as backend,
        trio.open_nursery() as nursery,
    ):
        disk = Disk(backend)
        await disk.fill()
        if operation == "delete":
            await backend.create_snapshot(SnapshotInfo(id="10", name="here", date=0))
        stop = Stop(monkeypatch, 2)
        work = await start(nursery, operation_on(backend, operation))
        assert stop.reached.is_set()
        try:
            with trio.fail_after(20):
                await disk.change(b"e", 4096)
                await disk.check()
        finally:
            stop.go_on.set()
        await work.join()
        await disk.check()
    secret = f"secret,id=key,file={key}"
    spec = f"driver=qcow2,encrypt.key-secret=key,file.filename={saved(store, tmp_path)}"
    qemu_img("check", "--object", secret, "--image-opts", spec)


@pytest.mark.parametrize("operation", ["create", "delete"])
async def test_at_the_last_moment_changes_wait(operation: str, tmp_path: Path) -> None:
    """An allocating write that is in flight ends before; a later one comes after the snapshot, and reads go on."""
    async with disk_for(operation, "plain") as (store, disk, cluster), trio.open_nursery() as nursery:
        backend = disk.backend
        await backend.flush()
        await backend.flush()
        slow = store.steps.hold("write")
        early = await start(nursery, lambda: disk.write(SIZE - cluster, b"e" * 512))
        await slow.reached.wait()
        header = store.steps.hold("write", 24)
        work = await start(nursery, operation_on(backend, operation))
        assert not header.reached.is_set(), "a write of the old state is in flight"
        slow.release()
        await early.join()
        await header.reached.wait()
        before = bytes(disk.expected)
        late = [
            await start(nursery, lambda: disk.write(0, b"l" * 512)),
            await start(nursery, lambda: disk.write(SIZE - 4 * cluster, b"l" * 512)),
        ]
        assert await backend.read(0, SIZE) == before
        late += [
            await start(nursery, lambda: disk.zero(8 * cluster, cluster)),
            await start(nursery, lambda: disk.discard(10 * cluster, cluster)),
        ]
        assert not any(task.done for task in late)
        header.release()
        await work.join()
        for task in late:
            await task.join()
        await disk.check()
        if operation == "create":
            await backend.apply_snapshot("10")
            assert await backend.read(0, SIZE) == before
    assert_clean(saved(store, tmp_path))


@pytest.mark.parametrize("operation", ["create", "delete"])
async def test_changes_beside_an_operation_that_fails_stay(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk_for(operation, "plain") as (store, disk, cluster), trio.open_nursery() as nursery:
        stop = Stop(monkeypatch, 3)
        work = await start(nursery, operation_on(disk.backend, operation))
        assert stop.reached.is_set()
        await disk.change(b"e", cluster)
        header = store.steps.hold("write", 24)
        stop.go_on.set()
        await header.reached.wait()
        late = await start(nursery, lambda: disk.write(SIZE - 2 * cluster, b"l" * 512))
        store.steps.fail("write", NoSpaceError("full"))
        header.release()
        with pytest.raises(NoSpaceError):
            await work.join()
        await late.join()
        await disk.check()
        assert len(disk.backend.list_snapshots()) == 1 + (operation == "delete")
        await disk.change(b"g", cluster)
    assert_clean(saved(store, tmp_path))


@pytest.mark.parametrize("operation", ["create", "delete"])
async def test_a_resize_to_less_waits_for_the_end(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with disk_for(operation, "plain") as (store, disk, _), trio.open_nursery() as nursery:
        stop = Stop(monkeypatch, 3)
        work = await start(nursery, operation_on(disk.backend, operation))
        assert stop.reached.is_set()
        resize = await start(nursery, lambda: disk.backend.truncate(SIZE // 2))
        try:
            assert not resize.done
        finally:
            stop.go_on.set()
        await work.join()
        await resize.join()
        assert await disk.backend.read(0, SIZE // 2) == disk.expected[: SIZE // 2]
    assert_clean(saved(store, tmp_path))


@pytest.mark.parametrize("kind", ["small", "plain"])
@pytest.mark.parametrize("operation", ["create", "delete"])
async def test_the_disk_grows_in_each_pause(
    operation: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so does its L1 table, to more clusters with the small ones."""
    pauses = await pauses_of(operation, kind, monkeypatch)
    for number in range(pauses):
        with monkeypatch.context() as patch:
            async with disk_for(operation, kind) as (store, disk, cluster), trio.open_nursery() as nursery:
                stop = Stop(patch, number)
                work = await start(nursery, operation_on(disk.backend, operation))
                assert stop.reached.is_set()
                try:
                    with trio.fail_after(20):
                        for longer in (SIZE + cluster, 2 * SIZE, 24 * SIZE):
                            await disk.backend.truncate(longer)
                            disk.expected += bytes(longer - len(disk.expected))
                            await disk.write(longer - cluster, b"g" * cluster)
                            await disk.backend.flush()
                    assert not work.done
                finally:
                    stop.go_on.set()
                await work.join()
                held = bytes(disk.expected)
                await disk.write(SIZE, b"f" * 3 * cluster)
                await disk.write(24 * SIZE - cluster, b"f" * 512)
                await disk.check()
                if operation == "create":
                    await disk.backend.apply_snapshot("10")
                    assert await disk.backend.read(0, 24 * SIZE) == held
        assert_clean(saved(store, tmp_path))


@pytest.mark.parametrize("operation", ["create", "delete"])
async def test_a_new_table_in_every_pause(operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in those of the rounds that go through what changed before."""
    monkeypatch.setattr(snapshot_active, "ENTRIES_AT_ONCE", 1)  # a pause after each table
    span = 32 << 10
    store = await created_in_memory(Store(), size=200 * span, cluster_size=512)
    async with in_memory(store, discard="unmap") as backend:
        disk = Disk(backend, 200 * span)
        for number in range(10):
            await disk.write(number * span, b"a" * 2048)
        if operation == "delete":
            await backend.create_snapshot(SnapshotInfo(id="10", name="here", date=0))
        run_others, at = Switch.run_others, 10

        async def change(switch: Switch) -> None:
            nonlocal at
            if at < 190 and switch.gives_way:
                await disk.write(at * span, b"b" * 512)
                await disk.write((at % 10) * span + 512, b"c" * 512)
                at += 1
            await run_others(switch)

        monkeypatch.setattr(Switch, "run_others", change)
        await operation_on(backend, operation)()
        assert at > 30
        await disk.check()
    assert_clean(saved(store, tmp_path))


# --- random changes -------------------------------------------------------------------------------------

_REGION = 32 << 10


class Change(NamedTuple):
    """One change of a region, with the bytes after it, and when it was begun and answered."""

    content: bytes
    begun: int
    ended: int


class Writer:
    """Changes its own region of the disk, one request after the other."""

    def __init__(self, backend: Backend, number: int, cluster: int, chance: random.Random, clock: list[int]) -> None:
        self.backend, self.cluster, self.chance, self.clock = backend, cluster, chance, clock
        self.base = number * _REGION
        self.history = [Change(bytes(_REGION), 0, 0)]
        self.stopped = False

    def _now(self) -> int:
        self.clock[0] += 1
        return self.clock[0]

    async def run(self) -> None:
        while not self.stopped:
            await self.step()

    async def step(self) -> None:
        content, begun = bytearray(self.history[-1].content), self._now()
        unit = self.chance.choice((512, self.cluster))
        length = self.chance.randrange(1, 4 * self.cluster // unit + 1) * unit
        length = min(length, _REGION)
        start = self.chance.randrange((_REGION - length) // unit + 1) * unit
        kind = self.chance.choice(("write", "write", "write", "zero", "discard", "flush"))
        if kind == "write":
            content[start : start + length] = self.chance.randbytes(1) * length
            await self.backend.write(self.base + start, content[start : start + length])
        elif kind == "flush":
            await self.backend.flush()
        elif kind == "zero" or unit == self.cluster:
            content[start : start + length] = bytes(length)
            if kind == "zero":
                await self.backend.write_zeroes(self.base + start, length, may_unmap=self.chance.random() < 0.5)
            else:
                await self.backend.discard(self.base + start, length)
        self.history.append(Change(bytes(content), begun, self._now()))

    def moments(self, found: bytes, begun: int, ended: int) -> list[tuple[int, int]]:
        """The spans of time in which the region had this content, within those of the snapshot."""
        spans = []
        for number, change in enumerate(self.history):
            after = self.history[number + 1].ended if number + 1 < len(self.history) else ended
            if change.content == found and change.begun <= ended and after >= begun:
                spans.append((max(change.begun, begun), min(after, ended)))
        return spans


def _have_a_moment(spans: list[list[tuple[int, int]]]) -> bool:
    """Whether one moment lies in a span of each."""
    starts = [low for each in spans for low, _ in each]
    return any(all(any(low <= moment <= high for low, high in each) for each in spans) for moment in starts)


async def _read_snapshot(image: Path, name: str) -> bytes:
    async with opened(image, writable=False, **{"internal-snapshot": name}) as backend:
        return bytes(await backend.read(0, SIZE))


async def _random_changes(store: Store, tmp_path: Path, kind: str, seed: int, rounds: int) -> int:
    """Make and delete snapshots beside writers; returns how many requests were answered beside them."""
    chance = random.Random(seed)
    cluster, clock, beside = FORMATS[kind]["cluster_size"], [0], 0
    store.steps.eager = False
    async with in_memory(store, discard="unmap") as backend:
        writers = [Writer(backend, number, cluster, chance, clock) for number in range(SIZE // _REGION)]
        held: dict[str, bytes] = {}

        async def grow() -> None:
            while not writers[0].stopped:
                await backend.truncate(backend.length + chance.randrange(1, 9) * cluster)
                await backend.write(backend.length - 512, b"g" * 512)

        for _ in range(rounds):
            async with trio.open_nursery() as nursery:
                for writer in writers:
                    writer.stopped = False
                    nursery.start_soon(writer.run)
                if kind != "version 2":
                    nursery.start_soon(grow)
                for _ in range(chance.randrange(60)):
                    await trio.lowlevel.checkpoint()
                before = clock[0]
                name = ""
                if held and chance.random() < 0.5:
                    await backend.delete_snapshot(chance.choice(list(held)))
                    gone = set(held) - {found.id for found in backend.list_snapshots()}
                    del held[gone.pop()]
                else:
                    name = (await backend.create_snapshot(HERE)).id
                ended = clock[0]
                beside += ended - before
                for writer in writers:
                    writer.stopped = True
            content = b"".join(writer.history[-1].content for writer in writers)
            assert await backend.read(0, SIZE) == content
            if name:
                await backend.flush()
                held[name] = await _read_snapshot(saved(store, tmp_path), name)
                assert _have_a_moment(
                    [writer.moments(held[name][writer.base :][:_REGION], before, ended) for writer in writers]
                ), f"snapshot {name} is of no moment"
            for writer in writers:
                del writer.history[:-1]
    for name, expected in held.items():
        assert await _read_snapshot(saved(store, tmp_path), name) == expected
    return beside


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 40))])
@pytest.mark.parametrize("kind", FORMATS)
async def test_random_changes_beside_snapshots(
    kind: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_active, "ENTRIES_AT_ONCE", 1)  # a pause after each table
    store = await created_in_memory(Store(), size=SIZE, **created(kind))
    beside = await _random_changes(store, tmp_path, kind, seed, rounds=6)
    assert beside > 20
    assert_clean(saved(store, tmp_path))
