"""A second reader of ``tiny`` images, which shares no line with the driver: the judge of its long tests."""

from __future__ import annotations

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

    def tables(self) -> Iterator[tuple[int, ...]]:
        """Yield the host offsets of each table's copies, empty for one that does not exist."""
        if self.levels == 1:
            yield (SECTOR,)
            return
        for pair in zip(self.words(SECTOR, self.count), self.words(SECTOR + self.directory, self.count), strict=True):
            yield tuple(entry * SECTOR for entry in pair if entry > 1)

    def entries(self) -> Iterator[int]:
        """Yield the entries of all blocks."""
        for places in self.tables():
            count = self.count if self.levels == 1 else PER_TABLE
            yield from self.words(places[0], count) if places else (0,) * count

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
        """Count corruptions and leaks, and tell of the first corruption."""
        wrong = []
        end = self.first
        for places in self.tables():
            count = self.count if self.levels == 1 else PER_TABLE
            if len(places) == 1 and self.levels == 2:
                wrong.append("a table without its copy")
            if len({self.words(place, count) for place in places}) > 1:
                wrong.append("a table that differs from its copy")
            end = max(end, *(place + 4 * count for place in places), 0)
        blocks = [entry * SECTOR for entry in self.entries() if entry > 1]
        if len(set(blocks)) < len(blocks):
            wrong.append("a block that is used twice")
        if any(place < self.first or place >= len(self.image) for place in blocks):
            wrong.append("a block outside of the file")
        if self.levels == 1 and any((place - self.first) % self.block for place in blocks):
            wrong.append("a block between the places for blocks")
        end = max([end, *(place + self.block for place in blocks if place < len(self.image))])
        return len(wrong), max(len(self.image) - end, 0) // self.block, "; ".join(wrong)


class Places:
    """The metadata of an image, for damage: host offsets of fields by kind, each with the field's length."""

    def __init__(self, image: bytes) -> None:
        reader = TinyReader(image)
        self.image = image
        self.cluster_size: int = reader.block
        header = [(8, 8), (16, 4), (20, 4), (24, 4), (28, 4)]
        tables = [place for places in reader.tables() for place in places]
        count = min(reader.count, PER_TABLE)
        entries = [(place + 4 * number, 4) for place in tables for number in range(count)]
        used = [place for place in entries if any(image[place[0] : place[0] + 4])]
        directory = [(SECTOR + 4 * number, 4) for number in range(16)] if reader.levels == 2 else []
        self.kinds: dict[str, list[tuple[int, int]]] = {"header": header, "entries": entries, "used": used}
        self.kinds["directory"] = directory
        self.clusters = [entry * SECTOR for entry in reader.entries() if entry > 1] or [reader.first]
        """Host offsets that something refers to."""
