"""What a header may say, and where its tables may lie. No I/O.

A fault continues the name of the file: "has a refcount order of 7, expected ...". Opening refuses the first one.

A check (``opening`` is False) refuses what QEMU refuses in check mode, so that nothing is called clean that QEMU would
not open. It refuses less about tables, as one in the wrong place is a finding and no reason to stop, and more about
extensions.

Source: docs/interop/qcow2.txt, "Header", "Header extensions".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fusedisk.core.errors import ImageError, UnsupportedFeatureError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.layout import Header

_MAX_BACKING_FORMAT = 15


class Fault(NamedTuple):
    """Something that is wrong."""

    text: str
    """What was found and what was expected, without the subject and the full stop."""
    kind: type[ImageError] = ImageError


def refuse(faults: Iterable[Fault], subject: str) -> None:
    """Raise the first fault as an error about ``subject``."""
    for fault in faults:
        raise fault.kind(f"{subject} {fault.text}.")


# --- fields and extensions ----------------------------------------------------------------------------


def field_faults(header: Header, *, opening: bool) -> Iterator[Fault]:
    """Bound what the fixed fields say about the header itself: cluster size, lengths and positions in the first
    cluster."""
    bits = header.cluster_bits
    if not layout.MIN_CLUSTER_BITS <= bits <= layout.MAX_CLUSTER_BITS:
        yield Fault(
            f"has qcow2 cluster bits of {bits}, expected {layout.MIN_CLUSTER_BITS} to {layout.MAX_CLUSTER_BITS} "
            "(clusters of 512 bytes to 2 MiB)"
        )
    if not header.refcount_order <= layout.MAX_REFCOUNT_ORDER:
        yield Fault(
            f"has a refcount order of {header.refcount_order}, expected at most {layout.MAX_REFCOUNT_ORDER} "
            "(refcounts of 64 bits)"
        )
    minimum = layout.V2_HEADER_LENGTH if header.version == 2 else layout.V3_MIN_HEADER_LENGTH
    if not minimum <= header.header_length <= header.cluster_size:
        yield Fault(f"has a header length of {header.header_length}, expected {minimum} to {header.cluster_size} bytes")
    if header.incompatible_features & layout.EXTENDED_L2 and header.cluster_size < layout.MIN_EXTENDED_L2_CLUSTER:
        yield Fault(
            f"has extended L2 entries and clusters of {header.cluster_size} bytes, expected at least "
            f"{layout.MIN_EXTENDED_L2_CLUSTER}"
        )
    if header.size >> 63:
        yield Fault(f"has a virtual size of {header.size} bytes, expected less than 2^63")
    if header.crypt_method not in (0, *layout.CRYPT_NAMES):
        yield Fault(f"has the encryption method {header.crypt_method}, expected 0, 1 or 2")
    if header.backing_file_offset:
        yield from _backing_name_faults(header, opening=opening)


def _backing_name_faults(header: Header, *, opening: bool) -> Iterator[Fault]:
    start, size = header.backing_file_offset, header.backing_file_size
    if size > layout.MAX_BACKING_NAME:
        yield Fault(f"has a backing file name of {size} bytes, expected at most {layout.MAX_BACKING_NAME}")
    if (opening and start < header.header_length) or start + size > header.cluster_size:
        yield Fault(
            f"has its backing file name at {start} with {size} bytes, expected it between the header's end "
            f"at {header.header_length} and the first cluster's at {header.cluster_size}"
        )


def feature_faults(header: Header, *, opening: bool) -> Iterator[Fault]:
    """Refuse by name what this driver does not know, and what feature bits, fields and extensions say against each
    other."""
    if (header.crypt_method == layout.CRYPT_LUKS) != (header.crypto_header is not None):
        yield Fault(
            f"has the encryption method {header.crypt_method} and {'a' if header.crypto_header else 'no'} pointer to a "
            "LUKS header; expected both or neither"
        )
    unknown = header.incompatible_features & ~layout.SUPPORTED_INCOMPATIBLE
    if unknown:
        found = layout.named_features(header, unknown)
        several = len(found) > 1
        yield Fault(
            f"uses the incompatible qcow2 feature{'s' if several else ''} {', '.join(found)}, which "
            f"{'are' if several else 'is'} not supported",
            UnsupportedFeatureError,
        )
    if opening and header.has_raw_data_file and header.backing_file:
        yield Fault(
            f"has a raw external data file and the backing file '{header.backing_file}', expected only one of them, as "
            "a raw file cannot show through"
        )
    kind = header.compression_type
    if kind not in layout.COMPRESSION_NAMES:
        yield Fault(f"uses the compression type {kind}, expected zlib (0) or zstd (1)", UnsupportedFeatureError)
    if bool(kind) != bool(header.incompatible_features & layout.COMPRESSION_TYPE):
        yield Fault(
            f"has the compression type {layout.COMPRESSION_NAMES[kind]}, but its compression type feature bit is "
            f"{'not ' if kind else ''}set; the two must agree"
        )
    if not opening:
        yield from _data_file_faults(header)
        yield from _extension_faults(header)


def _data_file_faults(header: Header) -> Iterator[Fault]:
    if header.has_data_file:
        if all(extension.type != layout.EXTENSION_DATA_FILE for extension in header.extensions):
            yield Fault("has an external data file and does not name it")
    elif header.autoclear_features & layout.RAW_EXTERNAL_DATA:
        yield Fault("has the feature 'raw external data' and no external data file, expected both or neither")


def _extension_faults(header: Header) -> Iterator[Fault]:
    end = header.backing_file_offset or header.cluster_size
    rest = end - header.header_length - sum(8 + (len(extension.data) + 7 & -8) for extension in header.extensions)
    if 0 < rest < 8:
        yield Fault(f"has room for {rest} bytes behind its header extensions, expected 8 or none")
    for kind, data in header.extensions:
        if kind == layout.EXTENSION_BACKING_FORMAT and len(data) > _MAX_BACKING_FORMAT:
            yield Fault(
                f"has a backing format with a name of {len(data)} bytes, expected at most {_MAX_BACKING_FORMAT}"
            )
        if kind == layout.EXTENSION_CRYPTO and len(data) != layout.CRYPTO_EXTENSION_LENGTH:
            yield Fault(
                f"has a pointer to a LUKS header of {len(data)} bytes, expected {layout.CRYPTO_EXTENSION_LENGTH}"
            )
        if kind == layout.EXTENSION_BITMAPS and len(data) != layout.BITMAP_EXTENSION_LENGTH:
            yield Fault(f"has a bitmaps extension of {len(data)} bytes, expected {layout.BITMAP_EXTENSION_LENGTH}")
    if header.crypto_header is not None and header.crypto_header[0] % header.cluster_size:
        yield Fault(f"has its LUKS header at {header.crypto_header[0]}, expected a multiple of {header.cluster_size}")
    found = header.bitmap_directory
    if found is not None and not found.is_possible(header):
        yield Fault(
            f"has a directory of {found.bitmaps} bitmaps in {found.size} bytes at {found.offset}, where none can be"
        )


# --- tables -------------------------------------------------------------------------------------------


def table_faults(header: Header, *, opening: bool) -> Iterator[Fault]:
    """Bound the tables that the header leads to, before anything is sized by them."""
    cluster_size, l1_bytes = header.cluster_size, header.l1_size * 8
    needed = -(-header.size // header.l2_span)
    if max(l1_bytes, needed * 8) > layout.MAX_L1_SIZE:
        yield Fault(
            f"has an L1 table of {header.l1_size} entries and needs {needed} for its size, expected at most "
            f"{layout.MAX_L1_SIZE // 8}"
        )
    if header.l1_size < needed:
        yield Fault(f"has an L1 table of {header.l1_size} entries, but its size of {header.size} bytes needs {needed}")
    refcount_bytes = header.refcount_table_size()
    if refcount_bytes > layout.MAX_REFCOUNT_TABLE_SIZE or (opening and not refcount_bytes):
        yield Fault(
            f"has a refcount table of {header.refcount_table_clusters} clusters, expected 1 to "
            f"{layout.MAX_REFCOUNT_TABLE_SIZE >> header.cluster_bits}"
        )
    if opening:
        yield from snapshot_faults(header)
        return
    for what, start, length in (
        ("L1 table", header.l1_table_offset, l1_bytes),
        ("refcount table", header.refcount_table_offset, refcount_bytes),
    ):
        if start % cluster_size or start + length >> 63:
            yield Fault(f"has its {what} at {start} with {length} bytes, but expected a multiple of {cluster_size}")


def snapshot_faults(header: Header) -> Iterator[Fault]:
    """Bound the number of snapshots."""
    if header.nb_snapshots > layout.MAX_SNAPSHOTS:
        yield Fault(f"has {header.nb_snapshots} snapshots, expected at most {layout.MAX_SNAPSHOTS}")


def place_faults(header: Header, file_length: int) -> Iterator[Fault]:
    """The tables that the header leads to must lie in the storage, ``file_length`` bytes long, and apart from each
    other. For opening."""
    placed: list[tuple[str, int, int]] = []
    for what, start, length in (
        ("L1 table", header.l1_table_offset, header.l1_size * 8),
        ("refcount table", header.refcount_table_offset, header.refcount_table_size()),
        ("snapshot table", header.snapshots_offset, header.nb_snapshots and 1),
        ("LUKS header", *(header.crypto_header or (0, 0))),
    ):
        if not length:
            continue
        yield from _table_place_faults(what, start, length, header.cluster_size, file_length)
        for other, low, high in placed:
            if start < high and low < start + length:
                yield Fault(f"has its {what} at {start} over its {other} at {low}, expected tables that do not overlap")
        placed.append((what, start, start + length))


def check_table(filename: str, what: str, start: int, length: int, cluster_size: int, file_length: int) -> None:
    """A table must be aligned, behind the header, and inside the storage (whose last cluster may be cut short).

    Raises ImageError.
    """
    refuse(_table_place_faults(what, start, length, cluster_size, file_length), f"'{filename}'")


def _table_place_faults(what: str, start: int, length: int, cluster_size: int, file_length: int) -> Iterator[Fault]:
    if start % cluster_size or start < cluster_size:
        yield Fault(f"has its {what} at {start}, but expected a multiple of {cluster_size} behind the header")
    if start + length > -(-file_length // cluster_size) * cluster_size:
        yield Fault(
            f"has its {what} at {start} with {length} bytes, past the end of the file at {file_length}: the file may "
            "have been cut short"
        )
