"""The GPT: a header and an array of entries at the start of the disk, and both again at its end.

Each copy has checksums; the first that is sound is taken. A sector may have 512 or 4096 bytes, which nothing in the
table says: a header that is sound where the size puts it says it.

Source: the UEFI specification, "GUID Partition Table (GPT) Disk Layout".
"""

from __future__ import annotations

import dataclasses
import struct
import uuid
import zlib

from fusedisk.export.partitions.mbr import PROTECTIVE, Entry
from fusedisk.export.partitions.table import Partition, Read, Table

SECTOR_SIZES = (512, 4096)
SIGNATURE = b"EFI PART"
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
"""Signature, revision, header size, its checksum, reserved; sectors of this header, of the other, the first and the
last that partitions may use; the disk's GUID; the array's first sector, number and size of entries, checksum."""
_CRC_AT = 16
_ENTRY = struct.Struct("<16s16sQQQ72s")
"""Type, GUID, first sector, last sector, attributes, name."""
_MAX_ENTRY_SIZE = 4096
_MAX_ARRAY = 4 << 20
"""Bytes; 256 times what is usual."""
_UNUSED = bytes(16)


class _Unsound(Exception):
    """A copy that cannot be taken; the message says why, as part of a sentence."""


@dataclasses.dataclass(slots=True)
class _Header:
    sector_size: int
    lba: int
    other_lba: int
    array_lba: int
    count: int
    entry_size: int
    array_crc: int


async def read_gpt(read: Read, length: int, protective: Entry) -> Table | str:
    """The partitions of a disk of ``length`` bytes, or why there are none, as part of a sentence.

    ``protective`` is the MBR's entry for the GPT; it tells where the disk ended when that was made.
    """
    reasons: list[str] = []
    others: list[tuple[int, int]] = []
    for size in SECTOR_SIZES:
        try:
            header = await _read_header(read, length, size, 1)
            if header.other_lba > 1:
                others.append((size, header.other_lba))
            return await _read_array(read, length, header)
        except _Unsound as exc:
            reasons.append(str(exc))
    # The sector size that got furthest has the most to say about what is wrong.
    why = next((reason for reason in reasons if "signature" not in reason), reasons[0])
    for size in SECTOR_SIZES:
        others += [(size, length // size - 1), (size, protective.start + protective.sectors - 1)]
    for size, lba in dict.fromkeys(others):
        try:
            header = await _read_header(read, length, size, lba)
            table = await _read_array(read, length, header)
        except _Unsound:
            continue
        table.remarks.insert(0, f"its GPT is damaged ({why}), so the backup in sector {lba} is taken")
        return table
    return f"its MBR says that there is a GPT, but that is damaged ({why}) and there is no sound backup of it"


async def _read_header(read: Read, length: int, size: int, lba: int) -> _Header:
    """The header in a sector, if it is sound."""
    if lba < 1 or (lba + 1) * size > length:
        raise _Unsound(f"the disk of {length} bytes has no sector {lba}")
    sector = await read(lba * size, size)
    if sector[:8] != SIGNATURE:
        raise _Unsound(f"sector {lba} has not the signature of a header")
    _, _, header_size, crc, _, my_lba, other_lba, _, _, _, array_lba, count, entry_size, array_crc = (
        _HEADER.unpack_from(sector)
    )
    if not _HEADER.size <= header_size <= size:
        raise _Unsound(f"a header of {header_size} bytes in a sector of {size}")
    found = zlib.crc32(sector[:_CRC_AT] + bytes(4) + sector[_CRC_AT + 4 : header_size])
    if found != crc:
        raise _Unsound(f"the header's checksum is {found:#010x} and should be {crc:#010x}")
    if my_lba != lba:
        raise _Unsound(f"the header in sector {lba} says that it is in sector {my_lba}")
    if entry_size < _ENTRY.size or entry_size > _MAX_ENTRY_SIZE or entry_size & (entry_size - 1):
        raise _Unsound(f"its entries have {entry_size} bytes")
    if not 0 < count * entry_size <= _MAX_ARRAY:
        raise _Unsound(f"it has {count} entries of {entry_size} bytes")
    return _Header(size, lba, other_lba, array_lba, count, entry_size, array_crc)


async def _read_array(read: Read, length: int, header: _Header) -> Table:
    """The entries of a sound header, if their checksum is right."""
    start, size = header.array_lba * header.sector_size, header.count * header.entry_size
    if start + size > length:
        raise _Unsound(f"its entries in sector {header.array_lba} lie past the disk's end")
    array = await read(start, size)
    found = zlib.crc32(array)
    if found != header.array_crc:
        raise _Unsound(f"the entries' checksum is {found:#010x} and should be {header.array_crc:#010x}")
    table = Table("gpt", header.sector_size)
    for index in range(header.count):
        kind, identity, first, last, _, name = _ENTRY.unpack_from(array, index * header.entry_size)
        if kind == _UNUSED:
            continue
        partition = Partition(
            number=index + 1,
            start=first * header.sector_size,
            length=(last - first + 1) * header.sector_size,
            type=str(uuid.UUID(bytes_le=kind)),
            uuid=str(uuid.UUID(bytes_le=identity)),
            name=name.decode("utf-16-le", "replace").partition("\0")[0],
        )
        table.partitions.append(partition)
    table.check(length)
    return table


def protective_entry(entries: list[Entry]) -> Entry | None:
    """The entry that says that there is a GPT, None where none does. What else a hybrid MBR holds does not count."""
    return next((entry for entry in entries if entry.type == PROTECTIVE and entry.start == 1), None)
