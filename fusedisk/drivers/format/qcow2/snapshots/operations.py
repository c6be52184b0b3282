"""Internal snapshots: making, applying and deleting them.

A snapshot is an L1 table of its own.

* Making one adds a reference to everything that the active L1 table leads to. So nothing of it may be overwritten in
  place any longer: its COPIED flags are cleared.
* Applying one adds a reference to everything that the snapshot leads to, and removes one from everything that the
  active table led to.
* Deleting one removes its references. Clusters that only the active table still leads to get their flags again.

Each is one step from an old state to a new one, see :mod:`.switch`: a crash leaves one of the two, and an
error changes nothing. The work is done in pieces of :data:`ENTRIES_AT_ONCE` table entries, and other tasks run between.

Making and deleting give way to all requests for data between two pieces, and follow what they change
(:mod:`.active`). At the end changes are held back while the last pieces are done, those of the last moments,
and the header is written. While one is applied, only plain reads are in flight on the node, and none during the step.

Source: docs/interop/qcow2.txt, "Snapshots".
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Protocol

import trio

from fusedisk.block.model.driver import HoldBack
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.core.errors import ImageError, NotSupportedError, OptionError
from fusedisk.core.progress import Progress
from fusedisk.drivers.format.qcow2 import header_checks, layout
from fusedisk.drivers.format.qcow2.commit import Committer
from fusedisk.drivers.format.qcow2.entries import COPIED, ENTRIES_AT_ONCE, OFFSET_MASK, empty_table
from fusedisk.drivers.format.qcow2.freed import Reason
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.refcount import Pause, Refcounts
from fusedisk.drivers.format.qcow2.snapshots.active import ActiveTables, FlaggedTables, SharedTables
from fusedisk.drivers.format.qcow2.snapshots.references import L2Table, Ones, rewritten, table_weights
from fusedisk.drivers.format.qcow2.snapshots.switch import NewTable, State, Switch
from fusedisk.drivers.format.qcow2.snapshots.table import Snapshot, encode_snapshots, next_id

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
    header_checks.check_table(
        image.filename,
        what,
        snapshot.l1_table_offset,
        length,
        image.geometry.cluster_size,
        image.storage.node.length,
    )
    table = await image.read_table(snapshot.l1_table_offset, snapshot.l1_size)
    table.extend(empty_table(needed - snapshot.l1_size))
    return table


async def create(driver: SnapshotImage, wanted: SnapshotInfo, progress: Progress, no_changes: HoldBack) -> SnapshotInfo:
    """Make a snapshot with the name, date and VM data of ``wanted``, whose id is chosen where it is empty. No
    changes run within ``no_changes``.

    Raises OptionError for an invalid name or id; ImageError where there are too many snapshots or references.
    """
    identity = wanted.id.encode("utf-8", "surrogateescape") or next_id(driver.snapshots)
    name = wanted.name.encode("utf-8", "surrogateescape")
    _check_names(driver, identity, name)
    image, header = driver.image, driver.image.header
    async with _beside_requests(driver) as switch:
        tables = SharedTables(image, switch)
        with tables.followed():
            async with image.mutex:
                switch.follow_file()
                await tables.count(progress)
                _lose_tables(driver, switch)
                await tables.write(2, discard=False)
            async with _last_moment(driver, switch, tables, no_changes):
                snapshot = Snapshot(
                    raw_id=identity,
                    raw_name=name,
                    l1_table_offset=tables.l1_offsets[1],
                    l1_size=len(tables.l1),
                    date_seconds=wanted.date // 10**9,
                    date_nanoseconds=wanted.date % 10**9,
                    vm_clock=wanted.vm_clock,
                    vm_state_size=wanted.vm_state_size,
                    disk_size=header.size,
                    icount=wanted.icount,
                )
                await _commit_beside(driver, switch, tables, [*driver.snapshots, snapshot], discard=False)
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
                switch.count_table(offset, (0 if data is not None else new[offset]) - old[offset])
            moved.update(await switch.new_tables(cleared))

        await _each(driver, itertools.chain(new, (offset for offset in old if offset not in new)), exchange, progress)
        l1 = await rewritten(l1, lambda entry: _leads_to(moved.get(entry & OFFSET_MASK), entry, new))
        _lose_tables(driver, switch)
        table = encode_snapshots(driver.snapshots, image.filename)
        state = State(
            size=snapshot.disk_size,
            l1=l1,
            l1_offset=await switch.new_l1(l1),
            snapshots=len(driver.snapshots),
            snapshots_offset=await switch.new_table(table),
        )
        try:
            await switch.commit(state, no_reads, discard=_discards(driver))
        finally:
            if switch.done:
                image.snapshot_table_size = len(table)
        await _place(driver)
    await switch.discard()


def _leads_to(moved: int | None, entry: int, weights: Counter[int]) -> int:
    """Return the active L1 entry for one of a snapshot."""
    offset = entry & OFFSET_MASK
    if moved is None:
        return offset  # and shared with the snapshot
    return moved | COPIED if weights[offset] == 1 else moved


async def delete(driver: SnapshotImage, snapshot: Snapshot, progress: Progress, no_changes: HoldBack) -> None:
    """Delete a snapshot. No changes run within ``no_changes``. Raises ImageError if its tables are invalid."""
    image, discards = driver.image, _discards(driver)
    async with _beside_requests(driver) as switch:
        lost = await read_l1(image, snapshot)
        tables = FlaggedTables(image, switch)
        with tables.followed():
            async with image.mutex:
                switch.follow_file()
                await _lose_snapshot(driver, switch, snapshot, lost, lambda done, all: progress(done, 2 * all))
                tables.ones = await _ones(driver, switch)
                await tables.count(lambda done, all: progress(all + done, 2 * all))
                _lose_tables(driver, switch)
                await tables.write(1, discard=discards)
            async with _last_moment(driver, switch, tables, no_changes):
                remaining = [other for other in driver.snapshots if other is not snapshot]
                await _commit_beside(driver, switch, tables, remaining, discard=discards)
    await switch.discard()


async def _lose_snapshot(
    driver: SnapshotImage, switch: Switch, snapshot: Snapshot, l1: array[int], progress: Progress
) -> None:
    """Count the references that go with a snapshot, whose L1 table is ``l1``."""
    image = driver.image
    weights = await table_weights(image, l1, f"the L1 table of snapshot {snapshot.id}", switch.pause)

    async def lose(offsets: Sequence[int]) -> None:
        for offset in offsets:
            table = await L2Table.read(image, offset)
            table.count(switch.lost, weights[offset])
            switch.runs[offset] = table.first_of_run()
            switch.count_table(offset, -weights[offset])

    await _each(driver, weights, lose, progress, switch.pause)
    if snapshot.l1_size:
        switch.lose_table(snapshot.l1_table_offset, snapshot.l1_size * 8)


async def _ones(driver: SnapshotImage, switch: Switch) -> Ones:
    """Which clusters have one reference in the new state, as far as was collected."""
    ones = Ones(driver.image.geometry)
    for number, index in enumerate([index for index, offset in enumerate(driver.refcounts.table) if offset]):
        ones.put(index, await switch.new_refcounts(index))
        if number % switch.blocks_at_once == 0:
            await switch.pause()
    return ones


async def _each(
    driver: SnapshotImage,
    tables: Iterable[int],
    work: Callable[[Sequence[int]], Awaitable[None]],
    progress: Progress,
    pause: Pause = trio.lowlevel.checkpoint,
) -> None:
    """Work on L2 tables, by host offset, a few at a time; other tasks run between."""
    offsets = array("Q", tables)
    size = max(ENTRIES_AT_ONCE // driver.image.geometry.l2_entries, 1)
    for start in range(0, len(offsets), size):
        progress(start, len(offsets))
        await work(offsets[start : start + size])
        await pause()


def _check_place(driver: SnapshotImage) -> None:
    if driver.image.header.has_data_file:
        raise NotSupportedError(
            f"'{driver.image.filename}' keeps its data in another file, which cannot hold internal snapshots."
        )


@contextmanager
def _undone_on_error(switch: Switch) -> Iterator[None]:
    try:
        yield
    except BaseException:
        switch.undo()
        raise


@asynccontextmanager
async def _switching(driver: SnapshotImage) -> AsyncIterator[Switch]:
    """Begin a new state, with all changes of the old one in the file and nobody else changing anything."""
    _check_place(driver)
    async with driver.committer.exclusive():
        switch = Switch(driver.image, driver.refcounts)
        with _undone_on_error(switch):
            yield switch


@asynccontextmanager
async def _beside_requests(driver: SnapshotImage) -> AsyncIterator[Switch]:
    """Begin a new state beside requests that change the old one."""
    _check_place(driver)
    async with driver.image.mutex:
        await driver.image.before_change(False)
    switch = Switch(driver.image, driver.refcounts, gives_way=True)
    with _undone_on_error(switch):
        yield switch


@asynccontextmanager
async def _last_moment(
    driver: SnapshotImage, switch: Switch, tables: ActiveTables, no_changes: HoldBack
) -> AsyncIterator[None]:
    """Hold everybody back, with all changes in the file and nothing left to follow."""
    # What the file has already need not be waited for then.
    await driver.committer.commit()
    await driver.image.barrier()
    async with no_changes(), driver.committer.exclusive():
        switch.gives_way = False
        switch.follow_file()
        with _undone_on_error(switch):  # while nobody else can change anything
            await tables.follow()
            yield


async def _commit_beside(
    driver: SnapshotImage, switch: Switch, tables: ActiveTables, snapshots: list[Snapshot], *, discard: bool
) -> None:
    """Switch to the new L1 table and list of snapshots."""
    image = driver.image
    table = encode_snapshots(snapshots, image.filename)
    state = State(
        size=image.header.size,
        l1=tables.l1,
        l1_offset=tables.l1_offsets[0],
        snapshots=len(snapshots),
        snapshots_offset=await switch.new_table(table),
    )
    try:
        await switch.commit(state, nullcontext, discard=discard, l2_places=tables.l2_places)
    finally:
        if switch.done:
            driver.snapshots, image.snapshot_table_size = snapshots, len(table)
    await _place(driver)


def _discards(driver: SnapshotImage) -> bool:
    """Whether the host gets space back."""
    return Reason.SNAPSHOT in driver.refcounts.freed.pass_discard


def _lose_tables(driver: SnapshotImage, switch: Switch) -> None:
    """Note that the new state has another L1 table and list of snapshots."""
    image, header = driver.image, driver.image.header
    switch.lose_l1()
    if header.nb_snapshots:
        switch.lose_table(header.snapshots_offset, image.snapshot_table_size)


async def _place(driver: SnapshotImage) -> None:
    """Tell the overlap checks where everything lies now."""
    image = driver.image
    await driver.place_snapshots()
    image.place_blocks(driver.refcounts.table)
    image.place_fixed()
