"""Mending invalid table entries in place. The rules are in :mod:`.repair`."""

from __future__ import annotations

from array import array

from fusedisk.block.request import io
from fusedisk.drivers.format.qcow2.check_analysis import Analysis
from fusedisk.drivers.format.qcow2.check_open import CheckedImage, Region
from fusedisk.drivers.format.qcow2.check_table import ALLOCATED_SUBCLUSTERS
from fusedisk.drivers.format.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
)
from fusedisk.drivers.format.qcow2.repair_bitmaps import mend_bitmaps

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
    await io.truncate(image.file, max(ends))
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
