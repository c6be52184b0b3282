"""An image as a check sees it: its header, believed no further than needed, and reads that are bounded.

What it must be at least for a check to make sense is in :mod:`.header_checks`.
"""

from __future__ import annotations

from array import array
from functools import partial
from typing import NamedTuple

from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.errors import HostError, ImageError
from fusedisk.drivers.format.qcow2 import header_checks, layout
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, Geometry, encode_table
from fusedisk.drivers.format.qcow2.image import read_table
from fusedisk.drivers.format.qcow2.layout import SECTOR, Header
from fusedisk.drivers.format.qcow2.snapshots.table import (
    MIN_ENTRY_SIZE,
    MIN_EXTRA_DATA,
    Snapshot,
    SnapshotTable,
    read_snapshots,
)

MAX_READ_END = (1 << 63) - (1 << 30)
"""No byte at or behind this can be read, as in QEMU."""
MAX_CLUSTERS = (1 << 31) - 1

KNOWN_AUTOCLEAR = layout.BITMAPS | layout.RAW_EXTERNAL_DATA


class Region(NamedTuple):
    """Bytes of the file."""

    offset: int
    length: int


def l1_of(snapshot: Snapshot) -> Region:
    """Return the L1 table of a snapshot."""
    return Region(snapshot.l1_table_offset, snapshot.l1_size * 8)


class CheckedImage:
    """The storage of an image with the sizes that its header asks for. Offsets and lengths are in bytes."""

    def __init__(self, file: Node, header: Header) -> None:
        geometry = self._geometry = Geometry(header)
        self.file = file
        self.filename = file.filename
        self.header = header
        self.cluster_bits = geometry.cluster_bits
        self.cluster_size = geometry.cluster_size
        self.cluster_mask = geometry.cluster_mask
        self.extended_l2 = geometry.extended_l2
        self.entry_size = 8 * geometry.entry_words
        self.table_entries = geometry.l2_entries
        """Entries in an L2 table."""
        self.refcount_bits = geometry.refcount_bits
        self.refcount_maximum = (1 << self.refcount_bits) - 1
        self.block_entries = geometry.block_entries
        """Refcounts in a refcount block."""
        self.data_file = header.has_data_file
        """Guest clusters lie in another file, which has no refcounts."""
        self.crypto = Region(*header.crypto_header) if header.crypto_header is not None else None
        """The LUKS header."""
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
        return Region(*self._geometry.compressed_range(entry))

    def compressed_entry(self, region: Region) -> int:
        """The L2 entry for compressed data that starts with a cluster."""
        sectors = -(-region.length // SECTOR)
        return COMPRESSED | (sectors - 1) << self._geometry.compressed_size_shift | region.offset

    # --- bytes ------------------------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> bytearray:
        """Bytes of the file; zeroes past its end. Raises HostError."""
        self._check_place(offset, length)
        return await io.read_bytes(self.file, offset, length)

    async def read_table(self, region: Region) -> array[int]:
        """A table of 64-bit numbers; zeroes past the file's end. Raises HostError."""
        self._check_place(*region)
        return await read_table(self.file, region.offset, region.length // 8)

    def _check_place(self, offset: int, length: int) -> None:
        if offset + length > MAX_READ_END:
            raise HostError(f"'{self.filename}' has no bytes at {offset}, which is behind the end of any file.")

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

    # --- snapshots --------------------------------------------------------------------------------------

    def is_incomplete(self, snapshot: Snapshot) -> bool:
        """Whether the extra data of a snapshot's entry lacks what version 3 asks for."""
        return self.header.version >= 3 and snapshot.extra_size < MIN_EXTRA_DATA

    def wrong_l1(self, snapshot: Snapshot) -> str | None:
        """Why the L1 table of a snapshot cannot be where its entry says; None where it can."""
        if snapshot.l1_table_offset & self.cluster_mask:
            return f"its L1 table at {snapshot.l1_table_offset:#x} does not start with a cluster"
        if snapshot.l1_size > layout.MAX_L1_SIZE // 8:
            return f"its L1 table has {snapshot.l1_size} entries"
        return None


async def open_image(file: Node) -> CheckedImage:
    """Read the header of the image in ``file``.

    Raises ImageError or UnsupportedFeatureError where not even a check makes sense.
    """
    filename = file.filename
    header = layout.parse_header(bytes(await io.read_bytes(file, 0, layout.V3_HEADER_LENGTH)), filename)
    refused = _subject(filename)
    header_checks.refuse(header_checks.field_faults(header, opening=False), refused)
    layout.parse_header_area(header, bytes(await io.read_bytes(file, 0, header.cluster_size)), filename)
    header_checks.refuse(header_checks.feature_faults(header, opening=False), refused)
    header_checks.refuse(header_checks.table_faults(header, opening=False), refused)
    image = CheckedImage(file, header)
    if image.clusters > MAX_CLUSTERS:
        raise _refuse(filename, f"has {image.clusters} clusters, expected at most {MAX_CLUSTERS}")
    return image


async def read_snapshot_table(image: CheckedImage, *, repair: bool) -> SnapshotTable:
    """Read the snapshot table. Where ``repair``, what is too long is cut off and counted instead of refused.

    Raises ImageError for an invalid table.
    """
    header, offset = image.header, image.header.snapshots_offset
    if not repair:
        header_checks.refuse(header_checks.snapshot_faults(header), _subject(image.filename))
    least = min(header.nb_snapshots, layout.MAX_SNAPSHOTS) * MIN_ENTRY_SIZE
    if offset & image.cluster_mask or offset + least >> 63:
        raise _refuse(image.filename, f"has its snapshot table at {offset}, where none can be")
    return await read_snapshots(image.read, header, partial(_refuse, image.filename), cut=repair)


def _refuse(filename: str, what: str) -> ImageError:
    return ImageError(f"{_subject(filename)} {what}.")


def _subject(filename: str) -> str:
    return f"'{filename}' cannot be checked: it"
