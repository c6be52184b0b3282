"""Damaging an image: seeded changes that aim at its metadata."""

from __future__ import annotations

import random
import struct
from typing import Protocol

_OFFSETS = 0x00FF_FFFF_FFFF_FE00
_HEADER = struct.Struct(">IIQIIQIIQQIIQ")
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_BITMAP = struct.Struct(">QIIBBHI")
_BITMAPS_EXTENSION = 0x23852875
_FAR = (1 << 20, 1 << 31, 1 << 40, 1 << 55, 1 << 56, 1 << 62, (1 << 63) - 512)


class Metadata(Protocol):
    """Where the metadata of a whole image is, and what its fields lead to; see :class:`Places`."""

    image: bytes
    cluster_size: int
    kinds: dict[str, list[tuple[int, int]]]
    clusters: list[int]

    def field(self, offset: int) -> int:
        """Return what a field says that leads to this host offset."""


class Places:
    """Where the metadata of a whole qcow2 image is: host offsets of fields by kind, each with the field's length."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        _, self.version, _, _, bits, _, _, l1_size, l1, table, table_clusters, snapshots, snapshot_table = (
            _HEADER.unpack_from(image)
        )
        self.cluster_size: int = 1 << bits
        self._step = 16 if self.version == 3 and self.word(72) & 16 else 8
        self.kinds: dict[str, list[tuple[int, int]]] = {"header": self._header()}
        self.kinds["extensions"] = self._extensions()
        self.kinds["l1"] = _words(l1, 8 * l1_size)
        self.kinds["table"] = _words(table, min(table_clusters * self.cluster_size, 256))
        self.kinds["snapshots"] = []
        for _ in range(snapshots):
            snapshot_table = self._snapshot(snapshot_table)
        self.kinds["l2"] = [place for table in sorted(set(self._tables())) for place in self._l2(table)]
        self.kinds["used_l2"] = [place for place in self.kinds["l2"] if self.word(place[0])]
        self.kinds["blocks"] = [
            (at, 8)
            for place, _ in self.kinds["table"]
            if (offset := self.word(place))
            for at, _ in _words(offset, self.cluster_size)
            if self.word(at) or at - offset < 64
        ]
        self.clusters = sorted(
            {self.word(at) & _OFFSETS for kind in ("l1", "used_l2", "table") for at, _ in self.kinds[kind]}
        )
        """Host offsets that something refers to."""

    def field(self, offset: int) -> int:
        """Return what an entry says that leads to this host offset, but for its flags."""
        return offset

    def word(self, place: int) -> int:
        """Eight bytes as a number; 0 behind the end."""
        return int.from_bytes(self.image[place : place + 8].ljust(8, b"\0"), "big")

    def _header(self) -> list[tuple[int, int]]:
        lengths = [4, 8, 4, 4, 8, 4, 4, 8, 8, 4, 4, 8]
        if self.version == 3:
            lengths += [8, 8, 8, 4, 4, 8]
        places, at = [], 4
        for length in lengths:
            places.append((at, length))
            at += length
        return places

    def _extensions(self) -> list[tuple[int, int]]:
        """Types, lengths and data, and where the bitmaps' one leads to."""
        places: list[tuple[int, int]] = []
        at = struct.unpack_from(">I", self.image, 100)[0] if self.version == 3 else 72
        while at + 8 <= self.cluster_size:
            kind, length = struct.unpack_from(">II", self.image, at)
            if kind >= 0x8000_0000 or kind in (_BITMAPS_EXTENSION, 0x0537BE77, 0x44415441, 0x6803F857, 0):
                places += [(at, 4), (at + 4, 4), (at + 4, 4)]
            if not kind:
                break
            places += [(place, 4) for place in range(at + 8, at + 8 + min(length, 24), 4)]
            if kind == _BITMAPS_EXTENSION:
                count, _, _, directory = struct.unpack_from(">IIQQ", self.image, at + 8)
                self._bitmaps(directory, count)
            at += 8 + (length + 7 & -8)
        return places

    def _bitmaps(self, at: int, count: int) -> None:
        places = self.kinds.setdefault("bitmaps", [])
        for _ in range(count):
            table, entries, _, _, _, name, extra = _BITMAP.unpack_from(self.image, at)
            places += [(at, 8), (at + 8, 4), (at + 12, 4), (at + 16, 1), (at + 17, 1), (at + 18, 2), (at + 20, 4)]
            places += _words(table, 8 * entries) * 3
            at += _BITMAP.size + extra + name + 7 & -8

    def _snapshot(self, at: int) -> int:
        """Note the entry at ``at``; returns where the next one is."""
        offset, entries, id_size, name_size, _, _, _, _, extra = _SNAPSHOT.unpack_from(self.image, at)
        lengths = (8, 4, 2, 2, 4, 4, 8, 4, 4)
        places = [(at + sum(lengths[:index]), length) for index, length in enumerate(lengths)]
        self.kinds["snapshots"] += places + [(at + 40 + index, 4) for index in range(0, extra, 4)]
        self.kinds.setdefault("snapshot_l1", []).extend(_words(offset, 8 * entries))
        return at + 40 + int(extra + id_size + name_size) + 7 & -8

    def _tables(self) -> list[int]:
        places = self.kinds["l1"] + self.kinds.get("snapshot_l1", [])
        return [offset for place, _ in places if (offset := self.word(place) & _OFFSETS)]

    def _l2(self, table: int) -> list[tuple[int, int]]:
        places = _words(table, self.cluster_size)
        return places if self._step == 8 else [place for place in places if self.word(place[0] & -16)]


