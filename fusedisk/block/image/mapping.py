"""The map of a disk: its block status from end to end, with adjacent ranges merged.

The entries are those of ``qemu-img map`` (QAPI's MapEntry), and so is the rule for merging them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple

from fusedisk.block.graph.backend import Backend
from fusedisk.block.model.extent import BlockStatus
from fusedisk.core.alone import checkpoint
from fusedisk.core.errors import OptionError

_LOOKUPS_AT_ONCE = 64
"""The number of lookups after which other tasks get their turn: a map of a fragmented image takes long."""


class MapEntry(NamedTuple):
    """A range of the disk with one status throughout. All numbers are bytes."""

    start: int
    length: int
    depth: int
    """The layer that the answer comes from: 0 is the image itself, 1 its backing file, and so on."""
    present: bool
    """Some layer holds the range."""
    zero: bool
    """It reads as zeroes."""
    data: bool
    """It has bytes on the host."""
    offset: int | None
    """Their offset in ``filename`` if they are stored there verbatim; None for compressed ones."""
    filename: str | None
    compressed: bool


async def map_entries(backend: Backend, start: int = 0, length: int | None = None) -> AsyncGenerator[MapEntry, None]:
    """Yield entries that cover ``[start, start + length)`` without gaps, up to the disk's end.

    Holds one entry at a time, whatever the size of the disk. Raises OptionError for a start past the end, and for a
    negative length.
    """
    if length is not None and length < 0:
        raise OptionError(f"the length of the map is {length}, expected 0 or more.")
    end = backend.length if length is None else min(start + length, backend.length)
    if not 0 <= start <= backend.length:
        raise OptionError(f"the start of the map is {start}, expected 0 to the disk's end at {backend.length}.")
    current: MapEntry | None = None
    offset = start
    lookups = 0
    while offset < end:
        entry = _entry(offset, await backend.block_status(offset, end - offset))
        offset += entry.length
        if current is not None and _continues(current, entry):
            current = current._replace(length=current.length + entry.length)
        else:
            if current is not None:
                yield current
            current = entry
        lookups += 1
        if lookups % _LOOKUPS_AT_ONCE == 0:
            await checkpoint()
    if current is not None:
        yield current


def _entry(start: int, status: BlockStatus) -> MapEntry:
    return MapEntry(
        start,
        status.length,
        status.depth,
        status.allocated,
        status.zero,
        status.data,
        status.offset,
        status.filename,
        status.compressed,
    )


def _continues(first: MapEntry, second: MapEntry) -> bool:
    """Whether ``second``, which follows on the disk, merges with ``first``."""
    if first[2:6] != second[2:6] or first[7:] != second[7:]:
        return False
    if first.offset is None or second.offset is None:
        return first.offset is second.offset
    return first.offset + first.length == second.offset
