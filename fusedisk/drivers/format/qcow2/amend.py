"""Changing the settings of an existing image.

Impossible changes are refused before anything changes, as far as they can be known. Then the changes are made one by
one, in QEMU's order: to version 3 first, to version 2 last, so that changes that need version 3 come between. Each is
crash-safe and leaves an image that every program can read; after each the driver reads the image again.

No request is in flight on the node meanwhile (:mod:`fusedisk.block.image.amend`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

from fusedisk.block.graph.filenames import resolve_reference
from fusedisk.block.model.flags import ZERO_NEW
from fusedisk.core import paths
from fusedisk.core.errors import NotSupportedError, OptionError
from fusedisk.core.progress import Progress
from fusedisk.crypto.luks import Piece
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.amend_changes import (
    changing,
    check_downgrade,
    downgrade,
    prepare_keys,
    upgrade,
    write_keys,
)
from fusedisk.drivers.format.qcow2.amend_refcounts import RefcountWidth
from fusedisk.drivers.format.qcow2.header import put_header
from fusedisk.drivers.format.qcow2.layout import Extension, Header
from fusedisk.drivers.format.qcow2.options import Qcow2AmendOptions

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver

_COMPATIBLE_FIELD = 80
_AT_ONCE = 1000
"""Units of progress in one change."""

Change = Callable[[Progress], Awaitable[None]]


async def amend(driver: Qcow2Driver, options: Qcow2AmendOptions, progress: Progress, *, force: bool) -> None:
    """Give the image what ``options`` ask for. ``force`` allows what may lose data.

    Raises OptionError, NotSupportedError, ImageError or PassphraseError with nothing changed, unless what is refused is
    the size of a disk that a change of version was to allow; HostError and NoSpaceError with some changes made.
    """
    await driver.committer.finish()
    changes = await _changes(driver, options, force=force)
    for number, change in enumerate(changes):
        await change(partial(_part, progress, number, len(changes)))
    progress(len(changes), len(changes))


def _part(progress: Progress, number: int, changes: int, done: int, total: int) -> None:
    """Progress in one of several changes."""
    progress(number * _AT_ONCE + done * _AT_ONCE // max(total, 1), changes * _AT_ONCE)


async def _changes(driver: Qcow2Driver, options: Qcow2AmendOptions, *, force: bool) -> list[Change]:
    """Return the checked changes, in order."""
    header = driver.image.header
    version = options.version or header.version
    _check_version(driver, options, version)
    changes: list[Change] = []
    if version > header.version:
        changes.append(partial(upgrade, driver))
    if options.size not in (None, header.size):
        changes.append(partial(_resize, driver, options.size))
    if options.encryption:
        pieces = await prepare_keys(driver, options, force=force)
        changes.append(partial(_change_keys, driver, pieces))
    bits = options.refcount_bits
    if bits not in (None, driver.image.geometry.refcount_bits):
        await RefcountWidth(driver.image, driver.refcounts, bits).check()
        changes.append(partial(_change_width, driver, bits))
    references = _references(driver, options, force=force)
    if references != _references_of(header):
        changes.append(partial(_change_references, driver, references))
    lazy = options.lazy_refcounts
    if lazy not in (None, bool(header.compatible_features & layout.LAZY_REFCOUNTS)):
        changes.append(partial(_change_lazy, driver, lazy))
    if version < header.version:
        check_downgrade(driver, options)
        changes.append(partial(downgrade, driver))
    return changes


def _check_version(driver: Qcow2Driver, options: Qcow2AmendOptions, version: int) -> None:
    filename, bits = driver.image.filename, options.refcount_bits
    if bits is not None and bits not in (1, 2, 4, 8, 16, 32, 64):
        raise OptionError(f"qcow2 refcount_bits is {bits}, expected 1, 2, 4, 8, 16, 32 or 64.")
    for name, wrong in (("lazy_refcounts", options.lazy_refcounts), ("refcount_bits", bits not in (None, 16))):
        if wrong and version < 3:
            raise OptionError(
                f"qcow2 {name} is '{getattr(options, name)}' for '{filename}', which needs compat=1.1 (version 3)."
            )


# --- the disk, keys and refcounts -----------------------------------------------------------------------


async def _resize(driver: Qcow2Driver, size: int, progress: Progress) -> None:
    old, backing = driver.image.header.size, driver.node.backing
    hides = backing is not None and min(backing.node.length, size) > old
    await driver.truncate(size, "off", ZERO_NEW if hides else 0)
    await driver.committer.finish()


async def _change_keys(driver: Qcow2Driver, pieces: list[Piece], progress: Progress) -> None:
    async with changing(driver):
        await write_keys(driver.image, pieces)


async def _change_width(driver: Qcow2Driver, bits: int, progress: Progress) -> None:
    async with changing(driver):
        await RefcountWidth(driver.image, driver.refcounts, bits).change(progress)


async def _change_lazy(driver: Qcow2Driver, lazy: bool, progress: Progress) -> None:
    header = driver.image.header
    features = header.compatible_features & ~layout.LAZY_REFCOUNTS | (layout.LAZY_REFCOUNTS if lazy else 0)
    # The refcounts in the file are right, also with lazy refcounts, since everything is committed.
    async with changing(driver):
        await driver.image.put_header_fields(_COMPATIBLE_FIELD, features.to_bytes(8, "big"))
        await driver.image.barrier()


# --- files that the header names ------------------------------------------------------------------------


@dataclasses.dataclass(slots=True, frozen=True)
class _References:
    """The header's references to other files."""

    backing_file: str
    backing_format: str | None
    data_file: str | None
    raw: bool


