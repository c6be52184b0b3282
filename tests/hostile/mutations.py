"""Broken qcow2 images: real ones, changed by seeded mutations that aim at their metadata."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

from tests.conftest import qemu_img, qemu_io
from tests.support.images import KIB, MIB, make_qcow2

_OFFSETS = 0x00FF_FFFF_FFFF_FE00


def plain_v2(path: Path) -> Path:
    """Version 2, a few clusters written."""
    return make_qcow2(path, 4 * MIB, *_WRITES, compat="0.10", cluster_size=4096)


def plain_v3(path: Path) -> Path:
    """Version 3 with zero clusters of both kinds."""
    commands = [*_WRITES, "write -z 256k 64k", "write -P 3 512k 64k", "write -z 512k 32k", "write -z -u 540k 4k"]
    return make_qcow2(path, 4 * MIB, *commands, cluster_size=4096)


def with_snapshots(path: Path) -> Path:
    """Three snapshots that share tables and clusters, one of them with VM state's marks of version 3."""
    make_qcow2(path, 4 * MIB, *_WRITES, cluster_size=4096)
    for number in range(3):
        qemu_img("snapshot", "-c", f"snapshot {number}", path)
        qemu_io(path, f"write -P {number} {number * 300}k 40k", "write -P 9 64k 4k", fmt="qcow2")
    return path


def old_snapshots(path: Path) -> Path:
    """Snapshots of a version 2 image."""
    make_qcow2(path, 2 * MIB, *_WRITES, compat="0.10", cluster_size=1024)
    for name in ("one", "two"):
        qemu_img("snapshot", "-c", name, path)
        qemu_io(path, "write -P 7 100k 10k", fmt="qcow2")
    return path


def compressed(path: Path) -> Path:
    """Compressed clusters, several in one host cluster, some of them overwritten."""
    commands = [f"write -c -P {index} {index * 16}k 16k" for index in range(40)]
    return make_qcow2(path, 4 * MIB, *commands, "write -P 77 100k 50k", cluster_size=16 * KIB)


def wide_refcounts(path: Path) -> Path:
    """64 bits."""
    return make_qcow2(path, 4 * MIB, *_WRITES, cluster_size=4096, refcount_bits=64)


def narrow_refcounts(path: Path) -> Path:
    """1 bit."""
    return make_qcow2(path, 4 * MIB, *_WRITES, cluster_size=4096, refcount_bits=1)


def odd_refcounts(path: Path) -> Path:
    """4 bits, with a snapshot."""
    make_qcow2(path, 4 * MIB, *_WRITES, cluster_size=4096, refcount_bits=4)
    qemu_img("snapshot", "-c", "x", path)
    qemu_io(path, "write -P 9 64k 4k", fmt="qcow2")
    return path


def tiny_clusters(path: Path) -> Path:
    """512 bytes: many tables and refcount blocks."""
    return make_qcow2(path, MIB, *_WRITES, cluster_size=512)


def tiny_snapshots(path: Path) -> Path:
    """512-byte clusters, compressed ones among them, 8-bit refcounts and a snapshot."""
    make_qcow2(path, 512 * KIB, "write -P 5 0 100k", "write -c -P 5 200k 512", cluster_size=512, refcount_bits=8)
    qemu_img("snapshot", "-c", "x", path)
    qemu_io(path, "write -P 9 64k 4k", fmt="qcow2")
    return path


def subclusters(path: Path) -> Path:
    """Extended L2 entries."""
    commands = [*_WRITES, "write -z 256k 20k", "write -c -P 4 1M 16k", "discard 8k 4k"]
    return make_qcow2(path, 4 * MIB, *commands, cluster_size=16 * KIB, extended_l2="on")


_WRITES = ["write -P 1 0 200k", "write -P 2 700k 100k", "write -P 3 1000k 3k"]

