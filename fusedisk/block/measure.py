"""How much space an image would take: what measuring tells, and what of a disk a new image must hold."""

from __future__ import annotations

from typing import NamedTuple

from fusedisk.block.backend import Backend
from fusedisk.block.check import Progress
from fusedisk.block.mapping import map_entries
from fusedisk.block.snapshot import no_progress

SECTOR = 512


class Measurement(NamedTuple):
    """Sizes of a file, in bytes."""

    required: int
    """What the image takes at first, with the data that it is to hold."""
    fully_allocated: int
    """What it takes once everything was written."""
    bitmaps: int | None = None
    """What persistent bitmaps take on top; None where either side cannot have any."""

    def information(self) -> dict[str, int]:
        """The numbers by qemu-img's names (QAPI's BlockMeasureInfo)."""
        bitmaps = {"bitmaps": self.bitmaps} if self.bitmaps is not None else {}
        return {**bitmaps, "required": self.required, "fully-allocated": self.fully_allocated}


def round_up(value: int, unit: int) -> int:
    """The next multiple of ``unit``."""
    return -(-value // unit) * unit


async def clusters_with_data(backend: Backend, cluster_size: int, progress: Progress = no_progress) -> int:
    """Bytes in the clusters of this size that have data anywhere in the chain; zeroes count for nothing."""
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
    """A raw image of ``size`` bytes: holes take space too, as far as its length goes."""
    length = round_up(size, SECTOR)
    return Measurement(length, length)
