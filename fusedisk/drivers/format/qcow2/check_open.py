"""An image as a check sees it: its header, believed no further than needed, and reads that are bounded.

What a header must be here is less than what :mod:`.driver` asks for, since a table that lies in the wrong place is a
finding and no reason to stop. Refused is what QEMU refuses in check mode, so that nothing is called clean that QEMU
would not open.

The snapshot table is read here entry by entry, since it may hold entries that :mod:`.snapshot_table` refuses.
"""

from __future__ import annotations

import dataclasses
import struct
from array import array
from typing import NamedTuple

from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.errors import HostError, ImageError, UnsupportedFeatureError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, encode_table, swap_table
from fusedisk.drivers.format.qcow2.layout import SECTOR, Header

MAX_READ_END = (1 << 63) - (1 << 30)
"""No byte at or behind this can be read, as in QEMU."""
MAX_CLUSTERS = (1 << 31) - 1
MAX_L1_ENTRIES = layout.MAX_L1_SIZE // 8

KNOWN_AUTOCLEAR = layout.BITMAPS | layout.RAW_EXTERNAL_DATA
_KNOWN_INCOMPATIBLE = (
    layout.DIRTY | layout.CORRUPT | layout.EXTERNAL_DATA | layout.COMPRESSION_TYPE | layout.EXTENDED_L2
)

EXTENSION_CRYPTO = 0x0537BE77
EXTENSION_DATA_FILE = 0x44415441
_LUKS = 2
_MAX_BACKING_FORMAT = 15

_CRYPTO = struct.Struct(">QQ")


class Region(NamedTuple):
    """Bytes of the file."""

    offset: int
    length: int


