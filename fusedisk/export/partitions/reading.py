"""Which partition table a disk has, as Linux decides it: a GPT where the MBR says so, the MBR itself otherwise."""

from __future__ import annotations

from fusedisk.export.partitions import gpt, mbr
from fusedisk.export.partitions.table import SECTOR, Read, Table


async def read_table(read: Read, length: int) -> Table | str:
    """The partition table of a disk of ``length`` bytes, or why there is none, as part of a sentence.

    Whatever the bytes are, nothing but what ``read`` raises is raised, and the work is bounded.
    """
    if length < SECTOR:
        return f"a disk of {length} bytes has no room for a partition table"
    sector = await read(0, SECTOR)
    primary = mbr.entries(sector)
    if primary is None:
        if await _has_gpt_header(read, length):
            return "there is a GPT but no protective MBR before it, without which Linux does not look at it either"
        return "there is no partition table"
    protective = gpt.protective_entry(primary)
    if protective is not None:
        return await gpt.read_gpt(read, length, protective)
    if any(entry.type == mbr.PROTECTIVE for entry in primary):
        return "its MBR says that there is a GPT, but not in sector 1"
    table = await mbr.read_mbr(read, length, sector, primary)
    if not table.partitions and not table.remarks:
        return "its MBR has no partitions"
    return table


async def _has_gpt_header(read: Read, length: int) -> bool:
    for size in gpt.SECTOR_SIZES:
        if length >= 2 * size and await read(size, len(gpt.SIGNATURE)) == gpt.SIGNATURE:
            return True
    return False
