"""The snapshot table as a check sees it: every entry, also such as :mod:`.snapshot` would refuse.

Source: docs/interop/qcow2.txt, "Snapshots".
"""

from __future__ import annotations

import dataclasses
import struct

from fusedisk.core.errors import ImageError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.check_open import MAX_L1_ENTRIES, CheckedImage, Region

MAX_TABLE_SIZE = 1024 * layout.MAX_SNAPSHOTS
MAX_EXTRA_DATA = 1024
V3_EXTRA_DATA = 16
"""What the extra data of an entry in a version 3 image holds at least: VM state size and disk size."""

_FIXED = struct.Struct(">QIHHIIQII")
_SIZES = struct.Struct(">QQ")
_READ_AHEAD = 64 << 10
_LONGEST_LABEL = 64
"""Letters of an id or a name in a message."""


@dataclasses.dataclass(slots=True)
class SnapshotEntry:
    """One entry, its texts and extra data byte for byte."""

    l1: Region
    """The snapshot's L1 table."""
    id: bytes
    name: bytes
    times: tuple[int, int, int]
    """Seconds and nanoseconds of the date, nanoseconds of the VM's clock."""
    vm_state_size: int
    extra: bytes

    @property
    def label(self) -> str:
        """For messages."""
        return f"snapshot {_readable(self.id)} ('{_readable(self.name)}')"

    def is_incomplete(self, image: CheckedImage) -> bool:
        """Whether the extra data lacks what version 3 asks for."""
        return image.header.version >= 3 and len(self.extra) < V3_EXTRA_DATA

    def wrong_l1(self, image: CheckedImage) -> str | None:
        """Why this cannot be the place of an L1 table; None where it can."""
        if self.l1.offset & image.cluster_mask:
            return f"its L1 table at {self.l1.offset:#x} does not start with a cluster"
        if self.l1.length > MAX_L1_ENTRIES * 8:
            return f"its L1 table has {self.l1.length // 8} entries"
        return None

    def encode(self, disk_size: int) -> bytes:
        """The entry with all that its version asks for; ``disk_size`` where it does not tell the disk's."""
        extra = self.extra
        if len(extra) < V3_EXTRA_DATA:
            vm_state_size = int.from_bytes(extra[:8], "big") if len(extra) >= 8 else self.vm_state_size
            extra = _SIZES.pack(vm_state_size, disk_size)
        seconds, nanoseconds, clock = self.times
        lengths = (self.l1.length // 8, len(self.id), len(self.name))
        fixed = _FIXED.pack(self.l1.offset, *lengths, seconds, nanoseconds, clock, self.vm_state_size, len(extra))
        encoded = fixed + extra + self.id + self.name
        return encoded + bytes(-len(encoded) % 8)


def _readable(text: bytes) -> str:
    """Return a text for a message: printable, and cut if it is too long."""
    whole = "".join(filter(str.isprintable, text.decode(errors="replace")))
    return whole if len(whole) <= _LONGEST_LABEL else f"{whole[:_LONGEST_LABEL]}..."


@dataclasses.dataclass(slots=True)
class SnapshotTable:
    """The whole table."""

    entries: list[SnapshotEntry]
    length: int
    """Bytes that the entries take up."""
    dropped: int = 0
    """Entries that the header counts and that are more than there can be."""
    shortened: int = 0
    """Entries whose extra data is longer than it can be."""


async def read_snapshot_table(image: CheckedImage, *, repair: bool) -> SnapshotTable:
    """Read the table. Where ``repair``, what is too long is cut off and counted instead of refused.

    Raises ImageError for an invalid table.
    """
    header = image.header
    count, offset = header.nb_snapshots, header.snapshots_offset
    if count > layout.MAX_SNAPSHOTS and not repair:
        raise _refuse(image, f"{count} snapshots, expected at most {layout.MAX_SNAPSHOTS}")
    if offset & image.cluster_mask or offset + min(count, layout.MAX_SNAPSHOTS) * _FIXED.size >> 63:
        raise _refuse(image, f"its snapshot table at {offset}, where none can be")
    table = SnapshotTable([], 0, dropped=max(count - layout.MAX_SNAPSHOTS, 0))
    reader = _Reader(image)
    for number in range(min(count, layout.MAX_SNAPSHOTS)):
        before = reader.position
        entry = await _read_entry(reader, number, table, repair=repair)
        if reader.position > MAX_TABLE_SIZE:
            if not repair:
                raise _refuse(image, f"a snapshot table larger than the {MAX_TABLE_SIZE} bytes that are possible")
            table.dropped += header.nb_snapshots - table.dropped - number
            reader.position = before
            break
        table.entries.append(entry)
    table.length = reader.position
    return table


def _refuse(image: CheckedImage, what: str) -> ImageError:
    return ImageError(f"'{image.filename}' cannot be checked: it has {what}.")


class _Reader:
    """Reads the table front to back, in bounded pieces; zeroes behind the file's end."""

    def __init__(self, image: CheckedImage) -> None:
        self.image = image
        self.position = 0
        self._piece = bytearray()
        self._piece_start = 0

    async def take(self, length: int) -> bytes:
        """The next ``length`` bytes (at most 64 KiB)."""
        at = self.position - self._piece_start
        if at < 0 or at + length > len(self._piece):
            start = self.image.header.snapshots_offset + self.position
            self._piece = await self.image.read(start, max(length, _READ_AHEAD))
            self._piece_start, at = self.position, 0
        self.position += length
        return bytes(self._piece[at : at + length])


async def _read_entry(reader: _Reader, number: int, table: SnapshotTable, *, repair: bool) -> SnapshotEntry:
    reader.position = (reader.position + 7) & -8
    fields = _FIXED.unpack(await reader.take(_FIXED.size))
    l1_offset, l1_size, id_size, name_size, seconds, nanoseconds, clock, vm_state_size, extra_size = fields
    if extra_size > MAX_EXTRA_DATA and not repair:
        raise _refuse(reader.image, f"{extra_size} bytes of extra data in entry {number} of its snapshot table")
    extra = await reader.take(min(extra_size, MAX_EXTRA_DATA))
    if extra_size > MAX_EXTRA_DATA:
        table.shortened += 1
        reader.position += extra_size - MAX_EXTRA_DATA
    identity = await reader.take(id_size)
    name = await reader.take(name_size)
    times = (seconds, nanoseconds, clock)
    return SnapshotEntry(Region(l1_offset, l1_size * 8), identity, name, times, vm_state_size, extra)
