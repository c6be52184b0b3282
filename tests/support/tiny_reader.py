"""A second reader of ``tiny`` images, which shares no line with the driver: the judge of its long tests."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

SECTOR = 512
PER_TABLE = 128


class TinyReader:
    """An image as bytes. Raises ValueError for what is no image."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        fields = struct.unpack_from(">8sQIIII", image.ljust(SECTOR, b"\0"))
        magic, self.length, self.block, self.count, self.levels, named = fields
        if magic != b"TINYDISK" or self.levels not in (1, 2) or not self.block:
            raise ValueError("no tiny image")
        self.backing = image[32 : 32 + named].decode(errors="replace")
        self.directory = -(-4 * self.count // SECTOR) * SECTOR
        self.first = SECTOR + self.levels * self.directory

    def words(self, place: int, count: int) -> tuple[int, ...]:
        """Return entries of the file; zeroes past its end."""
        raw = self.image[place : place + 4 * count].ljust(4 * count, b"\0")
        return struct.unpack(f">{count}I", raw)

    def tables(self, copy: int = 0) -> Iterator[int]:
        """Yield the host offset of each table, 0 for one that does not exist; of the first copies or the second."""
        if self.levels == 1:
            yield SECTOR
        else:
            yield from (entry * SECTOR for entry in self.words(SECTOR + copy * self.directory, self.count))

    def entries(self, copy: int = 0) -> Iterator[int]:
        """Yield the entries of all blocks."""
        count = self.count if self.levels == 1 else PER_TABLE
        for place in self.tables(copy):
            yield from self.words(place, count) if place else (0,) * count

    def disk(self, below: bytes) -> bytes:
        """Return the content of the disk over its backing file's."""
        content = bytearray(below[: self.length].ljust(self.length, b"\0"))
        for number, entry in enumerate(self.entries()):
            start = number * self.block
            end = min(start + self.block, self.length)
            if start >= end:
                break
            if entry == 1:
                content[start:end] = bytes(end - start)
            elif entry:
                place = entry * SECTOR
                content[start:end] = self.image[place : place + end - start].ljust(end - start, b"\0")
        return bytes(content)

    def check(self) -> tuple[int, int, str]:
        """Count corruptions and leaks, and tell of the corruptions. Copies that differ are no worse than a leak, but
        each must be sound by itself."""
        wrong = []
        end = self.first
        for copy in range(self.levels):
            blocks = [entry * SECTOR for entry in self.entries(copy) if entry > 1]
            tables = [place for place in self.tables(copy) if place] if self.levels == 2 else []
            taken = sorted(
                [(place, place + self.block) for place in blocks] + [(at, at + 4 * PER_TABLE) for at in tables]
            )
            if any(start < end for (_, end), (start, _) in itertools.pairwise(taken)):
                wrong.append("a place that is used twice")
            room = len(self.image) - (self.block - 1 if self.levels == 2 else 0)
            if any(place < self.first or place >= room for place in blocks):
                wrong.append("a place outside of the file")
            if self.levels == 1 and any((place - self.first) % self.block for place in blocks):
                wrong.append("a block between the places for blocks")
            inside = [place for place in blocks if place < len(self.image)]
            end = max([end, *(place + self.block for place in inside), *(place + 4 * PER_TABLE for place in tables)])
        leaks = max(len(self.image) - end, 0) // self.block
        stale = self.levels == 2 and [*self.entries(0)] != [*self.entries(1)]
        return len(wrong), leaks + stale, "; ".join(wrong)


class Places:
    """The metadata of an image, for damage: host offsets of fields by kind, each with the field's length."""

    def __init__(self, image: bytes) -> None:
        reader = TinyReader(image)
        self.image = image
        self.cluster_size: int = reader.block
        header = [(8, 8), (16, 4), (20, 4), (24, 4), (28, 4)]
        tables = [place for copy in range(reader.levels) for place in reader.tables(copy) if place]
        count = min(reader.count, PER_TABLE)
        entries = [(place + 4 * number, 4) for place in tables for number in range(count)]
        used = [place for place in entries if any(image[place[0] : place[0] + 4])]
        directory = [(SECTOR + 4 * number, 4) for number in range(16)] if reader.levels == 2 else []
        self.kinds: dict[str, list[tuple[int, int]]] = {"header": header, "entries": entries, "used": used}
        self.kinds["directory"] = directory
        self.clusters = [entry * SECTOR for entry in reader.entries() if entry > 1] or [reader.first]
        """Host offsets that something refers to."""

    def field(self, offset: int) -> int:
        """Return what an entry says that leads to this host offset."""
        return offset // SECTOR
