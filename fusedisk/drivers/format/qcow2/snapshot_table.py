"""The snapshot table: reading, finding and writing its entries.

Source: docs/interop/qcow2.txt, "Snapshots".
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from typing import Any

from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request.snapshot import find_snapshot
from fusedisk.core.errors import ImageError, SnapshotNotFoundError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.entries import OFFSET_MASK, Geometry
from fusedisk.drivers.format.qcow2.image import SNAPSHOT_L2, Image

MAX_TABLE_SIZE = 1024 * layout.MAX_SNAPSHOTS
"""Bytes; QEMU's bound."""
MAX_EXTRA_DATA = 1024
NO_ICOUNT = (1 << 64) - 1
"""Stands for an unknown number of instructions."""

_FIXED = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQQ")
"""VM state size, disk size, icount."""
_READ_AHEAD = 64 << 10
_MAX_L1_CLUSTERS = 1 << 16


@dataclasses.dataclass(slots=True)
class Snapshot:
    """One entry of the snapshot table."""

    raw_id: bytes
    raw_name: bytes
    l1_table_offset: int
    l1_size: int
    """Number of entries."""
    date_seconds: int
    date_nanoseconds: int
    vm_clock: int
    """Nanoseconds that the guest had run."""
    vm_state_size: int
    """Bytes."""
    disk_size: int
    """Bytes; the image's own size where the entry does not say."""
    icount: int | None
    """Instructions executed, where the entry says."""
    unknown_extra: bytes = b""
    """Extra data behind what is known, byte for byte."""

    @property
    def id(self) -> str:
        """A number as text, unless another program chose it."""
        return self.raw_id.decode("utf-8", "surrogateescape")

    @property
    def name(self) -> str:
        """Need not be unique."""
        return self.raw_name.decode("utf-8", "surrogateescape")

    def information(self) -> dict[str, Any]:
        """As ``qemu-img info --output=json`` prints it."""
        return self.public().information()

    def public(self) -> SnapshotInfo:
        """The snapshot in the form that users see."""
        date = self.date_seconds * 10**9 + self.date_nanoseconds
        return SnapshotInfo(
            self.id, self.name, date, self.vm_clock, self.vm_state_size, self.disk_size, icount=self.icount
        )

    def encode(self) -> bytes:
        """The entry, without padding."""
        icount = NO_ICOUNT if self.icount is None else self.icount
        extra = _EXTRA.pack(self.vm_state_size, self.disk_size, icount) + self.unknown_extra
        fixed = _FIXED.pack(
            self.l1_table_offset,
            self.l1_size,
            len(self.raw_id),
            len(self.raw_name),
            self.date_seconds,
            self.date_nanoseconds,
            self.vm_clock,
            # Programs that read only the 32-bit field must see a snapshot without VM state, not with a part of it.
            self.vm_state_size if self.vm_state_size < 1 << 32 else 0,
            len(extra),
        )
        return fixed + extra + self.raw_id + self.raw_name


def find(snapshots: Sequence[Snapshot], id: str, filename: str) -> Snapshot:
    """Return the snapshot with this id. Raises SnapshotNotFoundError."""
    for snapshot in snapshots:
        if snapshot.id == id:
            return snapshot
    raise SnapshotNotFoundError(f"'{filename}' has no snapshot with the id '{id}'.")


async def load_snapshots(image: Image) -> tuple[list[Snapshot], int]:
    """The snapshot table and its length in bytes. Raises ImageError where it is longer than it can be, or
    ends too early.
    """
    reader = _TableReader(image)
    snapshots = [await _read_entry(reader, number) for number in range(image.header.nb_snapshots)]
    return snapshots, reader.position


def encode_snapshots(snapshots: Sequence[Snapshot], filename: str) -> bytes:
    """The whole table. Raises ImageError where there are more snapshots than there can be."""
    if len(snapshots) > layout.MAX_SNAPSHOTS:
        raise ImageError(f"'{filename}' has {layout.MAX_SNAPSHOTS} snapshots, the maximum: delete one first.")
    table = bytearray()
    for snapshot in snapshots:
        table += bytes(-len(table) % 8)
        table += snapshot.encode()
    if len(table) > MAX_TABLE_SIZE:
        raise ImageError(
            f"the snapshot table of '{filename}' would take {len(table)} bytes, but at most {MAX_TABLE_SIZE} are "
            "possible: delete a snapshot first."
        )
    return bytes(table)


def next_id(snapshots: Sequence[Snapshot]) -> bytes:
    """One more than the largest number that an id starts with, as QEMU chooses it."""
    return str(max((_leading_number(snapshot.raw_id) for snapshot in snapshots), default=0) + 1).encode()


