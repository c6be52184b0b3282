"""Internal snapshots: the snapshot table.

Source: docs/interop/qcow2.txt, "Snapshots".
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

from fusedisk.core.errors import ImageError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.entries import Geometry
from fusedisk.drivers.format.qcow2.image import Image

MAX_TABLE_SIZE = 1024 * layout.MAX_SNAPSHOTS
"""Bytes; QEMU's bound."""
MAX_EXTRA_DATA = 1024

_FIXED = struct.Struct(">QIHHIIQII")
_READ_AHEAD = 64 << 10
_MAX_L1_CLUSTERS = 1 << 16


@dataclasses.dataclass(slots=True)
class Snapshot:
    """One entry of the snapshot table."""

    id: str
    name: str
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
    extra: bytes
    """The extra data, byte for byte."""

    def information(self) -> dict[str, Any]:
        """As ``qemu-img info --output=json`` prints it."""
        information = {
            "vm-clock-nsec": self.vm_clock % 10**9,
            "name": self.name,
            "date-sec": self.date_seconds,
            "date-nsec": self.date_nanoseconds,
            "vm-clock-sec": self.vm_clock // 10**9,
            "id": self.id,
            "vm-state-size": self.vm_state_size,
        }
        return information if self.icount is None else {"icount": self.icount} | information


async def load_snapshots(image: Image) -> tuple[list[Snapshot], int]:
    """The snapshot table and its length in bytes. Raises ImageError where it is longer than it can be, or
    ends too early.
    """
    reader = _TableReader(image)
    snapshots = [await _read_entry(reader, number) for number in range(image.header.nb_snapshots)]
    return snapshots, reader.position


def l1_clusters(snapshots: list[Snapshot], geometry: Geometry) -> frozenset[int]:
    """Host offsets of the clusters that hold the snapshots' L1 tables; of hostile snapshots, not of all of them."""
    found: set[int] = set()
    for snapshot in snapshots:
        start, length = snapshot.l1_table_offset, snapshot.l1_size * 8
        if start & geometry.cluster_mask or length > layout.MAX_L1_SIZE or len(found) > _MAX_L1_CLUSTERS:
            continue
        found.update(range(start, start + length, geometry.cluster_size))
    return frozenset(found - {0})


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
                    f"file's end or is larger than the {MAX_TABLE_SIZE} bytes that were wanted at most."
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
            f"'{reader.image.filename}' has a snapshot with {extra_size} bytes of extra data, but at most "
            f"{MAX_EXTRA_DATA} were "
            f"wanted."
        )
    extra = await reader.take(extra_size)
    identity = await reader.take(id_size)
    name = await reader.take(name_size)
    more = [int.from_bytes(extra[at : at + 8], "big") for at in range(0, len(extra) - 7, 8)]
    return Snapshot(
        id=identity.decode("utf-8", "replace"),
        name=name.decode("utf-8", "replace"),
        l1_table_offset=l1_offset,
        l1_size=l1_size,
        date_seconds=seconds,
        date_nanoseconds=nanoseconds,
        vm_clock=clock,
        vm_state_size=more[0] if more else vm_state_size,
        disk_size=more[1] if len(more) > 1 else reader.image.header.size,
        icount=more[2] if len(more) > 2 and more[2] != (1 << 64) - 1 else None,
        extra=extra,
    )