def _references_of(header: Header) -> _References:
    return _References(header.backing_file, header.backing_format, header.data_file_name, header.has_raw_data_file)


def _references(driver: Qcow2Driver, options: Qcow2AmendOptions, *, force: bool) -> _References:
    """Return the new references of the header. Raises OptionError and NotSupportedError for impossible ones."""
    header, filename = driver.image.header, driver.image.filename
    now = _references_of(header)
    if options.data_file is not None and not header.has_data_file:
        raise OptionError(f"qcow2 data_file is set, but '{filename}' has no external data file, nor can it get one.")
    if options.data_file_raw and not now.raw:
        raise OptionError(f"qcow2 data_file_raw is 'on', but '{filename}' can only be created so.")
    wanted = dataclasses.replace(
        now,
        data_file=now.data_file if options.data_file is None else options.data_file or None,
        raw=now.raw and options.data_file_raw is not False,
    )
    if options.backing_file is not None or options.backing_fmt is not None:
        name = now.backing_file if options.backing_file is None else options.backing_file
        format = options.backing_fmt or (now.backing_format if name == now.backing_file else None)
        wanted = dataclasses.replace(wanted, backing_file=name, backing_format=format)
        if wanted.backing_file != now.backing_file or wanted.backing_format != now.backing_format:
            _check_backing(driver, wanted, force=force)
    return wanted


def _check_backing(driver: Qcow2Driver, wanted: _References, *, force: bool) -> None:
    filename, name = driver.image.filename, wanted.backing_file
    if not force:
        raise NotSupportedError(
            f"'{filename}' keeps its backing file, as its disk could read otherwise with "
            f"{f'{name!r}' if name else 'none'}; with --force its header is changed, and nothing else."
        )
    if wanted.backing_format is not None and not name:
        raise OptionError(f"qcow2 backing_fmt is set, but '{filename}' is to have no backing_file.")
    if name and wanted.backing_format is None:
        raise OptionError(
            f"the backing file '{name}' is given without its format, and a guess could be wrong: add backing_fmt."
        )
    if len(os.fsencode(name)) > layout.MAX_BACKING_NAME:
        raise OptionError(
            f"qcow2 backing_file is longer than the {layout.MAX_BACKING_NAME} bytes that the header has room for."
        )
    if name and paths.real(resolve_reference(name, filename)) == paths.real(filename):
        raise OptionError(f"'{filename}' cannot be its own backing file.")
    if name and wanted.raw:
        raise OptionError(f"'{filename}' has a raw external data file, so it cannot have a backing file.")


async def _change_references(driver: Qcow2Driver, wanted: _References, progress: Progress) -> None:
    header = driver.image.header
    named = {
        layout.EXTENSION_BACKING_FORMAT: wanted.backing_format,
        layout.EXTENSION_DATA_FILE: wanted.data_file,
    }
    # Extensions keep their order: QEMU's, in most images.
    extensions = [
        Extension(kind, os.fsencode(named.get(kind) or "")) if kind in named else Extension(kind, data)
        for kind, data in header.extensions
        if kind not in named or named[kind] is not None
    ]
    present = {kind for kind, _ in extensions}
    extensions[:0] = [
        Extension(kind, os.fsencode(name)) for kind, name in named.items() if name is not None and kind not in present
    ]
    async with changing(driver):
        # Some autoclear bits go with the first change.
        autoclear = header.autoclear_features
        if not wanted.raw:
            autoclear &= ~layout.RAW_EXTERNAL_DATA
        new = dataclasses.replace(
            header, backing_file=wanted.backing_file, extensions=extensions, autoclear_features=autoclear
        )
        await put_header(driver.image, new)
