"""Writes changed metadata to the file, in an order that a power cut cannot break.

One commit, each step after the one before it, barriers being host flushes:

1. write refcounts;
2. if there are new refcount blocks: a barrier, then their entries in the refcount table;
3. a barrier, if clusters or data must be durable before what refers to them (:attr:`DirtyTables.ordered`);
4. write the changed entries of L2 tables, then those of the L1 table, as they were at step 1;
5. if references were lost: a barrier, then count the clusters down in memory. The next commit writes that.

So nothing in the file ever refers to a cluster whose refcount or data the file may lack, and no cluster is used again
while the file may still refer to it. Dying between any two writes, or losing any of those since the last barrier,
leaks clusters at worst.

The image's mutex is held for the writes and not for the barriers, so that other requests allocate meanwhile. Their
changes belong to the next commit; two commits never run at once.

With lazy refcounts step 1 leaves the refcounts out: the dirty bit, durable before the first commit, makes the next
program that opens the image after a crash count again. See docs/explanation/durability.md.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, nullcontext
from typing import NamedTuple

import trio

from fusedisk.core.alone import shield
from fusedisk.core.at_once import WouldWait, is_at_once, refuse_to_wait
from fusedisk.core.errors import CorruptImageError
from fusedisk.core.locks import Mutex
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.entries import encode_table
from fusedisk.drivers.format.qcow2.freed import ExternalRange, Freed
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.refcount import Refcounts

_MOST_TABLES_AT_ONCE = 8
"""Changed L2 tables with which a commit may be tried without a task."""
MAX_FREED_BYTES = 64 << 20
"""The amount of freed host space that triggers a commit, so that it can be used again."""


class _Plan(NamedTuple):
    """The writes of one commit."""

    l1: set[int]
    l2: dict[int, tuple[int, int]]
    writes: list[tuple[str, int, memoryview]]
    """Event, offset and bytes."""
    ordered: bool
    freed: list[Freed | ExternalRange]
    new_blocks: list[int]
    mark: int
    """Behind what these writes bring to the file, in the image's log of changes."""