def _words(start: int, length: int) -> list[tuple[int, int]]:
    return [(place, 8) for place in range(start, start + length, 8)]


_WEIGHTS = {
    "header": 3, "extensions": 1, "l1": 3, "used_l2": 6, "l2": 1, "table": 2, "blocks": 4, "snapshots": 2,
    "snapshot_l1": 2, "bitmaps": 4, "length": 1, "directory": 2, "entries": 2, "used": 6,
}  # fmt: skip


def damage(places: Metadata, rng: random.Random) -> tuple[bytes, list[str]]:
    """A broken copy of an image, and what was done to it."""
    broken = bytearray(places.image)
    done = []
    kinds = [kind for kind in _WEIGHTS if kind == "length" or places.kinds.get(kind)]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        kind = rng.choices(kinds, [_WEIGHTS[kind] for kind in kinds])[0]
        if kind == "length":
            done.append(_change_length(broken, places, rng))
        else:
            done.append(f"{kind}: {_change_field(broken, places, *rng.choice(places.kinds[kind]), rng)}")
    return bytes(broken), done


def _change_length(broken: bytearray, places: Metadata, rng: random.Random) -> str:
    change = rng.choice((-512, -places.cluster_size, -rng.randrange(len(broken)), 512, 3 * places.cluster_size))
    if change < 0:
        del broken[change:]
    else:
        broken += bytes(change)
    return f"length by {change}"


def _change_field(broken: bytearray, places: Metadata, at: int, length: int, rng: random.Random) -> str:
    if at + length > len(broken):
        return "nothing, it is cut off"
    old = int.from_bytes(broken[at : at + length], "big")
    value = _new_value(old, broken, places, length, rng) & (1 << 8 * length) - 1
    broken[at : at + length] = value.to_bytes(length, "big")
    return f"{old:#x} at {at} became {value:#x}"


def _swapped(places: Metadata) -> list[str]:
    """The kinds of fields that are swapped with others."""
    return [kind for kind in ("l1", "used_l2", "table", "blocks", "used", "directory") if places.kinds.get(kind)]


def _new_value(old: int, broken: bytearray, places: Metadata, length: int, rng: random.Random) -> int:
    size = places.cluster_size
    match rng.randrange(11):
        case 0 | 1:
            return old ^ (1 << rng.randrange(8 * length))
        case 2:
            return rng.randrange(1 << (8 * length))
        case 3:
            return 0
        case 4:  # to some cluster, perhaps just behind the end
            return rng.choice((0, 1 << 63)) | places.field(rng.randrange(len(broken) // size + 2) * size)
        case 5:  # to a cluster that something else uses
            return 1 << 63 | places.field(int(rng.choice(places.clusters)))
        case 6:  # swapped with another field
            other, other_length = rng.choice(places.kinds[rng.choice(_swapped(places))])
            value = int.from_bytes(broken[other : other + other_length], "big")
            if length == other_length:
                broken[other : other + length] = old.to_bytes(length, "big")
            return value
        case 7:
            return old + rng.choice((1, -1, 512, -512, size))
        case 8:  # far behind the end
            return old & 0xFF << 56 | rng.choice(_FAR)
        case 9:
            return (1 << 8 * length) - 1
        case _:
            shift = 8 * rng.randrange(length)
            return (old & ~(0xFF << shift)) | (rng.randrange(256) << shift)
