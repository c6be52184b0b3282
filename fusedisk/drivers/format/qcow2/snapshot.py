"""Internal snapshots: making, applying and deleting them.

A snapshot is an L1 table of its own.

* Making one adds a reference to everything that the active L1 table leads to. So nothing of it may be overwritten in
  place any longer: its COPIED flags are cleared.
* Applying one adds a reference to everything that the snapshot leads to, and removes one from everything that the
  active table led to.
* Deleting one removes its references. Clusters that only the active table still leads to get their flags again.

Each is one step from an old state to a new one, see :mod:`.snapshot_switch`: a crash leaves one of the two, and an
error changes nothing. Only plain reads are in flight on the node meanwhile, and overwrites of COPIED clusters where a
snapshot is made or deleted (``request/snapshot.py``). They see the old state, in memory too, until the step, and none
that it would disturb is in flight during it: no read when one is applied, no overwrite when one is made or deleted.
The work is done in pieces of :data:`ENTRIES_AT_ONCE` table entries, and other tasks run between.

Source: docs/interop/qcow2.txt, "Snapshots".
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from fusedisk.block.model.driver import HoldBack
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.core.errors import ImageError, NotSupportedError, OptionError
from fusedisk.core.progress import Progress
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.commit import Committer
from fusedisk.drivers.format.qcow2.entries import COPIED, ENTRIES_AT_ONCE, OFFSET_MASK, empty_table
from fusedisk.drivers.format.qcow2.freed import Reason
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.refcount import Refcounts
from fusedisk.drivers.format.qcow2.snapshot_references import L2Table, Ones, rewritten, table_weights
from fusedisk.drivers.format.qcow2.snapshot_switch import NewTable, State, Switch
from fusedisk.drivers.format.qcow2.snapshot_table import Snapshot, encode_snapshots, next_id

MAX_NAME = 255
"""Bytes; QEMU truncates longer names."""


class SnapshotImage(Protocol):
    """The part of the driver that is needed here."""

    image: Image
    refcounts: Refcounts
    committer: Committer
    snapshots: list[Snapshot]

    async def place_snapshots(self) -> None:
        """Tell the overlap checks where the snapshots' tables lie."""


async def read_l1(image: Image, snapshot: Snapshot) -> array[int]:
    """The L1 table of a snapshot, padded to the entries that its disk needs. Raises ImageError if it is invalid."""
    what = f"L1 table of snapshot {snapshot.id}"
    needed = max(snapshot.l1_size, -(-snapshot.disk_size >> image.geometry.span_bits))
    if needed * 8 > layout.MAX_L1_SIZE:
        raise ImageError(
            f"'{image.filename}' has an {what} of {snapshot.l1_size} entries and a disk of {snapshot.disk_size} bytes "
            f"in it, expected at most {layout.MAX_L1_SIZE // 8} entries."
        )
    length = snapshot.l1_size * 8
    if not length:
        return empty_table(needed)
    layout.check_table(
        image.filename,
        what,
        snapshot.l1_table_offset,
        length,
        image.geometry.cluster_size,
        image.storage.node.length,
    )
    table = await image.read_table(snapshot.l1_table_offset, snapshot.l1_size)
    return table + empty_table(needed - snapshot.l1_size)


async def create(
    driver: SnapshotImage, wanted: SnapshotInfo, progress: Progress, no_overwrites: HoldBack
) -> SnapshotInfo:
    """Make a snapshot with the name, date and VM data of ``wanted``, whose id is chosen where it is empty. No
    overwrites run within ``no_overwrites``.

    Raises OptionError for an invalid name or id; ImageError where there are too many snapshots or references.
    """
    header = driver.image.header
    identity = wanted.id.encode("utf-8", "surrogateescape") or next_id(driver.snapshots)
    name = wanted.name.encode("utf-8", "surrogateescape")
    _check_names(driver, identity, name)
    async with _switching(driver) as switch:
        l1 = await _share_active(driver, switch, progress)
        snapshot = Snapshot(
            raw_id=identity,
            raw_name=name,
            l1_table_offset=await switch.new_l1(l1),
            l1_size=len(l1),
            date_seconds=wanted.date // 10**9,
            date_nanoseconds=wanted.date % 10**9,
            vm_clock=wanted.vm_clock,
            vm_state_size=wanted.vm_state_size,
            disk_size=header.size,
            icount=wanted.icount,
        )
        snapshots = [*driver.snapshots, snapshot]
        await _commit(driver, switch, header.size, l1, snapshots, no_overwrites, discard=False)
    return snapshot.public()


