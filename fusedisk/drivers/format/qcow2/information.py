"""The information that ``info`` shows for qcow2 images only, with QMP's names."""

from __future__ import annotations

from typing import Any

from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.layout import Header


def specific_information(
    image: Image, bitmaps: list[dict[str, Any]], encryption: dict[str, Any] | None
) -> dict[str, Any]:
    """QMP's ``ImageInfoSpecificQCow2``; ``encryption`` is its member ``encrypt``, None without any."""
    header = image.header
    information: dict[str, Any] = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "compression-type": layout.COMPRESSION_NAMES[header.compression_type],
        "refcount-bits": image.geometry.refcount_bits,
    }
    if header.version >= 3:
        information |= {
            "lazy-refcounts": bool(header.compatible_features & layout.LAZY_REFCOUNTS),
            **({"bitmaps": bitmaps} if bitmaps else {}),
            "corrupt": bool(header.incompatible_features & layout.CORRUPT),
            "extended-l2": image.geometry.extended_l2,
            **_data_file(header),
        }
    if encryption is not None:
        information["encrypt"] = encryption
    return information


def _data_file(header: Header) -> dict[str, Any]:
    if not header.has_data_file:
        return {}
    name = {"data-file": header.data_file_name} if header.data_file_name is not None else {}
    return name | {"data-file-raw": header.has_raw_data_file}
