"""The qcow2 header and its extensions: reading and writing their bytes. No I/O.

What they may say is checked in :mod:`.header_checks`.

Source: docs/interop/qcow2.txt, "Header", "Header extensions", "Feature name table".
"""

from __future__ import annotations

import dataclasses
import os
import struct
from typing import NamedTuple

from fusedisk.core.errors import ImageError, UnsupportedFeatureError

MAGIC = b"QFI\xfb"

SECTOR = 512
"""The unit of encryption, of compressed lengths and of the disk's size; what is written as a whole."""
MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_EXTENDED_L2_CLUSTER = 16 << 10
"""Bytes in a cluster, so that a subcluster has at least 512."""
SMALL_CLUSTER = 4096
"""Bytes. Clusters up to this size leave out the feature name table, for the backing file's name, as QEMU does."""
MAX_REFCOUNT_ORDER = 6
MAX_L1_SIZE = 32 << 20
"""Bytes; QEMU's bound."""
MAX_REFCOUNT_TABLE_SIZE = 8 << 20
"""Bytes; QEMU's bound."""
MAX_SNAPSHOTS = 65536
MAX_BACKING_NAME = 1023

V2_HEADER_LENGTH = 72
V3_MIN_HEADER_LENGTH = 104
V3_HEADER_LENGTH = 112
"""What QEMU writes: up to the compression type, padded to a multiple of 8."""

# Byte offsets of the fields that change while an image is in use.
SIZE_FIELD = 24
L1_FIELDS = 36
"""l1_size (4 bytes), l1_table_offset (8)."""
REFCOUNT_TABLE_FIELDS = 48
"""refcount_table_offset (8 bytes), refcount_table_clusters (4)."""
INCOMPATIBLE_FIELD = 72
AUTOCLEAR_FIELD = 88

DIRTY = 1 << 0
CORRUPT = 1 << 1
EXTERNAL_DATA = 1 << 2
COMPRESSION_TYPE = 1 << 3
EXTENDED_L2 = 1 << 4
LAZY_REFCOUNTS = 1 << 0
"""A compatible feature."""

SUPPORTED_INCOMPATIBLE = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2
BITMAPS = 1 << 0
"""An autoclear feature: the bitmaps extension is consistent."""
RAW_EXTERNAL_DATA = 1 << 1
"""An autoclear feature: the data file is a raw image of the disk."""


EXTENSION_END = 0x00000000
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_DATA_FILE = 0x44415441
"""Name of the external data file."""
EXTENSION_BITMAPS = 0x23852875
"""The extension with the offset of the directory of persistent dirty bitmaps."""
EXTENSION_CRYPTO = 0x0537BE77
"""Full disk encryption header pointer."""

CRYPT_AES, CRYPT_LUKS = 1, 2
"""Encryption methods."""

INCOMPATIBLE, COMPATIBLE, AUTOCLEAR = range(3)
"""Feature types of the feature name table."""

FEATURE_NAMES = {
    (INCOMPATIBLE, 0): "dirty bit",
    (INCOMPATIBLE, 1): "corrupt bit",
    (INCOMPATIBLE, 2): "external data file",
    (INCOMPATIBLE, 3): "compression type",
    (INCOMPATIBLE, 4): "extended L2 entries",
    (COMPATIBLE, 0): "lazy refcounts",
    (AUTOCLEAR, 0): "bitmaps",
    (AUTOCLEAR, 1): "raw external data",
}
"""The table that QEMU writes into new images."""

COMPRESSION_NAMES = {0: "zlib", 1: "zstd"}
CRYPT_NAMES = {CRYPT_AES: "aes", CRYPT_LUKS: "luks"}

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_FEATURE = struct.Struct(">BB46s")
_MOST_NAMED = 8
"""Features that a message names."""
_CRYPTO = struct.Struct(">QQ")
_BITMAPS = struct.Struct(">IIQQ")
_MAX_BITMAPS = 65535
BITMAP_EXTENSION_LENGTH = _BITMAPS.size
CRYPTO_EXTENSION_LENGTH = _CRYPTO.size


class Extension(NamedTuple):
    """One header extension, its data without padding."""

    type: int
    data: bytes


class BitmapDirectory(NamedTuple):
    """Where the bitmaps extension says that the directory of bitmaps is."""

    bitmaps: int
    reserved: int
    size: int
    """Bytes."""
    offset: int

    def is_possible(self, header: Header) -> bool:
        """Whether there may be such a directory; the bounds are QEMU's."""
        return (
            not self.reserved
            and 0 < self.bitmaps <= _MAX_BITMAPS
            and not self.offset % header.cluster_size
            and self.size <= 1024 * _MAX_BITMAPS
        )


