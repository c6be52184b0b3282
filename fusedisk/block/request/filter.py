"""The base of all filters: a driver that passes everything to one child, except what a subclass overrides.

A filter without any override behaves as its child does, also for space (discards, write-zeroes, preallocation), for
resizing, and on the fast path. Reads and writes can be passed on in two ways:

* By default the filter **maps**: it tells the core that all bytes lie in its child, and the core goes there. Such a
  filter sees no data. It costs next to nothing.
* With ``moves_bytes = True`` each read and write comes through ``preadv`` and ``pwritev``. This is for filters that
  delay, count, change or fail requests; they override what they need and call ``super()``.

Every request reaches the child through its door (:mod:`.io`), which aligns it, splits it to the child's limits, and
emulates what the child lacks. So a filter need not repeat the child's alignments in its own limits.

The child has the role FILTERED and any name. A filter may have more children, such as a log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedisk.block.model.driver import Driver
from fusedisk.block.model.edge import Child
from fusedisk.block.model.extent import DATA, Extent, WriteExtent
from fusedisk.block.model.flags import Buffer
from fusedisk.block.model.limits import Limits
from fusedisk.block.model.node import Node
from fusedisk.block.request import io, space


class FilterDriver(Driver):
    """A driver with one child of the same data and length; passes everything on unless overridden.

    ``can_run_at_once`` stays False: a filter whose every wait calls ``refuse_to_wait`` first (or that has none)
    sets it.
    """

    is_filter = True

    @property
    def filtered(self) -> Child:
        """The edge to the one child that everything is passed to."""
        edge = self.node.filtered
        assert edge is not None
        return edge

    @property
    def below(self) -> Node:
        """The node that everything is passed to."""
        return self.filtered.node

    # --- names, size, limits ----------------------------------------------------------------------------

    def exact_filename(self) -> str | None:
        edge = self.node.filtered  # None while the child is being opened
        return edge.node.exact_filename() if edge is not None else None

    def storage_descriptor(self) -> int | None:
        return self.below.driver.storage_descriptor()

    async def length(self) -> int:
        return self.below.length

    def refresh_limits(self, limits: Limits) -> None:
        """Take what users of the disk ask for. The alignments and maxima of requests are the child's business."""
        below = self.below.limits
        limits.cluster_size = below.cluster_size
        limits.length_unit = below.length_unit
        limits.memory_alignment = below.memory_alignment

    # --- data: by mapping -------------------------------------------------------------------------------

    async def map(self, offset: int, length: int) -> Extent:
        return Extent(DATA, length, self.filtered, offset, recurse=True)

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        return WriteExtent(length, self.filtered, offset)

    def lookup(self, offset: int, length: int) -> Extent | None:
        return Extent(DATA, length, self.filtered, offset, recurse=True)

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent | None:
        return WriteExtent(length, self.filtered, offset)

    # --- data: with moves_bytes -------------------------------------------------------------------------

    async def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            await io.read(self.below, offset, buffer)
            offset += len(buffer)

    async def pwritev(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        await io.write(self.below, offset, buffers, flags)

    # --- other requests ---------------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await io.write_zeroes(self.below, offset, length, flags)

    async def preallocate(self, offset: int, length: int) -> None:
        await space.preallocate(self.below, offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await space.discard(self.below, offset, length)

    async def discard_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        if type(self).discard is not FilterDriver.discard:
            await super().discard_ranges(ranges)  # the subclass sees each range
            return
        await space.discard_ranges(self.below, ranges)

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        await space.truncate(self.below, length, preallocation, flags)

    async def debug_event(self, event: str) -> None:
        await self.below.driver.debug_event(event)

    # --- information ------------------------------------------------------------------------------------

    async def allocated_size(self) -> int | None:
        return await self.below.driver.allocated_size()

    def information(self) -> dict[str, Any]:
        return self.below.driver.information()

    def cost_of_writing(self) -> str | None:
        return self.below.driver.cost_of_writing()

    def has_zero_init(self) -> bool:
        return self.below.driver.has_zero_init()
