"""Refcounts of host clusters: the allocator, freeing, and growth of the refcount table.

Everything here but :meth:`Refcounts.return_unused` runs under the image's mutex.

Blocks change in memory, and may be written at any time: references are counted before they are made, and freed clusters
are counted down only when the file has lost the reference (:class:`~.freed.FreedClusters`), so they are not allocated
before. A new block is written when it is made, which reserves its space on the host, and before the table refers to
it, with a barrier between.

Searching is first fit. Two cursors keep it short: nothing is free before ``_first_free``, and nothing before
``_next_run`` was a run long enough for the last multi-cluster request. Blocks known to be full are skipped
without being loaded. Where the table has no block, everything is free: behind the last used cluster the file
just grows.

A new block describes itself where its own cluster lies in the range it covers. A new table is placed behind
everything that the old one covers, together with the blocks that cover the new table and themselves, and
becomes active by one write to the header.

Source: docs/interop/qcow2.txt, "Host cluster management".
"""

from __future__ import annotations

import errno
import logging
from array import array
from collections.abc import Awaitable, Callable

import trio

from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import ImageError, NoSpaceError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.changes import Kind
from fusedisk.drivers.format.qcow2.entries import (
    MAX_HOST_OFFSET,
    HostRun,
    empty_table,
    encode_table,
)
from fusedisk.drivers.format.qcow2.freed import FreedClusters
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.refcount_block import RefcountOverflow, RefcountUnderflow, refcount_codec
from fusedisk.drivers.format.table_cache import TableCache

log = logging.getLogger(__name__)

Pause = Callable[[], Awaitable[None]]
"""Lets others run between two pieces of work."""

MIN_BLOCKS = 4
_MOST_SPARE = 256
"""Free clusters that one look into a block finds."""
_BLOCKS_AT_ONCE = 64


