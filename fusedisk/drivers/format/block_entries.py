"""What the entries of a block table say: numbers that lead to blocks, and a few with a meaning of their own.

No I/O. In memory a table is a view of numbers in the machine's byte order, over any writable buffer.
"""

from __future__ import annotations

import itertools
import sys
from array import array
from collections.abc import Iterator, Mapping
from typing import Literal

from fusedisk.block.model.check_result import CheckResult
from fusedisk.block.model.extent import DATA, SPECIAL, UNALLOCATED, ZERO
from fusedisk.core.errors import CorruptImageError

Table = memoryview
"""Entries as numbers: a view of the format ``I`` or ``Q``."""

MAX_TABLE_BYTES = 512 << 20
"""The longest table that is read into memory."""


class Entries:
    """The code of one kind of table.

    ``kinds`` gives entries, or after ``kind_mask`` their states, that are not data: UNALLOCATED or ZERO. The first of
    each is the one that is written. ``special`` are bits that mark entries for the format alone (compressed blocks).
    All others are data: the block lies at ``base + (entry & place_mask) * unit`` of the file, and the bits ``present``
    are set in entries that are written.
    """

    def __init__(
        self,
        width: int,
        byteorder: str,
        *,
        unit: int,
        base: int = 0,
        kinds: Mapping[int, int],
        kind_mask: int = -1,
        place_mask: int = -1,
        special: int = 0,
        present: int = 0,
    ) -> None:
        self.width = width
        self.code: Literal["I", "Q"] = "I" if width == 4 else "Q"
        self.unit, self.base = unit, base
        self.kinds = dict(kinds)
        self.kind_mask, self.place_mask = kind_mask, place_mask
        self.special, self.present = special, present
        self.unallocated = next(entry for entry, kind in kinds.items() if kind == UNALLOCATED)
        self.zero = next((entry for entry, kind in kinds.items() if kind == ZERO), None)
        """None: the format has no blocks of zeroes."""
        self._swaps = byteorder != sys.byteorder

    def kind(self, entry: int) -> int:
        """Return the status of a block: DATA, ZERO, UNALLOCATED or SPECIAL."""
        return SPECIAL if entry & self.special else self.kinds.get(entry & self.kind_mask, DATA)

    def place(self, entry: int) -> int:
        """Return the host offset of a block with data."""
        return self.base + (entry & self.place_mask) * self.unit

    def entry(self, place: int) -> int:
        """Return the entry of a block with data at this host offset."""
        return (place - self.base) // self.unit | self.present

    # --- tables -----------------------------------------------------------------------------------------

    def table(self, buffer: bytearray | memoryview, count: int) -> Table:
        """Return a table of ``count`` entries that are kept in ``buffer``, none of them allocated."""
        table = memoryview(buffer).cast("B")[: count * self.width].cast(self.code)
        table[:] = memoryview(array(self.code, [self.unallocated]) * count)
        return table

    def decode(self, raw: bytes | bytearray | memoryview, table: Table) -> None:
        """Fill a table with the bytes of the file."""
        numbers = array(self.code, bytes(raw))
        if self._swaps:
            numbers.byteswap()
        table[:] = memoryview(numbers)

    def encode(self, table: Table) -> memoryview:
        """Return the bytes of a table, or of a slice of one, for the file."""
        numbers = array(self.code, table.tobytes())
        if self._swaps:
            numbers.byteswap()
        return memoryview(numbers).cast("B")

    def places(self, table: Table) -> list[int]:
        """Return the host offsets of all blocks with data."""
        kinds, kind_mask, special = self.kinds, self.kind_mask, self.special
        base, mask, unit = self.base, self.place_mask, self.unit
        return [
            base + (entry & mask) * unit for entry in table if entry & kind_mask not in kinds and not entry & special
        ]


class Area:
    """The part of a file in which blocks may lie, and how they lie there."""

    def __init__(self, first: int, end: int, *, size: int, align: int = 1, lead: int = 0) -> None:
        """``first``: the lowest offset of a block. ``end``: the length of the file. ``size``: bytes of a block.
        ``align``: what the distance to ``first`` is a multiple of. ``lead``: bytes that belong to a block and lie in
        front of its data."""
        self.first, self.end = first, end
        self.size, self.align, self.lead = size, align, lead

    def wrong(self, places: list[int]) -> Iterator[str]:
        """Yield what is wrong with the host offsets of blocks, a part of a sentence each."""
        first, last, stride = self.first + self.lead, self._last(), self.lead + self.size
        before = None
        for place in sorted(places):
            if place < first:
                yield f"at {place}, in front of the first block at {first}"
            elif place > last:
                yield f"at {place}, past the end of the file at {self.end}"
            elif (place - first) % self.align:
                yield f"at {place}, which is not {first} plus a multiple of {self.align}"
            elif before is not None and place < before + stride:
                yield f"at {place}, where another block lies"
            before = place

    def _last(self) -> int:
        """Return the highest offset of a block's data. A grid leaves room for a last block that is cut short; where
        blocks and tables lie as they come, all must be whole."""
        return self.end - 1 if self.align >= self.size else self.end - self.size

    def require(self, places: list[int], filename: str) -> None:
        """Raise CorruptImageError unless all blocks lie in this part of the file, each at a place of its own."""
        if not places:
            return
        first, align, stride = self.first + self.lead, self.align, self.lead + self.size
        found = sorted(places)
        good = found[0] >= first and found[-1] <= self._last()
        good = good and all(after - before >= stride for before, after in itertools.pairwise(found))
        if not good or (align > 1 and any((place - first) % align for place in places)):
            raise CorruptImageError(f"'{filename}' has a block {next(self.wrong(places))}.")

    def holes(self, places: list[int]) -> list[int]:
        """Return the host offsets of the blocks among the others that no entry leads to, if blocks lie in a grid."""
        stride = self.lead + self.size
        if self.align != stride:
            return []
        first = self.first + self.lead
        used = {(place - first) // stride for place in places}
        return [first + number * stride for number in range(max(used, default=-1)) if number not in used]

    def check(self, places: list[int], used: int, result: CheckResult) -> None:
        """Count in ``result`` blocks in the wrong place, and as leaks the whole blocks behind the last one in use.
        ``used``: where the tables end."""
        for wrong in self.wrong(places):
            result.corruptions += 1
            result.note(f"a block lies {wrong}.")
        used = max(used, self.first, *(place + self.size for place in places if place < self.end))
        leaks = max(self.end - used, 0) // (self.lead + self.size)
        if leaks:
            result.leaks += leaks
            result.note(f"the file ends at {self.end}, but the last block in use at {used}.")
        result.allocated_clusters = len(places)
        result.image_end_offset = used
