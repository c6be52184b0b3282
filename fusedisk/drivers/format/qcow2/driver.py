"""The qcow2 driver: QEMU's copy-on-write format, versions 2 and 3.

On disk: a header; an L1 table that leads to L2 tables, whose entries map guest clusters to host clusters; a
refcount table that leads to blocks of refcounts, one for each host cluster; a table of internal snapshots,
each with an L1 table of its own. All numbers are big-endian. What has no entry is read from the backing file.

Concurrent requests: lookups take no lock, changes of metadata take the image's (:mod:`.cluster`,
:mod:`.allocation`). Death of the process at any instant leaks clusters at worst (:mod:`.image`).

Not supported: recording writes in persistent dirty bitmaps (:mod:`.bitmaps`).

Specification: docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import trio

from fusedisk.block.model.children import BackingReference, ChildSpec, Role
from fusedisk.block.model.driver import Driver, HoldBack
from fusedisk.block.model.extent import DATA, SPECIAL, UNALLOCATED, Extent, WriteExtent
from fusedisk.block.model.files import Files
from fusedisk.block.model.flags import MAY_UNMAP, ZERO_NEW, Buffer
from fusedisk.block.model.limits import Limits
from fusedisk.block.model.node import NodeConfig
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request import io
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import NotSupportedError
from fusedisk.core.options import CreateOptions, Options
from fusedisk.core.zeroes import zero_fill
from fusedisk.drivers.format.change_log import ChangeLog
from fusedisk.drivers.format.qcow2 import discard, layout
from fusedisk.drivers.format.qcow2.allocation import Allocation, Allocator
from fusedisk.drivers.format.qcow2.bitmaps import Bitmaps, label
from fusedisk.drivers.format.qcow2.cluster import ClusterMap
from fusedisk.drivers.format.qcow2.commit import Committer
from fusedisk.drivers.format.qcow2.discard import Backing
from fusedisk.drivers.format.qcow2.entries import OFFSET_MASK
from fusedisk.drivers.format.qcow2.file_state import sparse_threshold, uses_clusters, warn_if_incomplete
from fusedisk.drivers.format.qcow2.first_write import FirstWrite, check_base
from fusedisk.drivers.format.qcow2.header import check_closed, check_version, check_writable, read_header
from fusedisk.drivers.format.qcow2.image import Image, specific_information
from fusedisk.drivers.format.qcow2.options import (
    Qcow2AmendOptions,
    Qcow2CreateOptions,
    Qcow2Options,
    cache_sizes,
    check_read_only,
    passed_discards,
)
from fusedisk.drivers.format.qcow2.refcount import Refcounts
from fusedisk.drivers.format.qcow2.snapshots.table import Snapshot, find, load_snapshots, open_snapshot, table_places
from fusedisk.drivers.format.qcow2.space import open_data_file
from fusedisk.drivers.format.qcow2.subcluster_allocation import cluster_map, new_allocator

if TYPE_CHECKING:
    from fusedisk.block.model.check_result import CheckResult, Repair
    from fusedisk.core.progress import Progress
    from fusedisk.drivers.format.compressed_pieces import CompressedPieces
    from fusedisk.drivers.format.qcow2.compressed import CompressedWriter
    from fusedisk.drivers.format.qcow2.encryption import Encryption


class Qcow2Driver(Driver):
    """One open qcow2 image."""

    name = "qcow2"
    can_run_at_once = True
    supports_backing = True
    compresses = True
    options_type: ClassVar[type[Options]] = Qcow2Options
    create_options_type: ClassVar[type[CreateOptions] | None] = Qcow2CreateOptions
    amend_options_type: ClassVar[type[CreateOptions] | None] = Qcow2AmendOptions
    child_specs = (ChildSpec("file", Role.FILE), ChildSpec("data-file", Role.DATA_FILE, required=False))

    image: Image
    snapshots: list[Snapshot]
    bitmaps: Bitmaps
    clusters: ClusterMap
    refcounts: Refcounts
    committer: Committer
    allocator: Allocator
    first_write: FirstWrite
    encryption: Encryption | None = None

    _compressed: CompressedPieces | None = None
    _compressing: CompressedWriter | None = None
    _changes: ChangeLog | None = None
    _end_was_checked = False
    _sparse_threshold: int | None = None
    """The number of clusters in use from which data extents may be holes of the file (:mod:`.file_state`); None once
    ``has_holes`` has decided."""

    # --- recognising and naming -------------------------------------------------------------------------

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head[:4] == layout.MAGIC and int.from_bytes(head[4:8], "big") >= 2 else 0

    def may_be_named(self) -> bool:
        return True

    def backing_reference(self) -> BackingReference | None:
        header = self.image.header
        return BackingReference(header.backing_file, header.backing_format) if header.backing_file else None

    # --- life -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        node = self.node
        edge = node.children["file"]
        header = await read_header(edge.node, node.filename, look_only=node.graph.look_only)
        l2_size, refcount_size = cache_sizes(self.options, header)
        check_version(self.options, header, node.filename)
        if not node.config.read_only:
            check_writable(header, node.filename)
            if header.incompatible_features & layout.DIRTY:
                # Imported here: rarely needed.
                from fusedisk.drivers.format.qcow2.check.repair import repair_unclosed

                await repair_unclosed(edge.node, node.filename)
                header = await read_header(edge.node, node.filename)
        image = Image(
            edge,
            header,
            node.filename,
            fence=node.fence,
            mapping_changed=node.change_mapping,
            overlap_check=self.options.overlap_check,
        )
        image.changes = self._changes
        await image.load_l1()
        self.image = image
        self.bitmaps = Bitmaps(image)
        await self.bitmaps.load()
        self.snapshots, image.snapshot_table_size = await load_snapshots(image)
        await self.place_snapshots()
        if self.options.internal_snapshot is not None:
            check_read_only(self.options, node.config, node.filename)
            await open_snapshot(image, self.snapshots, self.options.internal_snapshot)
        image.place_fixed()
        image.data_file = await open_data_file(node, header)
        if not self._end_was_checked and self.options.internal_snapshot is None:
            await warn_if_incomplete(image)
            self._end_was_checked = True
        self.clusters = cluster_map(image, image.data_file)
        self._sparse_threshold = await sparse_threshold(edge.node, header)
        self.clusters.recurse = self._sparse_threshold is not None
        self.refcounts = Refcounts(image)
        self.committer = Committer(image, self.refcounts)
        if header.crypt_method or self.options.encrypt_key_file is not None:
            # Imported here: few images are encrypted.
            from fusedisk.drivers.format.qcow2.encryption import open_encryption

            self.encryption = await open_encryption(edge.node, header, self.options, node.filename)
        self.encodes = self.refcounts.encrypted = self.encryption is not None
        self.allocator = new_allocator(
            self.clusters, self.refcounts, self.committer, image.data_file, self._backing_length
        )
        self._take_options(self.options)
        self._lookup = self.clusters.lookup
        self._lookup_in_place = _nothing
        self.first_write = FirstWrite(image, self.bitmaps, self._allow_overwriting)
        image.before_change = self.first_write.prepare
        image.l2.set_size(l2_size)
        self.refcounts.blocks.set_size(refcount_size)
        if not node.config.read_only:
            await self._load_refcounts()

    def log_changes(self, buffer: bytearray | memoryview) -> None:
        """From now on write each change of metadata in memory down in ``buffer`` as well. Nothing has changed since the
        image was opened. See docs/adr/0029."""
        self._changes = self.image.changes = ChangeLog(buffer)

    async def backing_opened(self) -> None:
        self.first_write.note_base = check_base(self)

    def _take_options(self, options: Qcow2Options) -> None:
        """Apply the options that may change while the image is open."""
        lazy = options.lazy_refcounts
        if lazy is None:
            lazy = bool(self.image.header.compatible_features & layout.LAZY_REFCOUNTS)
        self.committer.lazy_refcounts = lazy
        self.allocator.keeps_discarded = options.discard_no_unref
        self.refcounts.freed.pass_discard = passed_discards(options, self.node.config)

    async def _load_refcounts(self) -> None:
        """Load what allocating needs. The image changes only with the first write, see :mod:`.first_write`."""
        async with self.image.mutex:
            await self.refcounts.load()
            self.image.l2_places = await self.image.sorted_l2(self.image.l1)

    async def prepare_writing(self) -> None:
        """Prepare the image for the first change of guest data, see :mod:`.first_write`."""
        if not self.first_write.disk:
            refuse_to_wait()
            async with self.image.mutex:
                await self.first_write.prepare(True)

    def _allow_overwriting(self, allowed: bool) -> None:
        self._lookup_in_place = self.clusters.lookup_in_place if allowed else _nothing
        self.node.change_mapping()

    async def close(self) -> None:
        try:
            if self.first_write.begun and self.node.fenced is None:
                await self.committer.finish()
        finally:
            self.first_write.end()

    async def flush_to_os(self) -> None:
        await self.committer.commit()

    async def reopen_prepare(self, config: NodeConfig, options: Any) -> object:
        sizes = cache_sizes(options, self.image.header)
        for name in ("overlap-check", "internal-snapshot"):
            attribute = name.replace("-", "_")
            if getattr(options, attribute) != getattr(self.options, attribute):
                raise NotSupportedError(f"node '{self.node.name}': qcow2's {name} cannot change while it is open.")
        check_read_only(options, config, self.image.filename)
        check_version(options, self.image.header, self.node.filename)
        if self.node.config.read_only and not config.read_only:
            check_writable(self.image.header, self.image.filename)
            check_closed(self.image.header, self.image.filename)
            await self._load_refcounts()
        if config.read_only and self.first_write.begun:
            await self.committer.finish()
        return *sizes, options

    def reopen_commit(self, state: object) -> None:
        assert isinstance(state, tuple)
        l2_size, refcount_size, options = state
        self.image.l2.set_size(l2_size)
        self.refcounts.blocks.set_size(refcount_size)
        self._take_options(options)
        if self.node.config.read_only:
            self.first_write.end()

    # --- size and limits --------------------------------------------------------------------------------

    async def length(self) -> int:
        return self.image.header.size

    def refresh_limits(self, limits: Limits) -> None:
        limits.cluster_size = limits.discard_alignment = self.image.geometry.cluster_size
        limits.length_unit = layout.SECTOR
        limits.zeroes_alignment = self.image.geometry.subcluster_size
        if self.encodes:
            limits.request_alignment = max(limits.request_alignment, layout.SECTOR)

    # --- data -------------------------------------------------------------------------------------------

    async def map(self, offset: int, length: int) -> Extent:
        extent = self._lookup(offset, length)
        if extent is None:
            extent = await self.clusters.map(offset, length)
        if self.encodes and extent.child is not None and not extent.compressed:
            # Encrypted bytes are not readable on the host, so block status reports no offset.
            return extent._replace(status=SPECIAL) if extent.status == DATA else Extent(extent.status, extent.length)
        return extent

    def lookup(self, offset: int, length: int) -> Extent | None:
        return None if self.encodes else self._lookup(offset, length)

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent | None:
        return None if self.encodes else self._lookup_in_place(offset, length)

    async def has_holes(self) -> bool:
        threshold = self._sparse_threshold
        if threshold is not None:
            if self.committer.in_exclusive:
                return True  # unknown, but a commit would wait for a task that may itself wait for readers
            # Refcounts are counted in the file, so it must have all of them.
            await self.committer.commit()
            found = await uses_clusters(self.node.children["file"].node, self.image.header, threshold)
            self.clusters.recurse, self._sparse_threshold = found, None
        return self.clusters.recurse

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        if self.encodes:
            await self.require_key()
        extent = self._lookup_in_place(offset, length)
        if extent is not None:
            return extent
        return await self.allocator.map_write(offset, length)

    def map_write_now(self, offset: int, length: int) -> WriteExtent | None:
        return self.allocator.map_write_now(offset, length) if self.first_write.disk and not self.encodes else None

    def publish_now(self, allocation: object) -> None:
        assert isinstance(allocation, Allocation)
        self.allocator.publish_now(allocation)

    async def publish(self, allocation: object) -> None:
        assert isinstance(allocation, Allocation)
        await self.allocator.publish(allocation)

    def abandon(self, allocation: object) -> None:
        assert isinstance(allocation, Allocation)
        self.allocator.abandon(allocation)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        if self._compressing is None:
            # Imported here, like the reader: few images have compressed clusters.
            from fusedisk.drivers.format.qcow2.compressed import CompressedWriter

            self._compressing = CompressedWriter(self.node, self.allocator, self._drop)
        await self._compressing.write(offset, data)

    async def _drop(self, offset: int, length: int) -> None:
        """Turn whole clusters into zero clusters."""
        with trio.CancelScope(shield=True):
            await self.write_zeroes(offset, length, MAY_UNMAP)

    async def read_special(self, extent: Extent, offset: int, buffer: Buffer) -> None:
        refuse_to_wait()
        while True:
            if extent.compressed:
                if self._compressed is None:
                    from fusedisk.drivers.format.qcow2.compressed import compressed_reader

                    self._compressed = compressed_reader(self.node, self.clusters)
                done = await self._compressed.read(extent, offset, buffer)
            else:
                done = extent.length
                await self.read_plain(extent, offset, buffer[:done])
            if done == len(buffer):
                return
            # The clusters behind it were rewritten meanwhile.
            offset += done
            buffer = buffer[done:]
            extent = await self.map(offset, len(buffer))

    def read_cached(self, offset: int, buffer: Buffer, extent: Extent | None = None) -> bool:
        return self._compressed is not None and self._compressed.read_cached(offset, buffer, extent)

    def cached_pieces(self, extent: Extent, offset: int) -> list[memoryview] | None:
        return self._compressed.pieces(extent, offset) if self._compressed is not None else None

    def cached_source(self, extent: Extent, offset: int) -> tuple[Callable[[int, Buffer], bool], int] | None:
        return self._compressed.source(extent, offset) if self._compressed is not None else None

    async def read_plain(self, extent: Extent, offset: int, buffer: Buffer) -> None:
        """Fill ``buffer`` from an extent that needs no transformation."""
        backing = self.node.backing
        if self.encodes and extent.status in (DATA, SPECIAL):
            assert extent.child is not None
            assert self.encryption is not None
            await self.encryption.unlock(self.options)
            await self.encryption.read(extent.child.node, offset, extent.offset, buffer)
        elif extent.status == DATA:
            assert extent.child is not None
            await io.read(extent.child.node, extent.offset, buffer)
        elif extent.status == UNALLOCATED and backing is not None:
            await io.read(backing.node, offset, buffer)
        else:
            zero_fill(buffer)

    # --- encryption -------------------------------------------------------------------------------------

    async def require_key(self) -> None:
        if self.encryption is not None:
            await self.encryption.unlock(self.options)

    def take_key(self, other: Driver) -> None:
        assert isinstance(other, Qcow2Driver)
        if self.encryption is not None and other.encryption is not None:
            self.encryption.take_key(other.encryption)

    async def encode(self, offset: int, host_offset: int, data: bytes) -> Buffer:
        assert self.encryption is not None
        await self.encryption.unlock(self.options)
        return await self.encryption.encrypt(offset, host_offset, data)

    # --- other requests ---------------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self._zero_raw_data(offset, length, flags & MAY_UNMAP)
        await discard.write_zeroes(
            self.allocator,
            offset,
            length,
            may_unmap=bool(flags & MAY_UNMAP),
            backing=self.shows_through(),
        )

    async def discard(self, offset: int, length: int) -> None:
        await self._zero_raw_data(offset, length, MAY_UNMAP)
        await discard.discard(self.allocator, offset, length, backing=self.shows_through())

    async def _zero_raw_data(self, offset: int, length: int, flags: int) -> None:
        """Zero the range in a raw external data file too, which must match the disk byte for byte."""
        if self.image.header.has_raw_data_file:
            assert self.image.data_file is not None
            await self.prepare_writing()
            await io.write_zeroes(self.image.data_file.node, offset, length, flags)

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        # Imported here: rarely needed.
        from fusedisk.drivers.format.qcow2 import resize

        await resize.resize(self, length, preallocation, zero_new=bool(flags & ZERO_NEW))

    def shows_through(self) -> Backing:
        backing = self.node.backing
        return Backing(backing.node if backing is not None else None, named=bool(self.image.header.backing_file))

    def _backing_length(self) -> int:
        backing = self.node.backing
        return backing.node.length if backing is not None else 0

    # --- snapshots and VM state -------------------------------------------------------------------------

    async def place_snapshots(self) -> None:
        """Tell the overlap checks where the snapshots' tables lie, as ``self.snapshots`` says."""
        writable = not self.node.config.read_only
        self.image.snapshot_tables = await table_places(self.image, self.snapshots, writable=writable)

    def list_snapshots(self) -> list[SnapshotInfo]:
        return [found.public() for found in self.snapshots]

    async def create_snapshot(self, wanted: SnapshotInfo, progress: Progress, no_changes: HoldBack) -> SnapshotInfo:
        # Imported here and below: rarely needed.
        from fusedisk.drivers.format.qcow2.snapshots import operations, vmstate

        made = await operations.create(self, wanted, progress, no_changes)
        if made.vm_state_size:
            await vmstate.drop(self, made.vm_state_size)
        return made

    async def apply_snapshot(self, id: str, progress: Progress, no_reads: HoldBack) -> None:
        if self.bitmaps.valid:
            raise NotSupportedError(
                f"'{self.image.filename}' has {label(self.bitmaps.valid)}, which would not record what applying a "
                "snapshot changes: remove the bitmaps first, for example with 'qemu-img bitmap --remove'."
            )
        from fusedisk.drivers.format.qcow2.snapshots import operations

        self.allocator.end_settled = False
        await operations.apply(self, find(self.snapshots, id, self.image.filename), progress, no_reads)

    async def delete_snapshot(self, id: str, progress: Progress, no_changes: HoldBack) -> None:
        from fusedisk.drivers.format.qcow2.snapshots import operations

        await operations.delete(self, find(self.snapshots, id, self.image.filename), progress, no_changes)

    async def save_vmstate(self, offset: int, data: memoryview) -> None:
        from fusedisk.drivers.format.qcow2.snapshots import vmstate

        await vmstate.save(self, offset, data)

    async def load_vmstate(self, offset: int, buffer: memoryview) -> None:
        from fusedisk.drivers.format.qcow2.snapshots import vmstate

        await vmstate.load(self, offset, buffer)

    # --- settings ---------------------------------------------------------------------------------------

    async def amend(self, options: Any, progress: Progress, *, force: bool) -> None:
        # Imported here: rarely needed.
        from fusedisk.drivers.format.qcow2.amend.amend import amend

        await amend(self, options, progress, force=force)

    async def reload(self) -> None:
        """Read everything from the file again and forget all cached state. No request is in flight. If that fails, the
        image is fenced."""
        self.first_write.end()
        self._compressed, before = None, self.encryption
        if self._changes is not None:
            self._changes.clear()
        try:
            await self.open()
        except BaseException as exc:
            self.first_write.end()
            self.node.fence(f"It could not be read again after a change of its settings: {exc}")
            raise
        if self.encryption is not None and before is not None:
            self.encryption.take_key(before)

    # --- information ------------------------------------------------------------------------------------

    def information(self) -> dict[str, Any]:
        header = self.image.header
        information: dict[str, Any] = {
            "cluster-size": header.cluster_size,
            "dirty-flag": bool(header.incompatible_features & layout.DIRTY),
        }
        if self.encodes:
            information["encrypted"] = True
        if self.snapshots:
            information["snapshots"] = [snapshot.information() for snapshot in self.snapshots]
        return information

    def specific_information(self) -> dict[str, Any] | None:
        encryption = self.encryption.information() if self.encryption is not None else None
        return specific_information(self.image, self.bitmaps.information(), encryption)

    def cost_of_writing(self) -> str | None:
        return self.bitmaps.cost_of_writing()

    def has_zero_init(self) -> bool:
        # The clusters of a preallocated image read as the file does.
        preallocated = bool(self.image.l1) and bool(self.image.l1[0] & OFFSET_MASK)
        if self.encodes:
            return not preallocated
        return not preallocated or self.node.children["file"].node.driver.has_zero_init()

    # --- checking and creation --------------------------------------------------------------------------

    @classmethod
    async def check(cls, files: Files, repair: Repair, progress: Progress, *, dry_run: bool = False) -> CheckResult:
        # Imported here: rarely needed.
        from fusedisk.drivers.format.qcow2.check.check import check

        return await check(files.main, repair, progress, dry_run=dry_run)

    @classmethod
    async def check_create(cls, options: Any, filename: str) -> None:
        # Imported here: rarely needed.
        from fusedisk.drivers.format.qcow2 import create

        await create.check(options, filename)

    @classmethod
    async def create(cls, files: Files, options: Any) -> None:
        from fusedisk.drivers.format.qcow2 import create

        await create.create(files, options)


def _nothing(offset: int, length: int) -> WriteExtent | None:
    """Answer no write without waiting, until writing is prepared."""
    return None
