"""The persistent dirty bitmaps of an open image: their directory, marking them as in use, and resizing them.

A bitmap has a bit for each 2^granularity bytes of the disk. It *tracks* where every writer must keep it up to date
(QEMU's flag ``auto``), and is *in use* from the first write to the disk until its writer has stored it: until then its
bits mean nothing.

What writes to the disk is not recorded in them: a bitmap that tracks writes is marked as in use before the first one,
as QEMU does while it has an image open, and stays so. Those that track nothing, and everything that does not change the
disk, leave all of them as they are.

When the disk changes its length, new space counts as not changed, as in QEMU. While the disk changes all bitmaps are
marked as in use, so a crash leaves them invalid, never wrong. Then each is given a table for the new length, and bits
behind the disk's end are cleared, so that they do not come back when it grows.

Source: docs/interop/qcow2.txt, "Bitmaps".
"""

from __future__ import annotations

import dataclasses
import logging
import struct
from array import array
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from fusedisk.core.errors import FusediskError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.entries import HostRun, empty_table, encode_table
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.layout import Header

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver

log = logging.getLogger(__name__)

_MOST_NAMED = 3
"""Bitmaps that a message names."""


class Bitmaps:
    """The bitmaps of one image."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.found: list[Bitmap] = []
        self.offset = 0
        """Host offset of the directory."""
        self.broken = False
        """The directory is invalid: a writer must declare all bitmaps invalid."""

    async def load(self) -> None:
        """Read the directory, of which nothing is needed to read the disk."""
        image, header = self._image, self._image.header
        directory = header.bitmap_directory
        if directory is None:
            self.broken = bool(header.autoclear_features & layout.BITMAPS)
            return
        start, size = directory.offset, directory.size
        if not directory.is_possible(header) or start + size > image.storage.node.length:
            self.broken = True
            return
        try:
            self.found = parse_directory(await image.read(start, size), directory.bitmaps, header)
        except (InvalidDirectoryError, FusediskError) as exc:
            log.debug("%s: its directory of bitmaps %s", image.filename, exc)
            self.broken = True
            return
        self.offset = start
        image.bitmap_directory_size = size

    @property
    def tracking(self) -> list[Bitmap]:
        """The bitmaps that a write to the disk makes invalid."""
        return [bitmap for bitmap in self.found if bitmap.tracking]

    @property
    def valid(self) -> list[Bitmap]:
        """The bitmaps whose bits mean something."""
        return [bitmap for bitmap in self.found if not bitmap.in_use]

    async def mark(self, bitmaps: Iterable[Bitmap], *, in_use: bool) -> None:
        """Mark some as in use, or as stored; durable on return. Under the mutex. What may be valid in the file is so in
        memory, whatever fails: the next write to the disk marks it then."""
        changed = [bitmap for bitmap in bitmaps if bitmap.in_use != in_use]
        if changed and not in_use:
            # What makes them valid is durable first.
            await self._image.barrier()
        for bitmap in changed:
            flags = bitmap.flags ^ IN_USE
            if not in_use:
                bitmap.flags = flags
            await self.put_field(bitmap, FLAGS_FIELD, flags.to_bytes(4, "big"))
        if changed:
            await self._image.barrier()
        for bitmap in changed:
            bitmap.flags = bitmap.flags & ~IN_USE | (IN_USE if in_use else 0)

    async def put_field(self, bitmap: Bitmap, field: int, data: bytes) -> None:
        """Write a field of an entry of the directory; the order is the caller's business."""
        await self._image.put_bytes(self.offset + bitmap.position + field, data)

    def cost_of_writing(self) -> str | None:
        """Return what a write to the disk would make invalid, a sentence without its full stop; None if nothing."""
        filename, tracking = self._image.filename, self.tracking
        if self.broken and self._image.header.bitmap_directory is not None:
            return f"'{filename}' has an invalid directory of dirty bitmaps: the first write will drop all of them"
        if not tracking:
            return None
        return (
            f"'{filename}' has {label(tracking)}, which fusedisk does not keep up to date: the first write will make "
            f"{'it' if len(tracking) == 1 else 'them'} invalid"
        )

    def information(self) -> list[dict[str, Any]]:
        """As ``qemu-img info --output=json`` prints it."""
        names = ((IN_USE, "in-use"), (TRACKING, "auto"))
        return [
            {
                "flags": [name for flag, name in names if bitmap.flags & flag],
                "name": bitmap.label,
                "granularity": 1 << bitmap.granularity_bits,
            }
            for bitmap in self.found
        ]


