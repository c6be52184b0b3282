"""Doing without zero clusters, which version 2 does not know: in the active mapping and in all snapshots.

Without a backing file they become unallocated, with one they get host clusters of zeroes. L2 tables change in place,
for all that lead to them at once, so a new host cluster counts as often as the table does. The entries of a batch of
tables are written when their clusters are durable, and what they referred to before is given back behind that: the
disk reads the same at every instant, and a crash leaks at worst.

Source: docs/interop/qcow2.txt, "Cluster mapping", "Standard Cluster Descriptor".
"""

from __future__ import annotations

from array import array
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import trio

from fusedisk.core.errors import ImageError
from fusedisk.core.progress import Progress
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO, encode_table, used_pieces
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.snapshot import read_l1
from fusedisk.drivers.format.qcow2.snapshot_references import table_weights

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver

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
        raise _cannot_be(image, f"the L1 tables of its {len(driver.snapshots)} snapshots are longer than the file")
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


def _cannot_be(image: Image, what: str) -> ImageError:
    return ImageError(f"'{image.filename}' is corrupt: {what}; 'fusedisk check -r all' may repair it.")


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
                raise _cannot_be(self.image, f"entry {index} of its L2 table at {table.offset} is {old[index]:#018x}")
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
            raise _cannot_be(self.image, f"it has an L2 table at {offset}, where its {what} lies")
        if offset >= self.image.storage.node.length:
            raise _cannot_be(self.image, f"it has an L2 table at {offset}, behind the end of the file")

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
        await committer.settle()
