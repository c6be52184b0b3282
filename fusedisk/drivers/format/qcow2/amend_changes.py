"""The changes of an image's settings: its version, zero clusters that version 2 does not know, and its keys.

An open driver takes these settings for constant, so it reads the image again after each change.

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
from array import array
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio

from fusedisk.core.errors import FusediskError, NotSupportedError, OptionError, PassphraseError
from fusedisk.core.offload import run_cpu
from fusedisk.core.progress import Progress
from fusedisk.crypto import luks, luks_layout, secrets
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.encryption import read_passphrase
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO, encode_table, used_pieces
from fusedisk.drivers.format.qcow2.header import put_header
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.options import Qcow2AmendOptions
from fusedisk.drivers.format.qcow2.snapshot import read_l1
from fusedisk.drivers.format.qcow2.snapshot_references import corrupt, table_weights
from fusedisk.drivers.format.qcow2.snapshot_switch import State, Switch
from fusedisk.drivers.format.qcow2.snapshot_table import encode_snapshots

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver

log = logging.getLogger(__name__)


@asynccontextmanager
async def changing(driver: Qcow2Driver) -> AsyncIterator[None]:
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


# --- the version --------------------------------------------------------------------------------------

_SMALL_CLUSTER = 4096
"""In clusters up to this size the room is left for the backing file's name, as in new images."""


async def upgrade(driver: Qcow2Driver, progress: Progress) -> None:
    """Make an image of version 2 one of version 3; only the header, and the snapshot table if that lacks what version
    3 asks for, changes."""
    image, old = driver.image, driver.image.header
    async with changing(driver):
        progress(0, 1)
        table = encode_snapshots(driver.snapshots, image.filename)
        if len(table) != image.snapshot_table_size:
            await _move_snapshot_table(driver, table)
        kept = _without_feature_names(old)
        names = [layout.feature_name_table()] if old.cluster_size > _SMALL_CLUSTER else []
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


def check_downgrade(driver: Qcow2Driver, options: Qcow2AmendOptions) -> None:
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


async def downgrade(driver: Qcow2Driver, progress: Progress) -> None:
    """Make an image of version 3, which :func:`check_downgrade` has let through, one of version 2."""
    if driver.image.header.backing_file:
        await driver.require_key()
    image = driver.image
    async with changing(driver):
        await expand_zero_clusters(driver, progress)
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


async def expand_zero_clusters(driver: Qcow2Driver, progress: Progress) -> None:
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
        self.refcounts.free((), references=dict(sorted(self._freed.items())))
        self._writes.clear()
        self._freed.clear()
        self._batch = 0
        await committer.commit_with_barrier()


# --- keys ---------------------------------------------------------------------------------------------


async def prepare_keys(driver: Qcow2Driver, options: Qcow2AmendOptions, *, force: bool) -> list[luks.Piece]:
    """Return the writes that change the key slots, to be done in order with a barrier after each.

    Raises OptionError and NotSupportedError for options that do not fit, PassphraseError for a wrong passphrase.
    """
    image, filename = driver.image, driver.image.filename
    if driver.encryption is None:
        raise OptionError(f"'{filename}' is not encrypted, but {options.encryption[0]} was given.")
    if image.header.crypto_header is None:
        raise NotSupportedError(f"'{filename}' is encrypted with aes, which has no key slots: only luks has.")
    start, length = image.header.crypto_header
    header = luks_layout.parse(bytes(await image.read(start, luks_layout.HEADER_SIZE)), length, filename)
    materials = {
        slot: bytes(await image.read(start + offset, size)) for slot, (offset, size) in header.material_ranges().items()
    }
    if options.encrypt_state == "active":
        return await _add(driver, header, materials, options, force=force)
    if options.encrypt_state == "inactive":
        return await _remove(filename, header, materials, options, force=force)
    raise OptionError(f"{options.encryption[0]} was given, but not encrypt.state, which says what to do.")


async def write_keys(image: Image, pieces: list[luks.Piece]) -> None:
    """Write what :func:`prepare_keys` has returned."""
    assert image.header.crypto_header is not None
    start, _ = image.header.crypto_header
    for offset, data in pieces:
        await image.put_bytes(start + offset, data)
        await image.barrier()


async def _add(
    driver: Qcow2Driver,
    header: luks_layout.Header,
    materials: dict[int, bytes],
    options: Qcow2AmendOptions,
    *,
    force: bool,
) -> list[luks.Piece]:
    filename, slot = driver.image.filename, options.encrypt_keyslot
    if options.encrypt_old_key_file is not None:
        raise OptionError("encrypt.old-key-file was given, but encrypt.state=active only adds a passphrase.")
    if options.encrypt_new_key_file is None:
        raise OptionError("encrypt.state=active was given, but not encrypt.new-key-file, the passphrase to add.")
    new = await secrets.read(options.encrypt_new_key_file, options.encrypt_new_key_format)
    present = await read_passphrase(driver.options)
    if present is None:
        raise PassphraseError(
            f"'{filename}' is encrypted, and adding a passphrase needs one that opens it: name a file that holds it "
            "(the option encrypt.key-file, or --key-file)."
        )
    found = await run_cpu(luks.unlock, header, materials, present, filename)
    pieces: list[luks.Piece] = []
    if force and slot in header.active_slots():
        if header.active_slots() == [slot]:
            raise OptionError(
                f"Key slot {slot} is the only one in use, and overwriting it could lose all data: add the passphrase "
                "in another slot, then erase this one."
            )
        pieces = luks.erase_slot(header, slot)
    time = options.encrypt_iter_time
    asked = luks.Options() if time is None else luks.Options(iter_time=time)
    return pieces + await run_cpu(partial(luks.add_passphrase, header, found.master_key, new, asked, slot=slot))


async def _remove(
    filename: str,
    header: luks_layout.Header,
    materials: dict[int, bytes],
    options: Qcow2AmendOptions,
    *,
    force: bool,
) -> list[luks.Piece]:
    slot, file = options.encrypt_keyslot, options.encrypt_old_key_file
    for name in ("encrypt.new-key-file", "encrypt.iter-time"):
        if name in options.encryption:
            raise OptionError(f"{name} was given, but encrypt.state=inactive only removes a passphrase.")
    old = None if file is None else await secrets.read(file, options.encrypt_old_key_format)
    if slot is None and old is None:
        raise OptionError(
            "encrypt.state=inactive was given, but neither encrypt.old-key-file, the passphrase to remove, nor "
            "encrypt.keyslot."
        )
    if slot is None:
        assert old is not None
        return await run_cpu(partial(luks.remove_passphrase, header, materials, old, filename, force=force))
    if old is not None:
        await run_cpu(luks.unlock, _only(header, slot), materials, old, filename)
    return luks.erase_slot(header, slot, force=force)


def _only(header: luks_layout.Header, slot: int) -> luks_layout.Header:
    """The header as if no other slot were in use."""
    slots = [dataclasses.replace(found, active=found.active and at == slot) for at, found in enumerate(header.slots)]
    return dataclasses.replace(header, slots=slots)
