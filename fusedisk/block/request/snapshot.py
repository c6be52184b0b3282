"""Internal snapshots of a node: the door for making, applying and deleting them. Filters pass them to what is below.

A snapshot lies between requests: it holds every write answered before, and none that comes later.

* Making and deleting one let other requests go on: reads, and whatever changes the disk's data. The format follows
  these changes. Only for the moment when the file comes to lead to the snapshot, or no longer, changes are held back;
  a new snapshot holds what was written before that moment.
* Applying one waits for every request in flight on the node, and holds back all later ones but plain reads. For the
  moment when the disk changes, these wait too.

What needs the node alone, such as shrinking the disk or another snapshot, waits for the end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from fusedisk.block.model import permissions
from fusedisk.block.model.node import Node
from fusedisk.block.model.observer import Change
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.model.tracked import Request
from fusedisk.block.request import checks
from fusedisk.core.errors import FusediskError, OutOfRangeError, PermissionConflictError, SnapshotNotFoundError
from fusedisk.core.progress import Progress, no_progress

_MAX_VMSTATE = 1 << 56
"""Bytes; more than any format can hold."""


def find_snapshot(snapshots: Sequence[SnapshotInfo], id_or_name: str, filename: str) -> SnapshotInfo:
    """Return the first snapshot with that id, else the first with that name. Raises SnapshotNotFoundError."""
    by_id = (found for found in snapshots if found.id == id_or_name)
    by_name = (found for found in snapshots if found.name == id_or_name)
    found = next(by_id, None) or next(by_name, None)
    if found is None:
        raise SnapshotNotFoundError(f"'{filename}' has no snapshot with the id or name '{id_or_name}'.")
    return found


def find_snapshot_by(
    snapshots: Sequence[SnapshotInfo], filename: str, *, id: str | None = None, name: str | None = None
) -> SnapshotInfo:
    """Return the first snapshot with that id and that name, whichever are given. Raises SnapshotNotFoundError."""
    for found in snapshots:
        if id in (None, found.id) and name in (None, found.name) and (id, name) != (None, None):
            return found
    wanted = " and ".join(f"the {key} '{value}'" for key, value in (("id", id), ("name", name)) if value is not None)
    raise SnapshotNotFoundError(f"'{filename}' has no snapshot with {wanted or 'no id and no name'}.")


def list_snapshots(node: Node) -> list[SnapshotInfo]:
    """Return the snapshots in the order of the image's table."""
    return node.unfiltered.driver.list_snapshots()


async def create_snapshot(node: Node, snapshot: SnapshotInfo, progress: Progress = no_progress) -> SnapshotInfo:
    """Make a snapshot of the disk as it is now, see :meth:`fusedisk.block.model.driver.Driver.create_snapshot`."""
    node = node.unfiltered
    async with alone(node, "snapshot", beside_changes=True) as request:
        return await node.driver.create_snapshot(snapshot, progress, partial(_no_changes, node, request))


async def apply_snapshot(node: Node, id: str, progress: Progress = no_progress) -> None:
    """Restore the disk's content and length from a snapshot."""
    node = node.unfiltered
    changed = node.with_filters_above()
    async with alone(node, "snapshot") as request:
        request.let_pass(changes=False)
        old = node.length
        size = next((found.disk_size for found in node.driver.list_snapshots() if found.id == id), old)
        if size != old:
            node.check_operation("resize")
            if not node.perm & permissions.RESIZE:
                raise PermissionConflictError(f"No user of node '{node.name}' has asked for the resize permission.")
        end = max(old, size)
        for each in reversed(changed):
            await each.before_change(0, end, Change.SNAPSHOT)
        try:
            await node.driver.apply_snapshot(id, progress, partial(_no_reads, node, request))
        finally:
            for each in changed:
                each.changed(0, max(end, node.length), Change.SNAPSHOT)
    if node.length != old:
        node.resized()


@asynccontextmanager
async def _no_reads(node: Node, request: Request) -> AsyncIterator[None]:
    """Hold back reads while the disk and its length change."""
    await request.hold_back(node, reads=True)
    try:
        yield
    finally:
        node.take_length(await node.driver.length())
        node.change_mapping()
        request.let_pass(changes=False)


@asynccontextmanager
async def _no_changes(node: Node, request: Request) -> AsyncIterator[None]:
    """Hold back changes of the disk. Afterwards its mapping may be another."""
    await request.hold_back(node, reads=False)
    try:
        yield
    finally:
        node.change_mapping()
        request.let_pass(changes=True)


async def delete_snapshot(node: Node, id: str, progress: Progress = no_progress) -> None:
    """Delete a snapshot and free the space that only it used."""
    node = node.unfiltered
    async with alone(node, "snapshot", beside_changes=True) as request:
        await node.driver.delete_snapshot(id, progress, partial(_no_changes, node, request))


async def save_vmstate(node: Node, offset: int, data: memoryview) -> None:
    """Write to the VM state that goes into the next snapshot."""
    check_vmstate_range(offset, len(data))
    node = node.unfiltered
    async with alone(node, "save-vmstate"):
        await node.driver.save_vmstate(offset, data)


async def load_vmstate(node: Node, offset: int, buffer: memoryview) -> None:
    """Read from the VM state that belongs to the disk's content; zeroes if there is none."""
    check_vmstate_range(offset, len(buffer))
    node = node.unfiltered
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
    """Raise OutOfRangeError for a range that no VM state can have."""
    if offset < 0 or length < 0 or offset + length > _MAX_VMSTATE:
        raise OutOfRangeError(f"VM state cannot have {length} bytes at {offset}: expected 0 to 2^56.")


@asynccontextmanager
async def alone(node: Node, operation: str, *, beside_changes: bool = False) -> AsyncIterator[Request]:
    """Run the block with no other request in flight on the node, shielded from cancellation; with ``beside_changes``
    only with no other one that runs alone. The block may let some pass its request. Raises an error if the node is not
    writable."""
    checks.check_writable(node)
    node.check_operation(operation)
    request = Request.of_all()
    if beside_changes:
        request.let_pass(changes=True)
    request.enter(node)
    try:
        await request.wait_for_earlier(node)
        with trio.CancelScope(shield=True):
            yield request
    except FusediskError as exc:
        exc.at(node.name, operation)
        raise
    finally:
        # A failure half-way may have written something and changed the mapping, too.
        node.changed(0, 0, Change.STORAGE)
        node.change_mapping()
        request.leave(node)