def label(bitmaps: list[Bitmap]) -> str:
    """Return some bitmaps in words, the first few by their names."""
    names = [f"'{bitmap.label}'" for bitmap in bitmaps[:_MOST_NAMED]]
    if len(bitmaps) > _MOST_NAMED:
        names.append(f"{len(bitmaps) - _MOST_NAMED} more")
    if len(names) == 1:
        return f"the dirty bitmap {names[0]}"
    return f"the dirty bitmaps {', '.join(names[:-1])} and {names[-1]}"


# --- the directory ------------------------------------------------------------------------------------

IN_USE = 1 << 0
TRACKING = 1 << 1

TABLE_OFFSET_FIELD = 0
"""Position of the offset of the bitmap's table in an entry (8 bytes)."""
TABLE_SIZE_FIELD = 8
"""Position of the number of its entries (4 bytes)."""
TABLE_ENTRY_RESERVED = 0xFF000000000001FE
TABLE_ENTRY_OFFSET = 0x00FFFFFFFFFFFE00
TABLE_ENTRY_ONES = 1
FLAGS_FIELD = 12
"""Position of the flags (4 bytes)."""

MAX_TABLE_ENTRIES = 0x8000000
MAX_BITMAP_SIZE = 0x20000000
"""Bytes; QEMU's bounds, both."""

_ENTRY = struct.Struct(">QIIBBHI")
_MIN_GRANULARITY_BITS, _MAX_GRANULARITY_BITS = 9, 31
_MAX_NAME = 1023
_RESERVED_FLAGS = 0xFFFFFFFF & ~(IN_USE | TRACKING)
_DIRTY_TRACKING = 1
"""The only type of bitmap."""


class InvalidDirectoryError(ValueError):
    """The directory is invalid; the text continues "its directory of bitmaps"."""


@dataclasses.dataclass(slots=True)
class Bitmap:
    """An entry of the directory."""

    position: int
    """Where the entry starts, in bytes from the start of the directory."""
    name: bytes
    granularity_bits: int
    flags: int
    table_offset: int
    table_entries: int

    @property
    def in_use(self) -> bool:
        """The last writer did not store it: its bits mean nothing."""
        return bool(self.flags & IN_USE)

    @property
    def tracking(self) -> bool:
        """It is up to date, and every writer must keep it so."""
        return self.flags & (IN_USE | TRACKING) == TRACKING

    @property
    def label(self) -> str:
        """The name as a text."""
        return self.name.decode("utf-8", "replace")


def parse_directory(data: bytes | bytearray, count: int, header: Header) -> list[Bitmap]:
    """The bitmaps of a directory that is to hold ``count`` of them. Raises InvalidDirectoryError."""
    bitmaps: list[Bitmap] = []
    names: set[bytes] = set()
    position = 0
    while position < len(data):
        if position + _ENTRY.size > len(data) or len(bitmaps) == count:
            raise InvalidDirectoryError("does not hold what the header says")
        offset, entries, flags, kind, granularity, name_size, extra_size = _ENTRY.unpack_from(data, position)
        name_at = position + _ENTRY.size + extra_size
        name = bytes(data[name_at : name_at + name_size]).split(b"\0")[0]
        if (
            not 0 < entries <= MAX_TABLE_ENTRIES
            or not offset
            or offset % header.cluster_size
            or not _MIN_GRANULARITY_BITS <= granularity <= _MAX_GRANULARITY_BITS
            or flags & _RESERVED_FLAGS
            or name_size > _MAX_NAME
            or kind != _DIRTY_TRACKING
            or extra_size
            or name in names
            or entries << header.cluster_bits > MAX_BITMAP_SIZE
            or (not flags & IN_USE and entries != table_entries(header, granularity))
        ):
            raise InvalidDirectoryError(f"has an invalid entry {len(bitmaps)}")
        bitmaps.append(Bitmap(position, name, granularity, flags, offset, entries))
        names.add(name)
        position += (_ENTRY.size + name_size + extra_size + 7) & -8
    if position != len(data) or len(bitmaps) != count:
        raise InvalidDirectoryError("does not hold what the header says")
    return bitmaps


def bits_in(header: Header, granularity_bits: int) -> int:
    """Bits of a bitmap of the whole disk."""
    return header.size + (1 << granularity_bits) - 1 >> granularity_bits


