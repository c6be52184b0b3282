"""Repairing an image from what a check found.

Rules
-----
Repairing makes the metadata agree with itself and with what the tables refer to: **references are the truth, refcounts
follow them.** What could be read before reads the same afterwards:

1. A table entry that leads to a cluster keeps doing so. Only reserved bits and flags change (a compressed cluster loses
   a COPIED flag, a subcluster that is said to be both data and zeroes stays data).
2. An entry that leads nowhere, since its offset is no cluster's or lies behind the end of the file, could not be read,
   or read as zeroes. It becomes *zeroes* where the version has that (3), else *unallocated*; an L1 entry becomes empty.
3. If the cluster of an L2 table is also used for something else, its content decides: it is no L2 table if most of its
   entries are invalid as L2 entries and none leads to an otherwise unused cluster. Then the L1 entry is removed. The
   cluster is not touched, and neither is a part of an L1 table that is also used for something else.
4. A cluster with more references than its refcount can count is copied for those that are too many.
5. An entry of the snapshot table goes only if its L1 table cannot be in the file; texts and times of the others stay.
6. A part of a persistent bitmap that is not in the file says that everything has changed, so that a backup copies too
   much rather than too little. Where the directory or a table is not in the file, all bitmaps become invalid.
7. If the active L1 table itself is not in the file, or is very probably something else, nothing is repaired: all that
   the guest wrote would be given up. The same holds for a LUKS header, and for an L1 table so long that it runs into
   other tables: what looks wrong in it may be right there.
8. With LUKS, clusters are not copied, since they could not be decrypted at another offset: clusters as in rule 4 stay
   as they are, and are reported.
9. Nothing is repaired where something could not be read: what it refers to would be given up.

Freed clusters are not discarded: until they are used again, their content is still there to be looked at.

Order
-----
Dying at any point leaves an image that is not worse than it was; each step is flushed before the next:

1. entries are mended where they are (references only vanish: at worst clusters are leaked);
2. copies and new tables are written into clusters that nothing refers to and that lie behind everything in use;
3. refcounts that are too low are raised, those of the new clusters included; if a refcount block is missing or
   invalid, a whole new refcount structure is written into free clusters and becomes active by one write to the header;
4. entries and header are switched to the copies, whose refcounts are there by now;
5. refcounts that are too high are lowered, as nothing refers to those clusters any more;
6. COPIED flags are corrected, as refcounts are exact by now;
7. once a further look finds the image clean, the dirty and corrupt bits are cleared.
"""

from __future__ import annotations

import bisect
import logging
from array import array

from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.block.model.node import Node
from fusedisk.block.request import io, space
from fusedisk.core.errors import ImageError
from fusedisk.core.progress import Progress, no_progress
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.bitmaps import TABLE_ENTRY_OFFSET, TABLE_ENTRY_ONES
from fusedisk.drivers.format.qcow2.check.check import Analysis, analyse, check
from fusedisk.drivers.format.qcow2.check.image import (
    KNOWN_AUTOCLEAR,
    CheckedImage,
    Region,
    open_image,
    read_snapshot_table,
)
from fusedisk.drivers.format.qcow2.check.repair_refcounts import lower_refcounts, plan_moves, raise_refcounts
from fusedisk.drivers.format.qcow2.check.table import ALLOCATED_SUBCLUSTERS
from fusedisk.drivers.format.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
)

log = logging.getLogger(__name__)

_MAX_ROUNDS = 6
"""Mending may uncover further faults (a dropped table shared clusters with others), but it converges quickly."""

_BAD_BITS = layout.DIRTY | layout.CORRUPT


