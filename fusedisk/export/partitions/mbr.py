"""The MBR, a DOS partition table: four entries in the first sector, and logical partitions in a chain of more such
sectors inside an extended partition.

Numbers are Linux's: 1 to 4 by place for the primary ones, from 5 on in the order of the chain for the logical ones. The
extended partition itself holds the chain and no data, so it is no partition here. Sectors have 512 bytes: nothing in
the table says otherwise.

Source: the UEFI specification, "Legacy MBR"; for the chain, what Linux and fdisk read.
"""

from __future__ import annotations

import dataclasses
import struct

from fusedisk.export.partitions.table import LAST_NUMBER, SECTOR, Partition, Read, Table

SIGNATURE = b"\x55\xaa"
SIGNATURE_AT = 510
PROTECTIVE = 0xEE
"""Type of the entry that says: there is a GPT."""
_EXTENDED = frozenset((0x05, 0x0F, 0x85))
_ENTRIES_AT = 446
_ENTRY = struct.Struct("<B3xB3xII")
"""Flag, type, first sector, number of sectors; between them addresses by cylinder, which nobody uses."""
_DISK_ID_AT = 440
_FLAGS = (0x00, 0x80)
_FIRST_LOGICAL = 5
_MOST_LINKS = 512
"""Links of all chains together; twice what can have numbers, as a link need not hold a partition."""


@dataclasses.dataclass(slots=True)
class Entry:
    """One entry of a sector; ``start`` and ``sectors`` in sectors."""

    flag: int
    type: int
    start: int
    sectors: int

    @property
    def extends(self) -> bool:
        """Whether it leads to logical partitions."""
        return bool(self.sectors) and self.type in _EXTENDED


def entries(sector: bytes | bytearray) -> list[Entry] | None:
    """The four entries of a sector, None if it has not the signature of an MBR or what stands there are no entries."""
    if len(sector) < SECTOR or sector[SIGNATURE_AT:SECTOR] != SIGNATURE:
        return None
    found = [Entry(*_ENTRY.unpack_from(sector, _ENTRIES_AT + _ENTRY.size * index)) for index in range(4)]
    return found if all(entry.flag in _FLAGS for entry in found) else None


async def read_mbr(read: Read, length: int, sector: bytes | bytearray, primary: list[Entry]) -> Table:
    """The partitions of a disk of ``length`` bytes whose first ``sector`` has the entries ``primary``."""
    table = Table("dos", SECTOR)
    disk_id = int.from_bytes(sector[_DISK_ID_AT : _DISK_ID_AT + 4], "little")
    for number, entry in enumerate(primary, 1):
        if entry.sectors and not entry.extends:
            table.partitions.append(_partition(disk_id, number, entry, entry.start))
    chain = _Chain(read, length, table, disk_id)
    for entry in primary:
        if entry.extends:
            await chain.follow(entry)
    table.check(length)
    return table


def _partition(disk_id: int, number: int, entry: Entry, start: int) -> Partition:
    return Partition(
        number, start * SECTOR, entry.sectors * SECTOR, f"{entry.type:#04x}", f"{disk_id:08x}-{number:02x}"
    )


class _Chain:
    """Follows the links of extended partitions, each at most once, and not without end."""

    def __init__(self, read: Read, length: int, table: Table, disk_id: int) -> None:
        self._read = read
        self._length = length
        self._table = table
        self._disk_id = disk_id
        self._next = _FIRST_LOGICAL
        self._seen: set[int] = set()

    async def follow(self, extended: Entry) -> None:
        """Take the logical partitions of one extended partition."""
        link: Entry | None = extended
        place, room = extended.start, extended.sectors
        while link is not None:
            problem = self._problem(place)
            if problem is not None:
                self._table.remarks.append(problem)
                return
            self._seen.add(place)
            found = entries(await self._read(place * SECTOR, SECTOR))
            if found is None:
                if place != extended.start:
                    self._table.remarks.append(
                        f"the logical partitions from number {self._next} on are lost, as sector {place} of their "
                        "chain is no partition table"
                    )
                return
            self._take(found, place, room, extended)
            link = next((entry for entry in found if entry.extends), None)
            if link is not None:
                place, room = extended.start + link.start, link.sectors

    def _problem(self, place: int) -> str | None:
        """Why the chain ends before the link at ``place``."""
        lost = f"the logical partitions from number {self._next} on are left out, as"
        if place in self._seen:
            return f"{lost} their chain comes back to sector {place}"
        if (place + 1) * SECTOR > self._length:
            return f"{lost} their chain goes on in sector {place}, past the disk's end at {self._length}"
        if self._next > LAST_NUMBER:
            return f"{lost} Linux has no numbers above {LAST_NUMBER}"
        if len(self._seen) >= _MOST_LINKS:
            return f"{lost} {_MOST_LINKS} links of their chain were enough"
        return None

    def _take(self, found: list[Entry], place: int, room: int, extended: Entry) -> None:
        """Add the partitions of one link at sector ``place``, which has ``room`` sectors."""
        for index, entry in enumerate(found):
            if not entry.sectors or entry.extends or self._next > LAST_NUMBER:
                continue
            start = place + entry.start
            # The last two are unused, so what stands there counts only if it makes sense.
            if index >= 2 and not (
                entry.start + entry.sectors <= room
                and extended.start <= start
                and start + entry.sectors <= extended.start + extended.sectors
            ):
                continue
            self._table.partitions.append(_partition(self._disk_id, self._next, entry, start))
            self._next += 1
