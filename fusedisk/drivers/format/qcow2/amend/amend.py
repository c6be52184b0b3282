"""Changing the settings of an existing image.

Impossible changes are refused before anything changes, as far as they can be known. Then the changes are made one by
one, in QEMU's order: to version 3 first, to version 2 last, so that changes that need version 3 come between. Each is
crash-safe and leaves an image that every program can read; after each the driver reads the image again.

No request is in flight on the node meanwhile (:mod:`fusedisk.block.image.amend`).

Zero clusters
-------------
Version 2 does not know them. Without a backing file they become unallocated, with one they get host clusters of zeroes.
L2 tables change in place, for all that lead to them at once, so a new host cluster counts as often as the table does.
The entries of a batch of tables are written when their clusters are durable, and what they referred to before is given
back behind that: the disk reads the same at every instant, and a crash leaks at worst.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio

from fusedisk.block.graph.filenames import resolve_reference
from fusedisk.block.model.flags import ZERO_NEW
from fusedisk.core import paths
from fusedisk.core.errors import FusediskError, NotSupportedError, OptionError
from fusedisk.core.progress import Progress
from fusedisk.crypto.luks import Piece
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.amend.refcounts import RefcountWidth
from fusedisk.drivers.format.qcow2.encryption import prepare_keys, write_keys
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO, encode_table, used_pieces
from fusedisk.drivers.format.qcow2.header import put_header
from fusedisk.drivers.format.qcow2.layout import Extension, Header
from fusedisk.drivers.format.qcow2.options import Qcow2AmendOptions
from fusedisk.drivers.format.qcow2.snapshots.operations import read_l1
from fusedisk.drivers.format.qcow2.snapshots.references import corrupt, table_weights
from fusedisk.drivers.format.qcow2.snapshots.switch import State, Switch
from fusedisk.drivers.format.qcow2.snapshots.table import encode_snapshots

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver

log = logging.getLogger(__name__)

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
        changes.append(partial(_upgrade, driver))
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
        _check_downgrade(driver, options)
        changes.append(partial(_downgrade, driver))
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


@asynccontextmanager
async def _changing(driver: Qcow2Driver) -> AsyncIterator[None]:
    """Run the block with all changes in the file and no other request; the driver agrees with the file afterwards.

    After an error the file may have either state of the header, so all state in memory is thrown away. That loses only
    refcounts of clusters that nothing refers to.
    """
    await driver.committer.finish()
    try:
        async with driver.committer.exclusive():
            yield
        await driver.committer.finish()
    except BaseException:
        with trio.CancelScope(shield=True):
            try:
                await driver.reload()
            except FusediskError as exc:
                log.warning("%s: %s", driver.image.filename, exc)
        raise
    await driver.reload()


# --- the disk, keys and refcounts -----------------------------------------------------------------------


async def _resize(driver: Qcow2Driver, size: int, progress: Progress) -> None:
    old, backing = driver.image.header.size, driver.node.backing
    hides = backing is not None and min(backing.node.length, size) > old
    await driver.truncate(size, "off", ZERO_NEW if hides else 0)
    await driver.committer.finish()


async def _change_keys(driver: Qcow2Driver, pieces: list[Piece], progress: Progress) -> None:
    async with _changing(driver):
        await write_keys(driver.image, pieces)


async def _change_width(driver: Qcow2Driver, bits: int, progress: Progress) -> None:
    async with _changing(driver):
        await RefcountWidth(driver.image, driver.refcounts, bits).change(progress)


async def _change_lazy(driver: Qcow2Driver, lazy: bool, progress: Progress) -> None:
    header = driver.image.header
    features = header.compatible_features & ~layout.LAZY_REFCOUNTS | (layout.LAZY_REFCOUNTS if lazy else 0)
    # The refcounts in the file are right, also with lazy refcounts, since everything is committed.
    async with _changing(driver):
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
    async with _changing(driver):
        # Some autoclear bits go with the first change.
        autoclear = header.autoclear_features
        if not wanted.raw:
            autoclear &= ~layout.RAW_EXTERNAL_DATA
        new = dataclasses.replace(
            header, backing_file=wanted.backing_file, extensions=extensions, autoclear_features=autoclear
        )
        await put_header(driver.image, new)


# --- the version --------------------------------------------------------------------------------------


async def _upgrade(driver: Qcow2Driver, progress: Progress) -> None:
    """Make an image of version 2 one of version 3; only the header, and the snapshot table if that lacks what version
    3 asks for, changes."""
    image, old = driver.image, driver.image.header
    async with _changing(driver):
        progress(0, 1)
        table = encode_snapshots(driver.snapshots, image.filename)
        if len(table) != image.snapshot_table_size:
            await _move_snapshot_table(driver, table)
        kept = _without_feature_names(old)
        names = [layout.feature_name_table()] if old.cluster_size > layout.SMALL_CLUSTER else []
        header = dataclasses.replace(
            old,
            version=3,
            incompatible_features=0,
            compatible_features=0,
            autoclear_features=0,
            extra=bytes(layout.V3_HEADER_LENGTH - layout.V3_MIN_HEADER_LENGTH),
            extensions=[*kept, *names],
        )
        await put_header(image, header)


async def _move_snapshot_table(driver: Qcow2Driver, table: bytes) -> None:
    """Write the snapshot table anew; entries say how long the disk is then."""
    image, header = driver.image, driver.image.header
    switch = Switch(image, driver.refcounts)
    try:
        offset = await switch.new_table(table)
        switch.lose_table(header.snapshots_offset, image.snapshot_table_size)
        state = State(header.size, image.l1[:], header.l1_table_offset, header.nb_snapshots, offset)
        await switch.commit(state, contextlib.nullcontext, discard=False)
    except BaseException:
        switch.undo()
        raise
    image.snapshot_table_size = len(table)


def _check_downgrade(driver: Qcow2Driver, options: Qcow2AmendOptions) -> None:
    """Raise NotSupportedError for what version 2 cannot hold, once everything else in ``options`` is done."""
    header, filename = driver.image.header, driver.image.filename
    bits = driver.image.geometry.refcount_bits if options.refcount_bits is None else options.refcount_bits
    size = header.size if options.size is None else options.size
    otherwise = [shot for shot in driver.snapshots if shot.disk_size != size or shot.vm_state_size >> 32]
    for wrong, reason in (
        (bits != 16, f"has refcounts of {bits} bits, and there they have 16: add refcount_bits=16"),
        (header.has_data_file, "has an external data file"),
        (driver.image.geometry.extended_l2, "has extended L2 entries"),
        (bool(header.compression_type), f"compresses with {layout.COMPRESSION_NAMES[header.compression_type]}"),
        (
            any(kind == layout.EXTENSION_BITMAPS for kind, _ in header.extensions),
            "has persistent bitmaps: remove them first",
        ),
        (bool(options.lazy_refcounts or driver.options.lazy_refcounts), "was asked to have lazy refcounts"),
        (driver.options.discard_no_unref, "was opened with discard-no-unref"),
        (bool(otherwise), f"has {len(otherwise)} snapshots of another disk size, or with more than 4 GiB of VM state"),
    ):
        if wrong:
            raise NotSupportedError(f"'{filename}' cannot become version 2 (compat=0.10), because it {reason}.")


async def _downgrade(driver: Qcow2Driver, progress: Progress) -> None:
    """Make an image of version 3, which :func:`_check_downgrade` has let through, one of version 2."""
    if driver.image.header.backing_file:
        await driver.require_key()
    image = driver.image
    async with _changing(driver):
        await _expand_zero_clusters(driver, progress)
        header = dataclasses.replace(
            image.header,
            version=2,
            incompatible_features=0,
            compatible_features=0,
            autoclear_features=0,
            refcount_order=4,
            extra=b"",
            extensions=_without_feature_names(image.header),
        )
        await put_header(image, header)


def _without_feature_names(header: layout.Header) -> list[layout.Extension]:
    return [extension for extension in header.extensions if extension.type != layout.EXTENSION_FEATURE_NAMES]


# --- zero clusters ------------------------------------------------------------------------------------

_BATCH_BYTES = 16 << 20
"""L2 tables and new clusters that are worked on between two barriers."""


class _Table(NamedTuple):
    """An L2 table that some L1 tables lead to."""

    offset: int
    weight: int
    """The number of L1 entries that lead to it."""
    active: bool
    """Whether the active L1 table does."""
    guest_offset: int
    """The guest offset of its first entry."""


async def _expand_zero_clusters(driver: Qcow2Driver, progress: Progress) -> None:
    """Leave no zero cluster. Inside :meth:`Committer.exclusive`, with the key at hand where there is one; the image's
    caches are no longer right then. Raises ImageError for invalid tables, NoSpaceError and HostError; what was
    done until then stays."""
    tables = await _tables(driver)
    expansion = _Expansion(driver)
    for done, table in enumerate(tables):
        progress(done, len(tables))
        await expansion.take(table)
        await trio.lowlevel.checkpoint()
    await expansion.commit()


async def _tables(driver: Qcow2Driver) -> list[_Table]:
    """All L2 tables, lowest first."""
    image, span_bits = driver.image, driver.image.geometry.span_bits
    active = await table_weights(image, image.l1, "its L1 table")
    weights, guest_offsets = Counter(active), await _guest_offsets(image.l1, span_bits)
    # Snapshots of a hostile image may all lead to one large L1 table, or to tables that overlap.
    places = Counter((shot.l1_table_offset, shot.l1_size) for shot in driver.snapshots)
    if sum(size * 8 for _, size in places) > image.storage.node.length:
        raise corrupt(image, f"the L1 tables of its {len(driver.snapshots)} snapshots are longer than the file")
    for snapshot in {(shot.l1_table_offset, shot.l1_size): shot for shot in driver.snapshots}.values():
        l1 = (await read_l1(image, snapshot))[: snapshot.l1_size]
        number = places[snapshot.l1_table_offset, snapshot.l1_size]
        found = await table_weights(image, l1, f"the L1 table of snapshot {snapshot.id}")
        for offset, weight in found.items():
            weights[offset] += weight * number
        guest_offsets = await _guest_offsets(l1, span_bits) | guest_offsets
        await trio.lowlevel.checkpoint()
    return [_Table(offset, weights[offset], offset in active, guest_offsets[offset]) for offset in sorted(weights)]


async def _guest_offsets(l1: array[int], span_bits: int) -> dict[int, int]:
    """Return the guest offset of the first entry of each L2 table, by the table's host offset."""
    found: dict[int, int] = {}
    for first, piece in used_pieces(l1):
        found |= {
            entry & OFFSET_MASK: index << span_bits for index, entry in enumerate(piece, first) if entry & OFFSET_MASK
        }
        await trio.lowlevel.checkpoint()
    return found