def _check_names(driver: SnapshotImage, identity: bytes, name: bytes) -> None:
    for what, text in (("id", identity), ("name", name)):
        if len(text) > MAX_NAME or b"\0" in text:
            raise OptionError(
                f"the {what} of a snapshot has {len(text)} bytes, expected at most {MAX_NAME} and no zero byte."
            )
    if any(snapshot.raw_id == identity for snapshot in driver.snapshots):
        raise OptionError(f"'{driver.image.filename}' has a snapshot with the id '{identity.decode()}' already.")


async def apply(driver: SnapshotImage, snapshot: Snapshot, progress: Progress, no_reads: HoldBack) -> None:
    """Restore the disk from ``snapshot``, its size and VM state included. No reads run within ``no_reads``.

    Raises NotSupportedError for another size in version 2, ImageError if the snapshot's tables are invalid.
    """
    image, header = driver.image, driver.image.header
    if snapshot.disk_size != header.size and header.version < 3:
        raise NotSupportedError(
            f"'{image.filename}' is qcow2 of version 2, whose snapshots must have the disk's size of {header.size} "
            f"bytes to be applied, but snapshot {snapshot.id} has {snapshot.disk_size}."
        )
    async with _switching(driver) as switch:
        l1 = await read_l1(image, snapshot)
        new = await table_weights(image, l1, f"the L1 table of snapshot {snapshot.id}")
        old = await table_weights(image, image.l1, "its L1 table")
        moved: dict[int, int] = {}

        async def exchange(offsets: Sequence[int]) -> None:
            cleared: list[NewTable] = []
            for offset in offsets:
                gained = new[offset] - old[offset]
                data = None
                if gained:
                    table = await L2Table.read(image, offset)
                    table.count(switch.gained if gained > 0 else switch.lost, abs(gained))
                    data = table.without_copied() if offset in new else None
                if data is not None:
                    cleared.append(NewTable(offset, data, new[offset]))
                _count_table(switch, offset, (0 if data is not None else new[offset]) - old[offset])
            moved.update(await switch.new_tables(cleared))

        await _each(driver, itertools.chain(new, (offset for offset in old if offset not in new)), exchange, progress)
        l1 = await rewritten(l1, lambda entry: _leads_to(moved.get(entry & OFFSET_MASK), entry, new))
        await _commit(driver, switch, snapshot.disk_size, l1, driver.snapshots, no_reads, discard=True)


def _leads_to(moved: int | None, entry: int, weights: Counter[int]) -> int:
    """Return the active L1 entry for one of a snapshot."""
    offset = entry & OFFSET_MASK
    if moved is None:
        return offset  # and shared with the snapshot
    return moved | COPIED if weights[offset] == 1 else moved


async def delete(driver: SnapshotImage, snapshot: Snapshot, progress: Progress, no_overwrites: HoldBack) -> None:
    """Delete a snapshot. No overwrites run within ``no_overwrites``. Raises ImageError if its tables are invalid."""
    image = driver.image
    async with _switching(driver) as switch:
        l1 = (await read_l1(image, snapshot))[: snapshot.l1_size]
        weights = await table_weights(image, l1, f"the L1 table of snapshot {snapshot.id}")
        active = await table_weights(image, image.l1, "its L1 table")
        total = len(weights) + len(active)

        async def lose(offsets: Sequence[int]) -> None:
            for offset in offsets:
                (await L2Table.read(image, offset)).count(switch.lost, weights[offset])
                _count_table(switch, offset, -weights[offset])

        await _each(driver, weights, lose, lambda done, _: progress(done, total))
        if snapshot.l1_size:
            switch.lose_table(snapshot.l1_table_offset, snapshot.l1_size * 8)
        flagged = await _flag_active(driver, switch, active, lambda done, _: progress(len(weights) + done, total))
        remaining = [other for other in driver.snapshots if other is not snapshot]
        await _commit(driver, switch, image.header.size, flagged, remaining, no_overwrites, discard=True)