def plan(analysis: Analysis, repair: Repair) -> list[str]:
    """Return what :func:`repair` would do, a sentence each; empty if there is nothing to do."""
    done = []
    recounts = repair is not Repair.LEAKS
    if repair is Repair.ALL:
        wrong, snapshots = _wrong_entries(analysis)
        if wrong:
            done.append(f"fix or remove {wrong} invalid table entries")
        if snapshots:
            done.append(f"rewrite the snapshot table ({snapshots} invalid entries)")
    if recounts:
        if analysis.rebuild or analysis.walk.block_corruptions:
            done.append("rebuild the refcounts")
        elif analysis.too_low:
            done.append(f"raise the refcounts of {analysis.too_low} clusters")
    if analysis.leaks:
        done.append(f"give {analysis.leaks} leaked clusters back")
    others = analysis.result.corruptions - analysis.miscopied
    if analysis.miscopied and (recounts or not others):
        done.append(f"correct {analysis.miscopied} COPIED flags")
    if analysis.image.header.incompatible_features & _BAD_BITS and (recounts or not others):
        done.append("clear the marks for dirty and corrupt images")
    return done


def _wrong_entries(analysis: Analysis) -> tuple[int, int]:
    """Return how many entries of tables and how many of the snapshot table are wrong, refcounts aside."""
    snapshots = analysis.snapshots.dropped + analysis.snapshots.shortened + analysis.incomplete_snapshots
    return analysis.broken + analysis.overflows, snapshots


async def repair(analysis: Analysis, repair: Repair, progress: Progress) -> CheckResult:
    """Repair an image. Returns the result of checking it again, with the numbers of repairs.

    Raises ImageError, with nothing changed, where that cannot be done.
    """
    _check_repairable(analysis, repair)
    stuck = await stuck_entry(analysis) if repair is Repair.ALL and analysis.broken else None
    if stuck is not None:
        raise ImageError(f"'{analysis.image.filename}' is not repaired: {stuck}.")
    await _clear_unknown_autoclear(analysis.image)
    if repair is Repair.LEAKS:
        return await _repair_leaks(analysis, progress)
    return await _repair_all(analysis, progress, mends=repair is Repair.ALL)


async def repair_unclosed(file: Node, filename: str) -> None:
    """Make writing safe after a writer that did not close the image; see docs/adr/0021. Raises ImageError if more
    than refcounts is wrong."""
    log.warning("'%s' was not closed properly: its refcounts are checked before it is written to.", filename)
    result = await check(file, Repair.REFCOUNTS, no_progress)
    if result.corruptions or result.check_errors:
        raise ImageError(
            f"'{filename}' was not closed properly, and its refcounts could not be repaired; 'fusedisk check' "
            "tells more."
        )
    await io.flush(file)
    log.warning(
        "'%s' can be written to: %d wrong refcounts or COPIED flags were corrected, %d leaked clusters given back.",
        filename,
        result.corruptions_fixed,
        result.leaks_fixed,
    )


def _check_repairable(analysis: Analysis, repair: Repair) -> None:
    image, walk = analysis.image, analysis.walk
    if walk.result.check_errors > analysis.unreadable:
        raise ImageError(f"'{image.filename}' is not repaired: parts of it could not be read.")
    if image.crypto is not None and not image.has_region(*image.crypto):
        raise ImageError(
            f"'{image.filename}' is not repaired: its LUKS header has {image.crypto.length} bytes at "
            f"{image.crypto.offset}, where none can be, and without it all data would be given up; correct the header "
            "first."
        )
    if repair is Repair.LEAKS:
        if analysis.rebuild:
            raise ImageError(
                f"'{image.filename}' is not repaired: its refcounts must be rebuilt, which repairing leaks alone does "
                "not do; repair all (-r all)."
            )
        return
    wrong = sum(_wrong_entries(analysis))
    if wrong and repair is Repair.REFCOUNTS:
        raise ImageError(
            f"'{image.filename}' is not repaired: {wrong} entries of its tables are wrong, and not only its refcounts; "
            "'fusedisk check -r all' mends or drops them."
        )
    reason = _hopeless(analysis)
    if reason is not None:
        raise ImageError(f"'{image.filename}' is not repaired: {reason}.")


