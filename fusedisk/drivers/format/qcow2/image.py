"""The state of one open image that all its parts share, and the only place that changes its metadata.

The L1 table and L2 tables change in memory; :mod:`.commit` writes the changes, and refcounts with them
(:mod:`.refcount`), in an order that survives a power cut. Written at once are whole tables into unreferenced clusters,
and fields of the header, around which the caller puts barriers. See docs/explanation/durability.md.

Code that changes metadata holds ``mutex``; code that only reads it need not. Holding the mutex across requests to the
storage's door is safe, as nothing below calls back into the image.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from array import array
from bisect import bisect_left, insort
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from fusedisk.block.model.edge import Child
from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.compression.inflated_cache import InflatedCache, inflated_capacity
from fusedisk.core.alone import checkpoint
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import CorruptImageError, FusediskError
from fusedisk.core.locks import Mutex
from fusedisk.core.zeroes import ZEROES
from fusedisk.drivers.format.change_log import ChangeLog
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.changes import Kind
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
from fusedisk.drivers.format.table_cache import TableCache

log = logging.getLogger(__name__)

MIN_L2_TABLES = 2
_READ_AT_ONCE = 1 << 18
"""The number of entries that one step reads: those of the largest L2 table."""
INFLATED_BYTES = inflated_capacity()
"""The most bytes of inflated clusters kept for each image."""
SNAPSHOT_L2 = "snapshot's L2 table"
"""Its name in the overlap checks."""


BeforeChange = Callable[[bool], Awaitable[None]]


class MappingWatcher(Protocol):
    """Told of changes of L1 and L2 tables in memory, just before each. Synchronous, and under the mutex."""

    def table_changes(self, l1_index: int, table: array[int]) -> None:
        """The L2 table that an L1 entry leads to is to change, or that entry; so far the table is ``table``."""

    def entry_changes(self, l1_index: int, old: int, new: int) -> None:
        """An L1 entry is to lead from the host offset ``old`` to ``new``, which is another."""


async def _no_preparation(disk: bool) -> None:
    """Do nothing, for an image that is being created."""


class DirtyTables:
    """The changes of L1 and L2 tables that are not in the file yet."""

    def __init__(self) -> None:
        self.l1: set[int] = set()
        """Indices of changed entries."""
        self.l2: dict[int, tuple[int, int]] = {}
        """For each L2 table, by host offset, the range of changed entries: the first, and the one behind the last."""
        self.on_their_way: frozenset[int] = frozenset()
        """L2 tables with entries that are being written."""
        self.ordered = False
        """Whether something written earlier must be on disk before these entries are."""

    def __bool__(self) -> bool:
        return bool(self.l1 or self.l2)

    def pins(self, offset: int) -> bool:
        """Whether the L2 table must stay in memory."""
        return offset in self.l2 or offset in self.on_their_way

    def touch_l2(self, offset: int, first: int, end: int) -> None:
        """Note that the entries from ``first`` to ``end`` were changed."""
        low, high = self.l2.get(offset, (first, end))
        self.l2[offset] = min(low, first), max(high, end)

    def forget_l2(self, offset: int) -> None:
        """Drop the changes of a table that is gone."""
        self.l2.pop(offset, None)


async def read_table(file: Node, offset: int, entries: int) -> array[int]:
    """Read a table of 64-bit entries from ``file``. Other tasks run between steps if it is long."""
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

    ``storage`` is the edge to the node that holds it, which may be moved to another node while the image is open.
    ``fence`` stops writes once corruption is found, ``mapping_changed`` is called after every change of the mapping.
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
        """Prepared for changes (see :mod:`.first_write`), and not closed for them since."""
        self.corrupt = False
        """Corruption was found."""
        self.before_change: BeforeChange = _no_preparation
        """Awaited under the mutex before anything in the file changes; called with True if guest data may change."""
        self.geometry = Geometry(header)
        self.mutex = Mutex()
        self.data_file: Child | None = None
        """The external file for guest data, None if the image holds the data itself."""
        self.barriers = True
        """False if a power cut does not matter: for an image that is being created."""
        self.dirty = DirtyTables()
        self.changes: ChangeLog | None = None
        """Where each change in memory is also written down, None for nowhere."""
        self.l1: array[int] = array("Q")
        """Grows in place and is never replaced."""
        self.l2: TableCache[array[int]] = TableCache(self._read_l2, self.geometry.cluster_size, MIN_L2_TABLES)
        self.l2.is_pinned = self.dirty.pins
        self.inflated = InflatedCache(INFLATED_BYTES)
        """Content of compressed clusters by L2 entry; removed when the entry loses a reference."""
        self.fixed: list[tuple[int, int, str]] = []
        """Host ranges that must never hold guest data, with the names of the metadata in them."""
        self.fixed_end = 0
        """The end of the last range in ``fixed``."""
        self.snapshot_table_size = 0
        """Bytes."""
        self.bitmap_directory_size = 0
        """Bytes."""
        self.snapshot_tables: dict[int, str] = {}
        """Host offsets of clusters that hold tables of snapshots, with their names."""
        self.scattered: array[int] = array("Q")
        """Host offsets of the clusters that hold refcount blocks or ``snapshot_tables``, sorted. For writing only."""
        self.l2_places: array[int] = array("Q")
        """Host offsets of the L2 tables that ``l1`` leads to, sorted. For writing only."""
        self.watcher: MappingWatcher | None = None
        self.place_fixed()

    # --- reading ----------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytearray:
        """Return bytes of the storage; zeroes past its end."""
        return await io.read_bytes(self.storage.node, offset, length)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with bytes of the storage; zeroes past its end."""
        await io.read(self.storage.node, offset, buffer)

    async def load_l1(self) -> None:
        """Read the active L1 table."""
        self.l1 = await self.read_table(self.header.l1_table_offset, self.header.l1_size)

    async def read_table(self, offset: int, entries: int) -> array[int]:
        """Read a table of 64-bit entries."""
        return await read_table(self.storage.node, offset, entries)

    async def _read_l2(self, offset: int) -> array[int]:
        await self.announce("l2_load")
        table = await self.read_table(offset, self.geometry.l2_words)
        no_zero = 0 if self.geometry.extended_l2 else ZERO
        if self.data_file is not None and table[0] & (COPIED | OFFSET_MASK | no_zero) == COPIED:
            table[0] |= FIRST_CLUSTER
        return table

    def encode_l2(self, table: array[int], first: int = 0, end: int | None = None) -> memoryview:
        """Return a part of an L2 table as bytes."""
        entries = table[first:end]
        if self.data_file is not None and not first and entries[0] & OFFSET_MASK == FIRST_CLUSTER:
            entries[0] &= ~FIRST_CLUSTER
        return encode_table(entries)

    # --- where metadata lies ----------------------------------------------------------------------------
    #
    # ``fixed_at`` knows the metadata that the header leads to; ``metadata_at`` adds refcount blocks and the snapshots'
    # tables; ``occupied_at`` adds the L2 tables of the disk.

    def place_fixed(self) -> None:
        """Record where the fixed metadata lies, from the header."""
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
        self.mapping_changed()  # what lies there now must not be overwritten, whatever leads to it

    def fixed_at(self, start: int, length: int) -> str | None:
        """Return the name of the fixed metadata that a host range touches."""
        end = start + length
        for low, high, what in self.fixed:
            if start < high and low < end:
                return what
        return None

    def metadata_at(self, start: int, length: int) -> str | None:
        """Return the name of the metadata that a host range touches, except L2 tables, which snapshots share."""
        what = self._scattered_at(start, length)
        return what if what not in (None, SNAPSHOT_L2) else self.fixed_at(start, length)

    def _scattered_at(self, start: int, length: int) -> str | None:
        at = bisect_left(self.scattered, start)
        if at < len(self.scattered) and self.scattered[at] < start + length:
            return self.snapshot_tables.get(self.scattered[at], "refcount block")
        return None

    def occupied_at(self, start: int, length: int) -> str | None:
        """Return the name of the metadata that a host range touches, L2 tables included."""
        at = bisect_left(self.l2_places, start)
        if at < len(self.l2_places) and self.l2_places[at] < start + length:
            return "L2 table"
        return self._scattered_at(start, length) or self.fixed_at(start, length)

    @property
    def guards_scattered(self) -> bool:
        """Whether the overlap checks know scattered metadata."""
        return self.overlap_check in ("cached", "all")

    def place_blocks(self, blocks: Iterable[int]) -> None:
        """Record where the refcount blocks and the snapshots' tables lie."""
        if self.guards_scattered:
            self.scattered = array("Q", sorted({*filter(None, blocks), *self.snapshot_tables}))
            self.mapping_changed()

    def place_block(self, offset: int) -> None:
        """Record where a new refcount block lies."""
        if self.guards_scattered:
            insort(self.scattered, offset)
            self.mapping_changed()

    async def sorted_l2(self, l1: array[int], pause: Callable[[], Awaitable[None]] = checkpoint) -> array[int]:
        """Return the sorted offsets of the L2 tables of ``l1``, for :attr:`l2_places`. Others run in each ``pause``."""
        if not self.guards_scattered:
            return array("Q")
        runs: list[array[int]] = []
        for _, piece in used_pieces(l1):
            found = array("Q", sorted(filter(None, [entry & OFFSET_MASK for entry in piece])))
            if runs and found and runs[-1][-1] <= found[0]:
                runs[-1].extend(found)
            elif found:
                runs.append(found)
            await pause()
        if len(runs) < 2:
            return runs[0] if runs else array("Q")
        merged, rest = array("Q"), heapq.merge(*runs)
        while part := array("Q", itertools.islice(rest, ENTRIES_AT_ONCE)):
            merged.extend(part)
            await pause()
        return merged

    # --- corruption -------------------------------------------------------------------------------------

    async def mark_corrupt(self, reason: str) -> CorruptImageError:
        """Fence the image, mark it corrupt on disk, and return the error to raise. ``reason`` has no full
        stop.
        """
        refuse_to_wait()
        message = f"'{self.filename}' is corrupt: {reason}; 'fusedisk check -r all' may repair it."
        self.corrupt = True
        if self.changes is not None:
            self.changes.lose()
        if self.writable:
            self.writable = False
            await self._set_corrupt_bit()
        self.fence(f"{reason}.")
        return CorruptImageError(message)

    async def _set_corrupt_bit(self) -> None:
        """Set the corrupt bit. A failure is only logged: the error that is about to be raised matters more."""
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
        """Tell the storage about an event, see :meth:`fusedisk.block.model.driver.Driver.debug_event`."""
        await self.storage.node.driver.debug_event(event)

    async def _write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        await io.write(self.storage.node, offset, (memoryview(data),))

    async def put_new_table(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write a whole table into clusters that nothing refers to yet."""
        await self._write(offset, data)

    async def put_bytes(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write a part of a table; the caller is responsible for the order."""
        await self._write(offset, data)

    def put_l1_entry(self, index: int, entry: int) -> None:
        """Change one L1 entry in memory."""
        old, new = self.l1[index] & OFFSET_MASK, entry & OFFSET_MASK
        if old != new and self.watcher is not None:
            self.watcher.entry_changes(index, old, new)
        if old != new and self.guards_scattered:
            if old:
                del self.l2_places[bisect_left(self.l2_places, old)]
            if new:
                insort(self.l2_places, new)
        self.l1[index] = entry
        self.dirty.l1.add(index)
        self.dirty.ordered = True
        if self.changes is not None:
            self.changes.add(Kind.L1, self.header.l1_table_offset + 8 * index, entry.to_bytes(8, "big"))
        self.mapping_changed()

    async def put_new_l2(self, offset: int, table: array[int]) -> None:
        """Write an L2 table into a cluster that nothing refers to yet, so that its space is reserved on the host: the
        commit must not fail on a full disk after the write was answered."""
        await self.announce("l2_alloc_write")
        await self.put_new_table(offset, self.encode_l2(table))
        self.l2.put(offset, table)

    async def put_l2_entries(self, l1_index: int, index: int, entries: array[int], *, ordered: bool = True) -> None:
        """Change L2 entries, in memory, from entry ``index`` on in the table that the L1 entry leads to. An extended
        entry is two numbers in ``entries``.

        ``ordered``: refcounts or data written earlier must be on disk before these entries are. Not needed for entries
        that only lose a reference.
        """
        offset = self.l1[l1_index] & OFFSET_MASK
        table = await self.l2.load(offset)
        if self.watcher is not None:
            self.watcher.table_changes(l1_index, table)
        self.put_entries_now(offset, table, index, entries, ordered=ordered)
        self.l2.put(offset, table)

    def put_entries_now(
        self, offset: int, table: array[int], index: int, entries: array[int], *, ordered: bool = True
    ) -> None:
        """Do the same in the cached table at ``offset``, with nobody watching."""
        index *= self.geometry.entry_words
        end = index + len(entries)
        table[index:end] = entries
        self.dirty.touch_l2(offset, index, end)
        self.dirty.ordered |= ordered
        if self.changes is not None:
            self.changes.add(Kind.L2, offset + 8 * index, self.encode_l2(table, index, end))
        self.mapping_changed()

    async def put_header_fields(self, position: int, data: bytes) -> None:
        """Change neighbouring fields of the header.

        If the write fails, the header is read back: with the new fields in it all is well, with the old ones the error
        is raised, otherwise the image is fenced.
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
        """Flush, so that everything written so far is on disk before anything written later."""
        if self.barriers:
            if self.data_file is not None:
                await io.flush(self.data_file.node)
            await io.flush(self.storage.node)

    # --- the L1 table -----------------------------------------------------------------------------------

    async def put_l1_table(self, offset: int, entries: int) -> None:
        """Move the active L1 table, padded with zeroes, to new clusters and make the header refer to it. All changes of
        the table, and the clusters' refcounts, must be in the file already.
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


# --- information --------------------------------------------------------------------------------------


def specific_information(
    image: Image, bitmaps: list[dict[str, Any]], encryption: dict[str, Any] | None
) -> dict[str, Any]:
    """QMP's ``ImageInfoSpecificQCow2``; ``encryption`` is its member ``encrypt``, None without any."""
    header = image.header
    information: dict[str, Any] = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "compression-type": layout.COMPRESSION_NAMES[header.compression_type],
        "refcount-bits": image.geometry.refcount_bits,
    }
    if header.version >= 3:
        information |= {
            "lazy-refcounts": bool(header.compatible_features & layout.LAZY_REFCOUNTS),
            **({"bitmaps": bitmaps} if bitmaps else {}),
            "corrupt": bool(header.incompatible_features & layout.CORRUPT),
            "extended-l2": image.geometry.extended_l2,
            **_data_file(header),
        }
    if encryption is not None:
        information["encrypt"] = encryption
    return information


def _data_file(header: Header) -> dict[str, Any]:
    if not header.has_data_file:
        return {}
    name = {"data-file": header.data_file_name} if header.data_file_name is not None else {}
    return name | {"data-file-raw": header.has_raw_data_file}
