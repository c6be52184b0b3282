"""Running a workload over a write log: guest requests go into an oracle, the image's host writes into the log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.core.errors import NotSupportedError
from fusedisk.drivers.filter.blklogwrites import BlklogwritesDriver
from tests.crash.oracle import Oracle
from tests.crash.replay import SECTOR, Operation, read_log
from tests.support.profiles import QCOW2, FormatProfile


class Recording(NamedTuple):
    """Everything that is needed to replay crashes of one run."""

    base: bytes
    """The image before the run."""
    log: list[Operation]
    oracle: Oracle
    backing: Path | None
    """A raw file below the image."""
    profile: FormatProfile = QCOW2


class Marks(Protocol):
    """Hears when requests and flushes start and end."""

    async def mark(self, data: str) -> None:
        """Note ``start``, ``done``, ``flush`` or ``flushed``, and a number."""


class Guest:
    """Makes requests and remembers them."""

    def __init__(self, backend: Backend, log: Marks, oracle: Oracle) -> None:
        self.backend = backend
        self.oracle = oracle
        self._log = log
        self._flushes = 0

    @property
    def length(self) -> int:
        """Of the disk, in bytes."""
        return self.backend.length

    async def write(self, offset: int, data: bytes) -> None:
        """Write."""
        number = await self._start(offset, data)
        await self.backend.write(offset, data)
        await self._done(number)

    async def write_compressed(self, offset: int, data: bytes) -> None:
        """Write whole clusters, compressed."""
        number = await self._start(offset, data)
        await self.backend.write_compressed(offset, data)
        await self._done(number)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """Write zeroes."""
        number = await self._start(offset, bytes(length))
        await self.backend.write_zeroes(offset, length, may_unmap=may_unmap)
        await self._done(number)

    async def discard(self, offset: int, length: int, unit: int) -> None:
        """Discard. What lies in whole units of ``unit`` bytes reads as zeroes, unless the image cannot discard."""
        first, last = -(-offset // unit) * unit, (offset + length) // unit * unit
        if first >= last:
            return
        kept = bytes(self.oracle.current[first:last])
        number = await self._start(first, bytes(last - first))
        await self.backend.discard(first, last - first)
        if kept.strip(b"\0") and await self.backend.read(first, last - first) == kept:
            raise NotSupportedError("the image ignores discards, the workload should not make any")
        await self._done(number)

    async def resize(self, length: int) -> None:
        """Make the disk longer or shorter."""
        number = self.oracle.begin(0, b"", length)
        await self._log.mark(f"start {number}")
        await self.backend.truncate(length)
        await self._done(number)

    async def create_snapshot(self, name: str) -> None:
        """Make an internal snapshot, which makes durable what is done."""
        number = self.oracle.begin_snapshot(name)
        await self._log.mark(f"start {number}")
        await self.backend.create_snapshot(SnapshotInfo("", name, number * 10**9))
        await self._settled(number)

    async def apply_snapshot(self, name: str) -> None:
        """Let the disk be what it was."""
        number = self.oracle.begin_apply(name)
        await self._log.mark(f"start {number}")
        await self.backend.apply_snapshot(self._id(name))
        await self._settled(number)

    async def delete_snapshot(self, name: str) -> None:
        """Forget a snapshot."""
        number = self.oracle.begin_delete(name)
        await self._log.mark(f"start {number}")
        await self.backend.delete_snapshot(self._id(name))
        await self._settled(number)

    def _id(self, name: str) -> str:
        return next(found.id for found in self.backend.list_snapshots() if found.name == name)

    async def _settled(self, number: int) -> None:
        """A change of snapshots is durable when it is done, and so is all that was done before."""
        await self._done(number)
        self._flushes += 1
        await self._log.mark(f"flush {self._flushes}")
        await self._log.mark(f"flushed {self._flushes}")

    async def flush(self) -> None:
        """Make durable what is done."""
        self._flushes += 1
        number = self._flushes
        await self._log.mark(f"flush {number}")
        await self.backend.flush()
        await self._log.mark(f"flushed {number}")

    async def _start(self, offset: int, data: bytes) -> int:
        number = self.oracle.begin(offset, data)
        await self._log.mark(f"start {number}")
        return number

    async def _done(self, number: int) -> None:
        await self._log.mark(f"done {number}")


@asynccontextmanager
async def guest_of(image: Path, log: Path, profile: FormatProfile = QCOW2, **options: Any) -> AsyncIterator[Guest]:
    """A guest on the image over a log of its writes; ``options`` are the format driver's."""
    log.write_bytes(b"")
    graph = Graph(profile.drivers)
    try:
        storage = {
            "driver": "blklogwrites",
            "file": {"driver": "file", "filename": str(image), "locking": "off"},
            "log": {"driver": "file", "filename": str(log), "locking": "off"},
            "node-name": "log",
        }
        spec = {"driver": profile.name, "file": storage, "discard": "unmap", **options}
        backend = await graph.open_backend(spec, writable=True)
        driver = graph.node("log").driver
        assert isinstance(driver, BlklogwritesDriver)
        content = bytes(await backend.read(0, backend.length))
        assert len(content) % SECTOR == 0
        yield Guest(backend, driver, Oracle(content))
    finally:
        await graph.close()


async def record(
    image: Path,
    workload: Any,
    *,
    profile: FormatProfile = QCOW2,
    backing: Path | None = None,
    pressure: bool = False,
    **options: Any,
) -> Recording:
    """Run ``workload(guest)`` on ``image``, close it, and return what happened, closing included.

    ``pressure``: little memory, so that the driver writes metadata by itself.
    """
    base = image.read_bytes()
    log = image.with_suffix(".log")
    if pressure:
        options |= profile.pressure_options
    async with guest_of(image, log, profile, **options) as guest:
        if pressure:
            profile.under_pressure(guest.backend.node.driver)
        await workload(guest)
    return Recording(base, read_log(log), guest.oracle, backing, profile)
