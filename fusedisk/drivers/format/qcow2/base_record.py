"""Detects a backing file that was changed after its overlay got data.

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
from fusedisk.block.model.driver import Role
from fusedisk.block.model.node import Node
from fusedisk.core.errors import FusediskError, ImageError
from fusedisk.drivers.format.qcow2.amend_header import put_header
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.layout import Extension, Header
from fusedisk.drivers.format.qcow2.opening import read_header

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver

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