class _Expansion:
    """Works on tables, and remembers what is to be written and freed."""

    def __init__(self, driver: Qcow2Driver) -> None:
        self.driver = driver
        self.image, self.geometry, self.refcounts = driver.image, driver.image.geometry, driver.refcounts
        self._allocates = bool(self.image.header.backing_file)
        self._writes: list[tuple[int, memoryview]] = []
        self._freed: Counter[int] = Counter()
        """References of clusters that go."""
        self._batch = 0

    async def take(self, table: _Table) -> None:
        """Prepare a table, and write what was prepared when that is a lot."""
        self._check_place(table.offset)
        old = await self.image.read_table(table.offset, self.geometry.l2_words)
        zero = [index for index, entry in enumerate(old) if entry & (ZERO | COMPRESSED) == ZERO]
        if not zero:
            return
        new = old[:]
        for index in zero:
            if old[index] & self.geometry.l2_bad:
                raise corrupt(
                    self.image,
                    f"entry {index} of its L2 table at {table.offset} is {old[index]:#018x}, which is invalid",
                )
            new[index] = 0
            if old[index] & OFFSET_MASK:
                self._freed[(old[index] & OFFSET_MASK) >> self.geometry.cluster_bits] += table.weight
        if self._allocates:
            await self._allocate(table, zero, new)
        self._writes.append((table.offset + 8 * zero[0], encode_table(new[zero[0] : zero[-1] + 1])))
        self._batch += self.geometry.cluster_size
        if self._batch >= _BATCH_BYTES:
            await self.commit()

    def _check_place(self, offset: int) -> None:
        what = self.image.metadata_at(offset, self.geometry.cluster_size)
        if what is not None:
            raise corrupt(self.image, f"it has an L2 table at {offset}, where its {what} lies")
        if offset >= self.image.storage.node.length:
            raise corrupt(self.image, f"it has an L2 table at {offset}, behind the end of the file")

    async def _allocate(self, table: _Table, indices: list[int], new: array[int]) -> None:
        """Give the entries at ``indices`` host clusters of zeroes."""
        bits, size = self.geometry.cluster_bits, self.geometry.cluster_size
        copied = COPIED if table.active and table.weight == 1 else 0
        done = 0
        while done < len(indices):
            wanted = min(len(indices) - done, max(_BATCH_BYTES >> bits, 1))
            run = await self.refcounts.allocate(wanted)
            if table.weight > 1:
                await self.refcounts.add(run.first, [table.weight - 1] * run.clusters)
            host = run.first << bits
            for index in indices[done : done + run.clusters]:
                if self.driver.encodes:
                    data = await self.driver.encode(table.guest_offset + (index << bits), host, bytes(size))
                    await self.image.put_new_table(host, data)
                new[index] = host | copied
                host += size
            if not self.driver.encodes:
                await self.image.zero_host(run.first << bits, run.clusters << bits)
            done += run.clusters
        self._batch += len(indices) << bits

    async def commit(self) -> None:
        """Write entries, with everything that they refer to durable before, and free what they referred to."""
        committer, image = self.driver.committer, self.image
        await committer.write_refcounts()
        await image.barrier()
        for offset, data in self._writes:
            await image.put_bytes(offset, data)
        self.refcounts.freed.add((), references=dict(sorted(self._freed.items())))
        self._writes.clear()
        self._freed.clear()
        self._batch = 0
        await committer.commit_with_barrier()