def _leading_number(text: bytes) -> int:
    digits = 0
    while digits < len(text) and text[digits : digits + 1].isdigit():
        digits += 1
    return min(int(text[:digits] or b"0"), (1 << 63) - 1)


async def open_snapshot(image: Image, snapshots: Sequence[Snapshot], wanted: str) -> None:
    """Let the disk be that of the snapshot with the id or name ``wanted``. Raises SnapshotNotFoundError, and ImageError
    if the snapshot is invalid."""
    # Imported here: rarely needed.
    from fusedisk.drivers.format.qcow2.snapshot import read_l1

    known = [snapshot.public() for snapshot in snapshots]
    found = find(snapshots, find_snapshot(known, wanted, image.filename).id, image.filename)
    if found.disk_size >> 63:
        raise ImageError(
            f"'{image.filename}' has a disk of {found.disk_size} bytes in snapshot '{wanted}', expected less than 2^63."
        )
    image.l1[:] = await read_l1(image, found)
    image.header.size = found.disk_size


async def table_places(image: Image, snapshots: Sequence[Snapshot], *, writable: bool) -> dict[int, str]:
    """Return the clusters that the overlap checks guard for snapshots, by host offset, with what they hold. L2 tables
    are among them where the image is ``writable`` and the option asks for that."""
    tables = dict.fromkeys(_l1_clusters(snapshots, image.geometry), "snapshot's L1 table")
    if image.overlap_check == "all" and writable:
        for snapshot in snapshots:
            if snapshot.l1_size * 8 <= layout.MAX_L1_SIZE:
                l1 = await image.read_table(snapshot.l1_table_offset, snapshot.l1_size)
                tables |= {entry & OFFSET_MASK: SNAPSHOT_L2 for entry in l1 if entry & OFFSET_MASK}
    return tables


def _l1_clusters(snapshots: Sequence[Snapshot], geometry: Geometry) -> set[int]:
    """Host offsets of the clusters that hold the snapshots' L1 tables; of hostile snapshots, not of all of them."""
    found: set[int] = set()
    for snapshot in snapshots:
        start, length = snapshot.l1_table_offset, snapshot.l1_size * 8
        if start & geometry.cluster_mask or length > layout.MAX_L1_SIZE or len(found) > _MAX_L1_CLUSTERS:
            continue
        found.update(range(start, start + length, geometry.cluster_size))
    return found - {0}


class _TableReader:
    """Reads the snapshot table front to back, in bounded pieces."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.position = 0
        self._piece = bytearray()

    async def take(self, length: int) -> bytes:
        """The next ``length`` bytes (at most a few 100 KiB)."""
        while len(self._piece) < length:
            start = self.image.header.snapshots_offset + self.position + len(self._piece)
            count = min(_READ_AHEAD, self.image.storage.node.length - start)
            if count <= 0 or self.position + length > MAX_TABLE_SIZE:
                raise ImageError(
                    f"'{self.image.filename}' has {self.image.header.nb_snapshots} snapshots, but their "
                    "table goes on behind the "
                    f"file's end or is larger than {MAX_TABLE_SIZE} bytes, the maximum."
                )
            self._piece += await self.image.read(start, count)
        taken = bytes(self._piece[:length])
        del self._piece[:length]
        self.position += length
        return taken


async def _read_entry(reader: _TableReader, number: int) -> Snapshot:
    # The padding of the last entry need not be in the file.
    await reader.take(-reader.position % 8)
    fields = _FIXED.unpack(await reader.take(_FIXED.size))
    l1_offset, l1_size, id_size, name_size, seconds, nanoseconds, clock, vm_state_size, extra_size = fields
    if extra_size > MAX_EXTRA_DATA:
        raise ImageError(
            f"'{reader.image.filename}' has a snapshot with {extra_size} bytes of extra data, expected at most "
            f"{MAX_EXTRA_DATA}."
        )
    extra = await reader.take(extra_size)
    identity = await reader.take(id_size)
    name = await reader.take(name_size)
    more = [int.from_bytes(extra[at : at + 8], "big") for at in range(0, min(len(extra), _EXTRA.size) - 7, 8)]
    return Snapshot(
        raw_id=identity,
        raw_name=name,
        l1_table_offset=l1_offset,
        l1_size=l1_size,
        date_seconds=seconds,
        date_nanoseconds=nanoseconds,
        vm_clock=clock,
        vm_state_size=more[0] if more else vm_state_size,
        disk_size=more[1] if len(more) > 1 else reader.image.header.size,
        icount=more[2] if len(more) > 2 and more[2] != NO_ICOUNT else None,
        unknown_extra=extra[_EXTRA.size :],
    )
