"""How a qcow2 node changes its length: the driver's method for it, which puts the steps of :mod:`.resize` in order."""

from __future__ import annotations

import trio

from fusedisk.block.model.driver import ZERO_NEW, Buffer
from fusedisk.block.model.extent import UNALLOCATED, Extent
from fusedisk.block.request import io, transfer
from fusedisk.core.zeroes import is_zero
from fusedisk.drivers.format.qcow2.backing import NO_BACKING, Backing
from fusedisk.drivers.format.qcow2.snapshot_driver import SnapshotDriver


class ResizeDriver(SnapshotDriver):
    """The part of the qcow2 driver that is about its length."""

    async def _read_plain(self, extent: Extent, offset: int, buffer: Buffer) -> None:
        """Fill ``buffer`` with what an extent that is not compressed holds."""
        raise NotImplementedError

    def shows_through(self) -> Backing:
        """Return the current content of the image where it has no data of its own."""
        raise NotImplementedError

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        # Imported here: rarely needed.
        from fusedisk.drivers.format.qcow2 import resize
        from fusedisk.drivers.format.qcow2.bitmaps import resizing

        allocator, zero_new = self.allocator, bool(flags & ZERO_NEW)
        old = self.image.header.size
        resize.check_size(allocator, length, preallocation, zero_new=zero_new)
        if length == old:
            return
        async with resizing(self):
            if length < old:
                await self._shrink(length)
            else:
                await self._grow(length, preallocation, zero_new=zero_new)

    async def _grow(self, length: int, preallocation: str, *, zero_new: bool) -> None:
        from fusedisk.drivers.format.qcow2 import resize

        allocator, old, size = self.allocator, self.image.header.size, self.image.geometry.cluster_size
        await resize.grow_l1(allocator, resize.l1_entries(allocator, length))
        await self._zero_tail(zero_new)
        backing = self.shows_through() if zero_new else NO_BACKING
        settled, self.allocator.end_settled = self.allocator.end_settled, False
        if not await resize.clear_behind_end(allocator, length, backing):
            self.allocator.end_settled = settled
        if preallocation != "off":
            try:
                await resize.preallocate(allocator, -(-old // size) * size, length, preallocation)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await resize.give_back(allocator, length)
                raise
        if self.allocator.end_settled and preallocation == "off" and not self.image.header.has_raw_data_file:
            await resize.grow_size(allocator, length)
            return
        await self._resize_raw_data(length)
        # What the new size uncovers must be there before.
        await resize.set_size(allocator, length)
        self.allocator.end_settled = True

    async def _shrink(self, length: int) -> None:
        from fusedisk.drivers.format.qcow2 import resize

        old = self.image.header.size
        self.allocator.end_settled = False
        await resize.set_size(self.allocator, length)
        await self._resize_raw_data(length)
        await resize.drop_behind_end(self.allocator, old)
        await resize.shorten_file(self.allocator)
        self.allocator.end_settled = True

    async def _resize_raw_data(self, length: int) -> None:
        """Keep a raw data file as long as the disk."""
        if self.image.header.has_raw_data_file:
            assert self.image.data_file is not None
            await io.truncate(self.image.data_file.node, length)

    async def _zero_tail(self, zero_new: bool) -> None:
        """Make what the last cluster holds behind the disk's end zero, before the disk grows over it."""
        offset = self.image.header.size
        end = offset + -offset % self.image.geometry.cluster_size
        while offset < end:
            extent = await self.map(offset, end - offset)
            tail = memoryview(bytearray(extent.length))
            if extent.compressed:
                await self.read_special(extent, offset, tail)
            elif extent.status != UNALLOCATED or zero_new:
                await self._read_plain(extent, offset, tail)
            if not is_zero(tail):
                # As the guest would: in place, or by copying where the cluster is shared or compressed.
                self.allocator.end_settled = False
                await transfer.write(self.node, offset, (memoryview(bytes(len(tail))),), 0)
            offset += len(tail)
