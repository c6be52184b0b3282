"""The process dies at any instant while its changes of metadata are logged in memory that stays: what a successor makes
of the file and the log holds everything that was answered, flushed or not.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.drivers.format.change_log import Change, ChangeLog, changes_in
from fusedisk.drivers.format.qcow2 import driver as qcow2
from fusedisk.drivers.format.qcow2.changes import Kind
from fusedisk.drivers.format.qcow2.driver import Qcow2Driver
from fusedisk.drivers.format.qcow2.entries import HostRun, encode_table
from fusedisk.drivers.format.qcow2.freed import Freed
from tests.crash.judge import Checker, content_of
from tests.crash.oracle import Oracle, View
from tests.crash.recording import Guest
from tests.crash.workloads import WORKLOADS, Workload
from tests.support.memory import MemoryDriver, Store, stores
from tests.support.qcow2 import MEMORY_DRIVERS, driver_of, in_memory
from tests.support.thinning import thinned

LOG_BYTES = 1 << 20


class Death(NamedTuple):
    """What is left of a process, and what it had answered."""

    image: bytes
    changes: list[Change]
    view: View


class Deaths:
    """Deaths of one process at random instants: in front of and behind its host writes and its changes of metadata."""

    def __init__(self, store: Store, rng: random.Random, one_in: int) -> None:
        self.found: list[Death] = []
        self.store = store
        self.buffer = bytearray(LOG_BYTES)
        self.driver: Qcow2Driver | None = None
        self.exact = 0
        """How often a successor's metadata was compared with that in memory."""
        self._rng, self._one_in = rng, one_in
        self._started: set[int] = set()
        self._done: set[int] = set()

    def changes(self) -> list[Change]:
        """What a successor finds now."""
        changes = changes_in(self.buffer)
        assert changes is not None
        return list(changes)

    def maybe(self) -> None:
        """Die here, perhaps."""
        if self.driver is not None and not self._rng.randrange(self._one_in):
            done = frozenset(self._done)
            view = View(done, frozenset(self._started) - done)
            self.found.append(Death(bytes(self.store.data), self.changes(), view))

    async def mark(self, data: str) -> None:
        """See :class:`tests.crash.recording.Marks`."""
        what, number = data.split()
        if what == "start":
            self._started.add(int(number))
        elif what == "done":
            self._done.add(int(number))
        self.maybe()
        self._compare()

    def _compare(self) -> None:
        """What a successor makes of the file is what this process has in memory."""
        assert self.driver is not None
        image, refcounts = self.driver.image, self.driver.refcounts
        if self.driver.committer._committing.locked:
            return
        changes = self.changes()
        file = redone(self.store.data, changes)
        header = image.header

        def at(place: int, length: int) -> bytes:
            return bytes(file[place : place + length])

        assert at(header.l1_table_offset, 8 * len(image.l1)) == encode_table(image.l1)
        assert at(header.refcount_table_offset, 8 * len(refcounts.table)) == encode_table(refcounts.table)
        for offset, table in image.l2.tables.items():
            assert at(offset, 8 * len(table)) == image.encode_l2(table)
        for offset, block in refcounts.blocks.tables.items():
            assert at(offset, len(block)) == block
        assert freed_in(changes) == refcounts.freed.items
        self.exact += 1


def redone(image: bytes | bytearray, changes: list[Change]) -> bytearray:
    """The file after a successor has written the changes that the log holds."""
    file = bytearray(image)
    for kind in (Kind.REFCOUNTS, Kind.REFCOUNT_TABLE, Kind.L2, Kind.L1):
        for change in changes:
            if change.kind == kind:
                assert change.place + len(change.data) <= len(file)
                file[change.place : change.place + len(change.data)] = change.data
    return file


def freed_in(changes: list[Change]) -> list[Freed]:
    """What a successor has to free."""
    return [
        Freed(change.place, array("q", change.data).tolist(), change.kind == Kind.FREED_DISCARD)
        for change in changes
        if change.kind in (Kind.FREED, Kind.FREED_DISCARD)
    ]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let :class:`Deaths` watch the log of a driver, and the writes to its file."""

    def over(deaths: Deaths) -> None:
        class Watched(ChangeLog):
            def _publish(self) -> None:
                deaths.maybe()
                super()._publish()
                deaths.maybe()

        def put(self: MemoryDriver, offset: int, data: bytes) -> None:
            deaths.maybe()
            plain_put(self, offset, data)
            deaths.maybe()

        plain_put = MemoryDriver._put
        monkeypatch.setattr(MemoryDriver, "_put", put)
        monkeypatch.setattr(qcow2, "ChangeLog", Watched)

    return over


@pytest.fixture
def checker() -> Iterator[Checker]:
    with Checker() as checker:
        yield checker


async def run(
    workload: Workload, folder: Path, seed: int, watch: Any, one_in: int
) -> tuple[Deaths, Oracle, Path | None]:
    """Run a workload over a log of changes, up to closing the image."""
    path, backing = await workload.make(folder)
    store, below = Store(0), Store(0)
    store.data = bytearray(path.read_bytes())
    store.steps.eager = False
    deaths = Deaths(store, random.Random(seed), one_in)
    watch(deaths)
    options: dict[str, Any] = dict(workload.profile.pressure_options) if workload.pressure else {}
    if backing is not None:
        below.data = bytearray(backing.read_bytes())
        options["backing"] = {"driver": "raw", "file": {"driver": "memory", "filename": "below"}}
    graph = Graph(MEMORY_DRIVERS)
    with stores(image=store, below=below):
        try:
            spec = {"driver": "qcow2", "file": {"driver": "memory", "filename": "image"}, "discard": "unmap"}
            backend = await graph.open_backend(spec | options, writable=True)
            oracle = Oracle(bytes(await backend.read(0, backend.length)))
            driver = driver_of(backend)
            driver.log_changes(deaths.buffer)
            deaths.driver = driver
            if workload.pressure:
                workload.profile.under_pressure(driver)
            await workload.runner(seed)(Guest(backend, deaths, oracle))
        finally:
            await graph.close()
    assert deaths.changes() == [], "a closed image is no longer ours"
    return deaths, oracle, backing


async def taken_over(death: Death) -> bytes:
    """The image once a successor has closed it."""
    store = Store(0)
    store.data = redone(death.image, death.changes)
    async with in_memory(store, backing=None) as backend:
        driver = driver_of(backend)
        async with driver.image.mutex:
            await driver.first_write.prepare(False)
            for item in freed_in(death.changes):
                for number, delta in enumerate(item.deltas):
                    cluster = HostRun(item.first + number, 1)
                    driver.refcounts.freed.add([cluster] * -delta)
    return bytes(store.data)


async def check(name: str, folder: Path, seed: int, watch: Any, checker: Checker, count: int) -> None:
    deaths, oracle, backing = await run(WORKLOADS[name], folder, seed, watch, one_in=5)
    assert deaths.exact > 10
    assert any(death.changes for death in deaths.found)
    rng = random.Random(seed)
    for death in rng.sample(deaths.found, min(count, len(deaths.found))):
        image = await taken_over(death)
        found = await content_of(image, backing)
        assert not list(oracle.complaints(found.disk, death.view, zeroes_too=False))
        assert not list(oracle.snapshot_complaints(found.snapshots, death.view))
        verdict = checker.check(image).result()
        assert not verdict.corruptions, verdict.text


@pytest.mark.parametrize("name", thinned(WORKLOADS, 6))
async def test_nothing_that_was_answered_is_lost(name: str, tmp_path: Path, watch: Any, checker: Checker) -> None:
    await check(name, tmp_path, 1, watch, checker, count=25)
