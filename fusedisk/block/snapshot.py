"""Internal snapshots of a node: what there is to say about one, and the door for making, applying and deleting them.

A snapshot stands between requests: what was answered before is in it, what comes later is not. So these operations wait
for every request in flight on the node, and hold back all that come after them. Plain reads go on meanwhile, as they
find the same before and after; only while a snapshot is applied they wait for the moment when the disk changes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from fusedisk.block import io, permissions
from fusedisk.block.node import Node
from fusedisk.block.tracked import Request
from fusedisk.core.errors import FusediskError, OutOfRangeError, PermissionConflictError, SnapshotNotFoundError

if TYPE_CHECKING:
    from fusedisk.block.check import Progress

_MAX_VMSTATE = 1 << 56
"""Bytes; more than any format can hold."""


class SnapshotInfo(NamedTuple):
    """One internal snapshot."""

    id: str
    """Unique in the image. In ids and names, what is no UTF-8 stands as surrogates, as in file names."""
    name: str
    """Need not be unique."""
    date: int
    """When it was made: nanoseconds since 1970 (UTC)."""
    vm_clock: int = 0
    """Nanoseconds that the guest had run."""
    vm_state_size: int = 0
    """Bytes; 0 where it holds the disk only."""
    disk_size: int = 0
    """Bytes."""
    icount: int | None = None
    """Instructions that the guest had executed, where somebody counted."""

    def information(self) -> dict[str, Any]:
        """As ``qemu-img info --output=json`` prints it."""
        information = {
            "vm-clock-nsec": self.vm_clock % 10**9,
            "name": _as_text(self.name),
            "date-sec": self.date // 10**9,
            "date-nsec": self.date % 10**9,
            "vm-clock-sec": self.vm_clock // 10**9,
            "id": _as_text(self.id),
            "vm-state-size": self.vm_state_size,
        }
        return information if self.icount is None else {"icount": self.icount} | information


def _as_text(name: str) -> str:
    """A name that may hold any bytes, as a text that any program can read."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def find_snapshot(snapshots: Sequence[SnapshotInfo], id_or_name: str, filename: str) -> SnapshotInfo:
    """The first snapshot of that id, else the first of that name. Raises SnapshotNotFoundError."""
    by_id = (found for found in snapshots if found.id == id_or_name)
    by_name = (found for found in snapshots if found.name == id_or_name)
    found = next(by_id, None) or next(by_name, None)
    if found is None:
        raise SnapshotNotFoundError(f"'{filename}' has no snapshot with the id or name '{id_or_name}'.")
    return found


def find_snapshot_by(
    snapshots: Sequence[SnapshotInfo], filename: str, *, id: str | None = None, name: str | None = None
) -> SnapshotInfo:
    """The first snapshot of that id and that name, as far as they are given. Raises SnapshotNotFoundError."""
    for found in snapshots:
        if id in (None, found.id) and name in (None, found.name) and (id, name) != (None, None):
            return found
    wanted = " and ".join(f"the {key} '{value}'" for key, value in (("id", id), ("name", name)) if value is not None)
    raise SnapshotNotFoundError(f"'{filename}' has no snapshot with {wanted or 'no id and no name'}.")


def no_progress(done: int, total: int) -> None:
    """For those who do not want to know."""


def snapshot_node(node: Node) -> Node:
    """The node that keeps the snapshots of the disk: ``node``, or what the filters over it stand on."""
    while node.driver.is_filter:
        node = node.children["file"].node
    return node


def _filters_over(node: Node) -> Iterator[Node]:
    """The filters from ``node`` down to the one that stands on its :func:`snapshot_node`."""
    while node.driver.is_filter:
        yield node
        node = node.children["file"].node


def list_snapshots(node: Node) -> list[SnapshotInfo]:
    """The snapshots in the order of the image's table."""
    return snapshot_node(node).driver.list_snapshots()


async def create_snapshot(node: Node, snapshot: SnapshotInfo, progress: Progress = no_progress) -> SnapshotInfo:
    """Keep what the disk holds now, see :meth:`fusedisk.block.driver.Driver.create_snapshot`."""
    node = snapshot_node(node)
    async with alone(node, "snapshot", lets_reads=True):
        return await node.driver.create_snapshot(snapshot, progress)


async def apply_snapshot(node: Node, id: str, progress: Progress = no_progress) -> None:
    """Let the disk hold what it held when the snapshot was made, its length included."""
    filters = list(_filters_over(node))
    node = snapshot_node(node)
    old = node.length
    async with alone(node, "snapshot", lets_reads=True) as request:
        size = next((found.disk_size for found in node.driver.list_snapshots() if found.id == id), old)
        if size != old:
            node.check_operation("resize")
            if not node.perm & permissions.RESIZE:
                raise PermissionConflictError(f"No user of node '{node.name}' has asked for the resize permission.")
        await node.driver.apply_snapshot(id, progress, partial(_no_reads, node, request))
    if node.length != old:
        for changed in (node, *reversed(filters)):
            changed.length = await changed.driver.length()
            changed.change_mapping()
            changed.graph.resized(changed)


@asynccontextmanager
async def _no_reads(node: Node, request: Request) -> AsyncIterator[None]:
    """Nobody reads, so that the disk may change, its length included."""
    await request.wait_for_reads(node)
    try:
        yield
    finally:
        node.length = await node.driver.length()
        node.change_mapping()
        request.let_reads_pass()


async def delete_snapshot(node: Node, id: str, progress: Progress = no_progress) -> None:
    """Forget a snapshot, and give back the space that it alone had used."""
    node = snapshot_node(node)
    async with alone(node, "snapshot", lets_reads=True):
        await node.driver.delete_snapshot(id, progress)


async def save_vmstate(node: Node, offset: int, data: memoryview) -> None:
    """Write to the state of a virtual machine that the next snapshot shall hold."""
    check_vmstate_range(offset, len(data))
    node = snapshot_node(node)
    async with alone(node, "save-vmstate"):
        await node.driver.save_vmstate(offset, data)


async def load_vmstate(node: Node, offset: int, buffer: memoryview) -> None:
    """Read from the state of the virtual machine that belongs to what the disk holds; zeroes where there is none."""
    check_vmstate_range(offset, len(buffer))
    node = snapshot_node(node)
    request = Request(0, 1 << 63, False)
    request.enter(node)
    try:
        await request.wait_for_earlier(node)
        await node.driver.load_vmstate(offset, buffer)
    except FusediskError as exc:
        exc.at(node.name, "load-vmstate", offset, len(buffer))
        raise
    finally:
        request.leave(node)


def check_vmstate_range(offset: int, length: int) -> None:
    """Raise OutOfRangeError for what no VM state can have."""
    if offset < 0 or length < 0 or offset + length > _MAX_VMSTATE:
        raise OutOfRangeError(f"VM state has no {length} bytes at {offset}: expected 0 to 2^56.")


@asynccontextmanager
async def alone(node: Node, operation: str, *, lets_reads: bool = False) -> AsyncIterator[Request]:
    """No other request is in flight on the node, which must be writable, but for plain reads that begin later where
    ``lets_reads``; shielded from cancellation."""
    io.check_writable(node)
    node.check_operation(operation)
    request = Request(0, 1 << 63, True, serialising=True)
    request.enter(node)
    try:
        await request.wait_for_earlier(node)
        if lets_reads:
            request.let_reads_pass()
        with trio.CancelScope(shield=True):
            yield request
        node.written += 1
    except FusediskError as exc:
        exc.at(node.name, operation)
        raise
    finally:
        # What failed half-way may have changed it too.
        node.change_mapping()
        request.leave(node)