def table_entries(header: Header, granularity_bits: int) -> int:
    """Entries in the table of such a bitmap, which is stored in whole words of 64 bits."""
    return -(-(bits_in(header, granularity_bits) + 63 >> 6 << 3) // header.cluster_size)


# --- a new length of the disk -------------------------------------------------------------------------


@asynccontextmanager
async def resizing(driver: Qcow2Driver) -> AsyncIterator[None]:
    """Let the disk become longer or shorter inside; its valid bitmaps fit it afterwards, also where that fails."""
    bitmaps, committer = driver.bitmaps, driver.committer
    valid = bitmaps.valid
    if not valid:
        yield
        return
    async with committer.exclusive():
        await bitmaps.mark(valid, in_use=True)
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True):
            await _fit_all(driver, valid)
        raise
    await _fit_all(driver, valid)


async def _fit_all(driver: Qcow2Driver, bitmaps: list[Bitmap]) -> None:
    """Ignore errors, since the resize itself is done."""
    fit: list[Bitmap] = []
    try:
        for bitmap in bitmaps if driver.image.writable else ():
            async with driver.committer.exclusive():
                if await _fit(driver, bitmap):
                    fit.append(bitmap)
        async with driver.committer.exclusive():
            driver.first_write.renew()
            await driver.bitmaps.mark(fit, in_use=False)
    except FusediskError as exc:
        log.debug("%s: %s", driver.image.filename, exc)
    lost = [bitmap for bitmap in bitmaps if bitmap.in_use]
    if lost:
        log.warning(
            "'%s' has %s, which could not follow its change of size and is invalid.", driver.image.filename, label(lost)
        )


async def _fit(driver: Qcow2Driver, bitmap: Bitmap) -> bool:
    """Let a bitmap that is marked as in use fit the disk; returns whether it can. Under the mutex."""
    image, size = driver.image, driver.image.geometry.cluster_size
    if not _is_possible(image, bitmap.table_offset, bitmap.table_entries * 8):
        return False
    table = await image.read_table(bitmap.table_offset, bitmap.table_entries)
    places = [entry & TABLE_ENTRY_OFFSET for entry in table]
    if any(entry & TABLE_ENTRY_RESERVED for entry in table):
        return False
    if not all(_is_possible(image, place, size) for place in places if place):
        return False
    entries = table_entries(image.header, bitmap.granularity_bits)
    if not 0 < entries <= MAX_BITMAP_SIZE // size:
        return False
    if entries != len(table):
        await _move_table(driver, bitmap, (table + empty_table(max(entries - len(table), 0)))[:entries])
        dropped = [HostRun(place >> image.geometry.cluster_bits, 1) for place in places[entries:] if place]
        driver.refcounts.freed.add(dropped)
    if entries <= len(places) and places[entries - 1]:
        bits = min(bits_in(image.header, bitmap.granularity_bits) - (entries - 1) * size * 8, size * 8)
        await _clear_bits(image, places[entries - 1], bits)
    return True


def _is_possible(image: Image, start: int, length: int) -> bool:
    """Whether a part of a bitmap may lie there."""
    inside = start + length <= image.storage.node.length
    return inside and not start & image.geometry.cluster_mask and image.occupied_at(start, length) is None


async def _move_table(driver: Qcow2Driver, bitmap: Bitmap, table: array[int]) -> None:
    """Give a bitmap another table, which is in the file as a whole whatever part of it the directory tells of."""
    image, geometry, refcounts = driver.image, driver.image.geometry, driver.refcounts
    clusters = geometry.clusters(8 * len(table))
    run = await refcounts.allocate(clusters, exact=True)
    offset = run.first << geometry.cluster_bits
    await driver.committer.write_refcounts()
    await image.put_new_table(offset, bytes(encode_table(table)).ljust(clusters << geometry.cluster_bits, b"\0"))
    fields = [(TABLE_OFFSET_FIELD, offset.to_bytes(8, "big")), (TABLE_SIZE_FIELD, len(table).to_bytes(4, "big"))]
    if len(table) < bitmap.table_entries:
        fields.reverse()
    for field, data in fields:
        await image.barrier()
        await driver.bitmaps.put_field(bitmap, field, data)
    refcounts.freed.add(
        [HostRun(bitmap.table_offset >> geometry.cluster_bits, geometry.clusters(8 * bitmap.table_entries))]
    )
    bitmap.table_offset, bitmap.table_entries = offset, len(table)


async def _clear_bits(image: Image, place: int, first: int) -> None:
    """Clear the bits of a bitmap's cluster from ``first`` on."""
    data = await image.read(place, image.geometry.cluster_size)
    kept = int.from_bytes(data, "little") & (1 << first) - 1
    cleared = kept.to_bytes(len(data), "little")
    if cleared != data:
        await image.put_bytes(place, cleared)
