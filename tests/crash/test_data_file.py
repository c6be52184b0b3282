"""The power goes while an image with an external data file is written: two files, each with a cache of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from tests.conftest import qemu_img
from tests.crash.oracle import Oracle, View
from tests.crash.replay import SECTOR
from tests.crash.workloads import KIB, places, stamped
from tests.support.memory import Store, stores
from tests.support.qcow2 import MEMORY_DRIVERS, assert_not_corrupt
from tests.support.stepping import Steps

SIZE = 256 * KIB
UNIT = 4096
SPEC = {
    "driver": "qcow2",
    "file": {"driver": "memory", "filename": "image"},
    "data-file": {"driver": "memory", "filename": "data"},
}
OPTIONS = {
    "plain": f"cluster_size={UNIT}",
    "raw": f"cluster_size={UNIT},data_file_raw=on",
    "extended": "cluster_size=16k,extended_l2=on",
    "lazy": f"cluster_size={UNIT},lazy_refcounts=on",
}


class Change(NamedTuple):
    """Sectors of one store that a request changed, or, where there are none, a flush of it."""

    store: str
    sectors: dict[int, bytes]


class Timeline:
    """What reaches the stores, in order."""

    def __init__(self, watched: dict[str, Store]) -> None:
        self.stores = watched
        self.base = {name: bytes(store.data) for name, store in watched.items()}
        self.changes: list[Change] = []
        self._last = dict(self.base)
        for name, store in watched.items():
            store.steps = _Watcher(self, name)

    def look(self) -> int:
        """Find out what the request before this call has changed; returns how many changes there were so far."""
        for name, store in self.stores.items():
            now, before = bytes(store.data), self._last[name]
            if now != before:
                starts = range(0, max(len(now), len(before)), SECTOR)
                sectors = {at: now[at : at + SECTOR].ljust(SECTOR, b"\0") for at in starts}
                changed = {at: data for at, data in sectors.items() if data != before[at : at + SECTOR]}
                self._last[name] = now
                self.changes.append(Change(name, changed))
        return len(self.changes)

    def survivors(self, cut: int, random_: random.Random) -> dict[str, bytes]:
        """What the stores may hold when the power goes after ``cut`` changes."""
        durable = {name: bytearray(content) for name, content in self.base.items()}
        windows: dict[str, list[Change]] = {name: [] for name in self.stores}
        for change in self.changes[:cut]:
            if change.sectors:
                windows[change.store].append(change)
            else:
                _apply(durable[change.store], windows[change.store])
                windows[change.store].clear()
        for name, window in windows.items():
            kept = [change for change in window if random_.random() < random_.choice((0.1, 0.5, 0.9, 1))]
            if random_.random() < 0.5:
                kept = [Change(name, {at: data}) for change in kept for at, data in change.sectors.items()]
                kept = [change for change in kept if random_.random() < 0.7]
            random_.shuffle(kept)
            _apply(durable[name], kept)
        return {name: bytes(content) for name, content in durable.items()}


class _Watcher(Steps):
    def __init__(self, timeline: Timeline, name: str) -> None:
        super().__init__()
        self._timeline = timeline
        self._name = name

    async def take(self, operation: str, offset: int = 0, length: int = 0, flags: int = 0) -> None:
        self._timeline.look()
        if operation == "flush":
            self._timeline.changes.append(Change(self._name, {}))
        await super().take(operation, offset, length, flags)


def _apply(content: bytearray, changes: list[Change]) -> None:
    for change in changes:
        for at, data in change.sectors.items():
            content += bytes(max(0, at + SECTOR - len(content)))
            content[at : at + SECTOR] = data


class Guest:
    """Makes requests one after the other, and remembers which counted when."""

    def __init__(self, backend: Backend, timeline: Timeline) -> None:
        self.backend = backend
        self.timeline = timeline
        self.oracle = Oracle(bytes(SIZE))
        self.views: list[tuple[int, View]] = []
        """From how many changes on which steps count."""
        self._durable: frozenset[int] = frozenset()
        self._remember()

    def _remember(self) -> None:
        everything = frozenset(range(len(self.oracle.steps)))
        self.views.append((self.timeline.look(), View(self._durable, everything - self._durable)))

    async def work(self, random_: random.Random) -> None:
        for offset, length in places(random_, SIZE, UNIT, 90):
            match random_.randrange(6):
                case 0:
                    self.oracle.begin(offset, bytes(length))
                    self._remember()
                    await self.backend.write_zeroes(offset, length, may_unmap=random_.random() < 0.5)
                case 1:
                    unit = self.backend.node.limits.discard_alignment
                    first, last = -(-offset // unit) * unit, (offset + length) // unit * unit
                    if first < last:
                        self.oracle.begin(first, bytes(last - first))
                        self._remember()
                        await self.backend.discard(first, last - first)
                case 2:
                    done = frozenset(range(len(self.oracle.steps)))
                    await self.backend.flush()
                    self._durable = done
                    self._remember()
                case _:
                    data = stamped(length)
                    self.oracle.begin(offset, data)
                    self._remember()
                    await self.backend.write(offset, data)

    def view(self, cut: int) -> View:
        """The steps that count after ``cut`` changes."""
        return [view for changes, view in self.views if changes <= cut][-1]


async def record(folder: Path, kind: str, seed: int) -> tuple[Timeline, Guest]:
    image, data = folder / "disk.qcow2", folder / "disk.data"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={data},{OPTIONS[kind]}", image, str(SIZE))
    timeline = Timeline({"image": Store(image.read_bytes()), "data": Store(data.read_bytes())})
    with stores(**timeline.stores):
        graph = Graph(MEMORY_DRIVERS)
        # The data file keeps what is discarded, so that whoever loses a write finds old data there.
        options = {**SPEC, "discard": "unmap", "pass-discard-request": False}
        guest = Guest(await graph.open_backend(options, writable=True), timeline)
        await guest.work(random.Random(seed))
        await graph.close()
        timeline.look()
    return timeline, guest


async def check_crashes(folder: Path, kind: str, seed: int, count: int) -> None:
    timeline, guest = await record(folder, kind, seed)
    random_ = random.Random(seed)
    different = set()
    for _ in range(count):
        cut = random_.randrange(len(timeline.changes) + 1)
        found = {name: Store(content) for name, content in timeline.survivors(cut, random_).items()}
        different.add(bytes(found["image"].data) + bytes(found["data"].data))
        with stores(**found):
            graph = Graph(MEMORY_DRIVERS)
            backend = await graph.open_backend(SPEC, writable=True)
            content = bytes(await backend.read(0, SIZE))
            await graph.close()
        complaints = list(guest.oracle.complaints(content, guest.view(cut), zeroes_too=False))
        assert not complaints, f"after change {cut}: {complaints[0]} ({len(complaints)} like it)"
        (folder / "disk.qcow2").write_bytes(found["image"].data)
        (folder / "disk.data").write_bytes(found["data"].data)
        assert_not_corrupt(folder / "disk.qcow2")
    assert len(different) > count // 2


@pytest.mark.parametrize("kind", OPTIONS)
async def test_some_power_cuts(kind: str, tmp_path: Path) -> None:
    await check_crashes(tmp_path, kind, 1, 40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("seed", [2, 3])
async def test_many_power_cuts(kind: str, seed: int, tmp_path: Path) -> None:
    await check_crashes(tmp_path, kind, seed, 500)
