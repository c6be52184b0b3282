"""Another width of refcounts: the whole refcount structure is written anew, behind the last cluster in use.

Nothing leads to the new table and blocks until one write of 52 bytes, in the first sector of the file, changes the
table's place and the width at once. They count themselves, and do not count the old ones, so neither before nor after
that write is there a leak.

Source: docs/interop/qcow2.txt, "Host cluster management".
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

import trio

from fusedisk.core.errors import ImageError
from fusedisk.core.progress import Progress
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.entries import MAX_HOST_OFFSET, empty_table, encode_table
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.refcount import Refcounts
from fusedisk.drivers.format.qcow2.refcount_block import LARGEST, refcount_codec

_FIELDS = struct.Struct(">QIIQQQQI")
"""The header's fields from the offset of the refcount table to the refcount order."""


class _Found(NamedTuple):
    """The contents of the old structure."""

    end: int
    """Behind the last cluster in use."""
    blocks: set[int]
    """New blocks that something is to be counted in, by index."""


class _Plan(NamedTuple):
    """Where the new structure goes, in clusters."""

    first: int
    table_clusters: int
    blocks: list[int]
    """Indices; they lie behind the table in this order."""

    @property
    def end(self) -> int:
        return self.first + self.table_clusters + len(self.blocks)


class RefcountWidth:
    """The change of one image to refcounts of ``bits`` bits."""

    def __init__(self, image: Image, refcounts: Refcounts, bits: int) -> None:
        self.image = image
        self.geometry = image.geometry
        self.refcounts = refcounts
        self.bits = bits
        self.per_block = self.geometry.cluster_size * 8 // bits
        """New refcounts in one block."""
        self._old_codec = refcount_codec(self.geometry.refcount_bits, self.geometry.block_entries)
        self._new_codec = refcount_codec(bits, self.geometry.cluster_size * 8 // bits)
        self._decoded: tuple[int, array[int]] | None = None

    async def check(self) -> None:
        """Raise ImageError where a refcount is too large for the new width, or the new table would be too long. All
        refcounts must be in the file."""
        self._place(await self._look(lambda done, total: None))

    async def change(self, progress: Progress) -> None:
        """Write the new structure and let the header lead to it; read the header again then.

        Inside :meth:`Committer.exclusive`, with nothing kept. Raises what :meth:`check` does.
        """
        found = await self._look(lambda done, total: progress(done, 2 * total))
        plan = self._place(found)
        await self._check_free(plan)
        await self._write_blocks(plan, lambda done, total: progress(total + done, 2 * total))
        await self._write_table(plan)
        await self.image.barrier()
        await self._switch(plan)
        await self.image.barrier()

    # --- looking at the old structure -------------------------------------------------------------------

    async def _look(self, progress: Progress) -> _Found:
        table, per_old = self.refcounts.table, self.geometry.block_entries
        end, blocks = 1, {0}  # the header
        present = [index for index, offset in enumerate(table) if offset]
        for done, index in enumerate(present):
            progress(done, len(present))
            values = await self._old_block(index)
            self._check_width(index, values)
            first = index * per_old
            for at in range(0, per_old, min(self.per_block, per_old)):
                part = values[at : at + self.per_block]
                if part.count(0) < len(part):
                    blocks.add((first + at) // self.per_block)
                    end = first + at + len(part)
            self._check_table(max(blocks))
            await trio.lowlevel.checkpoint()
        return _Found(await self._last_used(end), blocks)

    async def _last_used(self, end: int) -> int:
        """Behind the last cluster with a refcount before ``end``."""
        while end:
            index, count = divmod(end - 1, self.geometry.block_entries)
            values = await self._old_block(index) if self._old_offset(index) else array("I")
            while count >= 0 and values:
                if values[count]:
                    return index * self.geometry.block_entries + count + 1
                count -= 1
            end = index * self.geometry.block_entries
        return 0

    def _check_width(self, index: int, values: array[int]) -> None:
        largest = max(values)
        if largest > (1 << self.bits) - 1 or (largest == LARGEST and self.geometry.refcount_bits > 32):
            cluster = index * self.geometry.block_entries + values.index(largest)
            raise ImageError(
                f"'{self.image.filename}' counts {largest} references to the cluster at "
                f"{cluster << self.geometry.cluster_bits}, but refcounts of {self.bits} bits count up to "
                f"{(1 << self.bits) - 1}."
            )

    def _old_offset(self, index: int) -> int:
        return self.refcounts.table[index] if index < len(self.refcounts.table) else 0

    async def _old_block(self, index: int) -> array[int]:
        if self._decoded is None or self._decoded[0] != index:
            block = await self.refcounts.blocks.load(self._old_offset(index))
            self._decoded = index, self._old_codec.decode(block)
        return self._decoded[1]

    async def _old_values(self, first: int, count: int) -> array[int]:
        """The old refcounts of some clusters; zeroes where there are none."""
        found = array("I")
        while count:
            index, at = divmod(first, self.geometry.block_entries)
            part = min(count, self.geometry.block_entries - at)
            if self._old_offset(index):
                found += (await self._old_block(index))[at : at + part]
            else:
                found.frombytes(bytes(4 * part))
            first, count = first + part, count - part
        return found

    # --- the new structure ------------------------------------------------------------------------------

    def _place(self, found: _Found) -> _Plan:
        """Behind everything in use, with blocks that count the new structure too."""
        size, blocks, table_clusters = self.geometry.cluster_size, set(found.blocks), 0
        while True:
            plan = _Plan(found.end, table_clusters, sorted(blocks))
            own = range(plan.first // self.per_block, (plan.end - 1) // self.per_block + 1)
            blocks |= set(own)
            needed = -(-8 * self._check_table(max(blocks)) // size)
            if needed == table_clusters and len(blocks) == len(plan.blocks):
                return plan
            table_clusters = needed

    def _check_table(self, index: int) -> int:
        """Entries of a table that has one for the block ``index``. Raises ImageError where it would be too long."""
        entries = index + 1
        most = min(
            layout.MAX_REFCOUNT_TABLE_SIZE // 8, (MAX_HOST_OFFSET >> self.geometry.cluster_bits) // self.per_block
        )
        if entries > most:
            raise ImageError(
                f"'{self.image.filename}' would need a refcount table of {entries} entries for refcounts of "
                f"{self.bits} bits, but at most {most} are possible."
            )
        return entries

    async def _check_free(self, plan: _Plan) -> None:
        """Refuse to overwrite metadata, whatever the refcounts say."""
        start, end = plan.first << self.geometry.cluster_bits, plan.end << self.geometry.cluster_bits
        what = self.image.occupied_at(start, end - start)
        if what is not None:
            raise await self.image.mark_corrupt(
                f"its refcounts say that the clusters from {start} on are free, but its {what} lies there"
            )

    async def _write_blocks(self, plan: _Plan, progress: Progress) -> None:
        lost = self._old_clusters()
        for done, index in enumerate(plan.blocks):
            progress(done, len(plan.blocks))
            first, end = index * self.per_block, (index + 1) * self.per_block
            values = await self._old_values(first, self.per_block)
            for cluster in lost[bisect_left(lost, first) : bisect_left(lost, end)]:
                if not values[cluster - first]:
                    raise await self.image.mark_corrupt(
                        f"the refcount of its refcount structure at {cluster << self.geometry.cluster_bits} is 0"
                    )
                values[cluster - first] -= 1
            for cluster in range(max(first, plan.first), min(end, plan.end)):
                values[cluster - first] = 1
            await self.image.announce("refblock_alloc_write_blocks")
            await self.image.put_new_table(self._block_offset(plan, done), self._new_codec.encode(values))
            await trio.lowlevel.checkpoint()

    def _old_clusters(self) -> list[int]:
        """The clusters that the old structure takes, sorted."""
        bits, header = self.geometry.cluster_bits, self.image.header
        first = header.refcount_table_offset >> bits
        blocks: Iterable[int] = (offset >> bits for offset in self.refcounts.table if offset)
        return sorted([*range(first, first + header.refcount_table_clusters), *blocks])

    def _block_offset(self, plan: _Plan, number: int) -> int:
        return plan.first + plan.table_clusters + number << self.geometry.cluster_bits

    async def _write_table(self, plan: _Plan) -> None:
        table = empty_table(plan.table_clusters * self.geometry.cluster_size // 8)
        for number, index in enumerate(plan.blocks):
            table[index] = self._block_offset(plan, number)
        await self.image.announce("refblock_alloc_write_table")
        await self.image.put_new_table(plan.first << self.geometry.cluster_bits, encode_table(table))

    async def _switch(self, plan: _Plan) -> None:
        header = self.image.header
        fields = _FIELDS.pack(
            plan.first << self.geometry.cluster_bits,
            plan.table_clusters,
            header.nb_snapshots,
            header.snapshots_offset,
            header.incompatible_features,
            header.compatible_features,
            header.autoclear_features,
            self.bits.bit_length() - 1,
        )
        await self.image.announce("refblock_alloc_switch_table")
        await self.image.put_header_fields(layout.REFCOUNT_TABLE_FIELDS, fields)
