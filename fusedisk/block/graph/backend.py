"""A user of a graph: the root edge, where every request in the system starts."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar, cast

import trio

from fusedisk.block.model import permissions
from fusedisk.block.model.children import Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.extent import BlockStatus
from fusedisk.block.model.flags import COMPRESSED, FUA, MAY_UNMAP
from fusedisk.block.model.node import OBSERVE
from fusedisk.block.model.observer import Change
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request import io, snapshot, space, status
from fusedisk.block.request.accounting import Accounting, Kind
from fusedisk.block.request.attempts import Attempts
from fusedisk.block.request.immediate import Immediate
from fusedisk.block.request.policies import Decision, ErrorPolicy, OnDone, Throttle
from fusedisk.core.at_once import WouldWait, run_at_once
from fusedisk.core.errors import FusediskError, HostError, NoMediumError, OperationBlockedError, OutOfRangeError
from fusedisk.core.locks import Signal
from fusedisk.core.progress import no_progress
from fusedisk.core.zeroes import zero_fill

if TYPE_CHECKING:
    from fusedisk.block.graph.graph import Graph
    from fusedisk.block.model.node import Node
    from fusedisk.core.progress import Progress

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_READ, _WRITE, _OTHER = Kind.READ, Kind.WRITE, Kind.OTHER
"""A global is found faster than a member of an enum."""
PASSED_THROUGH = "the kernel accesses its host file directly while its file is open"
_NEEDS_REQUESTS = ("replace", OBSERVE)
"""Operations that make no sense on a node whose requests bypass this process."""


class Backend:
    """A block device as its user sees it: an export, a job, the library.

    Holds permissions on its root node, checks ranges, counts requests in flight so that the graph below can be drained
    and changed, and turns write-through mode into FUA. Made by :meth:`Graph.attach`. Callers must not pass negative
    offsets to reads and writes.

    Every request is run by :meth:`run`, unless a short way answers it. It is *parked* while a throttle or an error
    policy holds it back and while the backend is quiesced, and *in flight* from then to its end::

        run -> parked -> in flight -> answered
                 ^           |
                 +- stopped -+   by the error policy, until ``retry_stopped``

    Only what is in flight keeps the graph from changing: ``quiesce`` lets nothing more get there until ``resume``, and
    ``wait_idle`` waits for the rest. Parked requests then go to the new root node, or fail once the backend is closed.
    ``hold`` and ``release`` count work that is no request.
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
        self.drain_count = 0
        """The number of callers of ``quiesce``; while it is not 0, no new request starts."""
        self._throttle: Throttle | None = None
        self._on_error: ErrorPolicy | None = None
        self._on_done: OnDone | None = None
        self.immediate = Immediate(self)
        """The short way for requests that need not wait."""
        self._draining: list[Node] = []
        """The nodes that were told of a drain, which may not be those that are below when it ends."""
        self._resumed = Signal()
        self._idle = Signal()
        self._retry = Signal()
        self._parked: set[trio.CancelScope] = set()
        self._passed: list[list[Node]] = []
        """The nodes that requests go past, once for each ``begin_passthrough``."""
        self._attempts = Attempts()
        """Of writes through the door without a task."""

    @property
    def node(self) -> Node:
        """The root node; raises NoMediumError once closed."""
        if self.root is None:
            raise self._closed()
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
        if self.immediate.read(offset, buffer):
            return
        if self._on_error is not None:
            zero_fill(buffer)  # an ignored error must not show what the memory held before
        await self.run(_READ, offset, len(buffer), io.read, offset, buffer)

    async def read(self, offset: int, length: int) -> bytearray:
        """Return ``length`` bytes from ``offset``. Raises OutOfRangeError past the end."""
        if length > self.length - offset or length < 0:
            raise self.out_of_range(offset, length)
        buffer = _buffer(length)
        await self.read_into(offset, memoryview(buffer))
        return buffer

    async def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """Write all of ``data``; with ``fua`` also to stable storage. Raises OutOfRangeError past the end."""
        buffer = memoryview(data).cast("B")
        if not fua and self.immediate.write(offset, buffer):
            return
        flags = FUA if fua else self._fua
        await self.run(_WRITE, offset, len(buffer), io.write, offset, (buffer,), flags)

    def write_now(self, offset: int, buffer: memoryview) -> bool:
        """Write if that is possible without waiting. False: a part may be written, so the caller must write all of it
        again."""
        if self.immediate.write(offset, buffer):
            return True
        root, length = self.root, len(buffer)
        if root is None or self.drain_count or offset + length > root.node.length or not self.immediate.ways().at_once:
            return False
        if self._attempts.skipped():
            return False
        try:
            run_at_once(io.write(root.node, offset, (buffer,)))
        except WouldWait:
            self._attempts.failed()
            return False
        except BaseException:
            self.accounting.failed += 1
            raise
        self._attempts.backoff = 0
        self.accounting.done(_WRITE, length)
        return True

    async def write_compressed(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write whole clusters (or up to the disk's end), compressed. Raises NotSupportedError if the format or the
        image does not support that, OutOfRangeError for parts of clusters."""
        buffer = memoryview(data).cast("B")
        await self.run(Kind.WRITE, offset, len(buffer), io.write, offset, (buffer,), COMPRESSED | self._fua)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = False) -> None:
        """Make a range read as zeroes; ``may_unmap`` allows to free its space."""
        flags = (MAY_UNMAP if may_unmap else 0) | self._fua
        await self.run(Kind.ZEROES, offset, length, io.write_zeroes, offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        """Give up the content of a range: afterwards it reads as before or as zeroes."""
        await self.run(Kind.DISCARD, offset, length, space.discard, offset, length)

    async def preallocate(self, offset: int, length: int) -> None:
        """Reserve host space for a range, which reads as before."""
        await self.run(Kind.OTHER, offset, length, space.preallocate, offset, length)

    async def write_back(self) -> None:
        """Make the drivers write their caches to the OS, so that less is lost if the process dies."""
        await self.run(Kind.OTHER, 0, 0, _write_back)

    async def flush(self) -> None:
        """Put every write that was answered before this call on stable storage."""
        await self.run(Kind.FLUSH, 0, 0, io.flush)

    async def truncate(self, length: int, preallocation: str = "off") -> None:
        """Resize the disk."""
        await self.run(Kind.OTHER, 0, 0, space.truncate, length, preallocation)

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Return the status of a prefix of the range, through the whole chain."""
        return await self.run(Kind.OTHER, offset, length, self._block_status, offset, length)

    async def _block_status(self, node: Node, offset: int, length: int) -> BlockStatus:
        async with status.tracked(node, offset, length):
            if offset + length > node.length:  # it has become shorter meanwhile
                raise self.out_of_range(offset, length)
            return await status.chain_status(node, offset, length)

    async def require_keys(self) -> None:
        """Raise PassphraseError now, not at the first request, if the key of an encrypted node is missing or wrong."""
        for node in self.node.with_all_below():
            await node.driver.require_key()

    @property
    def _fua(self) -> int:
        return 0 if self.write_cache else FUA

    # --- internal snapshots -----------------------------------------------------------------------------

    def list_snapshots(self) -> list[SnapshotInfo]:
        """Return the snapshots in the disk's image."""
        return snapshot.list_snapshots(self.node)

    async def create_snapshot(self, wanted: SnapshotInfo, progress: Progress = no_progress) -> SnapshotInfo:
        """Make a snapshot of the disk as it is now; new requests wait meanwhile. An empty id means: choose one."""
        return await self.run(Kind.OTHER, 0, 0, snapshot.create_snapshot, wanted, progress)

    async def apply_snapshot(self, id: str, progress: Progress = no_progress) -> None:
        """Restore the disk's content from a snapshot; the length may change."""
        await self.run(Kind.OTHER, 0, 0, snapshot.apply_snapshot, id, progress)

    async def delete_snapshot(self, id: str, progress: Progress = no_progress) -> None:
        """Delete a snapshot."""
        await self.run(Kind.OTHER, 0, 0, snapshot.delete_snapshot, id, progress)

    async def save_vmstate(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write to the VM state that goes into the next snapshot."""
        await self.run(Kind.OTHER, 0, 0, snapshot.save_vmstate, offset, memoryview(data).cast("B"))

    async def load_vmstate(self, offset: int, length: int) -> bytearray:
        """Read from the VM state that belongs to the disk's content; zeroes if there is none."""
        snapshot.check_vmstate_range(offset, length)
        buffer = _buffer(length)
        await self.run(Kind.OTHER, 0, 0, snapshot.load_vmstate, offset, memoryview(buffer))
        return buffer

    async def close(self) -> None:
        """Flush, detach from the root node, and close the nodes that are unused then."""
        await self.graph.detach(self)

    # --- the runner -------------------------------------------------------------------------------------

    async def run(
        self, kind: Kind, offset: int, length: int, request: Callable[..., Awaitable[_Result]], *args: Any
    ) -> _Result:
        """Run ``request(root node, *args)`` over a range and return its result, as for every request of this backend:
        check the range, throttle, run, ask the error policy, count.

        Raises OutOfRangeError for a range that is not on the disk, NoMediumError once closed, and what the request
        raises, unless the error policy decides otherwise.
        """
        on_done = self._on_done
        began = perf_counter() if on_done is not None else 0.0
        throttle = self._throttle if kind is not _OTHER else None
        while True:
            while self.drain_count:
                await self._resumed.wait()
            root = self.root
            if root is None:
                raise self._closed()
            if offset < 0 or length < 0 or offset + length > root.node.length:
                raise self.out_of_range(offset, length)
            if throttle is not None:
                await self._park(partial(throttle.admit, kind, length))
                throttle = None
                continue  # the disk may have changed meanwhile
            self.in_flight += 1
            try:
                result = await request(root.node, *args)
                break
            except FusediskError as exc:
                self.accounting.failed += 1
                if self._on_error is None or kind is _OTHER:
                    raise
                failure = exc
            except BaseException:
                self.accounting.failed += 1
                raise
            finally:
                self._end()
            decision = self._on_error.decide(kind, offset, length, failure)
            if decision is Decision.REPORT:
                raise failure
            if decision is Decision.IGNORE:
                result = cast(_Result, None)  # requests of the kinds that policies see have no result
                break
            await self._park(self._retry.wait)
        self.accounting.done(kind, length)
        if on_done is not None:
            on_done(kind, length, perf_counter() - began)
        return result

    async def _park(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Wait without being in flight, so that the graph can change meanwhile. Raises NoMediumError when the backend
        is closed."""
        with trio.CancelScope() as scope:
            self._parked.add(scope)
            try:
                await wait()
            finally:
                self._parked.remove(scope)
        if scope.cancelled_caught:
            raise self._closed()

    def retry_stopped(self) -> None:
        """Make all requests again that the error policy has stopped."""
        self._retry.notify()

    def _end(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.notify()

    def out_of_range(self, offset: int, length: int) -> OutOfRangeError:
        """Return the error for a range that is not on the disk."""
        if offset < 0 or length < 0:
            return OutOfRangeError(
                f"a request for {length} bytes at {offset} of '{self.name}': neither number may be negative."
            )
        return OutOfRangeError(
            f"'{self.name}' is {self.length} bytes long, a request for {length} bytes at {offset} goes past its end."
        )

    def _closed(self) -> NoMediumError:
        return NoMediumError(f"'{self.name}' is closed.")

    # --- policies ---------------------------------------------------------------------------------------
    #
    # Each is None by default. One that is set needs to see every request, so the short ways are closed. Raises
    # OperationBlockedError while the kernel accesses the host file directly.

    @property
    def throttle(self) -> Throttle | None:
        """Delays requests."""
        return self._throttle

    @throttle.setter
    def throttle(self, throttle: Throttle | None) -> None:
        self._change_policies(throttle)
        self._throttle = throttle

    @property
    def on_error(self) -> ErrorPolicy | None:
        """Decides what becomes of failed requests."""
        return self._on_error

    @on_error.setter
    def on_error(self, policy: ErrorPolicy | None) -> None:
        self._change_policies(policy)
        self._on_error = policy

    @property
    def on_done(self) -> OnDone | None:
        """Learns how long each answered request took, waiting included."""
        return self._on_done

    @on_done.setter
    def on_done(self, on_done: OnDone | None) -> None:
        self._change_policies(on_done)
        self._on_done = on_done

    def _change_policies(self, policy: object | None) -> None:
        if policy is not None and self._passed:
            raise OperationBlockedError(f"'{self.name}' cannot get a policy for its requests now: {PASSED_THROUGH}.")
        self.graph.changes += 1

    # --- direct access to the host file -----------------------------------------------------------------

    def begin_passthrough(self) -> None:
        """Note that requests bypass this process from now on: nothing may be put between, and nothing is seen. Allowed
        if ``immediate.ways().passthrough``."""
        self._passed.append(self.node.with_all_below())
        for node in self._passed[-1]:
            for operation in _NEEDS_REQUESTS:
                node.block_operation(operation, PASSED_THROUGH)

    def end_passthrough(self) -> None:
        """Undo one ``begin_passthrough``."""
        for node in self._passed.pop():
            for operation in _NEEDS_REQUESTS:
                node.unblock_operation(operation, PASSED_THROUGH)

    def note_external_write(self) -> None:
        """Note that the host file of a plain node may have been written from outside: something may need a flush, and
        the length may have grown."""
        node = self.node
        descriptor = node.driver.host_descriptor()
        length = os.fstat(descriptor).st_size if descriptor is not None else 0
        longer = length > node.length
        while True:
            node.take_length(max(node.length, length))
            node.changed(0, node.length, Change.OUTSIDE)
            storage = node.storage
            if storage is None:
                break
            node = storage.node
        if longer:
            self.node.resized()

    # --- draining ---------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Count some work as a request in flight until ``release``. Not allowed in a drained section."""
        self.in_flight += 1

    def release(self) -> None:
        """Undo one ``hold``."""
        self._end()

    def quiesce(self) -> None:
        """Start no new request until ``resume``, and have drivers let go of those held back; may be nested."""
        self.drain_count += 1
        if self.drain_count == 1 and self.root is not None:
            self._draining = self.root.node.with_all_below()
            for node in self._draining:
                node.begin_drain()

    async def wait_idle(self) -> None:
        """Wait until no request is in flight. Never call it from inside a request of this backend."""
        while self.in_flight:
            await self._idle.wait()

    async def last_flush(self) -> None:
        """Flush although quiesced, before the backend detaches. Counted, so that the graph cannot change meanwhile."""
        self.in_flight += 1
        try:
            await io.flush(self.node)
        finally:
            self._end()

    def resume(self) -> None:
        """Undo one ``quiesce``. Once the backend is closed, end all parked requests, too."""
        self.drain_count -= 1
        if not self.drain_count:
            for node in self._draining:
                node.end_drain()
            self._draining = []
            self._resumed.notify()
        if self.root is None:
            for scope in self._parked:
                scope.cancel()

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
