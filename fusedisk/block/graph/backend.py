"""A user of a graph: the root edge, where every request in the system starts."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

import trio

from fusedisk.block.model import permissions
from fusedisk.block.model.driver import COMPRESSED, FUA, MAY_UNMAP, Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.extent import BlockStatus
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request import io, snapshot, status
from fusedisk.block.request.accounting import Accounting
from fusedisk.block.request.immediate import Immediate
from fusedisk.core.at_once import WouldWait, run_at_once
from fusedisk.core.errors import HostError, NoMediumError, OutOfRangeError
from fusedisk.core.progress import no_progress

if TYPE_CHECKING:
    from fusedisk.block.graph.graph import Graph
    from fusedisk.block.model.node import Node
    from fusedisk.core.progress import Progress

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_MOST_TRIES_OFF = 1 << 12
"""After a failed attempt, how many writes at most skip the attempt (exponential back-off)."""


class Backend:
    """A block device as its user sees it: an export, a job, the library.

    Holds permissions on its root node, checks ranges, counts requests in flight so that the graph below can be drained
    and changed, and turns write-through mode into FUA. Made by :meth:`Graph.attach`. Callers must not pass negative
    offsets to reads and writes.

    Every request runs between ``_begin`` and ``_end``, which count it; ``hold`` and ``release`` do the same for work
    that is no request. ``quiesce`` lets nothing new begin until ``resume``; ``wait_idle`` waits until the count is 0.
    """

    def __init__(self, graph: Graph, name: str, *, write_cache: bool = True) -> None:
        self.graph = graph
        self.name = name
        self.write_cache = write_cache
        """False: each write is on stable storage when it is answered."""
        self.accounting = Accounting()
        self.on_resize: list[Callable[[int], None]] = []
        self.root: Child | None = None
        self.in_flight = 0
        self.quiesced = 0
        """The number of callers of ``quiesce``; while it is not 0, no new request starts."""
        self.immediate = Immediate(self)
        """The short way for requests that need not wait."""
        self._draining: list[Node] = []
        """The nodes that were told of a drain, which may not be those that are below when it ends."""
        self._resume: trio.Event | None = None
        self._idle: trio.Event | None = None
        self._tries_off = 0
        """The number of writes that still skip the attempt to write without a task."""
        self._failed_tries = 0
        """How many skipped it after the last failed attempt."""

    @property
    def node(self) -> Node:
        """The root node; raises NoMediumError once closed."""
        if self.root is None:
            raise NoMediumError(f"'{self.name}' is closed.")
        return self.root.node

    @property
    def length(self) -> int:
        """Virtual length in bytes."""
        return self.node.length

    @property
    def writable(self) -> bool:
        """Whether writes are possible."""
        return self.root is not None and bool(self.root.perm & permissions.WRITE)

    def warn_of_writing(self, way: str) -> None:
        """If the first write to the disk has an extra cost, log the cost and the ``way`` to avoid it."""
        cost = self.node.driver.cost_of_writing() if self.writable else None
        if cost is not None:
            log.warning("%s; %s.", cost, way)

    # --- requests ---------------------------------------------------------------------------------------

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``. Raises OutOfRangeError past the end."""
        length = len(buffer)
        if self.immediate.read(offset, buffer):
            return
        node = await self._begin(offset, length)
        try:
            await io.read(node, offset, buffer)
        except BaseException:
            self.accounting.failed += 1
            raise
        finally:
            self._end()
        self.accounting.reads += 1
        self.accounting.bytes_read += length

    async def read(self, offset: int, length: int) -> bytearray:
        """Return ``length`` bytes from ``offset``. Raises OutOfRangeError past the end."""
        if length > self.length - offset or length < 0:
            self.refuse(offset, length)
        buffer = _buffer(length)
        await self.read_into(offset, memoryview(buffer))
        return buffer

    async def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write all of ``data``; with ``fua`` also to stable storage. Raises OutOfRangeError past the end."""
        buffer = memoryview(data).cast("B")
        if not fua and self.immediate.write(offset, buffer):
            return
        node = await self._begin(offset, len(buffer))
        try:
            await io.write(node, offset, (buffer,), 0 if self.write_cache and not fua else FUA)
        except BaseException:
            self.accounting.failed += 1
            raise
        finally:
            self._end()
        self.accounting.writes += 1
        self.accounting.bytes_written += len(buffer)

    def write_now(self, offset: int, buffer: memoryview) -> bool:
        """Write if that is possible without waiting. False: a part may be written, so the caller must write all of it
        again."""
        if self.immediate.write(offset, buffer):
            return True
        if self._tries_off:
            self._tries_off -= 1
            return False
        root, length = self.root, len(buffer)
        if root is None or self.quiesced or offset + length > root.node.length or not self.immediate.takes_writes():
            return False
        try:
            run_at_once(io.write(root.node, offset, (buffer,)))
        except WouldWait:
            # An attempt in vain is not free: the clusters that it allocated must be filled up when they are used again.
            self._tries_off = self._failed_tries = min(2 * self._failed_tries + 1, _MOST_TRIES_OFF)
            return False
        except BaseException:
            self.accounting.failed += 1
            raise
        self._failed_tries = 0
        self.accounting.writes += 1
        self.accounting.bytes_written += length
        return True

    async def write_compressed(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write whole clusters (or up to the disk's end), compressed. Raises NotSupportedError if the format or the
        image does not support that, OutOfRangeError for parts of clusters."""
        buffer = memoryview(data).cast("B")
        node = await self._begin(offset, len(buffer))
        try:
            await io.write(node, offset, (buffer,), COMPRESSED | (0 if self.write_cache else FUA))
        except BaseException:
            self.accounting.failed += 1
            raise
        finally:
            self._end()
        self.accounting.writes += 1
        self.accounting.bytes_written += len(buffer)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """Make a range read as zeroes; ``may_unmap`` allows to free its space."""
        node = await self._begin(offset, length)
        try:
            await io.write_zeroes(
                node,
                offset,
                length,
                (MAY_UNMAP if may_unmap else 0) | (0 if self.write_cache else FUA),
            )
        except BaseException:
            self.accounting.failed += 1
            raise
        finally:
            self._end()
        self.accounting.zeroes += 1

    async def discard(self, offset: int, length: int) -> None:
        """Give up the content of a range: afterwards it reads as before or as zeroes."""
        node = await self._begin(offset, length)
        try:
            await io.discard(node, offset, length)
        except BaseException:
            self.accounting.failed += 1
            raise
        finally:
            self._end()
        self.accounting.discards += 1

    async def preallocate(self, offset: int, length: int) -> None:
        """Reserve host space for a range, which reads as before."""
        node = await self._begin(offset, length)
        try:
            await io.preallocate(node, offset, length)
        except BaseException:
            self.accounting.failed += 1
            raise
        finally:
            self._end()

    async def write_back(self) -> None:
        """Make the drivers write their caches to the OS, so that less is lost if the process dies."""
        await self._run(_write_back)

    def written_outside(self) -> None:
        """Note that the host file of a plain node may have been written from outside: something may need a flush, and
        the length may have grown."""
        node = self.node
        descriptor = node.driver.host_descriptor()
        length = os.fstat(descriptor).st_size if descriptor is not None else 0
        longer = length > node.length
        while True:
            node.written += 1
            node.take_length(max(node.length, length))
            storage = node.storage
            if storage is None:
                break
            node = storage.node
        if longer:
            self.node.resized()

    async def require_keys(self) -> None:
        """Raise PassphraseError now, not at the first request, if the key of an encrypted node is missing or wrong."""
        nodes = [self.node]
        for node in nodes:
            await node.driver.require_key()
            nodes += [child.node for child in node.children.values() if child.node not in nodes]

    async def flush(self) -> None:
        """Put every write that was answered before this call on stable storage."""
        node = await self._begin(0, 0)
        try:
            await io.flush(node)
        except BaseException:
            self.accounting.failed += 1
            raise
        finally:
            self._end()
        self.accounting.flushes += 1

    async def truncate(self, length: int, preallocation: str = "off") -> None:
        """Resize the disk."""
        node = await self._begin(0, 0)
        try:
            await io.truncate(node, length, preallocation)
        except BaseException:
            self.accounting.failed += 1
            raise
        finally:
            self._end()

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Return the status of a prefix of the range, through the whole chain."""
        node = await self._begin(offset, length)
        try:
            async with status.tracked(node, offset, length):
                if offset + length > node.length:  # it has become shorter meanwhile
                    self.refuse(offset, length)
                return await status.chain_status(node, offset, length)
        finally:
            self._end()

    # --- internal snapshots -----------------------------------------------------------------------------

    def list_snapshots(self) -> list[SnapshotInfo]:
        """Return the snapshots in the disk's image."""
        return snapshot.list_snapshots(self.node)

    async def create_snapshot(self, wanted: SnapshotInfo, progress: Progress = no_progress) -> SnapshotInfo:
        """Make a snapshot of the disk as it is now; new requests wait meanwhile. An empty id means: choose one."""
        return await self._run(lambda node: snapshot.create_snapshot(node, wanted, progress))

    async def apply_snapshot(self, id: str, progress: Progress = no_progress) -> None:
        """Restore the disk's content from a snapshot; the length may change."""
        await self._run(lambda node: snapshot.apply_snapshot(node, id, progress))

    async def delete_snapshot(self, id: str, progress: Progress = no_progress) -> None:
        """Delete a snapshot."""
        await self._run(lambda node: snapshot.delete_snapshot(node, id, progress))

    async def save_vmstate(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write to the VM state that goes into the next snapshot."""
        await self._run(lambda node: snapshot.save_vmstate(node, offset, memoryview(data).cast("B")))

    async def load_vmstate(self, offset: int, length: int) -> bytearray:
        """Read from the VM state that belongs to the disk's content; zeroes if there is none."""
        snapshot.check_vmstate_range(offset, length)
        buffer = _buffer(length)
        await self._run(lambda node: snapshot.load_vmstate(node, offset, memoryview(buffer)))
        return buffer

    async def _run(self, request: Callable[[Node], Awaitable[_Result]]) -> _Result:
        """Run something that needs no byte range but must be counted as in flight."""
        node = await self._begin(0, 0)
        try:
            return await request(node)
        except BaseException:
            self.accounting.failed += 1
            raise
        finally:
            self._end()

    async def close(self) -> None:
        """Flush, detach from the root node, and close the nodes that are unused then."""
        await self.graph.detach(self)

    # --- counting and quiescing -------------------------------------------------------------------------

    async def _begin(self, offset: int, length: int) -> Node:
        """Count a request in and return the root node. Waits while quiesced. Raises OutOfRangeError, NoMediumError."""
        while self.quiesced:
            if self._resume is None:
                self._resume = trio.Event()
            await self._resume.wait()
        root = self.root
        if root is None:
            raise NoMediumError(f"'{self.name}' is closed.")
        if offset < 0 or length < 0 or offset + length > root.node.length:
            self.refuse(offset, length)
        self.in_flight += 1
        return root.node

    def _end(self) -> None:
        self.in_flight -= 1
        if self._idle is not None and not self.in_flight:
            self._idle.set()

    def refuse(self, offset: int, length: int) -> NoReturn:
        """Raise OutOfRangeError for a range that is not on the disk. Never returns."""
        if offset < 0 or length < 0:
            raise OutOfRangeError(
                f"a request for {length} bytes at {offset} of '{self.name}': neither number may be negative."
            )
        raise OutOfRangeError(
            f"'{self.name}' is {self.length} bytes long, a request for {length} bytes at {offset} goes past its end."
        )

    def hold(self) -> None:
        """Count some work as a request in flight until ``release``. Not allowed while quiesced."""
        self.in_flight += 1

    def release(self) -> None:
        """Undo one ``hold``."""
        self._end()

    def quiesce(self) -> None:
        """Start no new request until ``resume``, and have drivers let go of those held back; may be nested."""
        self.quiesced += 1
        if self.quiesced == 1 and self.root is not None:
            self._draining = self.root.node.with_all_below()
            for node in self._draining:
                node.begin_drain()

    async def wait_idle(self) -> None:
        """Wait until no request is in flight. Never call it from inside a request of this backend."""
        while self.in_flight:
            if self._idle is None or self._idle.is_set():
                self._idle = trio.Event()
            await self._idle.wait()

    async def last_flush(self) -> None:
        """Flush although quiesced, before the backend detaches. Counted, so that the graph cannot change meanwhile."""
        self.in_flight += 1
        try:
            await io.flush(self.node)
        finally:
            self._end()

    def resume(self) -> None:
        """Undo one ``quiesce``."""
        self.quiesced -= 1
        if not self.quiesced:
            for node in self._draining:
                node.end_drain()
            self._draining = []
        if not self.quiesced and self._resume is not None:
            self._resume.set()
            self._resume = None

    def notify_resize(self) -> None:
        """Tell the user about the new length."""
        for callback in self.on_resize:
            callback(self.length)


def _buffer(length: int) -> bytearray:
    """Return memory for a request. Raises HostError if there is not enough."""
    try:
        return bytearray(length)
    except MemoryError as exc:
        raise HostError(
            f"{length} bytes do not fit into memory at once, read them in smaller pieces.", errno=errno.ENOMEM
        ) from exc


async def _write_back(node: Node) -> None:
    if node.config.read_only:
        return
    await node.driver.flush_to_os()
    for child in list(node.children.values()):
        if child.role is not Role.BACKING:
            await _write_back(child.node)
