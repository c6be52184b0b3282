"""What the persistent bitmaps of an image take up.

Source: docs/interop/qcow2.txt, "Bitmaps".
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from fusedisk.core.errors import ImageError
from fusedisk.drivers.format.qcow2.check_open import BitmapDirectory, CheckedImage, Region

_ENTRY = struct.Struct(">QIIBBHI")
_MAX_TABLE_ENTRIES = 0x8000000
_MAX_BITMAP_SIZE = 0x20000000
_MIN_GRANULARITY_BITS, _MAX_GRANULARITY_BITS = 9, 31
_MAX_NAME = 1023
_RESERVED_FLAGS = 0xFFFFFFFC
_IN_USE = 1
_TRACKING = 1

TABLE_ENTRY_RESERVED = 0xFF000000000001FE
TABLE_ENTRY_OFFSET = 0x00FFFFFFFFFFFE00
TABLE_ENTRY_ONES = 1


class Bitmap(NamedTuple):
    """An entry of the directory."""

    table: Region
    name: bytes
    granularity_bits: int
    in_use: bool
    """Whoever wrote it last did not finish: its bits mean nothing."""


async def bitmap_directory(image: CheckedImage, directory: BitmapDirectory) -> list[Bitmap]:
    """The bitmaps. Raises ImageError where the directory or an entry of it cannot be."""
    data = await image.read(*directory.region)
    bitmaps: list[Bitmap] = []
    names: set[bytes] = set()
    position = 0
    while position < len(data):
        if position + _ENTRY.size > len(data) or len(bitmaps) == directory.bitmaps:
            raise _broken(image, "does not hold what the header says")
        offset, entries, flags, kind, granularity, name_size, extra_size = _ENTRY.unpack_from(data, position)
        name_at = position + _ENTRY.size + extra_size
        name = bytes(data[name_at : name_at + name_size]).split(b"\0")[0]
        position += (_ENTRY.size + name_size + extra_size + 7) & -8
        size = entries << image.cluster_bits
        if (
            not 0 < entries <= _MAX_TABLE_ENTRIES
            or not offset
            or offset & image.cluster_mask
            or not _MIN_GRANULARITY_BITS <= granularity <= _MAX_GRANULARITY_BITS
            or flags & _RESERVED_FLAGS
            or name_size > _MAX_NAME
            or kind != _TRACKING
            or extra_size
            or name in names
            or size > _MAX_BITMAP_SIZE
            or (not flags & _IN_USE and entries != _table_entries(image, granularity))
        ):
            raise _broken(image, f"has an entry {len(bitmaps)} that cannot be")
        bitmaps.append(Bitmap(Region(offset, entries * 8), name, granularity, bool(flags & _IN_USE)))
        names.add(name)
    if position != len(data) or len(bitmaps) != directory.bitmaps:
        raise _broken(image, "does not hold what the header says")
    return bitmaps


def _table_entries(image: CheckedImage, granularity: int) -> int:
    """Entries in the table of a bitmap of the whole disk; it is stored in whole words of 64 bits."""
    bits = image.header.size + (1 << granularity) - 1 >> granularity
    return -(-(bits + 63 >> 6 << 3) // image.cluster_size)


def wrong_entry(image: CheckedImage, entry: int) -> bool:
    """Whether an entry of a bitmap's table cannot be."""
    offset = entry & TABLE_ENTRY_OFFSET
    return bool(entry & TABLE_ENTRY_RESERVED or (offset and entry & TABLE_ENTRY_ONES) or offset & image.cluster_mask)


def _broken(image: CheckedImage, what: str) -> ImageError:
    return ImageError(f"'{image.filename}' cannot be checked: its directory of bitmaps {what}.")
