"""The clusters that the persistent bitmaps of an image take up.

Source: docs/interop/qcow2.txt, "Bitmaps".
"""

from __future__ import annotations

from fusedisk.core.errors import ImageError
from fusedisk.drivers.format.qcow2.bitmap_directory import Bitmap, InvalidDirectoryError, parse_directory
from fusedisk.drivers.format.qcow2.check_open import CheckedImage
from fusedisk.drivers.format.qcow2.layout import BitmapDirectory

TABLE_ENTRY_RESERVED = 0xFF000000000001FE
TABLE_ENTRY_OFFSET = 0x00FFFFFFFFFFFE00
TABLE_ENTRY_ONES = 1


async def bitmap_directory(image: CheckedImage, directory: BitmapDirectory) -> list[Bitmap]:
    """The bitmaps. Raises ImageError if the directory or an entry of it is invalid."""
    data = await image.read(directory.offset, directory.size)
    try:
        return parse_directory(data, directory.bitmaps, image.header)
    except InvalidDirectoryError as exc:
        raise ImageError(f"'{image.filename}' cannot be checked: its directory of bitmaps {exc}.") from None


def wrong_entry(image: CheckedImage, entry: int) -> bool:
    """Whether an entry of a bitmap's table is invalid."""
    offset = entry & TABLE_ENTRY_OFFSET
    return bool(entry & TABLE_ENTRY_RESERVED or (offset and entry & TABLE_ENTRY_ONES) or offset & image.cluster_mask)