def _hopeless(analysis: Analysis) -> str | None:
    """Return why repairing everything would lose more than it saves; None if it would not."""
    image, walk, l1 = analysis.image, analysis.walk, analysis.image.l1_region
    if analysis.leaks and walk.active_wrong == walk.active_entries > 1:
        return (
            f"what its header calls the L1 table, at {l1.offset}, holds no entry that can be, and without it all data "
            "would be given up; correct the header first"
        )
    if l1.length and (l1.offset < image.cluster_size or l1.offset >= image.length):
        return (
            f"its header has the L1 table at {l1.offset}, where none can be, and without it all data would be given "
            "up; correct the header first"
        )
    if analysis.broken:
        places = sorted(walk.uses)
        for table in walk.l1_tables:
            after = bisect.bisect_right(places, table.region.offset)
            if after < len(places) and places[after] < table.region.offset + table.region.length:
                return f"{table.label}, of {table.region.length // 8} entries, runs into an L2 table at {places[after]}"
    return None


async def _repair_leaks(analysis: Analysis, progress: Progress) -> CheckResult:
    image, snapshots = analysis.image, analysis.snapshots
    leaks = analysis.leaks
    await lower_refcounts(analysis)
    analysis = await analyse(image, snapshots, progress)
    copied = analysis.miscopied
    if copied and analysis.result.corruptions == copied:
        await correct_copied(analysis)
        analysis = await analyse(image, snapshots, progress)
    result = analysis.result
    result.leaks_fixed = leaks - analysis.leaks
    result.corruptions_fixed = copied - analysis.miscopied
    if not result.check_errors and not result.corruptions:
        await _clear_bad_bits(image)
    return result


async def _repair_all(analysis: Analysis, progress: Progress, *, mends: bool) -> CheckResult:
    """Repair refcounts and, with ``mends``, entries too."""
    image, snapshots = analysis.image, analysis.snapshots
    leaks, corruptions = analysis.leaks, analysis.result.corruptions - analysis.miscopied
    for _ in range(_MAX_ROUNDS if mends else 0):
        if not await _repair_once(analysis, progress):
            break
        image = await open_image(image.file)
        snapshots = await read_snapshot_table(image, repair=False)
        analysis = await analyse(image, snapshots, progress)
    await raise_refcounts(analysis)
    analysis = await analyse(image, snapshots, progress)
    await lower_refcounts(analysis)
    analysis = await analyse(image, snapshots, progress)
    copied = analysis.miscopied
    await correct_copied(analysis)
    result = (await analyse(image, snapshots, progress)).result
    result.leaks_fixed = max(leaks - result.leaks, 0)
    result.corruptions_fixed = max(corruptions + copied - result.corruptions, 0)
    if not result.check_errors and not result.corruptions:
        await _clear_bad_bits(image)
    return result


async def _repair_once(analysis: Analysis, progress: Progress) -> bool:
    """Mend entries, then move what has to be moved. Returns whether there was anything to do."""
    image = analysis.image
    mended = await mend_tables(analysis)
    if mended:
        analysis = await analyse(image, analysis.snapshots, progress)
    moves = await plan_moves(analysis)
    if not moves.needed:
        return mended
    await moves.write_copies()
    covered = await analyse(image, analysis.snapshots, progress, moves.reserved)
    await raise_refcounts(covered)
    await moves.switch()
    return True


async def _clear_unknown_autoclear(image: CheckedImage) -> None:
    """Invalidate unknown features: their data may have changed, and their clusters count as leaks."""
    header = image.header
    known = header.autoclear_features & KNOWN_AUTOCLEAR
    if known != header.autoclear_features:
        await image.write(layout.AUTOCLEAR_FIELD, known.to_bytes(8, "big"))
        header.autoclear_features = known


async def _clear_bad_bits(image: CheckedImage) -> None:
    header = image.header
    if not header.incompatible_features & _BAD_BITS:
        return
    await image.flush()
    header.incompatible_features &= ~_BAD_BITS
    await image.write(layout.INCOMPATIBLE_FIELD, header.incompatible_features.to_bytes(8, "big"))
    await image.flush()


