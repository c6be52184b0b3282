"""The log of ``blklogwrites``: the format of the kernel's dm-log-writes target. Bytes only, no I/O.

The first sector holds the superblock. From the second sector on come entries: a sector with the entry's fields,
behind which a mark keeps its text, and for a write its data in the sectors that follow. All numbers are
little-endian and count the log's own sectors. Source: Documentation/admin-guide/device-mapper/log-writes.rst of Linux.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from fusedisk.core.errors import ImageError

MAGIC = 0x6A736677736872
VERSION = 1
FLUSH = 1
FUA = 2
DISCARD = 4
MARK = 8
_KNOWN_FLAGS = FLUSH | FUA | DISCARD | MARK

MIN_SECTOR_SIZE = 512
MAX_SECTOR_SIZE = 1 << 23
"""QEMU's bound."""

_SUPERBLOCK = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")
SUPERBLOCK_LENGTH = _SUPERBLOCK.size
ENTRY_LENGTH = _ENTRY.size


class Superblock(NamedTuple):
    """What the log's first sector says."""

    entries: int
    sector_size: int
    """Bytes."""

    def encode(self) -> bytes:
        """The whole first sector."""
        return _SUPERBLOCK.pack(MAGIC, VERSION, self.entries, self.sector_size).ljust(self.sector_size, b"\0")


class Entry(NamedTuple):
    """One operation; places and lengths are in the log's sectors."""

    sector: int
    sectors: int
    flags: int = 0
    mark_length: int = 0
    """Bytes of text of a mark."""

    def encode(self, sector_size: int, mark: bytes = b"") -> bytes:
        """The entry's own sector."""
        return (_ENTRY.pack(self.sector, self.sectors, self.flags, self.mark_length) + mark).ljust(sector_size, b"\0")

    @property
    def data_sectors(self) -> int:
        """Sectors of data that follow the entry's own."""
        return 0 if self.flags & DISCARD else self.sectors


def is_sector_size(size: int) -> bool:
    """Whether a log may have sectors of ``size`` bytes."""
    return MIN_SECTOR_SIZE <= size <= MAX_SECTOR_SIZE and not size & (size - 1)


def parse_superblock(data: bytes | memoryview, filename: str) -> Superblock:
    """Raises ImageError where ``data`` is no superblock."""
    if len(data) < SUPERBLOCK_LENGTH:
        raise ImageError(f"'{filename}' has {len(data)} bytes, expected the {SUPERBLOCK_LENGTH} of a log.")
    magic, version, entries, sector_size = _SUPERBLOCK.unpack_from(data)
    if magic != MAGIC:
        raise ImageError(f"'{filename}' starts with {magic:#x}, expected a write log's {MAGIC:#x}.")
    if version != VERSION:
        raise ImageError(f"'{filename}' is a write log of version {version}, expected version {VERSION}.")
    if not is_sector_size(sector_size):
        raise ImageError(
            f"'{filename}' is a write log with sectors of {sector_size} bytes, expected a power of two from "
            f"{MIN_SECTOR_SIZE} to {MAX_SECTOR_SIZE}."
        )
    return Superblock(entries, sector_size)


def parse_entry(data: bytes | memoryview, number: int, sectors_left: int, filename: str) -> Entry:
    """The entry whose sector starts with ``data``; ``sectors_left`` is what the log has behind that sector.

    Raises ImageError for unknown flags, and for more data than the log has.
    """
    if len(data) < ENTRY_LENGTH:
        raise ImageError(f"'{filename}' ends before entry {number} of its log, which its superblock counts.")
    entry = Entry(*_ENTRY.unpack_from(data))
    if entry.flags & ~_KNOWN_FLAGS:
        raise ImageError(f"'{filename}' has the flags {entry.flags:#x} in entry {number}, unknown to write logs.")
    if entry.data_sectors > sectors_left:
        raise ImageError(
            f"'{filename}' has {entry.data_sectors} sectors of data in entry {number}, but only {sectors_left} are "
            "left."
        )
    return entry
