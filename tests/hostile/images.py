"""Images to break: small real ones, and where their metadata lies."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from tests.conftest import qemu_img, qemu_io


class Places(NamedTuple):
    """Where the metadata of a qcow2 image lies, as (offset, length)."""

    header: tuple[int, int]
    l1: tuple[int, int]
    refcount_table: tuple[int, int]
    refcount_blocks: list[tuple[int, int]]
    l2: list[tuple[int, int]]
    snapshots: tuple[int, int]

    def all(self) -> list[tuple[int, int]]:
        """Every place that the image has."""
        found = [self.header, self.l1, self.refcount_table, *self.refcount_blocks, *self.l2, self.snapshots]
        return [place for place in found if place[1]]


def places(image: bytes | bytearray) -> Places:
    """Read them from an image that is whole."""
    cluster_bits = struct.unpack_from(">I", image, 20)[0]
    size = 1 << cluster_bits
    l1_size, l1_offset = struct.unpack_from(">IQ", image, 36)
    table_offset, table_clusters, snapshots, snapshots_offset = struct.unpack_from(">QIIQ", image, 48)
    table = struct.unpack_from(f">{table_clusters * size // 8}Q", image, table_offset)
    l1 = struct.unpack_from(f">{l1_size}Q", image, l1_offset)
    mask = (1 << 56) - 512
    return Places(
        (0, size),
        (l1_offset, l1_size * 8),
        (table_offset, table_clusters * size),
        [(entry, size) for entry in table if entry],
        [(entry & mask, size) for entry in l1 if entry & mask],
        (snapshots_offset, 40 * snapshots),
    )


def small_image(path: Path, *, version: str = "1.1", cluster_size: int = 512, snapshot: bool = False) -> bytes:
    """A qcow2 image with data, zeroes, compressed clusters and holes; returns its bytes."""
    options = f"compat={version},cluster_size={cluster_size}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, str(192 * cluster_size))
    commands = [f"write -c -P {n + 1} {(2 * n + 100) * cluster_size} {cluster_size}" for n in range(4)]
    commands += [f"write -P {n + 60} {n * 7 * cluster_size} {2 * cluster_size}" for n in range(8)]
    if version == "1.1":
        commands += [f"write -z {80 * cluster_size} {4 * cluster_size}", f"write -z -u 0 {cluster_size}"]
    qemu_io(path, *commands, fmt="qcow2")
    if snapshot:
        qemu_img("snapshot", "-c", "one", path)
        qemu_io(path, f"write -P 99 0 {4 * cluster_size}", fmt="qcow2")
    return path.read_bytes()
