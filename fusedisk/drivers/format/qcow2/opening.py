"""The first steps of opening an image: reading the header, and deciding whether it may be written to."""

from __future__ import annotations

import logging

from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.errors import ImageError, OptionError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.layout import Header
from fusedisk.drivers.format.qcow2.options import Qcow2Options

log = logging.getLogger(__name__)


async def read_header(file: Node, filename: str, *, look_only: bool = False) -> Header:
    """The validated header of the image in ``file``. Raises ImageError or UnsupportedFeatureError.

    ``look_only``: where its tables lie in impossible places, warn of that and leave them out.
    """
    head = await _read(file, layout.V3_HEADER_LENGTH)
    header = layout.parse_header(head, filename)
    layout.check_untrusted(header, filename)
    layout.parse_header_area(header, await _read(file, header.cluster_size), filename)
    layout.check_features(header, filename)
    layout.check_table_sizes(header, filename)
    try:
        layout.check_table_places(header, file.length, filename)
    except ImageError as exc:
        if not look_only:
            raise
        log.warning("%s", exc)
        header.l1_size = header.nb_snapshots = 0
    return header


async def _read(file: Node, length: int) -> bytes:
    data = bytearray(min(length, file.length))
    await io.read(file, 0, memoryview(data))
    return bytes(data)


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
