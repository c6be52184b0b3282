"""The driver's methods for internal snapshots and VM state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusedisk.block.model.driver import Driver, HoldBack
from fusedisk.block.model.node import NodeConfig
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request.snapshot import find_snapshot
from fusedisk.core.errors import ImageError, NotSupportedError, OptionError, SnapshotNotFoundError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.allocation import Allocator
from fusedisk.drivers.format.qcow2.bitmaps import Bitmaps, label
from fusedisk.drivers.format.qcow2.commit import Committer
from fusedisk.drivers.format.qcow2.entries import OFFSET_MASK
from fusedisk.drivers.format.qcow2.first_write import FirstWrite
from fusedisk.drivers.format.qcow2.image import SNAPSHOT_L2, Image
from fusedisk.drivers.format.qcow2.options import Qcow2Options
from fusedisk.drivers.format.qcow2.refcount import Refcounts
from fusedisk.drivers.format.qcow2.snapshot_table import Snapshot, l1_clusters, load_snapshots

if TYPE_CHECKING:
    from fusedisk.core.progress import Progress
    from fusedisk.drivers.format.qcow2.encryption import Encryption


class SnapshotDriver(Driver):
    """The part of the qcow2 driver that is about snapshots."""

    image: Image
    refcounts: Refcounts
    committer: Committer
    allocator: Allocator
    snapshots: list[Snapshot]
    bitmaps: Bitmaps
    first_write: FirstWrite
    encryption: Encryption | None = None

    # --- opening ----------------------------------------------------------------------------------------

    async def load_snapshots(self) -> None:
        """Read the snapshot table. If the options name a snapshot, the disk becomes that. Raises ImageError."""
        image = self.image
        self.snapshots, image.snapshot_table_size = await load_snapshots(image)
        await self.place_snapshots()
        wanted = self.options.internal_snapshot
        if wanted is None:
            return
        self._check_read_only(self.node.config)
        found = self._snapshot(find_snapshot(self.list_snapshots(), wanted, image.filename).id)
        if found.disk_size >> 63:
            raise ImageError(
                f"'{image.filename}' has a disk of {found.disk_size} bytes in snapshot '{wanted}', expected less "
                "than 2^63."
            )
        from fusedisk.drivers.format.qcow2 import snapshot

        image.l1[:] = await snapshot.read_l1(image, found)
        image.header.size = found.disk_size

    def check_reopen(self, config: NodeConfig, options: Qcow2Options) -> None:
        """Raise NotSupportedError or OptionError for settings that an open snapshot cannot have."""
        if options.internal_snapshot != self.options.internal_snapshot:
            raise NotSupportedError(
                f"node '{self.node.name}': qcow2's internal-snapshot cannot change while it is open."
            )
        self._check_read_only(config)

    def _check_read_only(self, config: NodeConfig) -> None:
        wanted = self.options.internal_snapshot
        if wanted is not None and not config.read_only:
            raise OptionError(
                f"'{self.image.filename}' cannot be writable with internal-snapshot '{wanted}', "
                "as snapshots are read-only."
            )

    async def place_snapshots(self) -> None:
        """Tell the overlap checks where the snapshots' tables lie, as ``self.snapshots`` says."""
        image = self.image
        tables = dict.fromkeys(l1_clusters(self.snapshots, image.geometry), "snapshot's L1 table")
        if image.overlap_check == "all" and not self.node.config.read_only:
            for found in self.snapshots:
                if found.l1_size * 8 <= layout.MAX_L1_SIZE:
                    l1 = await image.read_table(found.l1_table_offset, found.l1_size)
                    tables |= {entry & OFFSET_MASK: SNAPSHOT_L2 for entry in l1 if entry & OFFSET_MASK}
        image.snapshot_tables = tables

    def take_key(self, other: Driver) -> None:
        assert isinstance(other, SnapshotDriver)
        if self.encryption is not None and other.encryption is not None:
            self.encryption.take_key(other.encryption)

    # --- snapshots --------------------------------------------------------------------------------------

    def list_snapshots(self) -> list[SnapshotInfo]:
        return [found.public() for found in self.snapshots]

    async def create_snapshot(self, wanted: SnapshotInfo, progress: Progress, no_changes: HoldBack) -> SnapshotInfo:
        # Imported here: rarely needed.
        from fusedisk.drivers.format.qcow2 import snapshot, vmstate

        made = await snapshot.create(self, wanted, progress, no_changes)
        if made.vm_state_size:
            await vmstate.drop(self, made.vm_state_size)
        return made

    async def apply_snapshot(self, id: str, progress: Progress, no_reads: HoldBack) -> None:
        if self.bitmaps.valid:
            raise NotSupportedError(
                f"'{self.image.filename}' has {label(self.bitmaps.valid)}, which would not record what applying a "
                "snapshot changes: remove the bitmaps first, for example with 'qemu-img bitmap --remove'."
            )
        from fusedisk.drivers.format.qcow2 import snapshot

        self.allocator.end_settled = False
        await snapshot.apply(self, self._snapshot(id), progress, no_reads)

    async def delete_snapshot(self, id: str, progress: Progress, no_changes: HoldBack) -> None:
        from fusedisk.drivers.format.qcow2 import snapshot

        await snapshot.delete(self, self._snapshot(id), progress, no_changes)

    def _snapshot(self, id: str) -> Snapshot:
        for found in self.snapshots:
            if found.id == id:
                return found
        raise SnapshotNotFoundError(f"'{self.image.filename}' has no snapshot with the id '{id}'.")

    # --- VM state ---------------------------------------------------------------------------------------

    async def save_vmstate(self, offset: int, data: memoryview) -> None:
        from fusedisk.drivers.format.qcow2 import vmstate

        await vmstate.save(self, offset, data)

    async def load_vmstate(self, offset: int, buffer: memoryview) -> None:
        from fusedisk.drivers.format.qcow2 import vmstate

        await vmstate.load(self, offset, buffer)
