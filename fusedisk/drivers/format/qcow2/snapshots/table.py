"""The snapshot table: reading, finding and writing its entries.

Opening and checking read it here, each by its own rules: opening refuses a table that goes on behind the file's end,
where a check reads zeroes, and a repair cuts off what is too long instead of refusing it.

Source: docs/interop/qcow2.txt, "Snapshots".
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request.snapshot import find_snapshot
from fusedisk.core.errors import ImageError, SnapshotNotFoundError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.entries import OFFSET_MASK, Geometry
from fusedisk.drivers.format.qcow2.image import SNAPSHOT_L2, Image
from fusedisk.drivers.format.qcow2.layout import Header

MAX_TABLE_SIZE = 1024 * layout.MAX_SNAPSHOTS
"""Bytes; QEMU's bound."""
MAX_EXTRA_DATA = 1024
MIN_EXTRA_DATA = 16
"""Bytes that version 3 asks for: VM state size and disk size."""
NO_ICOUNT = (1 << 64) - 1
"""Stands for an unknown number of instructions."""

_FIXED = struct.Struct(">QIHHIIQII")
MIN_ENTRY_SIZE = _FIXED.size
_EXTRA = struct.Struct(">QQQ")
"""VM state size, disk size, icount."""
_READ_AHEAD = 64 << 10
_MAX_L1_CLUSTERS = 1 << 16
_LONGEST_LABEL = 64
"""Letters of an id or a name in a message."""

Read = Callable[[int, int], Awaitable[bytearray]]
"""Reads bytes of the file, by offset and length."""
Refuse = Callable[[str], ImageError]
"""Makes an error from what is wrong, which continues the file's name: "has ..."."""


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
    extra_size: int = _EXTRA.size
    """Bytes of extra data that the file has."""

    @property
    def id(self) -> str:
        """A number as text, unless another program chose it."""
        return self.raw_id.decode("utf-8", "surrogateescape")

    @property
    def name(self) -> str:
        """Need not be unique."""
        return self.raw_name.decode("utf-8", "surrogateescape")

    @property
    def label(self) -> str:
        """Id and name for a message about an invalid snapshot."""
        return f"snapshot {_readable(self.raw_id)} ('{_readable(self.raw_name)}')"

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


def _readable(text: bytes) -> str:
    """Return a text for a message: printable, and cut if it is too long."""
    whole = "".join(filter(str.isprintable, text.decode(errors="replace")))
    return whole if len(whole) <= _LONGEST_LABEL else f"{whole[:_LONGEST_LABEL]}..."


@dataclasses.dataclass(slots=True)
class SnapshotTable:
    """The whole table."""

    snapshots: list[Snapshot]
    length: int = 0
    """Bytes that the entries take up."""
    dropped: int = 0
    """Entries that the header counts and that are more than there can be."""
    shortened: int = 0
    """Entries whose extra data is longer than it can be."""


async def load_snapshots(image: Image) -> tuple[list[Snapshot], int]:
    """The snapshot table and its length in bytes. Raises ImageError where it is longer than it can be, or
    ends too early.
    """
    file_end = image.storage.node.length
    table = await read_snapshots(image.read, image.header, partial(_refuse, image.filename), file_end=file_end)
    return table.snapshots, table.length


def _refuse(filename: str, what: str) -> ImageError:
    return ImageError(f"'{filename}' {what}.")


async def read_snapshots(
    read: Read, header: Header, refuse: Refuse, *, file_end: int | None = None, cut: bool = False
) -> SnapshotTable:
    """Read the table, no byte of it behind ``file_end``. With ``cut``, what is too long is cut off and counted.

    Raises what ``refuse`` returns for an invalid table.
    """
    count = header.nb_snapshots
    limit = MAX_TABLE_SIZE if file_end is None else min(file_end - header.snapshots_offset, MAX_TABLE_SIZE)
    reader = _TableReader(read, header.snapshots_offset, limit)
    table = SnapshotTable([], dropped=max(count - layout.MAX_SNAPSHOTS, 0))
    for number in range(min(count, layout.MAX_SNAPSHOTS)):
        before = reader.position
        try:
            table.snapshots.append(await _read_entry(reader, header, table, refuse, cut=cut))
        except _TooLongError:
            if not cut:
                raise refuse(
                    f"has {count} snapshots, but their table goes on behind the file's end or is larger than "
                    f"{MAX_TABLE_SIZE} bytes, the maximum"
                ) from None
            table.dropped, reader.position = count - number, before
            break
    table.length = reader.position
    return table


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
    from fusedisk.drivers.format.qcow2.snapshots.operations import read_l1

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


class _TooLongError(Exception):
    """The table goes on where it must not."""


class _TableReader:
    """Reads the snapshot table front to back, in bounded pieces."""

    def __init__(self, read: Read, offset: int, limit: int) -> None:
        self._read = read
        self._offset = offset
        self._limit = limit
        self.position = 0
        self._piece = bytearray()
        self._piece_start = 0

    def skip(self, length: int) -> None:
        """Pass over bytes. Raises _TooLongError where the table must not have that many."""
        if self.position + length > self._limit:
            raise _TooLongError
        self.position += length

    async def take(self, length: int) -> bytes:
        """Return the next ``length`` bytes (at most a few 100 KiB). Raises _TooLongError as :meth:`skip` does."""
        start = self.position
        self.skip(length)
        if length and start + length > self._piece_start + len(self._piece):
            count = min(max(length, _READ_AHEAD), self._limit - start)
            self._piece, self._piece_start = await self._read(self._offset + start, count), start
        at = start - self._piece_start
        return bytes(self._piece[at : at + length])


async def _read_entry(
    reader: _TableReader, header: Header, table: SnapshotTable, refuse: Refuse, *, cut: bool
) -> Snapshot:
    # The padding of the last entry need not be in the file.
    reader.skip(-reader.position % 8)
    fields = _FIXED.unpack(await reader.take(_FIXED.size))
    l1_offset, l1_size, id_size, name_size, seconds, nanoseconds, clock, vm_state_size, extra_size = fields
    if extra_size > MAX_EXTRA_DATA:
        if not cut:
            raise refuse(f"has a snapshot with {extra_size} bytes of extra data, expected at most {MAX_EXTRA_DATA}")
        table.shortened += 1
    extra = await reader.take(min(extra_size, MAX_EXTRA_DATA))
    reader.skip(extra_size - len(extra))
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
        disk_size=more[1] if len(more) > 1 else header.size,
        icount=more[2] if len(more) > 2 and more[2] != NO_ICOUNT else None,
        unknown_extra=extra[_EXTRA.size :],
        extra_size=extra_size,
    )
