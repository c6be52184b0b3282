"""What a guest reads from an image, by the plainest reading of the specification: the oracle that repairs are held to.

Each (sub)cluster of the disk and of every snapshot is told as its bytes, or as what has none: zeroes, unallocated, or
unreadable. Where encryption ties bytes to a place, that place is part of what is told.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import zstandard

from tests.mutation.images import Sample

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED, _ZERO = 1 << 62, 1
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_MOST_SNAPSHOTS = 16

UNREADABLE = "unreadable"
Content = bytes | str | tuple[int, bytes]
Disks = dict[tuple[bytes, bytes], dict[int, Content]]
"""By snapshot (id and name; both empty for the disk itself) the content by guest offset. Unallocated is left out."""


class Metadata(NamedTuple):
    """Host clusters that hold metadata."""

    bits: int
    clusters: frozenset[int]
    l2_tables: frozenset[int]
    """Those of them that hold L2 tables."""


class Guest:
    """One image as its bytes."""

    def __init__(self, image: bytes, sample: Sample, data: bytes | None, metadata: Metadata | None = None) -> None:
        """``metadata``: what held metadata before the damage, so tables are believed in there and data elsewhere."""
        self.image = image
        self.sample = sample
        self.version, _, _, self.bits = struct.unpack_from(">IQII", image, 4)
        self.size = 1 << self.bits
        self.disk_size, _, self.l1_size, self.l1 = struct.unpack_from(">QIIQ", image, 24)
        self.table, self.table_clusters, self.snapshots, self.snapshot_table = struct.unpack_from(">QIIQ", image, 48)
        incompatible = int.from_bytes(image[72:80], "big") if self.version == 3 else 0
        self.step = 16 if incompatible & 16 else 8
        self.zstd = bool(incompatible & 8)
        self.data = data if incompatible & 4 else None
        self.tables: set[int] = set()
        """Host clusters that hold metadata."""
        self.l2_tables: set[int] = set()
        self.known = metadata if metadata is not None and metadata.bits == self.bits else None
        self._mark(0, self.size)
        self._mark(self.l1, 8 * self.l1_size)
        self._mark(self.table, self.table_clusters << self.bits)
        for entry in self._words(self.table, self.table_clusters << self.bits):
            if entry & _OFFSET:
                self._mark(entry & _OFFSET, self.size)

    def metadata(self) -> Metadata:
        """What holds metadata in an image that is whole."""
        self.disks()
        return Metadata(self.bits, frozenset(self.tables), frozenset(self.l2_tables))

    def disks(self) -> Disks:
        """All that can be read."""
        tables = [((b"", b""), self.l1, self.l1_size), *self._snapshot_tables()]
        for _, offset, entries in tables:
            for entry in self._words(offset, 8 * entries):
                if entry & _OFFSET:
                    self._mark(entry & _OFFSET, self.size)
                    self.l2_tables.add((entry & _OFFSET) >> self.bits)
        return {name: dict(self._disk(offset, entries)) for name, offset, entries in tables}

    def _mark(self, start: int, length: int) -> None:
        end = min(start + length, len(self.image) + self.size)
        self.tables.update(range(start >> self.bits, end + self.size - 1 >> self.bits))

    def _words(self, start: int, length: int) -> list[int]:
        """Numbers of a table; what is behind the file's end is not there."""
        part = self.image[start : start + length]
        return [number for (number,) in struct.iter_unpack(">Q", part[: len(part) & -8])]

    def _snapshot_tables(self) -> Iterator[tuple[tuple[bytes, bytes], int, int]]:
        at = self.snapshot_table
        for _ in range(min(self.snapshots, _MOST_SNAPSHOTS)):
            if at + _SNAPSHOT.size > len(self.image):
                return
            offset, entries, id_size, name_size, *_, extra = _SNAPSHOT.unpack_from(self.image, at)
            start = at
            at += _SNAPSHOT.size + extra
            name = (self.image[at : at + id_size], self.image[at + id_size : at + id_size + name_size])
            at += id_size + name_size + 7 & -8
            if at > len(self.image):
                return
            self._mark(start, at - start)
            self._mark(offset, 8 * entries)
            if not offset & self.size - 1:
                yield name, offset, entries

    def _disk(self, l1: int, entries: int) -> Iterator[tuple[int, Content]]:
        span = self.size // self.step * self.size
        for index, entry in enumerate(self._words(l1, 8 * entries)):
            offset = entry & _OFFSET
            if not offset:
                continue
            if offset & self.size - 1 or (self.known is not None and offset >> self.bits not in self.known.l2_tables):
                yield index * span, UNREADABLE
                continue
            words = self._words(offset, self.size)
            for number in range(0, len(words), self.step // 8):
                bitmap = words[number + 1] if self.step == 16 and number + 1 < len(words) else None
                place = index * span + number * 8 // self.step * self.size
                yield from self._cluster(place, words[number], bitmap)

    def _cluster(self, place: int, entry: int, bitmap: int | None) -> Iterator[tuple[int, Content]]:
        offset = entry & _OFFSET
        if entry & _COMPRESSED:
            yield place, self._inflate(entry) if bitmap in (None, 0) else UNREADABLE
            return
        if bitmap is None:
            if entry & _ZERO and self.version == 3:
                yield place, "zeroes"
            elif offset or (self.data is not None and entry >> 63):
                yield place, self._bytes(offset, self.size)
            return
        part = self.size // 32
        for number in range(32):
            data, zero = bitmap >> number & 1, bitmap >> 32 + number & 1
            if data and zero:
                yield place + number * part, UNREADABLE
            elif zero:
                yield place + number * part, "zeroes"
            elif data:
                content = self._bytes(offset, self.size, number * part, part) if offset else UNREADABLE
                yield place + number * part, content

    def _bytes(self, offset: int, alignment: int, start: int = 0, length: int | None = None) -> Content:
        if offset & alignment - 1:
            return UNREADABLE
        source = self.image if self.data is None else self.data
        length = length or self.size
        at = offset + start
        if self.data is None:
            if self._is_metadata(offset):
                return UNREADABLE  # bytes that are no guest's
            if at >= len(source) and (self.sample.key or self.version == 2):
                return UNREADABLE  # the key makes noise of nothing; version 2 cannot keep zeroes that are nowhere
        content = source[at : at + length].ljust(length, b"\0")
        if self.sample.key == "luks":
            return at, content
        return content if content.strip(b"\0") else "zeroes"

    def _is_metadata(self, offset: int) -> bool:
        return self.known is not None and offset >> self.bits in self.known.clusters

    def _inflate(self, entry: int) -> Content:
        shift = 62 - (self.bits - 8)
        offset = entry & (1 << shift) - 1
        length = ((entry & _COMPRESSED - 1) >> shift) * 512 + 512 - offset % 512
        source = self.image[offset : offset + length]
        last = offset + max(len(source), 1) - 1 >> self.bits
        clusters = range(offset >> self.bits, last + 1)
        if self.data is not None or any(self._is_metadata(cluster << self.bits) for cluster in clusters):
            return UNREADABLE
        try:
            if self.zstd:
                content = zstandard.ZstdDecompressor().decompressobj().decompress(source)[: self.size]
            else:
                content = zlib.decompressobj(-15).decompress(source, self.size)
        except (zlib.error, zstandard.ZstdError):
            return UNREADABLE
        if len(content) < self.size:
            return UNREADABLE
        return content if content.strip(b"\0") else "zeroes"


def lost(before: Disks, after: Disks, nothing: str) -> list[str]:
    """What could be read before and reads otherwise now, a line each; ``nothing`` is how unallocated clusters read."""
    found = []
    for name, disk in before.items():
        other = after.get(name)
        if other is None:
            continue
        for place, content in disk.items():
            now = other.get(place, nothing)
            if content != UNREADABLE and now != content:
                disk_name = name[1].decode(errors="replace") or "the disk"
                found.append(f"{disk_name} at {place:#x}: {_short(content)} became {_short(now)}")
    return found


def _short(content: Content) -> str:
    return content if isinstance(content, str) else repr(content)[:40]