# --- persistent bitmaps -------------------------------------------------------------------------------


async def mend_bitmaps(analysis: Analysis) -> bool:
    """Mend the tables of all bitmaps, or let all become invalid; returns whether anything was changed."""
    image = analysis.image
    if image.bitmaps is None:
        return False
    tables = analysis.walk.bitmap_tables
    if not all(image.has_region(*region) for region in (Region(image.bitmaps.offset, image.bitmaps.size), *tables)):
        image.header.autoclear_features &= ~layout.BITMAPS
        image.bitmaps = None
        await image.write(layout.AUTOCLEAR_FIELD, image.header.autoclear_features.to_bytes(8, "big"))
        return True
    changed = False
    for region in tables:
        before = await image.read_table(region)
        after = array("Q", (_mended_entry(image, entry) for entry in before))
        changed |= await image.write_changes(region.offset, before, after)
    return changed


def _mended_entry(image: CheckedImage, entry: int) -> int:
    """Set all bits of a part that is not in the file: a backup then copies too much, never too little."""
    offset = entry & TABLE_ENTRY_OFFSET
    return TABLE_ENTRY_ONES if offset and not image.has_region(offset, image.cluster_size) else entry


# --- COPIED flags -------------------------------------------------------------------------------------


async def correct_copied(analysis: Analysis) -> None:
    """Correct the flags in the active L1 table and its L2 tables. The analysis is out of date then."""
    if not analysis.miscopied:
        return
    image, walk = analysis.image, analysis.walk
    for table in walk.l1_tables:
        if table.active and walk.miscopied_l1:
            await _correct(analysis, image.inside(table.region), words=1, data_file=False)
    for offset in walk.miscopied_tables:
        region = Region(offset, image.cluster_size)
        await _correct(analysis, region, words=image.entry_size // 8, data_file=image.data_file)
    await image.flush()


async def _correct(analysis: Analysis, region: Region, *, words: int, data_file: bool) -> None:
    image, disk = analysis.image, analysis.disk
    before = await image.read_table(region)
    after = before[:]
    for index in range(0, len(before), words):
        entry = before[index]
        offset = entry & OFFSET_MASK
        if entry & COMPRESSED or not offset:
            continue
        refcount = 1 if data_file else await disk.get(offset >> image.cluster_bits)
        after[index] = entry | COPIED if refcount == 1 else entry & ~COPIED
    await image.write_changes(region.offset, before, after)


# --- table entries ------------------------------------------------------------------------------------

_ALL_ZERO_SUBCLUSTERS = ALLOCATED_SUBCLUSTERS << 32


async def mend_tables(analysis: Analysis) -> bool:
    """Mend all tables; returns whether anything was changed. The analysis is out of date then."""
    image = analysis.image
    changed = await _grow_over_l1_tables(analysis)
    changed |= await mend_bitmaps(analysis)
    foreign: set[int] = set()
    for offset in analysis.walk.broken_tables:
        if offset & image.cluster_mask or not offset:
            continue  # goes with its L1 entries
        before = await image.read_table(Region(offset, image.cluster_size))
        after = _mended_table(image, before)
        if _is_foreign(analysis, offset, before, after):
            foreign.add(offset)
        else:
            changed |= await image.write_changes(offset, before, after)
    for table in analysis.walk.l1_tables:
        before = await image.read_table(image.inside(table.region))
        after = before[:]
        for index, entry in enumerate(before):
            if entry and not analysis.is_shared(table, index):
                after[index] = _mended_l1_entry(image, entry, foreign)
        changed |= await image.write_changes(table.region.offset, before, after)
    if changed:
        await image.flush()
    return changed


async def stuck_entry(analysis: Analysis) -> str | None:
    """An invalid L1 entry that must not be mended, as something else is in its cluster; None without one."""
    image = analysis.image
    for table in analysis.walk.l1_tables:
        for index, entry in enumerate(await image.read_table(image.inside(table.region))):
            if entry and analysis.is_shared(table, index) and _mended_l1_entry(image, entry, set()) != entry:
                return (
                    f"{table.label} has the invalid entry {entry:#x} in a cluster that is also used for something else"
                )
    return None


async def _grow_over_l1_tables(analysis: Analysis) -> bool:
    """Let the file hold all of the L1 tables that start in it; what is added reads as before."""
    image = analysis.image
    ends = [
        table.region.offset + table.region.length
        for table in analysis.walk.l1_tables
        if table.region.offset < image.length and not image.has_region(*table.region)
    ]
    if not ends:
        return False
    await space.truncate(image.file, max(ends))
    return True


def _is_foreign(analysis: Analysis, offset: int, before: array[int], after: array[int]) -> bool:
    """Whether something else is in the cluster of what an L1 entry calls an L2 table."""
    weight = analysis.walk.uses[offset].weight
    if analysis.counts[offset >> analysis.image.cluster_bits] <= weight:
        return False
    wrong = sum(old != new and not _is_entry(analysis.image, old) for old, new in zip(before, after, strict=True))
    return 2 * wrong > len(before) - before.count(0) and not _has_own_clusters(analysis, before, weight)


def _is_entry(image: CheckedImage, entry: int) -> bool:
    """Whether this could be an entry of an L2 table, had the file not been cut off."""
    return not entry & (COMPRESSED | L2_RESERVED | image.cluster_mask & OFFSET_MASK)


def _has_own_clusters(analysis: Analysis, table: array[int], weight: int) -> bool:
    """Whether an entry leads to a cluster that nothing else refers to, as only those of real tables do."""
    image, bits = analysis.image, analysis.image.cluster_bits
    wrong = COMPRESSED | L2_RESERVED | image.cluster_mask & OFFSET_MASK
    for entry in table[:: image.entry_size // 8]:
        offset = entry & OFFSET_MASK
        if offset and not entry & wrong and offset < image.length and analysis.counts[offset >> bits] <= weight:
            return True
    return False


def _mended_l1_entry(image: CheckedImage, entry: int, foreign: set[int]) -> int:
    offset = entry & OFFSET_MASK
    if not offset or offset & image.cluster_mask or offset in foreign:
        return 0
    if not image.has_region(offset, image.cluster_size):
        return 0
    return entry & ~L1_RESERVED


def _mended_table(image: CheckedImage, table: array[int]) -> array[int]:
    if not image.extended_l2:
        return array("Q", (mended_entry(image, entry, 0)[0] if entry else 0 for entry in table))
    mended = table[:]
    for index in range(0, len(table), 2):
        mended[index], mended[index + 1] = mended_entry(image, table[index], table[index + 1])
    return mended


def mended_entry(image: CheckedImage, entry: int, bitmap: int) -> tuple[int, int]:
    """An L2 entry and its bitmap of subclusters (0 where there are none) as they should be."""
    if entry & COMPRESSED:
        if image.data_file or not image.has_region(*image.compressed_region(entry)):
            return _zeroes(image, _ALL_ZERO_SUBCLUSTERS)
        return entry & ~COPIED, 0
    entry &= ~L2_RESERVED
    offset = entry & OFFSET_MASK
    if not offset and not (image.data_file and entry & COPIED):
        return entry, bitmap & ~ALLOCATED_SUBCLUSTERS
    allocated = bitmap & ALLOCATED_SUBCLUSTERS
    present = image.data_file or image.has_region(offset, image.cluster_size)
    if offset & image.cluster_mask or not present:
        return _zeroes(image, (bitmap | allocated << 32) & _ALL_ZERO_SUBCLUSTERS)
    return entry, bitmap & ~(allocated << 32)


def _zeroes(image: CheckedImage, subclusters: int) -> tuple[int, int]:
    """Return the entry for a cluster that reads as zeroes, as far as the version has one."""
    if image.extended_l2:
        return 0, subclusters
    return (ZERO if image.header.version >= 3 else 0), 0
