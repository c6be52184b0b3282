"""The header of an image: reading it on opening, and rewriting it so that a power cut cannot break it.

Rewriting
---------
The header, its extensions and the backing file's name lie in the first cluster, and only a sector of 512 bytes is
written as a whole. The first sector says where everything else is, so it alone turns the old header into the new one:
what the new one has behind it is written first, to bytes that the old one does not use. Where both need the same bytes
there is a step between: a header that says what the new one says, without the feature name table (which serves error
messages only), with its extensions in the first sector and the name where neither of the other two has anything.

Source: docs/interop/qcow2.txt, "Header", "Header extensions".
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from typing import NamedTuple

from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.errors import ImageError, OptionError
from fusedisk.drivers.format.qcow2 import header_checks, layout
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.layout import SECTOR, Header
from fusedisk.drivers.format.qcow2.options import Qcow2Options

log = logging.getLogger(__name__)


async def read_header(file: Node, filename: str, *, look_only: bool = False) -> Header:
    """The validated header of the image in ``file``. Raises ImageError or UnsupportedFeatureError.

    ``look_only``: where its tables lie in impossible places, warn of that and leave them out.
    """
    head = bytes(await io.read_bytes(file, 0, min(layout.V3_HEADER_LENGTH, file.length)))
    header = layout.parse_header(head, filename)
    subject = f"'{filename}'"
    header_checks.refuse(header_checks.field_faults(header, opening=True), subject)
    area = await io.read_bytes(file, 0, min(header.cluster_size, file.length))
    layout.parse_header_area(header, bytes(area), filename)
    header_checks.refuse(header_checks.feature_faults(header, opening=True), subject)
    header_checks.refuse(header_checks.table_faults(header, opening=True), subject)
    try:
        header_checks.refuse(header_checks.place_faults(header, file.length), subject)
    except ImageError as exc:
        if not look_only:
            raise
        log.warning("%s", exc)
        header.l1_size = header.nb_snapshots = 0
    return header


def check_version(options: Qcow2Options, header: Header, filename: str) -> None:
    """Raise OptionError for options that version 2 cannot have."""
    if options.discard_no_unref and header.version < 3:
        raise OptionError(f"'{filename}' is qcow2 of version 2, but discard-no-unref needs version 3 (compat=1.1).")
    if options.lazy_refcounts and header.version < 3:
        raise OptionError(f"'{filename}' is qcow2 of version 2, but lazy-refcounts needs version 3 (compat=1.1).")


def check_writable(header: Header, filename: str) -> None:
    """Refuse to write to images whose metadata cannot be relied on. Raises ImageError."""
    if header.incompatible_features & layout.CORRUPT:
        raise ImageError(
            f"'{filename}' is marked corrupt and can only be opened read-only until it is repaired, as by "
            f"'fusedisk check -r all'."
        )


def check_closed(header: Header, filename: str) -> None:
    """Refuse to write to an image whose refcounts may be behind. Raises ImageError."""
    if header.incompatible_features & layout.DIRTY:
        raise ImageError(
            f"'{filename}' was not closed properly: its refcounts must be repaired before it is written to, which "
            "opening it for writing does, or 'fusedisk check -r all'."
        )


# --- rewriting the header -----------------------------------------------------------------------------


Range = tuple[int, int]
"""First byte and the one behind the last."""


class _Area(NamedTuple):
    """The bytes of a header in the first cluster."""

    head: bytes
    """Fields and extensions, from the start of the file."""
    name: bytes
    """Of the backing file."""
    name_offset: int

    def pieces(self) -> list[tuple[int, bytes]]:
        """Offsets and bytes."""
        return [(0, self.head), (self.name_offset, self.name)]

    def ranges(self) -> list[Range]:
        """The bytes that count."""
        return [(start, start + len(data)) for start, data in self.pieces() if data]

    def behind_first_sector(self) -> Iterator[tuple[int, bytes]]:
        """The pieces there."""
        for start, data in self.pieces():
            cut = max(SECTOR - start, 0)
            if data[cut:]:
                yield start + cut, data[cut:]

    def first_sector(self, old: bytes) -> bytes:
        """The first sector, with what ``old`` has where this has nothing."""
        sector = bytearray(old)
        for start, data in self.pieces():
            if start < SECTOR:
                part = data[: SECTOR - start]
                sector[start : start + len(part)] = part
        return bytes(sector)


async def put_header(image: Image, header: Header) -> None:
    """Bring ``header`` to the file, which is durable on return. ``image.header`` stays as it is: read it again.

    Raises ImageError, with nothing changed, where it does not fit into the first cluster, or no step between does.
    """
    present = bytes(await image.read(0, header.cluster_size))
    new, old = _area(header, image.filename), _ranges_in_use(image.header)
    if not _collides(new, old, present):
        await _switch(image, new)
        return
    between = _between(header, image.filename, new, old, present)
    await _switch(image, between)
    present = bytes(await image.read(0, header.cluster_size))
    if not _collides(new, between.ranges(), present):
        await _switch(image, new)


def _area(header: Header, filename: str, name_offset: int | None = None) -> _Area:
    """Lay out a header; the name goes behind the extensions, unless an offset is given."""
    header = dataclasses.replace(header)
    encoded = layout.encode_header_area(header, filename)
    end, name = header.backing_file_offset or len(encoded), os.fsencode(header.backing_file)
    if name and name_offset is not None:
        header.backing_file_offset = name_offset
    return _Area(layout.encode_header(header) + encoded[header.header_length : end], name, header.backing_file_offset)


def _ranges_in_use(header: Header) -> list[Range]:
    """The bytes that the header in the file needs."""
    end = header.header_length + 8 + sum(8 + len(data) + -len(data) % 8 for _, data in header.extensions)
    start = header.backing_file_offset
    return [(0, end), (start, start + header.backing_file_size)] if start else [(0, end)]


def _collides(area: _Area, in_use: list[Range], present: bytes) -> bool:
    """Whether writing what lies behind the first sector would change bytes that are in use."""
    for start, data in area.behind_first_sector():
        for low, high in in_use:
            low, high = max(low, start), min(high, start + len(data))
            if low < high and present[low:high] != data[low - start : high - start]:
                return True
    return False


def _between(header: Header, filename: str, new: _Area, old: list[Range], present: bytes) -> _Area:
    """Return a header that may follow the existing one, and be followed by ``new`` if there is room for that."""
    kept = [extension for extension in header.extensions if extension.type != layout.EXTENSION_FEATURE_NAMES]
    header = dataclasses.replace(header, extensions=kept)
    old_end, new_end = max(end for _, end in old), max(end for _, end in new.ranges())
    size, name = header.cluster_size, len(new.name)
    found = None
    for place in (max(old_end, new_end), new_end, old_end, size - name):
        area = _area(header, filename, place)
        fits = not name or len(area.head) <= place <= size - name
        if fits and not _collides(area, old, present):
            found = found or area
            if not _collides(new, area.ranges(), bytes(size)):
                return area
    if found is None:
        raise ImageError(
            f"the first cluster of '{filename}' has {size} bytes, which is no room for the old header and the new "
            "one at once, as a change that a power cut cannot break asks for."
        )
    return found


async def _switch(image: Image, area: _Area) -> None:
    """Let the file have a header whose bytes behind the first sector are not in use, when they and all that was
    written before are durable."""
    for offset, data in area.behind_first_sector():
        await image.put_bytes(offset, data)
    await image.barrier()
    sector = area.first_sector(bytes(await image.read(0, SECTOR)))
    await image.put_header_fields(0, sector)
    await image.barrier()