async def _flag_active(driver: SnapshotImage, switch: Switch, active: Counter[int], progress: Progress) -> array[int]:
    """Set the COPIED flags of what only the active L1 table leads to in the new state, in copies of the L2 tables that
    change. Returns the L1 table for these copies."""
    image, geometry = driver.image, driver.image.geometry
    ones = Ones(geometry)
    for number, index in enumerate([index for index, offset in enumerate(driver.refcounts.table) if offset]):
        ones.put(index, await switch.new_refcounts(index))
        if number % switch.blocks_at_once == 0:
            await trio.lowlevel.checkpoint()
    moved: dict[int, int] = {}

    async def flag(offsets: Sequence[int]) -> None:
        flagged: list[NewTable] = []
        for offset in offsets:
            if not ones.of(offset >> geometry.cluster_bits):
                continue  # shared, and so is all that it leads to
            data = (await L2Table.read(image, offset)).with_copied(ones)
            if data is not None:
                flagged.append(NewTable(offset, data, 1))
                _count_table(switch, offset, -active[offset])
        moved.update(await switch.new_tables(flagged))

    def leads_to(entry: int) -> int:
        offset = entry & OFFSET_MASK
        owned = offset and ones.of(offset >> geometry.cluster_bits)
        return moved.get(offset, offset) | (COPIED if owned else 0)

    await _each(driver, active, flag, progress)
    return await rewritten(image.l1, leads_to)


async def _share_active(driver: SnapshotImage, switch: Switch, progress: Progress) -> array[int]:
    """Add a reference to everything that the active L1 table leads to, in L2 tables without COPIED flags. Returns the
    L1 table for these."""
    image = driver.image
    weights = await table_weights(image, image.l1, "its L1 table")
    moved: dict[int, int] = {}

    async def share(offsets: Sequence[int]) -> None:
        cleared: list[NewTable] = []
        for offset in offsets:
            table = await L2Table.read(image, offset)
            table.count(switch.gained, weights[offset])
            data = table.without_copied()
            if data is not None:
                cleared.append(NewTable(offset, data, 2 * weights[offset]))
            _count_table(switch, offset, weights[offset] if data is None else -weights[offset])
        moved.update(await switch.new_tables(cleared))

    await _each(driver, weights, share, progress)
    return await rewritten(image.l1, lambda entry: moved.get(entry & OFFSET_MASK, entry & OFFSET_MASK))


def _count_table(switch: Switch, offset: int, change: int) -> None:
    """Count a change in the number of L1 entries that lead to an L2 table. Raises ImageError for a table outside of the
    file."""
    counts = switch.gained if change > 0 else switch.lost
    if change and counts.add([offset >> switch.geometry.cluster_bits], abs(change)):
        raise ImageError(
            f"'{switch.image.filename}' has an L2 table at {offset}, behind the end of the file; "
            "'fusedisk check -r all' may repair it."
        )
    if change < 0:
        switch.changed_l2.add(offset)


async def _each(
    driver: SnapshotImage, tables: Iterable[int], work: Callable[[Sequence[int]], Awaitable[None]], progress: Progress
) -> None:
    """Work on L2 tables, by host offset, a few at a time; other tasks run between."""
    offsets = array("Q", tables)
    size = max(ENTRIES_AT_ONCE // driver.image.geometry.l2_entries, 1)
    for start in range(0, len(offsets), size):
        progress(start, len(offsets))
        await work(offsets[start : start + size])
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def _switching(driver: SnapshotImage) -> AsyncIterator[Switch]:
    """Begin a new state, with all changes of the old one in the file."""
    if driver.image.header.has_data_file:
        raise NotSupportedError(
            f"'{driver.image.filename}' keeps its data in another file, which cannot hold internal snapshots."
        )
    async with driver.committer.exclusive():
        switch = Switch(driver.image, driver.refcounts)
        try:
            yield switch
        except BaseException:
            switch.undo()
            raise


async def _commit(
    driver: SnapshotImage,
    switch: Switch,
    size: int,
    l1: array[int],
    snapshots: list[Snapshot],
    hold_back: HoldBack,
    *,
    discard: bool,
) -> None:
    """Switch to the new L1 table and list of snapshots."""
    image, header = driver.image, driver.image.header
    table = encode_snapshots(snapshots, image.filename)
    if header.l1_size:
        switch.lose_table(header.l1_table_offset, header.l1_size * 8)
    if header.nb_snapshots:
        switch.lose_table(header.snapshots_offset, image.snapshot_table_size)
    state = State(
        size=size,
        l1=l1,
        l1_offset=await switch.new_l1(l1),
        snapshots=len(snapshots),
        snapshots_offset=await switch.new_table(table),
    )
    try:
        await switch.commit(state, hold_back, discard=discard and Reason.SNAPSHOT in driver.refcounts.pass_discard)
    finally:
        if switch.done:
            driver.snapshots, image.snapshot_table_size = snapshots, len(table)
    await driver.place_snapshots()
    image.place_blocks(driver.refcounts.table)
    image.place_fixed()