class CheckedImage:
    """The storage of an image with the sizes that its header asks for. Offsets and lengths are in bytes."""

    def __init__(self, file: Node, header: Header) -> None:
        bits = header.cluster_bits
        self.file = file
        self.filename = file.filename
        self.header = header
        self.cluster_bits = bits
        self.cluster_size = 1 << bits
        self.cluster_mask = self.cluster_size - 1
        self.extended_l2 = bool(header.incompatible_features & layout.EXTENDED_L2)
        self.entry_size = 16 if self.extended_l2 else 8
        self.table_entries = self.cluster_size // self.entry_size
        """Entries in an L2 table."""
        self.refcount_bits = 1 << header.refcount_order
        self.refcount_maximum = (1 << self.refcount_bits) - 1
        self.block_entries = self.cluster_size * 8 >> header.refcount_order
        """Refcounts in a refcount block."""
        self.data_file = bool(header.incompatible_features & layout.EXTERNAL_DATA)
        """Guest clusters lie in another file, which has no refcounts."""
        self._compressed_size_shift = 62 - (bits - 8)
        self.crypto = self._crypto_header()
        self.bitmaps = header.bitmap_directory
        """None also where the bitmaps have become invalid."""

    # --- sizes ------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """The length of the file, in whole sectors."""
        return -(-self.file.length // SECTOR) * SECTOR

    @property
    def clusters(self) -> int:
        """Host clusters in the file; the last one may be cut short."""
        return self.length + self.cluster_mask >> self.cluster_bits

    def has_region(self, offset: int, length: int) -> bool:
        """Whether a region lies in the file, apart from less than a cluster at its end."""
        return offset + length - self.length < self.cluster_size

    def inside(self, region: Region) -> Region:
        """Return the part of a region that lies in the file; the rest reads as zeroes."""
        return Region(region.offset, max(min(region.length, self.length - region.offset), 0))

    def compressed_region(self, entry: int) -> Region:
        """Return the region of an L2 entry's compressed data. The length is an upper bound in whole sectors."""
        shift = self._compressed_size_shift
        offset = entry & (1 << shift) - 1
        sectors = (entry & COMPRESSED - 1) >> shift
        return Region(offset, (sectors + 1) * SECTOR - offset % SECTOR)

    def compressed_entry(self, region: Region) -> int:
        """The L2 entry for compressed data that starts with a cluster."""
        sectors = -(-region.length // SECTOR)
        return COMPRESSED | (sectors - 1) << self._compressed_size_shift | region.offset

    # --- bytes ------------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytearray:
        """Bytes of the file; zeroes past its end. Raises HostError."""
        if offset + length > MAX_READ_END:
            raise HostError(f"'{self.filename}' has no bytes at {offset}, which is behind the end of any file.")
        return await io.read_bytes(self.file, offset, length)

    async def read_table(self, region: Region) -> array[int]:
        """A table of 64-bit numbers; zeroes past the file's end."""
        return decode_table(await self.read(*region))

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Change bytes of the file."""
        await io.write(self.file, offset, (memoryview(data),))

    async def write_changes(self, offset: int, before: array[int], after: array[int]) -> bool:
        """Write what changed of the table at ``offset``; returns whether anything did."""
        if before == after:
            return False
        changed = [index for index, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        first, last = changed[0], changed[-1] + 1
        await self.write(offset + 8 * first, encode_table(after[first:last]))
        return True

    async def flush(self) -> None:
        """Flush, so that earlier writes are on stable storage before later ones."""
        await io.flush(self.file)

    # --- places -----------------------------------------------------------------------------------------

    @property
    def l1_region(self) -> Region:
        """The active L1 table."""
        return Region(self.header.l1_table_offset, self.header.l1_size * 8)

    @property
    def refcount_table_region(self) -> Region:
        """The refcount table."""
        return Region(self.header.refcount_table_offset, self.header.refcount_table_size())

    def _crypto_header(self) -> Region | None:
        """The region of the LUKS header."""
        for extension in self.header.extensions:
            if extension.type == EXTENSION_CRYPTO:
                return Region(*_CRYPTO.unpack(extension.data))
        return None


def decode_table(data: bytes | bytearray) -> array[int]:
    """A table of big-endian 64-bit numbers."""
    table = array("Q", data)
    swap_table(table)
    return table


async def open_image(file: Node) -> CheckedImage:
    """Read the header of the image in ``file``.

    Raises ImageError or UnsupportedFeatureError where not even a check makes sense.
    """
    filename = file.filename
    header = layout.parse_header(bytes(await io.read_bytes(file, 0, layout.V3_HEADER_LENGTH)), filename)
    _check_sizes(header, filename)
    layout.parse_header_area(header, bytes(await io.read_bytes(file, 0, header.cluster_size)), filename)
    _check_features(header, filename)
    _check_extensions(header, filename)
    image = CheckedImage(file, header)
    _check_tables(image)
    return image


def _refuse(filename: str, what: str, found: object, wanted: str) -> ImageError:
    return ImageError(f"'{filename}' cannot be checked: its {what} is {found}, expected {wanted}.")


def _check_sizes(header: Header, filename: str) -> None:
    bits = header.cluster_bits
    if not layout.MIN_CLUSTER_BITS <= bits <= layout.MAX_CLUSTER_BITS:
        wanted = f"{layout.MIN_CLUSTER_BITS} to {layout.MAX_CLUSTER_BITS}"
        raise _refuse(filename, "number of cluster bits", bits, wanted)
    if header.refcount_order > layout.MAX_REFCOUNT_ORDER:
        raise _refuse(filename, "refcount order", header.refcount_order, f"at most {layout.MAX_REFCOUNT_ORDER}")
    if header.version > 2 and not layout.V3_MIN_HEADER_LENGTH <= header.header_length <= header.cluster_size:
        wanted = f"{layout.V3_MIN_HEADER_LENGTH} to {header.cluster_size}"
        raise _refuse(filename, "header length", header.header_length, wanted)
    room = header.cluster_size - header.backing_file_offset
    longest = min(layout.MAX_BACKING_NAME, room)
    if room < 0 or (header.backing_file_offset and header.backing_file_size > longest):
        found = f"{header.backing_file_size} bytes at {header.backing_file_offset}"
        raise _refuse(filename, "backing file's name", found, "a name in the first cluster")
    if header.size >> 63:
        raise _refuse(filename, "virtual size", header.size, "less than 2^63")
    if header.crypt_method > _LUKS:
        raise _refuse(filename, "encryption method", header.crypt_method, "0, 1 or 2")


def _check_features(header: Header, filename: str) -> None:
    unknown = header.incompatible_features & ~_KNOWN_INCOMPATIBLE
    if unknown:
        found = layout.named_features(header, unknown)
        raise UnsupportedFeatureError(
            f"'{filename}' cannot be checked: it uses incompatible features that are not known ({', '.join(found)})."
        )
    kind = header.compression_type
    if kind not in layout.COMPRESSION_NAMES:
        raise _refuse(filename, "compression type", kind, "zlib (0) or zstd (1)")
    if bool(kind) != bool(header.incompatible_features & layout.COMPRESSION_TYPE):
        raise _refuse(filename, "compression type", kind, "one that agrees with its feature bit")
    if header.incompatible_features & layout.EXTENDED_L2 and header.cluster_size < 32 * SECTOR:
        raise _refuse(filename, "cluster size", header.cluster_size, "at least 16384 for extended L2 entries")
    types = {extension.type for extension in header.extensions}
    if header.incompatible_features & layout.EXTERNAL_DATA:
        if EXTENSION_DATA_FILE not in types:
            raise _refuse(filename, "external data file", "not named", "its name")
    elif header.autoclear_features & layout.RAW_EXTERNAL_DATA:
        raise _refuse(filename, "feature 'raw external data'", "set", "an external data file for it")
    if header.crypt_method == _LUKS and EXTENSION_CRYPTO not in types:
        raise _refuse(filename, "LUKS header", "not there", "the place of one")


def _check_extensions(header: Header, filename: str) -> None:
    end = header.backing_file_offset or header.cluster_size
    rest = end - header.header_length - sum(8 + (len(extension.data) + 7 & -8) for extension in header.extensions)
    if 0 < rest < 8:
        raise _refuse(filename, "room for header extensions", f"{rest} bytes at its end", "8 or none")
    for extension in header.extensions:
        length = len(extension.data)
        if extension.type == layout.EXTENSION_BACKING_FORMAT and length > _MAX_BACKING_FORMAT:
            found, wanted = f"{length} bytes long", f"at most {_MAX_BACKING_FORMAT}"
            raise _refuse(filename, "name of a backing format", found, wanted)
        if extension.type == EXTENSION_CRYPTO:
            if header.crypt_method != _LUKS or length != _CRYPTO.size:
                raise _refuse(filename, "extension for a LUKS header", f"{length} bytes long", "LUKS and 16 bytes")
            if _CRYPTO.unpack(extension.data)[0] % header.cluster_size:
                raise _refuse(filename, "LUKS header", "not at the start of a cluster", "that")
        if extension.type == layout.EXTENSION_BITMAPS:
            _check_bitmaps(header, extension.data, filename)


def _check_bitmaps(header: Header, data: bytes, filename: str) -> None:
    if len(data) != layout.BITMAP_EXTENSION_LENGTH:
        raise _refuse(filename, "bitmaps extension", f"{len(data)} bytes long", f"{layout.BITMAP_EXTENSION_LENGTH}")
    found = header.bitmap_directory
    if found is not None and not found.is_possible(header):
        what = f"{found.bitmaps} bitmaps in {found.size} bytes at {found.offset}"
        raise _refuse(filename, "bitmaps extension", what, "a directory of bitmaps")


def _check_tables(image: CheckedImage) -> None:
    header, filename = image.header, image.filename
    for what, (offset, length), most in (
        ("L1 table", image.l1_region, layout.MAX_L1_SIZE),
        ("refcount table", image.refcount_table_region, layout.MAX_REFCOUNT_TABLE_SIZE),
    ):
        if length > most or offset & image.cluster_mask or offset + length >> 63:
            found = f"{length} bytes at {offset}"
            raise _refuse(filename, what, found, f"at most {most} bytes at a multiple of {image.cluster_size}")
    span = image.cluster_size * image.table_entries
    needed = -(-header.size // span)
    if header.l1_size < needed:
        raise _refuse(filename, "number of L1 entries", header.l1_size, f"at least {needed} for its size")
    if image.clusters > MAX_CLUSTERS:
        raise _refuse(filename, "number of clusters", image.clusters, f"at most {MAX_CLUSTERS}")


# --- the snapshot table -------------------------------------------------------------------------------

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
        raise _refuse_table(image, f"{count} snapshots, expected at most {layout.MAX_SNAPSHOTS}")
    if offset & image.cluster_mask or offset + min(count, layout.MAX_SNAPSHOTS) * _FIXED.size >> 63:
        raise _refuse_table(image, f"its snapshot table at {offset}, where none can be")
    table = SnapshotTable([], 0, dropped=max(count - layout.MAX_SNAPSHOTS, 0))
    reader = _Reader(image)
    for number in range(min(count, layout.MAX_SNAPSHOTS)):
        before = reader.position
        entry = await _read_entry(reader, number, table, repair=repair)
        if reader.position > MAX_TABLE_SIZE:
            if not repair:
                raise _refuse_table(image, f"a snapshot table larger than the {MAX_TABLE_SIZE} bytes that are possible")
            table.dropped += header.nb_snapshots - table.dropped - number
            reader.position = before
            break
        table.entries.append(entry)
    table.length = reader.position
    return table


def _refuse_table(image: CheckedImage, what: str) -> ImageError:
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
        raise _refuse_table(reader.image, f"{extra_size} bytes of extra data in entry {number} of its snapshot table")
    extra = await reader.take(min(extra_size, MAX_EXTRA_DATA))
    if extra_size > MAX_EXTRA_DATA:
        table.shortened += 1
        reader.position += extra_size - MAX_EXTRA_DATA
    identity = await reader.take(id_size)
    name = await reader.take(name_size)
    times = (seconds, nanoseconds, clock)
    return SnapshotEntry(Region(l1_offset, l1_size * 8), identity, name, times, vm_state_size, extra)