class Refcounts:
    """The refcount structure of one writable image."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.geometry = image.geometry
        self.codec = refcount_codec(self.geometry.refcount_bits, self.geometry.block_entries)
        self.blocks: TableCache[bytearray] = TableCache(self._read_block, self.geometry.cluster_size, MIN_BLOCKS)
        self.blocks.is_pinned = self._is_dirty
        self.table: array[int] = array("Q")
        self.freed = FreedClusters(image, self.add)
        self.encrypted = False
        """Guest data is encrypted, so new clusters of zeroes do not read as zeroes to the guest."""
        self._full = bytearray()
        """For each table entry, 1 if its block is known to have no free cluster."""
        self._first_free = 0
        self._next_run = 0
        self._used_end = 0
        """No cluster at or behind this host offset was allocated since the image was opened."""
        self._spare = self._spare_end = 0
        """From the one cluster to the other all were free when they were found, and hold no metadata."""
        self.open_cluster = -1
        """The cluster with room for more compressed data behind its last; -1 if there is none."""
        self._kept: list[HostRun] = []
        """Clusters that were returned unused: their refcount is one, but nothing refers to them."""
        self._dirty: dict[int, tuple[int, int]] = {}
        """For each changed block, by host offset, the changed bytes: the first, and the one behind the last."""
        self._unhooked: dict[int, int] = {}
        """Entries of ``table`` that are not in the file's table yet."""
        self.changed: set[int] | None = None
        """Collects the indices of blocks that change, if somebody wants them."""

    async def load(self) -> None:
        """Read the refcount table. Raises ImageError for invalid entries."""
        image, header = self.image, self.image.header
        await image.announce("reftable_load")
        self._take_table(await image.read_table(header.refcount_table_offset, header.refcount_table_size() // 8))
        file_end = -(-image.storage.node.length // self.geometry.cluster_size) * self.geometry.cluster_size
        previous = 0
        for offset in sorted(entry for entry in self.table if entry):
            if offset & self.geometry.cluster_mask or offset == previous or offset >= file_end:
                raise ImageError(
                    f"'{image.filename}' has a refcount block at {offset}, expected distinct multiples of "
                    f"{self.geometry.cluster_size} inside the file; 'fusedisk check -r all' may "
                    "repair it."
                )
            previous = offset

    def _take_table(self, table: array[int]) -> None:
        self.table = table
        self.image.place_blocks(table)
        self._full = bytearray(len(table))

    async def _read_block(self, offset: int) -> bytearray:
        await self.image.announce("refblock_load")
        return await self.image.read(offset, self.geometry.cluster_size)

    # --- looking ----------------------------------------------------------------------------------------

    async def get(self, cluster: int) -> int:
        """Return the refcount of a host cluster."""
        block_index, index = divmod(cluster, self.geometry.block_entries)
        offset = self.table[block_index] if block_index < len(self.table) else 0
        if not offset:
            return 0
        return self.codec.get(await self.blocks.load(offset), index)

    async def last_used(self) -> int:
        """Return the last host cluster with a refcount."""
        per_block = self.geometry.block_entries
        for block_index in range(len(self.table) - 1, -1, -1):
            if offset := self.table[block_index]:
                index = self.codec.last_used(await self.blocks.load(offset))
                if index is not None:
                    return block_index * per_block + index
        return 0

    # --- allocating -------------------------------------------------------------------------------------

    async def allocate(self, count: int, *, exact: bool = False, pause: Pause | None = None) -> HostRun:
        """Allocate adjacent clusters: at least one and at most ``count``, with ``exact`` exactly ``count``. Their
        refcounts become one, in memory; a commit writes that before anything that refers to them. Others may allocate
        in each ``pause``, of which there are several if refcount blocks are missing.

        Raises NoSpaceError or HostError, with at most leaked clusters changed, and CorruptImageError if the refcounts
        call metadata free.
        """
        await self.image.announce("cluster_alloc")
        if self._kept and (run := self._take_kept(count, exact)):
            return run
        while True:
            first = await self._find(count, self._first_free if count == 1 else self._next_run)
            missing = self._missing_blocks(first, count)
            if not missing:
                break
            await self._add_blocks(missing, pause)
        await self._check_free(first, count)
        start, end = first << self.geometry.cluster_bits, first + count << self.geometry.cluster_bits
        fresh = not self.encrypted and start >= max(self._used_end, self.image.storage.node.length)
        self._used_end = max(self._used_end, end)
        await self.add(first, [1] * count)
        if count > 1:
            self._next_run = first + count
        if count == 1 or first == self._first_free:
            self._first_free = first + count
        return HostRun(first, count, fresh)

    def allocate_now(self, count: int) -> HostRun | None:
        """Do as :meth:`allocate` if that takes no more than counting up in a block in memory; None otherwise."""
        geometry = self.geometry
        if self._kept or (self._spare_end - self._spare < count and not self._find_spare(count)):
            return None
        first = self._spare
        block_index, index = divmod(first, geometry.block_entries)
        offset = self.table[block_index] if block_index < len(self.table) else 0
        block = self.blocks.get(offset)
        if block is None or self.codec.free_run(block, index, count) < count:
            self._spare_end = first  # somebody else has taken them
            return None
        position, data = self.codec.encoded(block, index, [1] * count)
        self._put(block_index, block, position, data)
        self._spare = end = first + count
        start = first << geometry.cluster_bits
        fresh = not self.encrypted and start >= self._used_end and start >= self.image.storage.node.length
        self._used_end = max(self._used_end, end << geometry.cluster_bits)
        if count > 1:
            self._next_run = end
        if first == self._first_free:
            self._first_free = end
        return HostRun(first, count, fresh)

    def _find_spare(self, count: int) -> bool:
        """Look for at least ``count`` adjacent free clusters where :meth:`allocate` would look first."""
        per_block, bits = self.geometry.block_entries, self.geometry.cluster_bits
        block_index, index = divmod(self._first_free if count == 1 else self._next_run, per_block)
        if block_index >= len(self.table) or self._full[block_index]:
            return False
        block = self.blocks.get(self.table[block_index])
        if block is None:
            return False
        at, run = self.codec.find_free(block, index, count)
        if run < count:
            return False
        run = self.codec.free_run(block, at, min(max(count, _MOST_SPARE), per_block - at))
        first = block_index * per_block + at
        if self.image.occupied_at(first << bits, run << bits) is not None:
            return False
        self._spare, self._spare_end = first, first + run
        return True

    def return_unused(self, run: HostRun) -> None:
        """Take back unused clusters from :meth:`allocate`, for the next allocation. Synchronous."""
        self._kept.append(run)

    def _take_kept(self, count: int, exact: bool) -> HostRun | None:
        first, length, _ = self._kept[-1]
        if exact and length < count:
            return None
        self._kept.pop()
        if length > count:
            self._kept.append(HostRun(first + count, length - count))
        return HostRun(first, min(count, length))

    def release_kept(self) -> None:
        """Free the clusters that :meth:`return_unused` took back."""
        kept, self._kept = self._kept, []
        self.freed.add(kept)

    async def _find(self, count: int, cluster: int) -> int:
        """Return the first cluster of the first run of ``count`` free ones from ``cluster`` on.

        ``start`` and ``have`` are the first cluster and the length of the run found so far, which may span blocks.
        """
        per_block = self.geometry.block_entries
        start = have = 0
        while have < count:
            block_index, index = divmod(cluster, per_block)
            if block_index >= len(self.table):
                break  # everything behind the table is free, so the run is as long as it needs to be
            offset = self.table[block_index]
            if not offset:
                # Without a block all clusters of its range are free.
                at, run = index, min(count - have, per_block - index)
            elif self._full[block_index]:
                following = self._full.find(0, block_index)
                cluster, have = (following if following >= 0 else len(self.table)) * per_block, 0
                continue  # nothing is free before the next block that is not known to be full
            else:
                block = await self.blocks.load(offset)
                if have:
                    at, run = 0, self.codec.free_run(block, 0, min(count - have, per_block))
                else:
                    at, run = self._find_in_block(block, block_index, index, count)
            if not have:
                start = block_index * per_block + at
            have += run
            cluster = block_index * per_block + at + run
            if have < count and at + run < per_block:
                have = 0  # the run is too short and ends inside the block: search on behind it
        # Without a run, everything from `cluster` on lies behind the table.
        first = start if have else cluster
        if first + count > MAX_HOST_OFFSET >> self.geometry.cluster_bits:
            raise NoSpaceError(
                f"'{self.image.filename}' has reached the largest file that qcow2 can describe.", errno=errno.EFBIG
            )
        return first

    def _find_in_block(self, block: bytearray, block_index: int, index: int, count: int) -> tuple[int, int]:
        at, run = self.codec.find_free(block, index, count)
        if not run and not index and not (count > 1 and self.codec.find_free(block, 0, 1)[1]):
            self._full[block_index] = 1
        return (at, run) if run else (self.geometry.block_entries, 0)

    def _missing_blocks(self, first: int, count: int) -> list[int]:
        per_block = self.geometry.block_entries
        indices = range(first // per_block, (first + count - 1) // per_block + 1)
        return [index for index in indices if not self._has_block(index)]

    def _has_block(self, block_index: int) -> bool:
        return block_index < len(self.table) and bool(self.table[block_index])

    async def _check_free(self, first: int, count: int) -> None:
        """Refuse to overwrite metadata, whatever the refcounts say."""
        bits = self.geometry.cluster_bits
        start, end = first << bits, first + count << bits
        what = self.image.occupied_at(start, end - start)
        if what is not None:
            raise await self.image.mark_corrupt(
                f"its refcounts say that {count} clusters at {start} are free, but its {what} lies there"
            )

    # --- changing ---------------------------------------------------------------------------------------

    async def add(self, first: int, deltas: list[int]) -> list[HostRun]:
        """Change refcounts of neighbouring clusters whose blocks exist; returns the runs that dropped to zero."""
        per_block = self.geometry.block_entries
        freed: list[HostRun] = []
        done = 0
        while done < len(deltas):
            block_index, index = divmod(first + done, per_block)
            part = deltas[done : done + per_block - index]
            base = block_index * per_block
            freed += [HostRun(base + at, run) for at, run in await self._add_in_block(block_index, index, part)]
            done += len(part)
        return freed

    async def _add_in_block(self, block_index: int, index: int, deltas: list[int]) -> list[tuple[int, int]]:
        offset = self.table[block_index] if block_index < len(self.table) else 0
        first = block_index * self.geometry.block_entries + index
        try:
            if not offset:
                raise RefcountUnderflow
            block = await self.blocks.load(offset)
            position, data, freed = self.codec.added(block, index, deltas)
        except RefcountUnderflow:
            raise await self.image.mark_corrupt(
                f"the refcount of one of {len(deltas)} clusters in use at {first << self.geometry.cluster_bits} is 0"
            ) from None
        except RefcountOverflow:
            raise ImageError(
                f"'{self.image.filename}' has refcounts of {self.codec.bits} bits, which cannot count one "
                "more reference."
            ) from None
        self._put(block_index, block, position, data)
        self.blocks.put(offset, block)
        if freed:
            self._spare_end = self._spare  # the lowest are used first
            if any(first - index + at <= self.open_cluster < first - index + at + run for at, run in freed):
                self.open_cluster = -1
            lowest = block_index * self.geometry.block_entries + freed[0][0]
            self._full[block_index] = 0
            self._first_free = min(self._first_free, lowest)
            self._next_run = min(self._next_run, lowest)
        return freed

    # --- writing ----------------------------------------------------------------------------------------

    def _is_dirty(self, offset: int) -> bool:
        return offset in self._dirty

    def _put(self, block_index: int, block: bytearray, position: int, data: bytes) -> None:
        """Change bytes of a block in memory."""
        offset, end = self.table[block_index], position + len(data)
        block[position:end] = data
        low, high = self._dirty.get(offset, (position, end))
        self._dirty[offset] = min(low, position), max(high, end)
        if self.image.changes is not None:
            self.image.changes.add(Kind.REFCOUNTS, offset + position, data)
        if self.changed is not None:
            self.changed.add(block_index)

    @property
    def dirty_blocks(self) -> int:
        """The number of blocks that differ from the file."""
        return len(self._dirty)

    @property
    def dirty(self) -> bool:
        """Whether any change is not in the file."""
        return bool(self._dirty or self._unhooked)

    async def write_blocks(self) -> list[int]:
        """Write what was changed in blocks.

        Returns the entries of the table that :meth:`hook_up` may write behind a barrier.
        """
        for offset in sorted(self._dirty):
            first, end = self._dirty[offset]
            block = self.blocks.tables[offset]
            await self.image.announce("refblock_update")
            await self.image.put_bytes(offset + first, block[first:end])
            # Nobody can have changed the block meanwhile: this runs under the mutex.
            del self._dirty[offset]
        return sorted(self._unhooked)

    async def hook_up(self, indices: list[int]) -> None:
        """Write the table entries of new blocks, which must be on disk already."""
        for index in indices:
            if index in self._unhooked:
                await self.image.announce("refblock_alloc_hookup")
                await self.image.announce("reftable_update")
                position = self.image.header.refcount_table_offset + 8 * index
                await self.image.put_bytes(position, self._unhooked[index].to_bytes(8, "big"))
                del self._unhooked[index]

    def take_over(self, table: array[int]) -> None:
        """Adopt a new refcount table that is already in the file, together with its moved blocks."""
        for offset in set(self.table) - set(table):
            self._dirty.pop(offset, None)
            self.blocks.drop(offset)
        self._unhooked.clear()
        self._take_table(table)
        self._first_free = self._next_run = 0
        self._spare_end = self._spare
        self.open_cluster = -1
        if self.image.changes is not None:
            # The file has all changes, and the old blocks may be used for other things at once.
            self.image.changes.clear()

    # --- growing ----------------------------------------------------------------------------------------

    async def _add_blocks(self, indices: list[int], pause: Pause | None) -> None:
        """Make progress towards the blocks for ``indices``. Other tasks run meanwhile if there are many."""
        for number, block_index in enumerate(indices, 1):
            if not self._has_block(block_index):
                await self._add_block(block_index)
            if pause is not None:
                await pause()
            elif number % _BLOCKS_AT_ONCE == 0:
                refuse_to_wait()
                await trio.lowlevel.checkpoint()

    async def _add_block(self, block_index: int) -> None:
        """Make progress towards a block for ``block_index``: add it, or first a block or a table that it needs. Call it
        until the block exists."""
        await self.image.announce("refblock_alloc")
        per_block = self.geometry.block_entries
        cluster = await self._find(1, self._first_free)
        home, index = divmod(cluster, per_block)
        beyond = max(home, block_index)
        if beyond >= len(self.table):
            await self._grow_table(beyond)
            return
        await self._check_free(cluster, 1)
        block = bytearray(self.geometry.cluster_size)
        if not self.table[home]:
            self._set_to_one(block, index, 1)
        offset = cluster << self.geometry.cluster_bits
        self._used_end = max(self._used_end, offset + len(block))
        await self.image.announce("refblock_alloc_write")
        await self.image.put_new_table(offset, block)
        if self.table[home]:
            await self.add(cluster, [1])
            home = block_index
        self.table[home] = self._unhooked[home] = offset
        if self.image.changes is not None:
            position = self.image.header.refcount_table_offset + 8 * home
            self.image.changes.add(Kind.REFCOUNT_TABLE, position, offset.to_bytes(8, "big"))
        self.image.place_block(offset)
        self.blocks.put(offset, block)

    async def _grow_table(self, block_index: int) -> None:
        """Move the refcount table to a larger space, with an entry for ``block_index`` and enough blocks to count
        itself.
        """
        refuse_to_wait()
        # Cancelled half-way, memory and header would disagree about which table is active.
        with trio.CancelScope(shield=True):
            await self._move_table(block_index)

    async def _move_table(self, block_index: int) -> None:
        geometry, header = self.geometry, self.image.header
        await self.image.announce("reftable_grow")
        per_block, size = geometry.block_entries, geometry.cluster_size
        old_entries = len(self.table)
        table_clusters, blocks = self._new_table_size(block_index)
        if table_clusters * size > layout.MAX_REFCOUNT_TABLE_SIZE:
            raise NoSpaceError(
                f"'{self.image.filename}' needs a refcount table of {table_clusters * size} bytes to grow, "
                "but at most "
                f"{layout.MAX_REFCOUNT_TABLE_SIZE} are possible.",
                errno=errno.EFBIG,
            )
        first = old_entries * per_block
        offset = first << geometry.cluster_bits
        blocks_offset = offset + table_clusters * size
        await self._check_free(first, table_clusters + blocks)
        # The new table refers to all blocks, so the file must have them.
        await self.write_blocks()

        content = bytearray(blocks * size)
        self._set_to_one(content, 0, table_clusters + blocks)
        table = self.table + empty_table(table_clusters * (size // 8) - old_entries)
        for i in range(blocks):
            table[old_entries + i] = blocks_offset + i * size
        self._used_end = max(self._used_end, blocks_offset + len(content))
        await self.image.announce("refblock_alloc_write_blocks")
        await self.image.put_new_table(blocks_offset, content)
        await self.image.announce("refblock_alloc_write_table")
        await self.image.put_new_table(offset, encode_table(table))
        await self.image.barrier()
        await self.image.announce("refblock_alloc_switch_table")
        await self.image.put_header_fields(
            layout.REFCOUNT_TABLE_FIELDS, offset.to_bytes(8, "big") + table_clusters.to_bytes(4, "big")
        )
        old = HostRun(header.refcount_table_offset >> geometry.cluster_bits, header.refcount_table_clusters)
        header.refcount_table_offset, header.refcount_table_clusters = offset, table_clusters
        full = self._full
        self._take_table(table)
        self._full[: len(full)] = full
        self.image.place_fixed()
        self._unhooked.clear()
        await self.image.barrier()
        self.freed.add([old])

    def _set_to_one(self, content: bytearray, index: int, count: int) -> None:
        position, data = self.codec.encoded(content, index, [1] * count)
        content[position : position + len(data)] = data

    def _new_table_size(self, block_index: int) -> tuple[int, int]:
        """Return how many clusters the new table takes, and how many new blocks count the table and themselves."""
        size, per_block = self.geometry.cluster_size, self.geometry.block_entries
        old_entries = len(self.table)
        blocks = 1
        while True:
            entries = max(block_index + 1, old_entries + blocks, old_entries * 3 // 2)
            table_clusters = -(-entries * 8 // size)
            needed = -(-(table_clusters + blocks) // per_block)
            if needed <= blocks:
                return table_clusters, blocks
            blocks = needed
