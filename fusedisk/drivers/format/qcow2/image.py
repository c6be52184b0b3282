"""The state of one open image that all its parts share, and the only place that changes its metadata.

Changes of the L1 table and of L2 tables are made in memory; :mod:`.commit` brings them to the file in the order that
a power cut asks for, and refcounts with them (:mod:`.refcount`). What is written at once: whole tables into clusters
that nothing refers to, and fields of the header, around which the caller puts barriers. See
docs/explanation/durability.md.

Everything that changes metadata holds ``mutex``; those who only look at it need not. Holding it across
requests to the storage's door is safe, as nothing below calls back into the image.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from array import array
from bisect import bisect_left, insort
from collections.abc import Awaitable, Callable, Iterable

from fusedisk.block import io
from fusedisk.block.child import Child
from fusedisk.block.node import Node
from fusedisk.core.alone import checkpoint
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import CorruptImageError, FusediskError
from fusedisk.core.inflated_cache import InflatedCache, inflated_capacity
from fusedisk.core.locks import Mutex
from fusedisk.core.zeroes import ZEROES
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.cache import TableCache
from fusedisk.drivers.format.qcow2.entries import (
    COPIED,
    ENTRIES_AT_ONCE,
    FIRST_CLUSTER,
    OFFSET_MASK,
    ZERO,
    Geometry,
    empty_table,
    encode_table,
    swap_table,
    used_pieces,
)
from fusedisk.drivers.format.qcow2.layout import Header

log = logging.getLogger(__name__)

MIN_L2_TABLES = 2
_READ_AT_ONCE = 1 << 18
"""Entries of a table: as many as the largest L2 table has."""
INFLATED_BYTES = inflated_capacity()
"""Inflated clusters kept of each image."""
SNAPSHOT_L2 = "snapshot's L2 table"
"""What the overlap checks call it."""


BeforeChange = Callable[[bool], Awaitable[None]]


async def _no_preparation(disk: bool) -> None:
    """For an image that is being made."""


class DirtyTables:
    """What of the L1 and L2 tables the file does not have yet."""

    def __init__(self) -> None:
        self.l1: set[int] = set()
        """Indices of entries."""
        self.l2: dict[int, tuple[int, int]] = {}
        """For each L2 table, by host offset, the first entry that is changed and the one behind the last."""
        self.on_their_way: frozenset[int] = frozenset()
        """L2 tables with entries that are about to be written."""
        self.ordered = False
        """Whether anything before must be durable before these entries are."""

    def __bool__(self) -> bool:
        return bool(self.l1 or self.l2)

    def pins(self, offset: int) -> bool:
        """Whether the L2 table must stay in memory."""
        return offset in self.l2 or offset in self.on_their_way

    def touch_l2(self, offset: int, first: int, end: int) -> None:
        """Entries from ``first`` to ``end`` were changed."""
        low, high = self.l2.get(offset, (first, end))
        self.l2[offset] = min(low, first), max(high, end)

    def forget_l2(self, offset: int) -> None:
        """The table is gone."""
        self.l2.pop(offset, None)


async def read_table(file: Node, offset: int, entries: int) -> array[int]:
    """A table of 64-bit entries in ``file``. Where it is long, others run meanwhile."""
    table = empty_table(entries)
    for start in range(0, entries, _READ_AT_ONCE):
        piece = table[start : start + _READ_AT_ONCE] if entries > _READ_AT_ONCE else table
        await io.read(file, offset + 8 * start, memoryview(piece).cast("B"))
        swap_table(piece)
        if piece is not table:
            table[start : start + len(piece)] = piece
            await checkpoint()
    return table


class Image:
    """One open image.

    ``storage`` is the edge to the node that holds it, and may be moved to another node while the image is
    open. ``fence`` stops writes once corruption is found, ``mapping_changed`` is called after every change of
    what guest offsets lead to.
    """

    def __init__(
        self,
        storage: Child,
        header: Header,
        filename: str,
        *,
        fence: Callable[[str], None],
        mapping_changed: Callable[[], None],
        overlap_check: str = "cached",
    ) -> None:
        self.storage = storage
        self.header = header
        self.filename = filename
        self.fence = fence
        self.mapping_changed = mapping_changed
        self.overlap_check = overlap_check
        self.writable = False
        """It was prepared for changes (see :mod:`.first_write`), and nothing has ended them since."""
        self.corrupt = False
        """Corruption was found."""
        self.before_change: BeforeChange = _no_preparation
        """Awaited under the mutex before anything in the file changes; True where that may be the guest's data."""
        self.geometry = Geometry(header)
        self.mutex = Mutex()
        self.data_file: Child | None = None
        """Where guest data lies, if not here."""
        self.barriers = True
        """False where nobody cares about power cuts: an image that is being created."""
        self.dirty = DirtyTables()
        self.l1: array[int] = array("Q")
        """Grows in place and is never replaced."""
        self.l2: TableCache[array[int]] = TableCache(self._read_l2, self.geometry.cluster_size, MIN_L2_TABLES)
        self.l2.is_pinned = self.dirty.pins
        self.inflated = InflatedCache(INFLATED_BYTES)
        """Content of compressed clusters by L2 entry; an entry that loses a reference goes."""
        self.fixed: list[tuple[int, int, str]] = []
        """Host ranges with their names that no guest data may ever lie in."""
        self.fixed_end = 0
        """Nothing of ``fixed`` lies at or behind this."""
        self.snapshot_table_size = 0
        """Bytes."""
        self.bitmap_directory_size = 0
        """Bytes."""
        self.snapshot_tables: dict[int, str] = {}
        """Host offsets of clusters that hold tables of snapshots, with what to call them."""
        self.scattered: array[int] = array("Q")
        """Host offsets of the clusters that hold refcount blocks or ``snapshot_tables``, sorted. For writing only."""
        self.l2_places: array[int] = array("Q")
        """Host offsets of the L2 tables that ``l1`` leads to, sorted. For writing only."""
        self.place_fixed()

    # --- reading ----------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytearray:
        """Bytes of the storage; zeroes past its end."""
        data = bytearray(length)
        await self.read_into(offset, memoryview(data))
        return data

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with bytes of the storage; zeroes past its end."""
        await io.read(self.storage.node, offset, buffer)

    async def load_l1(self) -> None:
        """Read the active L1 table."""
        self.l1 = await self.read_table(self.header.l1_table_offset, self.header.l1_size)

    async def read_table(self, offset: int, entries: int) -> array[int]:
        """A table of 64-bit entries."""
        return await read_table(self.storage.node, offset, entries)

    async def _read_l2(self, offset: int) -> array[int]:
        await self.announce("l2_load")
        table = await self.read_table(offset, self.geometry.l2_words)
        no_zero = 0 if self.geometry.extended_l2 else ZERO
        if self.data_file is not None and table[0] & (COPIED | OFFSET_MASK | no_zero) == COPIED:
            table[0] |= FIRST_CLUSTER
        return table

    def encode_l2(self, table: array[int], first: int = 0, end: int | None = None) -> memoryview:
        """The bytes of a part of an L2 table."""
        entries = table[first:end]
        if self.data_file is not None and not first and entries[0] & OFFSET_MASK == FIRST_CLUSTER:
            entries[0] &= ~FIRST_CLUSTER
        return encode_table(entries)

    # --- fixed places -----------------------------------------------------------------------------------

    def place_fixed(self) -> None:
        """Take the places of the fixed metadata from the header."""
        header, size = self.header, self.geometry.cluster_size
        places = [
            (0, size, "header"),
            (header.l1_table_offset, header.l1_size * 8, "L1 table"),
            (header.refcount_table_offset, header.refcount_table_size(), "refcount table"),
            (header.snapshots_offset, self.snapshot_table_size, "snapshot table"),
            (*(header.crypto_header or (0, 0)), "LUKS header"),
            (
                header.bitmap_directory.offset if header.bitmap_directory else 0,
                self.bitmap_directory_size,
                "bitmap directory",
            ),
        ]
        if self.overlap_check == "none":
            places = []
        self.fixed = [(start, start + (-(-length // size) * size), what) for start, length, what in places if length]
        self.fixed_end = max((end for _, end, _ in self.fixed), default=0)

    def fixed_at(self, start: int, length: int) -> str | None:
        """The name of the fixed metadata that a host range touches."""
        end = start + length
        for low, high, what in self.fixed:
            if start < high and low < end:
                return what
        return None

    def metadata_at(self, start: int, length: int) -> str | None:
        """The name of the metadata other than L2 tables, which snapshots share, that a host range touches."""
        what = self._scattered_at(start, length)
        return what if what not in (None, SNAPSHOT_L2) else self.fixed_at(start, length)

    def _scattered_at(self, start: int, length: int) -> str | None:
        at = bisect_left(self.scattered, start)
        if at < len(self.scattered) and self.scattered[at] < start + length:
            return self.snapshot_tables.get(self.scattered[at], "refcount block")
        return None

    def occupied_at(self, start: int, length: int) -> str | None:
        """The name of the metadata that a host range touches, L2 tables included."""
        at = bisect_left(self.l2_places, start)
        if at < len(self.l2_places) and self.l2_places[at] < start + length:
            return "L2 table"
        return self._scattered_at(start, length) or self.fixed_at(start, length)

    @property
    def _guards_scattered(self) -> bool:
        return self.overlap_check in ("cached", "all")

    def place_blocks(self, blocks: Iterable[int]) -> None:
        """Take the places of the refcount blocks, and of the snapshots' tables."""
        if self._guards_scattered:
            self.scattered = array("Q", sorted({*filter(None, blocks), *self.snapshot_tables}))

    def place_block(self, offset: int) -> None:
        """There is a new refcount block."""
        if self._guards_scattered:
            insort(self.scattered, offset)

    async def sorted_l2(self, l1: array[int]) -> array[int]:
        """The host offsets of the L2 tables that ``l1`` leads to, for :attr:`l2_places`. Others run meanwhile."""
        if not self._guards_scattered:
            return array("Q")
        runs: list[array[int]] = []
        for _, piece in used_pieces(l1):
            found = array("Q", sorted(filter(None, [entry & OFFSET_MASK for entry in piece])))
            if runs and found and runs[-1][-1] <= found[0]:
                runs[-1].extend(found)
            elif found:
                runs.append(found)
            await checkpoint()
        if len(runs) < 2:
            return runs[0] if runs else array("Q")
        merged, rest = array("Q"), heapq.merge(*runs)
        while part := array("Q", itertools.islice(rest, ENTRIES_AT_ONCE)):
            merged.extend(part)
            await checkpoint()
        return merged

    # --- corruption -------------------------------------------------------------------------------------

    async def corruption(self, reason: str) -> CorruptImageError:
        """Fence the image, mark it corrupt on disk, and return the error to raise. ``reason`` has no full
        stop.
        """
        refuse_to_wait()
        message = f"'{self.filename}' is corrupt: {reason}; 'fusedisk check -r all' may repair it."
        self.corrupt = True
        if self.writable:
            self.writable = False
            await self._mark_corrupt()
        self.fence(f"{reason}.")
        return CorruptImageError(message)

    async def _mark_corrupt(self) -> None:
        """Best effort: the error that is about to be raised matters more."""
        header = self.header
        if header.version < 3 or header.incompatible_features & layout.CORRUPT:
            return
        header.incompatible_features |= layout.CORRUPT
        try:
            await self._write(layout.INCOMPATIBLE_FIELD, header.incompatible_features.to_bytes(8, "big"))
        except FusediskError as exc:
            log.warning("%s: the corrupt bit could not be set: %s", self.filename, exc)

    # --- writing metadata -------------------------------------------------------------------------------

    async def announce(self, event: str) -> None:
        """Tell the storage what is about to be done to it; see :meth:`fusedisk.block.driver.Driver.debug_event`."""
        await self.storage.node.driver.debug_event(event)

    async def _write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await io.write(self.storage.node, offset, (memoryview(data),))

    async def put_new_table(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write a whole table into clusters that nothing refers to yet."""
        await self._write(offset, data)

    async def put_bytes(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write a part of a table; the order is the caller's business."""
        await self._write(offset, data)

    def put_l1_entry(self, index: int, entry: int) -> None:
        """Change one L1 entry in memory."""
        old, new = self.l1[index] & OFFSET_MASK, entry & OFFSET_MASK
        if old != new and self._guards_scattered:
            if old:
                del self.l2_places[bisect_left(self.l2_places, old)]
            if new:
                insort(self.l2_places, new)
        self.l1[index] = entry
        self.dirty.l1.add(index)
        self.dirty.ordered = True
        self.mapping_changed()

    async def put_new_l2(self, offset: int, table: array[int]) -> None:
        """Write an L2 table into a cluster that nothing refers to yet: what is answered before the next commit has its
        place on the host, should that be full by then."""
        await self.announce("l2_alloc_write")
        await self.put_new_table(offset, self.encode_l2(table))
        self.l2.put(offset, table)

    async def put_l2_entries(self, l1_index: int, index: int, entries: array[int], *, ordered: bool = True) -> None:
        """Change L2 entries, in memory, from entry ``index`` on in the table that the L1 entry leads to. An extended
        entry is two numbers in ``entries``.

        ``ordered``: refcounts or data that were written before must be durable before these entries are; not so where
        entries only lose something.
        """
        offset = self.l1[l1_index] & OFFSET_MASK
        table = await self.l2.load(offset)
        index *= self.geometry.entry_words
        table[index : index + len(entries)] = entries
        self.dirty.touch_l2(offset, index, index + len(entries))
        self.dirty.ordered |= ordered
        self.l2.put(offset, table)
        self.mapping_changed()

    async def put_header_fields(self, position: int, data: bytes) -> None:
        """Change neighbouring fields of the header.

        If the write fails the header is read back: where it holds the new fields all is well, where it holds
        the old ones the error is raised, and where neither can be told the image is fenced.
        """
        old = await self.read(position, len(data))
        try:
            await self._write(position, data)
        except FusediskError as exc:
            try:
                now = await self.read(position, len(data))
            except FusediskError:
                now = bytearray()
            if now == data:
                return
            if now != old:
                self.writable = False
                self.fence(f"A write of its header failed half-way: {exc}.")
            raise

    async def zero_host(self, offset: int, length: int) -> None:
        """Write zeroes into clusters of the file that nothing refers to yet."""
        if length > len(ZEROES):
            await io.write_zeroes(self.storage.node, offset, length)
        elif length:
            await io.write(self.storage.node, offset, (ZEROES[:length],))

    async def barrier(self) -> None:
        """Everything written so far is on the disk before anything that is written from now on."""
        if self.barriers:
            if self.data_file is not None:
                await io.flush(self.data_file.node)
            await io.flush(self.storage.node)

    # --- the L1 table -----------------------------------------------------------------------------------

    async def put_l1_table(self, offset: int, entries: int) -> None:
        """Move the active L1 table, which has no changes that the file lacks, filled up with zeroes, to new clusters
        whose refcounts the file has, and let the header refer to it.
        """
        table = self.l1 + empty_table(entries - len(self.l1))
        await self.announce("l1_grow_write_table")
        await self.put_new_table(offset, encode_table(table))
        await self.barrier()
        await self.announce("l1_grow_activate_table")
        await self.put_header_fields(layout.L1_FIELDS, entries.to_bytes(4, "big") + offset.to_bytes(8, "big"))
        self.header.l1_size, self.header.l1_table_offset = entries, offset
        self.l1.extend(table[len(self.l1) :])
        self.place_fixed()
        await self.barrier()