class Committer:
    """Commits of one writable image."""

    def __init__(self, image: Image, refcounts: Refcounts, *, lazy_refcounts: bool = False) -> None:
        self.image = image
        self.refcounts = refcounts
        self.lazy_refcounts = lazy_refcounts
        self._committing = Mutex()
        self._exclusive: trio.Event | None = None
        """Exists while a task is in :meth:`exclusive`; set once the file has all changes answered before. From then on
        no change of metadata is answered."""
        self.max_freed = max(MAX_FREED_BYTES >> image.geometry.cluster_bits, 16)
        """The most freed clusters that may wait for a commit."""

    async def commit(self) -> None:
        """Write everything that was changed before this call to the file, without waiting for the disk.

        Raises HostError if the file cannot be written; nothing is forgotten then, so that it may be tried again.
        """
        while (settled := self._exclusive) is not None:
            if not settled.is_set():
                refuse_to_wait()
                await settled.wait()
            if self._exclusive is settled:
                return
        if self._needed or self._committing.locked:
            at_once = is_at_once()
            if at_once and not self._is_short:
                raise WouldWait
            with nullcontext() if at_once else trio.CancelScope(shield=True):
                async with self._committing:
                    await self._commit(held=False)

    @property
    def _is_short(self) -> bool:
        """Whether a commit is short enough to be tried without a task, and can be made again if it then has to wait:
        dropping freed clusters cannot."""
        return not self.refcounts.freed.clusters and len(self.image.dirty.l2) <= _MOST_TABLES_AT_ONCE

    @property
    def holds_much(self) -> bool:
        """Whether memory holds many changes."""
        image, refcounts = self.image, self.refcounts
        tables = image.l2.capacity
        return (
            # A cache that holds all tables is not relieved by writing them.
            (len(image.dirty.l2) * 4 > tables * 3 and tables < len(image.l1))
            or refcounts.dirty_blocks > refcounts.blocks.capacity
            or refcounts.freed.clusters > self.max_freed
            or (image.changes is not None and image.changes.full)
        )

    async def relieve(self) -> None:
        """Commit if memory holds many changes. Not under the mutex."""
        if self.holds_much:
            await self.commit()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold the mutex, with nothing left to commit, shielded from cancellation: for changes that order their writes
        themselves. What they free is counted down by the commit that ends this."""
        with trio.CancelScope(shield=True):
            async with self._committing, self.image.mutex:
                self._exclusive = trio.Event()
                try:
                    await self.image.before_change(False)
                    await self._commit(held=True)
                    self._exclusive.set()
                    yield
                finally:
                    self._exclusive.set()
                    self._exclusive = None
                await self._commit(held=True)

    @property
    def in_exclusive(self) -> bool:
        """Whether a task is in :meth:`exclusive`."""
        return self._exclusive is not None

    async def commit_with_barrier(self) -> None:
        """Commit within :meth:`exclusive`, with a barrier behind it."""
        await self._commit(held=True)
        await self.image.barrier()

    async def finish(self) -> None:
        """Commit with nothing left for later, so that the file has no leaks: before closing."""
        with shield():
            async with self._committing:
                async with self.image.mutex:
                    self.refcounts.release_kept()
                await self._commit(held=False)
                async with self.image.mutex:
                    await self.write_refcounts()
                    await self.clear_dirty_bit()
                    if self.image.changes is not None and not self._needed:
                        self.image.changes.clear()

    async def write_refcounts(self) -> None:
        """Write all refcounts. Under the mutex."""
        new = await self.refcounts.write_blocks()
        if new:
            await self.image.barrier()
            await self.refcounts.hook_up(new)

    # --- the dirty bit ----------------------------------------------------------------------------------

    @property
    def lazy(self) -> bool:
        """Whether refcounts may be behind while the image is in use. Not with a log of changes, which would grow."""
        return self.lazy_refcounts and self.image.header.version >= 3 and self.image.changes is None

    async def set_dirty_bit(self) -> None:
        """Set the dirty bit, durably, so that references are counted again after a crash. Under the mutex. Does nothing
        for images of version 2, which have no such bit."""
        header = self.image.header
        if header.version >= 3 and not header.incompatible_features & layout.DIRTY:
            await self._put_incompatible(header.incompatible_features | layout.DIRTY)

    async def clear_dirty_bit(self) -> None:
        """Clear the dirty bit, now that the refcounts in the file are right. Under the mutex."""
        header = self.image.header
        if header.incompatible_features & layout.DIRTY:
            await self.image.barrier()
            await self._put_incompatible(header.incompatible_features & ~layout.DIRTY)

    async def _put_incompatible(self, bits: int) -> None:
        await self.image.put_header_fields(layout.INCOMPATIBLE_FIELD, bits.to_bytes(8, "big"))
        self.image.header.incompatible_features = bits
        await self.image.barrier()

    # --- one commit -------------------------------------------------------------------------------------

    @property
    def _needed(self) -> bool:
        return bool(self.image.dirty or self.refcounts.dirty or self.refcounts.freed.clusters)

    @asynccontextmanager
    async def _mutex(self, held: bool) -> AsyncIterator[None]:
        """Take the mutex unless we hold it."""
        if held:
            yield
            return
        async with self.image.mutex:
            yield

    async def _commit(self, *, held: bool) -> None:
        image, refcounts = self.image, self.refcounts
        async with self._mutex(held):
            if not self._needed:
                return
            if not image.writable:
                raise CorruptImageError(
                    f"'{image.filename}' was found to be corrupt before all changes of its metadata were written."
                )
            plan = await self._prepare(held)
        try:
            if plan.new_blocks:
                await image.barrier()
                async with self._mutex(held):
                    await refcounts.hook_up(plan.new_blocks)
            if plan.ordered:
                await image.barrier()
            async with self._mutex(held):
                for event, offset, data in plan.writes:
                    await image.announce(event)
                    await image.put_bytes(offset, data)
            if plan.freed:
                await image.barrier()
        except BaseException:
            self._restore(plan)
            raise
        image.dirty.on_their_way = frozenset()
        if image.changes is not None:
            # Before anything is freed: the changes may lie in clusters that are used for other things then.
            image.changes.settle(plan.mark)
        if plan.freed:
            async with self._mutex(held):
                await refcounts.freed.drop(plan.freed)

    async def _prepare(self, held: bool) -> _Plan:
        """Write refcounts, and take a snapshot of the dirty tables for the other steps."""
        dirty = self.image.dirty
        new_blocks: list[int] = []
        if self.lazy and not held and self.refcounts.dirty_blocks <= self.refcounts.blocks.capacity:
            await self.set_dirty_bit()
        else:
            new_blocks = await self.refcounts.write_blocks()
        plan = _Plan(
            l1=dirty.l1,
            l2=dirty.l2,
            writes=[*self._l2_writes(), *self._l1_writes()],
            ordered=dirty.ordered,
            freed=self.refcounts.freed.take(),
            new_blocks=new_blocks,
            mark=self.image.changes.mark() if self.image.changes is not None else 0,
        )
        dirty.on_their_way = frozenset(dirty.l2)
        dirty.l1, dirty.l2, dirty.ordered = set(), {}, False
        return plan

    def _l2_writes(self) -> Iterator[tuple[str, int, memoryview]]:
        image = self.image
        for offset, (first, end) in sorted(image.dirty.l2.items()):
            yield "l2_update", offset + 8 * first, image.encode_l2(image.l2.tables[offset], first, end)

    def _l1_writes(self) -> Iterator[tuple[str, int, memoryview]]:
        image = self.image
        for first, end in _runs(image.dirty.l1):
            yield "l1_update", image.header.l1_table_offset + 8 * first, encode_table(image.l1[first:end])

    def _restore(self, plan: _Plan) -> None:
        """Mark all changes of a failed commit as dirty again, since any part of them may be in the file."""
        dirty = self.image.dirty
        dirty.l1 |= plan.l1
        for offset, (first, end) in plan.l2.items():
            dirty.touch_l2(offset, first, end)
        dirty.on_their_way = frozenset()
        dirty.ordered |= plan.ordered
        self.refcounts.freed.put_back(plan.freed)


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield runs of adjacent numbers, as the first and the one behind the last."""
    first = end = -1
    for number in sorted(numbers):
        if number != end:
            if first >= 0:
                yield first, end
            first = number
        end = number + 1
    if first >= 0:
        yield first, end