FEATURE_SETS: dict[str, Callable[[Path], Path]] = {
    make.__name__: make
    for make in (
        plain_v2,
        plain_v3,
        with_snapshots,
        old_snapshots,
        compressed,
        wide_refcounts,
        narrow_refcounts,
        odd_refcounts,
        tiny_clusters,
        tiny_snapshots,
        subclusters,
    )
}


class Places:
    """Where the metadata of an image is: host offsets of 8-byte fields, by kind."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        _, version, _, _, bits, _, _, l1_size, l1, table, table_clusters, snapshots, snapshot_table = (
            struct.unpack_from(">IIQIIQIIQQIIQ", image)
        )
        self.cluster_size = 1 << bits
        self.version = version
        incompatible = self._word(72) if version == 3 else 0
        step = 16 if incompatible & 16 else 8
        self.header = list(range(8, 112 if version == 3 else 72, 4))
        self.l1 = list(range(l1, l1 + 8 * l1_size, 8))
        self.l2 = [
            place
            for entry in self.l1
            if (offset := self._word(entry) & _OFFSETS)
            for place in range(offset, offset + self.cluster_size, 8)
            if step == 8 or self._word(place & -16)
        ]
        self.used_l2 = [place for place in self.l2 if self._word(place)]
        self.table = list(range(table, table + min(table_clusters * self.cluster_size, 256), 8))
        self.blocks = [
            place
            for entry in self.table
            if (offset := self._word(entry))
            for place in range(offset, offset + self.cluster_size, 8)
            if self._word(place) or place - offset < 64
        ]
        self.snapshots = list(range(snapshot_table, snapshot_table + 70 * snapshots, 4)) if snapshots else []

    def _word(self, place: int) -> int:
        return int.from_bytes(self.image[place : place + 8], "big")


def mutate(image: bytes, random_: random.Random) -> tuple[bytes, list[str]]:
    """A broken copy of ``image``, and what was done to it."""
    places = Places(image)
    broken = bytearray(image)
    done = []
    for _ in range(random_.choice([1, 1, 1, 2, 3, 6])):
        kind = random_.choices(
            ["header", "l1", "used_l2", "l2", "table", "blocks", "snapshots", "length"], [2, 3, 6, 1, 2, 4, 2, 1]
        )[0]
        if kind == "length":
            done.append(_change_length(broken, places, random_))
            continue
        candidates = getattr(places, kind)
        if candidates:
            done.append(f"{kind}: {_change_field(broken, places, random_.choice(candidates), random_)}")
    return bytes(broken), done


def _change_length(broken: bytearray, places: Places, random_: random.Random) -> str:
    change = random_.choice([-512, -places.cluster_size, -random_.randrange(len(broken)), 512, 3 * places.cluster_size])
    if change < 0:
        del broken[change:]
    else:
        broken += bytes(change)
    return f"length by {change}"


def _change_field(broken: bytearray, places: Places, place: int, random_: random.Random) -> str:
    if place + 8 > len(broken):
        return "nothing, it is cut off"
    old = broken[place : place + 8]
    kind = random_.randrange(8)
    if kind <= 1:
        bit = random_.randrange(64)
        value = int.from_bytes(old, "big") ^ 1 << bit
    elif kind == 2:
        value = random_.randrange(1 << 64)
    elif kind == 3:
        value = 0
    elif kind == 4:  # to a cluster that something else uses
        value = 1 << 63 | random_.randrange(len(broken) // places.cluster_size + 2) * places.cluster_size
    elif kind == 5:  # what another field holds
        other = random_.choice(places.l1 + places.used_l2 + places.table)
        value = int.from_bytes(places.image[other : other + 8], "big")
    elif kind == 6:
        value = int.from_bytes(old, "big") + random_.choice([1, -1, 512, -512, places.cluster_size]) & (1 << 64) - 1
    else:
        at = random_.randrange(8)
        value = int.from_bytes(old[:at] + bytes([random_.randrange(256)]) + old[at + 1 :], "big")
    broken[place : place + 8] = value.to_bytes(8, "big")
    return f"{old.hex()} at {place} became {value:016x}"
