"""How much space an image would take: the result of measuring, and how much of a disk a new image must hold."""

from __future__ import annotations

from typing import NamedTuple

from fusedisk.block.graph.backend import Backend
from fusedisk.block.image.mapping import map_entries
from fusedisk.core.progress import Progress, no_progress

SECTOR = 512


class Measurement(NamedTuple):
    """Sizes of a file, in bytes."""

    required: int
    """The size of the new image with its data."""
    fully_allocated: int
    """The size once every cluster has been written."""
    bitmaps: int | None = None
    """The additional size of persistent bitmaps; None if either side cannot have any."""

    def information(self) -> dict[str, int]:
        """Return the numbers by qemu-img's names (QAPI's BlockMeasureInfo)."""
        bitmaps = {"bitmaps": self.bitmaps} if self.bitmaps is not None else {}
        return {**bitmaps, "required": self.required, "fully-allocated": self.fully_allocated}


def round_up(value: int, unit: int) -> int:
    """Return ``value`` rounded up to a multiple of ``unit``."""
    return -(-value // unit) * unit


async def clusters_with_data(backend: Backend, cluster_size: int, progress: Progress = no_progress) -> int:
    """Return the bytes in clusters of this size that have data anywhere in the chain; zeroes do not count."""
    total = covered = 0
    async for entry in map_entries(backend):
        end = entry.start + entry.length
        progress(end, backend.length)
        if entry.zero or not (entry.data and entry.present) or end <= covered:
            continue
        start = max(entry.start, covered) // cluster_size * cluster_size
        covered = round_up(end, cluster_size)
        total += covered - start
    return total


def measure_raw(size: int) -> Measurement:
    """Measure a raw image of ``size`` bytes; its holes count as length."""
    length = round_up(size, SECTOR)
    return Measurement(length, length)
