"""Reading block tables with their checks, and checking open ones."""

from __future__ import annotations

from collections.abc import Sequence

from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.block.model.edge import Child
from fusedisk.block.model.node import Node
from fusedisk.block.request.space import truncate
from fusedisk.core.errors import ImageError
from fusedisk.core.offload import run_cpu
from fusedisk.drivers.format.block_entries import MAX_TABLE_BYTES, Area, Entries, Table
from fusedisk.drivers.format.block_storage import Allocate, Flat, Level, Space, Tree
from fusedisk.drivers.format.block_table import BlockTable, Parts


async def flat_table(
    node: Node,
    edge: Child,
    entries: Entries,
    area: Area,
    *,
    count: int,
    places: Sequence[int],
    interleave: int = 0,
    reuses: bool = True,
    parts: Parts | None = None,
    allocate: Allocate = bytearray,
    strict: bool = True,
) -> BlockTable:
    """Read and check a table of one level, of ``count`` entries, of which there may be copies at several ``places``.
    Raises ImageError for a table that is not in the file and, if ``strict``, for entries that lead to wrong places."""
    storage = edge.node
    _check_in_file(storage, "block table", places[0], count * entries.width)
    level = Level(storage, entries, count, places, allocate)
    await level.read()
    tables = Flat(level, area, interleave)
    end, holes = area.end, list[int]()
    if strict:
        end, holes = await run_cpu(_examine, entries, tables.block_entries(), area, storage.filename)
    space = Space(storage, area, end=end, free=holes if reuses else (), reuses=reuses)
    return BlockTable(node, edge, tables, space, parts=parts)


def _examine(entries: Entries, table: Table, area: Area, filename: str) -> tuple[int, list[int]]:
    """Return where the blocks end and which places among them are free."""
    places = entries.places(table)
    area.require(places, filename)
    end = max(places) + area.size if places else area.first
    return end, area.holes(places)


async def two_level_table(
    node: Node,
    edge: Child,
    directory_entries: Entries,
    entries: Entries,
    area: Area,
    *,
    count: int,
    places: Sequence[int],
    per_table: int,
    cache_size: int,
    reuses: bool = True,
    parts: Parts | None = None,
    allocate: Allocate = bytearray,
    strict: bool = True,
) -> BlockTable:
    """Read and check a directory of ``count`` entries, of which there may be several at ``places`` that lead to tables
    of their own. The tables have ``per_table`` entries each and are checked when they are read."""
    storage = edge.node
    area.end = storage.length
    space = Space(storage, area, end=storage.length, reuses=reuses)
    directories = []
    size = per_table * entries.width
    for place in places:
        _check_in_file(storage, "block directory", place, count * directory_entries.width)
        directory = Level(storage, directory_entries, count, (place,), allocate)
        await directory.read()
        tables = Area(0, storage.length, size=size)
        if strict:
            tables.require(directory_entries.places(directory.table), storage.filename)
        directories.append(directory)
    tree = Tree(storage, directories, entries, per_table, space, cache_size=cache_size, allocate=allocate)
    return BlockTable(node, edge, tree, space, parts=parts)


def _check_in_file(storage: Node, what: str, place: int, size: int) -> None:
    """Raise ImageError for a table that is longer than may be kept in memory, or does not lie in the file."""
    if size > MAX_TABLE_BYTES:
        raise ImageError(f"'{storage.filename}' has a {what} of {size} bytes, expected at most {MAX_TABLE_BYTES}.")
    if place + size > storage.length:
        raise ImageError(
            f"'{storage.filename}' has its {what} at {place}, {size} bytes long, but the file ends at {storage.length}."
        )


async def check_table(table: BlockTable, repair: Repair) -> CheckResult:
    """Count what is wrong with a table, which is not in use otherwise. ``repair`` cuts off leaks at the end of the file
    and, if it is ALL, writes copies again that differ. Other corruptions stay: which of two blocks is the right one is
    not for a program to say. Then the leaks stay, too, as they may be what a wrong entry meant."""
    result = CheckResult(total_clusters=table.tables.blocks)
    stale = await table.tables.check(result)
    if result.corruptions > len(stale):
        return result
    if result.leaks and repair is not Repair.NOTHING:
        await truncate(table.edge.node, result.image_end_offset)
        table.space.end = min(table.space.end, result.image_end_offset)
        result.leaks, result.leaks_fixed = 0, result.leaks
        result.repairs.append(f"the file is cut off behind its last block, at {result.image_end_offset}.")
    if stale and repair is Repair.ALL:
        for block in stale:
            level = await table.tables.change(block)
            level.mark(0, len(level.table))
        await table.finish()
        result.corruptions, result.corruptions_fixed = 0, len(stale)
        result.repairs.append(f"the copies of {len(stale)} tables are written again.")
    return result
