"""Making COPIED flags agree with refcounts, which are right by now."""

from __future__ import annotations

from fusedisk.drivers.format.qcow2.check_analysis import Analysis
from fusedisk.drivers.format.qcow2.check_open import Region
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK


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
