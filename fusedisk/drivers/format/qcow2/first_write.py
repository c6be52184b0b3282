"""The first change of an image: promises in its header that our writes would break are withdrawn first, durably. An
image that is open for writing but only read is not touched.

There are two steps, since many changes leave the guest's data as they are (snapshots, settings, VM state): *any* first
change clears the autoclear bits of unknown features, the first change of the *disk* marks the bitmaps that track writes
as in use. An empty overlay also records its base before it gets data (:mod:`.base_record`).

Source: docs/interop/qcow2.txt, "Header" (autoclear features) and "Bitmaps".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import CorruptImageError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.bitmaps import Bitmaps
from fusedisk.drivers.format.qcow2.image import Image


class FirstWrite:
    """The first writes to one image; everything here runs under its mutex."""

    def __init__(self, image: Image, bitmaps: Bitmaps, tell: Callable[[bool], None]) -> None:
        """``tell`` is called with True when guest data may change without asking here, with False when not."""
        self._image = image
        self._bitmaps = bitmaps
        self._tell = tell
        self.begun = False
        """Whether anything may change."""
        self.disk = False
        """Whether the guest's data may change."""
        self.note_base: Callable[[], Awaitable[None]] | None = None
        """What the first write to the disk does once before it."""

    async def prepare(self, disk: bool) -> None:
        """Let the file be changed, with ``disk`` also the guest's data. Raises CorruptImageError where corruption was
        found before."""
        if not self.begun:
            refuse_to_wait()
            await self._clear_autoclear()
            self.begun = self._image.writable = True
        if disk and not self.disk:
            refuse_to_wait()
            if self.note_base is not None:
                await self.note_base()
                self.note_base = None
            await self._bitmaps.mark(self._bitmaps.tracking, in_use=True)
            self.disk = True
            self._tell(True)

    async def _clear_autoclear(self) -> None:
        image, header = self._image, self._image.header
        if image.corrupt:
            raise CorruptImageError(f"'{image.filename}' was found to be corrupt before it was written to.")
        kept = header.kept_autoclear & ~(layout.BITMAPS if self._bitmaps.broken else 0)
        if kept != header.autoclear_features:
            await image.put_header_fields(layout.AUTOCLEAR_FIELD, kept.to_bytes(8, "big"))
            # Nothing may change before the promise is gone.
            await image.barrier()
            header.autoclear_features = kept

    def renew(self) -> None:
        """Note that there may be valid bitmaps again. Synchronous."""
        self.disk = False
        self._tell(False)

    def end(self) -> None:
        """Treat the next change as a first one again. Synchronous."""
        self.begun = self._image.writable = False
        self.renew()