@dataclasses.dataclass(slots=True)
class Header:
    """The header's fields by the specification's names; offsets and sizes in bytes unless said otherwise."""

    version: int = 3
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = 0
    l1_size: int = 0
    """Number of entries."""
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V3_HEADER_LENGTH
    extra: bytes = b""
    """What the header holds behind the refcount order and header length, byte for byte."""
    extensions: list[Extension] = dataclasses.field(default_factory=list)
    backing_file: str = ""

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_span(self) -> int:
        """Guest bytes that one L2 table maps."""
        return self.cluster_size * (self.cluster_size // (16 if self.incompatible_features & EXTENDED_L2 else 8))

    @property
    def compression_type(self) -> int:
        """0 is zlib, 1 is zstd."""
        return self.extra[0] if self.extra else 0

    @property
    def backing_format(self) -> str | None:
        """The format of the backing file, where the image names it."""
        for extension in self.extensions:
            if extension.type == EXTENSION_BACKING_FORMAT:
                return os.fsdecode(extension.data.split(b"\0")[0]) or None
        return None

    @property
    def data_file_name(self) -> str | None:
        """The external data file, where the image names it."""
        for extension in self.extensions:
            if extension.type == EXTENSION_DATA_FILE:
                return os.fsdecode(extension.data.split(b"\0")[0]) or None
        return None

    @property
    def has_data_file(self) -> bool:
        """Whether guest data lies in an external data file."""
        return bool(self.incompatible_features & EXTERNAL_DATA)

    @property
    def kept_autoclear(self) -> int:
        """The autoclear bits whose promises a writer of ours keeps."""
        kept = (RAW_EXTERNAL_DATA if self.has_data_file else 0) | (BITMAPS if self.bitmap_directory else 0)
        return self.autoclear_features & kept

    @property
    def has_raw_data_file(self) -> bool:
        """Whether that is a raw image of the disk."""
        return self.has_data_file and bool(self.autoclear_features & RAW_EXTERNAL_DATA)

    @property
    def crypto_header(self) -> tuple[int, int] | None:
        """Offset and length in bytes of the LUKS header, where there is one."""
        for extension in self.extensions:
            if extension.type == EXTENSION_CRYPTO and len(extension.data) >= _CRYPTO.size:
                offset, length = _CRYPTO.unpack_from(extension.data)
                return offset, length
        return None

    @property
    def bitmap_directory(self) -> BitmapDirectory | None:
        """Where the persistent bitmaps are; None also where they have become invalid."""
        if not self.autoclear_features & BITMAPS:
            return None
        for extension in self.extensions:
            if extension.type == EXTENSION_BITMAPS and len(extension.data) == BITMAP_EXTENSION_LENGTH:
                return BitmapDirectory(*_BITMAPS.unpack(extension.data))
        return None

    def refcount_table_size(self) -> int:
        """Bytes in the refcount table."""
        return self.refcount_table_clusters << self.cluster_bits


def parse_header(head: bytes, filename: str) -> Header:
    """The fixed fields from the first bytes of an image (at least 112 where it has them).

    Extensions and the backing file's name come later, by :func:`parse_header_area`. Raises ImageError where
    the bytes are no qcow2 header, UnsupportedFeatureError for other versions.
    """
    if len(head) < V2_HEADER_LENGTH:
        raise ImageError(
            f"'{filename}' is {len(head)} bytes long, expected a qcow2 header of at least {V2_HEADER_LENGTH} bytes."
        )
    magic, version, *fields = _V2.unpack_from(head)
    if magic != MAGIC:
        raise ImageError(f"'{filename}' starts with the bytes {magic.hex()}, expected qcow2's {MAGIC.hex()}.")
    if version not in (2, 3):
        raise UnsupportedFeatureError(f"'{filename}' is qcow2 of version {version}, expected version 2 or 3.")
    header = Header(version, *fields)
    if version == 2:
        header.header_length = V2_HEADER_LENGTH
        return header
    if len(head) < V3_MIN_HEADER_LENGTH:
        raise ImageError(
            f"'{filename}' is {len(head)} bytes long, expected a version 3 qcow2 header of at least "
            f"{V3_MIN_HEADER_LENGTH} bytes."
        )
    (
        header.incompatible_features,
        header.compatible_features,
        header.autoclear_features,
        header.refcount_order,
        header.header_length,
    ) = _V3.unpack_from(head, V2_HEADER_LENGTH)
    return header


def parse_header_area(header: Header, area: bytes, filename: str) -> None:
    """Fill in ``extra``, ``extensions`` and ``backing_file`` from the first cluster (or what the file has of
    it).

    Raises ImageError for extensions that reach past their area.
    """
    if len(area) < header.header_length:
        raise ImageError(f"'{filename}' is {len(area)} bytes long, but its header takes {header.header_length}.")
    fixed = V2_HEADER_LENGTH if header.version == 2 else V3_MIN_HEADER_LENGTH
    header.extra = area[fixed : header.header_length]
    start, size = header.backing_file_offset, header.backing_file_size
    end = start or header.cluster_size
    header.extensions = _parse_extensions(area[:end], header.header_length, end, filename)
    if start:
        if start + size > len(area):
            raise ImageError(
                f"'{filename}' is {len(area)} bytes long, but the name of its backing file ends at {start + size}."
            )
        header.backing_file = os.fsdecode(area[start : start + size].split(b"\0")[0])


def _parse_extensions(area: bytes, position: int, end: int, filename: str) -> list[Extension]:
    found: list[Extension] = []
    while position + _EXTENSION.size <= len(area):
        kind, length = _EXTENSION.unpack_from(area, position)
        position += _EXTENSION.size
        if length > end - position or position + length > len(area):
            raise ImageError(
                f"'{filename}' has the header extension {kind:#010x} of {length} bytes at "
                f"{position - _EXTENSION.size}, but "
                f"extensions must end before {min(end, len(area))}."
            )
        if kind == EXTENSION_END:
            break
        found.append(Extension(kind, area[position : position + length]))
        position += (length + 7) & -8
    return found


def named_features(header: Header, unknown: int) -> list[str]:
    """The incompatible features in ``unknown`` by name: the first few, and how many more there are."""
    names = feature_names(header)
    found = [names.get((INCOMPATIBLE, bit), f"bit {bit}") for bit in range(64) if unknown >> bit & 1]
    more = len(found) - _MOST_NAMED
    return [*found[:_MOST_NAMED], f"{more} more"] if more > 0 else found


def feature_names(header: Header) -> dict[tuple[int, int], str]:
    """Names by feature type and bit: ours, then those of the image's own feature name table."""
    names: dict[tuple[int, int], str] = {}
    for extension in header.extensions:
        if extension.type == EXTENSION_FEATURE_NAMES:
            whole = len(extension.data) // _FEATURE.size * _FEATURE.size
            for kind, bit, name in _FEATURE.iter_unpack(extension.data[:whole]):
                names[kind, bit] = "".join(filter(str.isprintable, name.split(b"\0")[0].decode("utf-8", "replace")))
    return names | FEATURE_NAMES


def crypto_header_pointer(offset: int, length: int) -> Extension:
    """The extension that leads to a LUKS header."""
    return Extension(EXTENSION_CRYPTO, _CRYPTO.pack(offset, length))


def feature_name_table() -> Extension:
    """The feature name table that new images carry."""
    data = b"".join(_FEATURE.pack(kind, bit, name.encode()) for (kind, bit), name in FEATURE_NAMES.items())
    return Extension(EXTENSION_FEATURE_NAMES, data)


def encode_header_area(header: Header, filename: str) -> bytes:
    """The header with its extensions and backing file name as they stand at the start of the file.

    Sets ``backing_file_offset``, ``backing_file_size`` and ``header_length``. Raises ImageError where all that does
    not fit into the first cluster.
    """
    header.header_length = V2_HEADER_LENGTH if header.version == 2 else V3_MIN_HEADER_LENGTH + len(header.extra)
    name = os.fsencode(header.backing_file)
    encoded = b"".join(map(_encode_extension, header.extensions)) + _EXTENSION.pack(EXTENSION_END, 0)
    end = header.header_length + len(encoded)
    if end + len(name) > header.cluster_size:
        raise ImageError(
            f"the header of '{filename}' takes {end + len(name)} bytes with its extensions and the name of its "
            f"backing file, expected only {header.cluster_size} bytes, one cluster."
        )
    header.backing_file_offset = end if name else 0
    header.backing_file_size = len(name)
    return encode_header(header) + encoded + name


def encode_header(header: Header) -> bytes:
    """The fixed fields."""
    fields = [getattr(header, field.name) for field in dataclasses.fields(header)[1:12]]
    encoded = _V2.pack(MAGIC, header.version, *fields)
    if header.version == 2:
        return encoded
    return (
        encoded
        + _V3.pack(
            header.incompatible_features,
            header.compatible_features,
            header.autoclear_features,
            header.refcount_order,
            header.header_length,
        )
        + header.extra
    )


def _encode_extension(extension: Extension) -> bytes:
    padding = -len(extension.data) % 8
    return _EXTENSION.pack(extension.type, len(extension.data)) + extension.data + bytes(padding)
