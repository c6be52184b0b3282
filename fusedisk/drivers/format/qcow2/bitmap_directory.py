"""The directory of an image's persistent dirty bitmaps: what it holds, and what an entry must be. Bytes only, no I/O.

A bitmap has a bit for each 2^granularity bytes of the disk. It *tracks* where every writer must keep it up to date
(QEMU's flag ``auto``), and is *in use* from the first write to the disk until its writer has stored it: until then its
bits mean nothing.

Source: docs/interop/qcow2.txt, "Bitmaps".
"""

from __future__ import annotations

import dataclasses
import struct

from fusedisk.drivers.format.qcow2.layout import Header

IN_USE = 1 << 0
TRACKING = 1 << 1

TABLE_OFFSET_FIELD = 0
"""Position of the offset of the bitmap's table in an entry (8 bytes)."""
TABLE_SIZE_FIELD = 8
"""Position of the number of its entries (4 bytes)."""
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
