"""The base of formats whose disk is a block table and little else.

A subclass opens: it reads its header, sets ``table`` and ``disk_length``, and says how a new length is written. The
order of writes, and what a crash can leave, is the block table's (:mod:`fusedisk.drivers.format.block_table`).
"""

from __future__ import annotations

from typing import Any

from fusedisk.block.model.children import ChildSpec, Role
from fusedisk.block.model.driver import Driver
from fusedisk.block.model.extent import Extent, WriteExtent
from fusedisk.block.model.flags import ZERO_NEW
from fusedisk.block.model.limits import Limits
from fusedisk.block.model.node import NodeConfig
from fusedisk.block.request import io
from fusedisk.core.errors import NotSupportedError
from fusedisk.drivers.format.block_table import BlockTable


class TableDriver(Driver):
    """Passes everything that concerns the mapping to ``table``."""

    can_run_at_once = True
    child_specs = (ChildSpec("file", Role.FILE),)
    table: BlockTable
    disk_length: int

    async def write_length(self, length: int) -> None:
        """Write the length of the disk to the header. Raises NotSupportedError for formats that have a fixed one."""
        raise NotSupportedError(f"{self.name} images cannot be resized.")

    # --- life -------------------------------------------------------------------------------------------

    def may_be_named(self) -> bool:
        return True

    async def close(self) -> None:
        if not self.node.config.read_only and self.node.fenced is None:
            await self.table.finish()

    async def reopen_prepare(self, config: NodeConfig, options: Any) -> object:
        state = await super().reopen_prepare(config, options)
        if config.read_only and not self.node.config.read_only:
            await self.table.finish()
        return state

    async def length(self) -> int:
        return self.disk_length

    def refresh_limits(self, limits: Limits) -> None:
        limits.cluster_size = limits.zeroes_alignment = limits.discard_alignment = self.table.size

    def information(self) -> dict[str, Any]:
        return {"cluster-size": self.table.size}

    def has_zero_init(self) -> bool:
        return self.node.backing is None

    # --- mapping ----------------------------------------------------------------------------------------

    def lookup(self, offset: int, length: int) -> Extent | None:
        return self.table.lookup(offset, length)

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent | None:
        return self.table.lookup_in_place(offset, length)

    async def map(self, offset: int, length: int) -> Extent:
        return await self.table.map(offset, length)

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        return await self.table.map_write(offset, length)

    async def publish(self, allocation: object) -> None:
        await self.table.publish(allocation)

    def abandon(self, allocation: object) -> None:
        self.table.abandon(allocation)

    # --- other requests ---------------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Free the blocks, with or without MAY_UNMAP: these formats reserve no space."""
        await self.table.write_zeroes(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await self.table.discard(offset, length)

    async def flush_to_os(self) -> None:
        await self.table.write_out()

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        """Change the length: when it grows, what is added is zeroed for sure before the header tells of it."""
        if preallocation != "off":
            raise NotSupportedError(f"{self.name} images have no preallocation mode '{preallocation}', expected off.")
        old = self.disk_length
        if length >= old:
            await self.table.resize(old, length, zero_new=bool(flags & ZERO_NEW))
            await self.table.write_out()
            await io.flush(self.table.edge.node)
        await self.write_length(length)
        self.disk_length = length
        if length < old:
            await self.table.resize(old, length, zero_new=False)
