"""The persistent dirty bitmaps of an open image. What writes to the disk is not recorded in them: a bitmap that tracks
writes is marked as in use before the first one, as QEMU does while it has an image open, and stays so. That says that
its bits mean nothing any more; those that track nothing, and everything that does not change the disk, leave all of
them as they are.

Source: docs/interop/qcow2.txt, "Bitmaps".
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from fusedisk.core.errors import FusediskError
from fusedisk.drivers.format.qcow2 import bitmap_directory, layout
from fusedisk.drivers.format.qcow2.bitmap_directory import IN_USE, TRACKING, Bitmap, InvalidDirectoryError
from fusedisk.drivers.format.qcow2.image import Image

log = logging.getLogger(__name__)

_MOST_NAMED = 3
"""Bitmaps that a message names."""


class Bitmaps:
    """The bitmaps of one image."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.found: list[Bitmap] = []
        self.offset = 0
        """Host offset of the directory."""
        self.broken = False
        """The directory is invalid: a writer must declare all bitmaps invalid."""

    async def load(self) -> None:
        """Read the directory, of which nothing is needed to read the disk."""
        image, header = self._image, self._image.header
        directory = header.bitmap_directory
        if directory is None:
            self.broken = bool(header.autoclear_features & layout.BITMAPS)
            return
        start, size = directory.offset, directory.size
        if not directory.is_possible(header) or start + size > image.storage.node.length:
            self.broken = True
            return
        try:
            self.found = bitmap_directory.parse_directory(await image.read(start, size), directory.bitmaps, header)
        except (InvalidDirectoryError, FusediskError) as exc:
            log.debug("%s: its directory of bitmaps %s", image.filename, exc)
            self.broken = True
            return
        self.offset = start
        image.bitmap_directory_size = size

    @property
    def tracking(self) -> list[Bitmap]:
        """The bitmaps that a write to the disk makes invalid."""
        return [bitmap for bitmap in self.found if bitmap.tracking]

    @property
    def valid(self) -> list[Bitmap]:
        """The bitmaps whose bits mean something."""
        return [bitmap for bitmap in self.found if not bitmap.in_use]

    async def mark(self, bitmaps: Iterable[Bitmap], *, in_use: bool) -> None:
        """Mark some as in use, or as stored; durable on return. Under the mutex. What may be valid in the file is so in
        memory, whatever fails: the next write to the disk marks it then."""
        changed = [bitmap for bitmap in bitmaps if bitmap.in_use != in_use]
        if changed and not in_use:
            # What makes them valid is durable first.
            await self._image.barrier()
        for bitmap in changed:
            flags = bitmap.flags ^ IN_USE
            if not in_use:
                bitmap.flags = flags
            await self.put_field(bitmap, bitmap_directory.FLAGS_FIELD, flags.to_bytes(4, "big"))
        if changed:
            await self._image.barrier()
        for bitmap in changed:
            bitmap.flags = bitmap.flags & ~IN_USE | (IN_USE if in_use else 0)

    async def put_field(self, bitmap: Bitmap, field: int, data: bytes) -> None:
        """Write a field of an entry of the directory; the order is the caller's business."""
        await self._image.put_bytes(self.offset + bitmap.position + field, data)

    def cost_of_writing(self) -> str | None:
        """Return what a write to the disk would make invalid, a sentence without its full stop; None if nothing."""
        filename, tracking = self._image.filename, self.tracking
        if self.broken and self._image.header.bitmap_directory is not None:
            return f"'{filename}' has an invalid directory of dirty bitmaps: the first write will drop all of them"
        if not tracking:
            return None
        return (
            f"'{filename}' has {label(tracking)}, which fusedisk does not keep up to date: the first write will make "
            f"{'it' if len(tracking) == 1 else 'them'} invalid"
        )

    def information(self) -> list[dict[str, Any]]:
        """As ``qemu-img info --output=json`` prints it."""
        names = ((IN_USE, "in-use"), (TRACKING, "auto"))
        return [
            {
                "flags": [name for flag, name in names if bitmap.flags & flag],
                "name": bitmap.label,
                "granularity": 1 << bitmap.granularity_bits,
            }
            for bitmap in self.found
        ]


def label(bitmaps: list[Bitmap]) -> str:
    """Return some bitmaps in words, the first few by their names."""
    names = [f"'{bitmap.label}'" for bitmap in bitmaps[:_MOST_NAMED]]
    if len(bitmaps) > _MOST_NAMED:
        names.append(f"{len(bitmaps) - _MOST_NAMED} more")
    if len(names) == 1:
        return f"the dirty bitmap {names[0]}"
    return f"the dirty bitmaps {', '.join(names[:-1])} and {names[-1]}"
