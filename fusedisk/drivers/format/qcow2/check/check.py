"""``check``: analyse the image, repair it if that is asked for, and analyse it again.

A check reads the refcounts in the file, walks everything that refers to clusters (:mod:`.walk`), and compares.
It counts as ``qemu-img check`` does:

* **corruptions**: a refcount lower than the number of references; an invalid entry (reserved bits, an offset
  that is not aligned, a place behind the file's end); a COPIED flag that does not agree with the refcount; a refcount
  block with other users;
* **leaks**: clusters whose refcount is higher than the number of references;
* **check errors**: what could not be read.

Repairing is :mod:`.repair`'s.

Specification: docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.block.model.node import Node
from fusedisk.core.errors import ImageError
from fusedisk.core.progress import Progress
from fusedisk.drivers.format.qcow2.check.image import (
    CheckedImage,
    open_image,
    read_snapshot_table,
)
from fusedisk.drivers.format.qcow2.check.walk import L1Table, Walk
from fusedisk.drivers.format.qcow2.counts import WHOLE, Counts, DiskRefcounts
from fusedisk.drivers.format.qcow2.entries import HostRun
from fusedisk.drivers.format.qcow2.layout import SECTOR
from fusedisk.drivers.format.qcow2.snapshots.table import SnapshotTable


async def check(file: Node, repair: Repair, progress: Progress, *, dry_run: bool = False) -> CheckResult:
    """Check the image in ``file``, see :meth:`fusedisk.block.model.driver.Driver.check`."""
    image = await open_image(file)
    snapshots = await _read_snapshots(image, repair)
    analysis = await analyse(image, snapshots, progress)
    result = analysis.result
    result.corruptions += snapshots.dropped + snapshots.shortened
    if repair is Repair.NOTHING:
        return result
    from fusedisk.drivers.format.qcow2.check import repair as repairing  # it builds on the analysis

    plan = repairing.plan(analysis, repair)
    if plan and not dry_run:
        result = await repairing.repair(analysis, repair, progress)
    result.repairs = plan
    return result


async def _read_snapshots(image: CheckedImage, repair: Repair) -> SnapshotTable:
    try:
        return await read_snapshot_table(image, repair=False)
    except ImageError:
        if repair is not Repair.ALL:
            raise
    return await read_snapshot_table(image, repair=True)


# --- the analysis -------------------------------------------------------------------------------------


class Analysis:
    """The findings of one look at an image. Numbers count clusters or entries."""

    def __init__(
        self, image: CheckedImage, snapshots: SnapshotTable, reserved: Sequence[HostRun] = (), *, whole: int = WHOLE
    ) -> None:
        """``reserved``: clusters with one reference more, which is about to be made."""
        self.image = image
        self.snapshots = snapshots
        self.reserved = reserved
        self.disk = DiskRefcounts(image)
        self.counts = Counts(image.clusters, whole=whole)
        self.walk = Walk(image, snapshots, self.disk, self.counts)
        self.result = self.walk.result
        self.overflows = 0
        """References that the width of the refcounts cannot count."""
        self.crowded: dict[int, int] = {}
        """Clusters with such references, and how many."""
        self.too_low = 0
        self.leaks = 0
        self.unreadable = 0
        """Clusters whose refcounts cannot be read."""
        self.incomplete_snapshots = sum(map(image.is_incomplete, snapshots.snapshots))
        self.rebuild = False
        """The refcount structure cannot be repaired where it is."""
        self.miscopied = 0
        self.end = 0
        """The cluster behind the last one in use."""
        self._whole = whole

    async def run(self, progress: Progress) -> None:
        """Analyse the image. Raises ImageError or HostError if that is impossible."""
        await self.disk.load(whole=self._whole)
        await self.walk.run(progress)
        for run in self.reserved:
            self.counts.add_run(run.first, run.clusters)
        await self._compare()
        walk = self.walk
        self.rebuild = self.rebuild or walk.rebuild
        self.miscopied = walk.miscopied_l1 + walk.found.miscopied
        self._sum_up()

    @property
    def broken(self) -> int:
        """The number of faults in tables and headers, without refcounts and COPIED flags."""
        return self.walk.corruptions + self.walk.found.corruptions

    def is_shared(self, table: L1Table, index: int) -> bool:
        """Whether something else is in the cluster of an L1 table's entry, too."""
        cluster = table.region.offset + 8 * index >> self.image.cluster_bits
        # The offset and the length of a snapshot's table are as likely to be wrong as its entries.
        phantoms = self.walk.phantoms[cluster] if table.active else 0
        return self.counts[cluster] - phantoms > table.users

    def _sum_up(self) -> None:
        walk, result, image = self.walk, self.result, self.image
        for snapshot in self.snapshots.snapshots:
            if image.is_incomplete(snapshot):
                result.note(f"{snapshot.label}: its entry in the snapshot table lacks the size of the disk.")
        result.corruptions = (
            self.broken
            + walk.block_corruptions
            + self.overflows
            + self.too_low
            + self.miscopied
            + self.incomplete_snapshots
        )
        result.leaks = self.leaks
        result.check_errors += self.unreadable
        result.image_end_offset = self.end << image.cluster_bits
        result.total_clusters = image.header.size // SECTOR * SECTOR + image.cluster_mask >> image.cluster_bits
        result.allocated_clusters = walk.found.allocated
        result.fragmented_clusters = walk.found.fragmented
        result.compressed_clusters = walk.found.compressed

    # --- comparing --------------------------------------------------------------------------------------

    async def _compare(self) -> None:
        """Compare the counted references with the refcounts, a refcount block's worth at a time."""
        size = self.image.block_entries
        last = -(-self.counts.end() // size)
        numbers = {number for number in range(min(last, len(self.disk.table))) if self.disk.offset(number)}
        for number in sorted(numbers | self.counts.touched(size)):
            await self._compare_block(number)
        self.end = max(self.end, 1)

    async def _compare_block(self, number: int) -> None:
        size = self.image.block_entries
        first = number * size
        count = min(size, self.counts.end() - first)
        wanted = self._references(first, count)
        self._clip(first, wanted)
        block = await self.disk.block(number) if self.disk.offset(number) else array("I", bytes(4 * count))
        if block is None:
            self.unreadable += count
            self.result.note(f"the refcounts of the clusters {first} to {first + count - 1} cannot be read.")
            return
        block = block[:count]
        used = max(_used(block), _used(wanted))
        if used:
            self.end = max(self.end, first + used)
        if block != wanted:
            self._differ(first, block, wanted)

    def wanted(self, number: int) -> array[int]:
        """The refcounts that a refcount block should hold: the references, as far as they can be counted."""
        size, maximum = self.image.block_entries, self.image.refcount_maximum
        found = self._references(number * size, size)
        if max(found) > maximum:
            found = array("I", [min(references, maximum) for references in found])
        return found

    def _references(self, first: int, count: int) -> array[int]:
        found = self.counts.part(first, count)
        return found if found is not None else array("I", bytes(4 * count))

    def _clip(self, first: int, wanted: array[int]) -> None:
        """Count references beyond what the refcounts' width allows as corruptions, and limit ``wanted`` to it."""
        maximum = self.image.refcount_maximum
        if self.image.refcount_bits > 16 or (maximum == 0xFFFF and _fit_16_bits(wanted)) or max(wanted) <= maximum:
            return
        for index, references in enumerate(wanted):
            if references > maximum:
                self.overflows += references - maximum
                self.crowded[first + index] = references - maximum
                self.result.note(
                    f"cluster {first + index} has {references} references, but refcounts of {self.image.refcount_bits} "
                    f"bits count up to {maximum}."
                )
                wanted[index] = maximum

    def _differ(self, first: int, block: array[int], wanted: array[int]) -> None:
        for cluster, (refcount, references) in enumerate(zip(block, wanted, strict=True), first):
            if refcount == references:
                continue
            if refcount > references:
                self.leaks += 1
                kind = "leaked"
            else:
                self.too_low += 1
                kind = "in use"
                self.rebuild = self.rebuild or not refcount
            self.result.note(f"cluster {cluster} is {kind}: refcount {refcount}, references {references}.")


def _used(values: array[int]) -> int:
    """How many values there are up to the last that is not 0."""
    if values and values[-1]:
        return len(values)
    return -(-len(values.tobytes().rstrip(b"\0")) // values.itemsize)


def _fit_16_bits(values: array[int]) -> bool:
    """Whether no value is larger than 65535; much faster than looking for the largest."""
    planes = values.tobytes()
    first = 0 if sys.byteorder == "big" else 2
    zeroes = bytes(len(values))
    return planes[first::4] == zeroes == planes[first + 1 :: 4]


async def analyse(
    image: CheckedImage, snapshots: SnapshotTable, progress: Progress, reserved: Sequence[HostRun] = ()
) -> Analysis:
    """Return the analysis of an image, see :class:`Analysis`."""
    analysis = Analysis(image, snapshots, reserved)
    await analysis.run(progress)
    return analysis
