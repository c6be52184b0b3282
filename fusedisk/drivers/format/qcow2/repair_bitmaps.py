"""Mending what leads to persistent bitmaps. The rules are in :mod:`.repair`."""

from __future__ import annotations

from array import array

from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.check_analysis import Analysis
from fusedisk.drivers.format.qcow2.check_bitmaps import TABLE_ENTRY_OFFSET, TABLE_ENTRY_ONES
from fusedisk.drivers.format.qcow2.check_open import CheckedImage, Region


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
