"""An error at every named event of a workload: the image stays clean of corruption, the node goes on."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import FusediskError
from fusedisk.drivers.filter.blkdebug import BlkdebugDriver
from fusedisk.drivers.filter.blkdebug_rules import EVENTS, InjectError, Rules
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, qemu_io
from tests.crash.oracle import Oracle, View
from tests.crash.replay import SECTOR
from tests.crash.workloads import KIB, places, stamped
from tests.support.qcow2 import assert_not_corrupt

UNIT = 512
SIZE = 96 * KIB

HAPPEN = {
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_alloc_write",
    "write_aio",
    "cow_read",
    "cow_write",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_done",
}
"""Events of the workload below at which a request can fail. Reading the refcount table comes before it."""


class Case(NamedTuple):
    """One error: at which occurrence of the event, which, on what, and whether it stays."""

    event: str
    occurrence: int
    number: int
    iotype: str | None
    stays: bool

    def rules(self) -> dict[str, Any]:
        """Options of blkdebug."""
        states = [
            {"event": self.event, "state": state, "new_state": state + 1} for state in range(1, self.occurrence + 1)
        ]
        inject: dict[str, Any] = {"event": self.event, "state": self.occurrence, "errno": self.number}
        inject |= {"once": not self.stays} | ({"iotype": self.iotype} if self.iotype else {})
        return {"inject-error": [inject], "set-state": states}


def cases(count: int) -> list[Case]:
    """Errors at the first ``count`` occurrences of each event."""
    random_ = random.Random(count)
    found = []
    for event in sorted(HAPPEN):
        for occurrence in range(1, count + 1):
            number = random_.choice((errno.EIO, errno.ENOSPC))
            iotype = random_.choice((None, None, "write"))
            found.append(Case(event, occurrence, number, iotype, stays=random_.random() < 0.3))
    return found


def make_image(folder: Path) -> Path:
    """Full of what needs metadata to be changed: a backing file, compressed clusters, two snapshots, refcounts of 64
    bits whose table is nearly too small."""
    base = folder / "base.raw"
    base.write_bytes(b"".join(b"base%04d" % index * 64 for index in range(SIZE // SECTOR)))
    image = folder / "image.qcow2"
    options = f"cluster_size={UNIT},refcount_bits=64"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "raw", image, str(SIZE))
    qemu_io(image, "write -P 17 0 16k", "write -c -P 3 20k 512", "write -c -P 4 20992 512", fmt="qcow2")
    qemu_img("snapshot", "-c", "one", image)
    qemu_io(image, "write -P 19 4k 8k", fmt="qcow2")
    qemu_img("snapshot", "-c", "two", image)
    # The file ends shortly before what the first refcount table covers, so that growing it is part of the workload.
    qemu_img("resize", "-q", image, str(2304 * KIB))
    qemu_io(image, f"write -P 23 {256 * KIB} 1920k", fmt="qcow2")
    return image


class Victim:
    """A guest whose requests may fail: then their sectors hold anything between before and after."""

    def __init__(self, backend: Backend, content: bytes) -> None:
        self.backend = backend
        self.oracle = Oracle(content)
        self.done: set[int] = set()
        self.failures = 0

    async def write(self, offset: int, data: bytes) -> None:
        number = self.oracle.begin(offset, data)
        await self._try(number, self.backend.write(offset, data))

    async def write_zeroes(self, offset: int, length: int) -> None:
        number = self.oracle.begin(offset, bytes(length))
        await self._try(number, self.backend.write_zeroes(offset, length, may_unmap=True))

    async def resize(self, length: int) -> None:
        number = self.oracle.begin(0, b"", length)
        await self._try(number, self.backend.truncate(length))

    async def flush(self) -> None:
        try:
            await self.backend.flush()
        except FusediskError:
            self.failures += 1

    async def _try(self, number: int, request: Any) -> None:
        try:
            await request
        except FusediskError:
            self.failures += 1
            self.oracle.length = self.backend.length
        else:
            self.done.add(number)

    async def look(self) -> None:
        """Compare the whole disk, and take what failed requests left as what is there."""
        found = bytes(await self.backend.read(0, self.backend.length))
        must = frozenset(self.done)
        view = View(must, frozenset(range(len(self.oracle.steps))) - must)
        complaints = list(self.oracle.complaints(found, view, zeroes_too=False))
        assert not complaints, complaints[0]
        self.oracle = Oracle(found)
        self.done.clear()


async def work(victim: Victim, random_: random.Random) -> None:
    """A bit of everything that changes metadata."""
    for offset, length in places(random_, SIZE - 8 * KIB, UNIT, 14):
        await victim.write(offset, stamped(length))
    for offset, length in places(random_, SIZE - 8 * KIB, UNIT, 4):
        await victim.write_zeroes(offset, length)
    # Parts of sectors, and of clusters: nobody else writes there.
    for offset in range(SIZE - 8 * KIB + 100, SIZE, 2 * KIB):
        await victim.write(offset, stamped(random_.randrange(100, 900)))
    await victim.flush()
    await victim.resize(victim.backend.length + 64 * KIB)
    start = victim.backend.length - 190 * KIB
    for offset in range(start, start + 96 * KIB, 12 * KIB):
        await victim.write(offset, stamped(12 * KIB))
    await victim.flush()


async def run(case: Case, image: Path) -> int:
    """Returns how many requests met the error."""
    storage = {
        "driver": "blkdebug",
        "image": {"driver": "file", "filename": str(image)},
        "node-name": "debug",
        "align": UNIT,
        **case.rules(),
    }
    # Small caches, so that tables are loaded again.
    spec = {"driver": "qcow2", "file": storage, "l2-cache-size": 2 * UNIT, "refcount-cache-size": 4 * UNIT}
    graph = Graph(DRIVERS, Gate(allow_any=True))
    try:
        backend = await graph.open_backend(spec | {"discard": "unmap"}, writable=True)
        debug = graph.node("debug").driver
        assert isinstance(debug, BlkdebugDriver)
        rules, debug.rules = debug.rules, Rules([], [])
        struck = []
        strike = rules.strike

        def counting(iotype: str, offset: int, length: int) -> InjectError | None:
            if (error := strike(iotype, offset, length)) is not None:
                struck.append(iotype)
            return error

        rules.strike = counting  # type: ignore[method-assign]
        victim = Victim(backend, bytes(await backend.read(0, backend.length)))
        debug.rules = rules
        await work(victim, random.Random(str(case)))
        debug.rules = Rules([], [])
        failures = victim.failures
        assert backend.node.fenced is None
        await victim.look()
        await work(victim, random.Random(1))
        assert victim.failures == failures, "the node does not go on"
        await victim.look()
    finally:
        await graph.close()
    assert_not_corrupt(image)
    graph = Graph(DRIVERS, Gate(allow_any=True))
    backend = await graph.open_backend({"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}})
    assert await backend.read(0, backend.length) == victim.oracle.base
    await graph.close()
    return len(struck)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("injected"))


def test_the_list_of_events() -> None:
    assert set(EVENTS) >= HAPPEN


@pytest.mark.parametrize("case", cases(1), ids=lambda case: f"{case.event}-{case.occurrence}")
async def test_first_occurrence(case: Case, template: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    image.write_bytes(template.read_bytes())
    assert await run(case._replace(iotype=None, stays=False), image), "the error never happened"


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(12), ids=lambda case: f"{case.event}-{case.occurrence}")
async def test_later_occurrences(case: Case, template: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    image.write_bytes(template.read_bytes())
    await run(case, image)
