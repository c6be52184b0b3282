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

from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.core.errors import ImageError
from fusedisk.core.progress import Progress
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.check_analysis import Analysis, analyse
from fusedisk.drivers.format.qcow2.check_open import KNOWN_AUTOCLEAR, CheckedImage, open_image
from fusedisk.drivers.format.qcow2.check_snapshots import read_snapshot_table
from fusedisk.drivers.format.qcow2.repair_copied import correct_copied
from fusedisk.drivers.format.qcow2.repair_entries import mend_tables, stuck_entry
from fusedisk.drivers.format.qcow2.repair_moves import plan_moves
from fusedisk.drivers.format.qcow2.repair_refcounts import lower_refcounts, raise_refcounts

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
