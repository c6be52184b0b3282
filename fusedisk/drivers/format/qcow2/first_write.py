"""The first change of an image: promises in its header that our writes would break are withdrawn first, durably. An
image that is open for writing but only read is not touched.

There are two steps, since many changes leave the guest's data as they are (snapshots, settings, VM state): *any* first
change clears the autoclear bits of unknown features, the first change of the *disk* marks the bitmaps that track writes
as in use. An empty overlay also records its base before it gets data.

Source: docs/interop/qcow2.txt, "Header" (autoclear features) and "Bitmaps".

The record of the base
----------------------
A base that is changed under its overlay makes a broken disk of both, and nothing in the format shows it. So the first
write to an empty overlay records the state of its base in a header extension, which other programs keep and ignore.
``commit`` empties an overlay, so the first write after it records the base again.

Only certain changes are reported. A copy of the files has another time, but also another inode, so the time counts for
the same inode only; sizes always count. Overlays without a record are not judged, as times alone would give false
alarms after each copy or restored backup. Bases on block devices have neither size nor time, and are not recorded.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from logging import getLogger
from typing import TYPE_CHECKING, NamedTuple

from fusedisk.block.graph.filenames import resolve_reference
from fusedisk.block.model.children import Role
from fusedisk.block.model.node import Node
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import CorruptImageError, FusediskError, ImageError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.bitmaps import Bitmaps
from fusedisk.drivers.format.qcow2.header import put_header, read_header
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.layout import Extension, Header

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver


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


# --- the record of the base ---------------------------------------------------------------------------

log = getLogger(__name__)

EXTENSION_BASE = 0x46446273
"""Ours: ``FDbs``. Its data is the checksum of the backing file's name as the header has it, then :class:`_Base`."""

_RECORD = struct.Struct(">IxxxxQQQq")


class _Base(NamedTuple):
    """The state of a backing file."""

    disk_size: int
    """Bytes."""
    file_size: int
    """Bytes of its file, and of its data file if it has one."""
    inode: int
    """0 for several files."""
    mtime_ns: int
    """When any of them was written last."""


def check_base(driver: Qcow2Driver) -> Callable[[], Awaitable[None]] | None:
    """Warn if the backing file, which is attached, is known to have changed.

    Returns what the first write to an empty overlay does, under the image's mutex, to note the base as it is now; None
    if there is nothing to note.
    """
    node, image = driver.node, driver.image
    found = _state_of_base(driver)
    if found is None:
        return None
    known = _noted(image.header)
    if any(image.l1) or driver.snapshots:
        if known is not None and (change := _change(known, found)):
            assert node.backing is not None
            log.warning(
                "'%s' has changed since '%s' was made over it (%s): if its disk reads otherwise now, the two no longer "
                "fit together.",
                node.backing.node.filename,
                node.filename,
                change,
            )
        return None
    return partial(_note, image, found) if known != found else None


def _change(known: _Base, found: _Base) -> str | None:
    """Return the difference that shows that the base has changed."""
    if known.disk_size != found.disk_size:
        return f"a disk of {known.disk_size} bytes then, {found.disk_size} now"
    if known.file_size != found.file_size:
        return f"a file of {known.file_size} bytes then, {found.file_size} now"
    if known.inode and known.inode == found.inode and known.mtime_ns != found.mtime_ns:
        return f"last written {datetime.fromtimestamp(found.mtime_ns // 10**9):%Y-%m-%d %H:%M:%S}"
    return None


def _state_of_base(driver: Qcow2Driver) -> _Base | None:
    """The state of the file that the header names, None where the base is something else or no regular file."""
    backing = driver.node.backing
    name = driver.image.header.backing_file
    if backing is None or not name:
        return None
    try:
        named = resolve_reference(name, driver.node.exact_filename())
        if not os.path.samefile(named, backing.node.filename):
            return None
        files = [os.stat(path) for path in _files(backing.node)]
    except (OSError, ValueError, FusediskError):
        return None
    if not files or not all(stat.S_ISREG(file.st_mode) for file in files):
        return None
    return _Base(
        backing.node.length,
        sum(file.st_size for file in files),
        files[0].st_ino if len(files) == 1 else 0,
        max(file.st_mtime_ns for file in files),
    )


def _files(node: Node) -> list[str]:
    """The files that an image without its own backing files consists of."""
    if node.driver.is_protocol:
        return [node.filename]
    below = [child.node for child in node.children.values() if child.role is not Role.BACKING]
    return [path for each in below for path in _files(each)]


def _noted(header: Header) -> _Base | None:
    """Return the header's record of the base that it names."""
    for kind, data in header.extensions:
        if kind == EXTENSION_BASE and len(data) == _RECORD.size:
            name, *state = _RECORD.unpack(data)
            return _Base(*state) if name == _checksum(header.backing_file) else None
    return None


def _checksum(name: str) -> int:
    return zlib.crc32(os.fsencode(name))


async def _note(image: Image, base: _Base) -> None:
    """Let the header say what the base is. Where the first cluster has no room for that, it stays as it is."""
    header = image.header
    kept = [extension for extension in header.extensions if extension.type != EXTENSION_BASE]
    new = Extension(EXTENSION_BASE, _RECORD.pack(_checksum(header.backing_file), *base))
    try:
        await put_header(image, replace(header, extensions=[*kept, new]))
    except ImageError as exc:
        log.debug("%s", exc)
        return
    written = await read_header(image.storage.node, image.filename)
    header.extensions, header.backing_file_offset = written.extensions, written.backing_file_offset
