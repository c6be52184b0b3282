"""qcow2 images for tests: making them, opening them, asking qemu-img about them; and images in memory, whose host
writes can be watched, held and broken.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.registry import Registry
from fusedisk.block.model.files import Files
from fusedisk.block.model.node import Node
from fusedisk.drivers.format.qcow2.driver import Qcow2Driver
from fusedisk.drivers.format.qcow2.options import Qcow2CreateOptions
from fusedisk.drivers.format.qcow2.snapshots import switch as snapshot_switch
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, run_tool
from tests.support.memory import Store, stores
from tests.support.stepping import Steps

CLUSTER_SIZES = [512 << shift for shift in range(13)]
"""All of them, 512 bytes to 2 MiB."""

MEMORY_DRIVERS = Registry(
    {
        "qcow2": "fusedisk.drivers.format.qcow2.driver:Qcow2Driver",
        "raw": "fusedisk.drivers.format.raw:RawDriver",
        "memory": "tests.support.memory:MemoryDriver",
    },
    prefixes={"memory": "memory"},
    probed=("qcow2", "raw"),
)


async def create_image(path: Path, **options: Any) -> Path:
    """Make an image with our driver."""
    path.write_bytes(b"")
    graph = Graph(DRIVERS)
    try:
        backend = await graph.open_backend({"driver": "file", "filename": str(path)}, writable=True)
        await Qcow2Driver.create(_Existing(backend.node, graph), Qcow2CreateOptions(**options))
    finally:
        await graph.close()
    return path


class _Existing(Files):
    """Files that the test has made already."""

    def __init__(self, main: Node, graph: Graph) -> None:
        super().__init__(main)
        self._graph = graph

    async def create(self, *others: str) -> list[Node]:
        specs = [{"driver": "file", "filename": name} for name in others]
        return [self.main, *[(await self._graph.open_backend(spec, writable=True)).node for spec in specs]]


@asynccontextmanager
async def opened(path: Path | str, *, writable: bool = True, **options: Any) -> AsyncIterator[Backend]:
    """Open a qcow2 image with our driver, its backing chain included."""
    graph = Graph(DRIVERS)
    try:
        spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **options}
        yield await graph.open_backend(spec, writable=writable)
    finally:
        await graph.close()


@asynccontextmanager
async def in_memory(store: Store, *, writable: bool = True, **options: Any) -> AsyncIterator[Backend]:
    """Open the qcow2 image that lies in ``store``."""
    graph = Graph(MEMORY_DRIVERS)
    with stores(image=store):
        try:
            spec = {"driver": "qcow2", "file": {"driver": "memory", "filename": "image"}, **options}
            yield await graph.open_backend(spec, writable=writable)
        finally:
            store.steps.heal()
            await graph.close()


async def created_in_memory(store: Store, **options: Any) -> Store:
    """Make an image with our driver in ``store``; its list of calls starts empty afterwards."""
    graph = Graph(MEMORY_DRIVERS)
    with stores(image=store):
        try:
            backend = await graph.open_backend({"driver": "memory", "filename": "image"}, writable=True)
            await Qcow2Driver.create(Files(backend.node), Qcow2CreateOptions(**options))
        finally:
            await graph.close()
    store.steps.calls.clear()
    return store


def saved(store: Store | bytes, folder: Path) -> Path:
    """A file with what is in memory, for qemu-img."""
    path = folder / "image.qcow2"
    path.write_bytes(store if isinstance(store, bytes) else store.data)
    return path


def driver_of(backend: Backend) -> Qcow2Driver:
    """The driver behind a backend."""
    driver = backend.node.driver
    assert isinstance(driver, Qcow2Driver)
    return driver


def check(path: Path) -> dict[str, Any]:
    """``qemu-img check --output=json``, whatever it found."""
    report: dict[str, Any] = json.loads(
        run_tool("qemu-img", "check", "-f", "qcow2", "--output=json", path, check=False)
    )
    return report


def assert_clean(path: Path) -> None:
    """qemu-img finds neither corruptions nor leaks."""
    report = check(path)
    wrong = {key: report[key] for key in ("corruptions", "leaks", "check-errors") if report.get(key)}
    assert not wrong, run_tool("qemu-img", "check", "-f", "qcow2", path, check=False)


def assert_not_corrupt(path: Path) -> int:
    """qemu-img finds no corruption; returns how many clusters are leaked."""
    report = check(path)
    wrong = {key: report[key] for key in ("corruptions", "check-errors") if report.get(key)}
    assert not wrong, run_tool("qemu-img", "check", "-f", "qcow2", path, check=False)
    return int(report.get("leaks", 0))


def raw_content(path: Path, tmp_path: Path) -> bytes:
    """What QEMU reads in the image."""
    out = tmp_path / "content.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, out)
    return out.read_bytes()


class Snapshots(Steps):
    """Keeps the content of a store before every write that reaches it: what a process that dies there leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.store: Store | None = None
        self.taken: list[bytes] = []

    def watch(self, store: Store) -> None:
        """Start keeping what ``store`` holds."""
        self.store = store
        store.steps = self

    async def take(self, operation: str, offset: int = 0, length: int = 0, flags: int = 0) -> None:
        if self.store is not None and operation in ("write", "zero", "discard", "truncate"):
            self.taken.append(bytes(self.store.data))
        await super().take(operation, offset, length, flags)


@contextmanager
def pausing_everywhere() -> Iterator[None]:
    """Let others run in every pause of a snapshot's work, however short ago the last one was."""
    seconds, snapshot_switch.STEP_SECONDS = snapshot_switch.STEP_SECONDS, 0.0
    try:
        yield
    finally:
        snapshot_switch.STEP_SECONDS = seconds
