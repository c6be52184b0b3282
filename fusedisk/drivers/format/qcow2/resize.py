"""Resizing an image.

Growing: the L1 table, the tail of the last cluster, preallocation, then the size in the header. Shrinking: the size in
the header, then what leads behind the disk's end, then the file's own end. No request is in flight meanwhile. Whatever
is done lies behind the disk's end as the header has it, so stopping anywhere, or losing power, leaves the old disk or
the new one.

A disk that grows write by write mostly finds nothing behind its end. Then the size goes into the header without a
barrier, and the next flush makes it durable (:func:`grow_size`).
"""

from __future__ import annotations

import logging
from array import array
from typing import TYPE_CHECKING

import trio

from fusedisk.block.model.extent import UNALLOCATED
from fusedisk.block.model.flags import MAY_UNMAP
from fusedisk.block.model.node import Node
from fusedisk.block.request import io, space, transfer
from fusedisk.block.request.status import chain_status
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import FusediskError, ImageError, NotSupportedError, OptionError
from fusedisk.core.zeroes import ZEROES, is_zero
from fusedisk.drivers.format.qcow2 import discard, layout
from fusedisk.drivers.format.qcow2.allocation import Allocator
from fusedisk.drivers.format.qcow2.bitmaps import resizing
from fusedisk.drivers.format.qcow2.discard import NO_BACKING, Backing
from fusedisk.drivers.format.qcow2.entries import COPIED, OFFSET_MASK, ZERO, Geometry, HostRun, next_entry
from fusedisk.drivers.format.qcow2.freed import Reason
from fusedisk.drivers.format.qcow2.options import PREALLOCATIONS

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver

log = logging.getLogger(__name__)

_SKIPS_AT_ONCE = 1 << 16
"""Empty L1 entries that one step skips at most."""


async def resize(driver: Qcow2Driver, length: int, preallocation: str, *, zero_new: bool) -> None:
    """Change the length of the disk, see :meth:`fusedisk.block.model.driver.Driver.truncate`."""
    allocator = driver.allocator
    old = driver.image.header.size
    check_size(allocator, length, preallocation, zero_new=zero_new)
    if length == old:
        return
    async with resizing(driver):
        if length < old:
            await _shrink(driver, length)
        else:
            await _grow(driver, length, preallocation, zero_new=zero_new)


async def _grow(driver: Qcow2Driver, length: int, preallocation: str, *, zero_new: bool) -> None:
    allocator, old, size = driver.allocator, driver.image.header.size, driver.image.geometry.cluster_size
    await grow_l1(allocator, l1_entries(allocator, length))
    await _zero_tail(driver, zero_new)
    backing = driver.shows_through() if zero_new else NO_BACKING
    settled, driver.allocator.end_settled = driver.allocator.end_settled, False
    if not await clear_behind_end(allocator, length, backing):
        driver.allocator.end_settled = settled
    if preallocation != "off":
        try:
            await preallocate(allocator, -(-old // size) * size, length, preallocation)
        except BaseException:
            with trio.CancelScope(shield=True):
                await give_back(allocator, length)
            raise
    if driver.allocator.end_settled and preallocation == "off" and not driver.image.header.has_raw_data_file:
        await grow_size(allocator, length)
        return
    await _resize_raw_data(driver, length)
    # What the new size uncovers must be there before.
    await set_size(allocator, length)
    driver.allocator.end_settled = True


async def _shrink(driver: Qcow2Driver, length: int) -> None:
    old = driver.image.header.size
    driver.allocator.end_settled = False
    await set_size(driver.allocator, length)
    await _resize_raw_data(driver, length)
    await drop_behind_end(driver.allocator, old)
    await shorten_file(driver.allocator)
    driver.allocator.end_settled = True


async def _resize_raw_data(driver: Qcow2Driver, length: int) -> None:
    """Keep a raw data file as long as the disk."""
    if driver.image.header.has_raw_data_file:
        assert driver.image.data_file is not None
        await space.truncate(driver.image.data_file.node, length)


async def _zero_tail(driver: Qcow2Driver, zero_new: bool) -> None:
    """Make what the last cluster holds behind the disk's end zero, before the disk grows over it."""
    offset = driver.image.header.size
    end = offset + -offset % driver.image.geometry.cluster_size
    while offset < end:
        extent = await driver.map(offset, end - offset)
        tail = memoryview(bytearray(extent.length))
        if extent.compressed:
            await driver.read_special(extent, offset, tail)
        elif extent.status != UNALLOCATED or zero_new:
            await driver.read_plain(extent, offset, tail)
        if not is_zero(tail):
            # As the guest would: in place, or by copying where the cluster is shared or compressed.
            driver.allocator.end_settled = False
            await transfer.write(driver.node, offset, (memoryview(bytes(len(tail))),), 0)
        offset += len(tail)


# --- the steps -----------------------------------------------------------------------------------------


async def grow_size(allocator: Allocator, length: int) -> None:
    """Put a larger size into the header without waiting for the disk; the L1 table must cover it.

    For a disk behind whose end nothing has changed since the last barrier: whether the size or the entries of what is
    written there reach the disk first, what is uncovered has no data.
    """
    async with allocator.image.mutex:
        await allocator.image.before_change(False)
        await allocator.image.put_header_fields(layout.SIZE_FIELD, length.to_bytes(8, "big"))
        allocator.image.header.size = length


async def set_size(allocator: Allocator, length: int) -> None:
    """Put the virtual size into the header, durably; the L1 table must cover it."""
    refuse_to_wait()
    async with allocator.committer.exclusive():
        # What the new size uncovers must be there before.
        await allocator.image.barrier()
        await allocator.image.put_header_fields(layout.SIZE_FIELD, length.to_bytes(8, "big"))
        allocator.image.header.size = length
        await allocator.image.barrier()


def check_size(allocator: Allocator, length: int, preallocation: str, *, zero_new: bool) -> None:
    """Raise NotSupportedError or OptionError, with nothing changed, where the image cannot become ``length``
    bytes.
    """
    image, header = allocator.image, allocator.image.header
    if preallocation not in PREALLOCATIONS:
        raise OptionError(
            f"'{image.filename}' cannot be resized with preallocation '{preallocation}', expected "
            f"{', '.join(PREALLOCATIONS[:-1])} or {PREALLOCATIONS[-1]}."
        )
    if length < header.size and preallocation != "off":
        raise OptionError(
            f"'{image.filename}' has {header.size} bytes and cannot shrink to {length} with preallocation, which is "
            "for what is added."
        )
    if length % layout.SECTOR:
        raise OptionError(f"'{image.filename}' cannot get {length} bytes, expected a multiple of {layout.SECTOR}.")
    if header.version < 3 and header.nb_snapshots:
        raise NotSupportedError(
            f"'{image.filename}' is qcow2 of version 2 with snapshots, which cannot be resized: delete the "
            "snapshots first."
        )
    if header.version < 3 and header.crypt_method and preallocation != "off" and length > header.size:
        raise NotSupportedError(
            f"'{image.filename}' is qcow2 of version 2 and encrypted, so space that is reserved for what is added "
            "would not read as zeroes; in version 3 (compat=1.1) it does."
        )
    if header.version < 3 and zero_new:
        raise NotSupportedError(
            f"'{image.filename}' is qcow2 of version 2 and cannot hide its longer backing file behind "
            "zeroes; version 3 "
            f"(compat=1.1) can."
        )
    check_l1(image.filename, header, length)


def check_l1(filename: str, header: layout.Header, length: int) -> None:
    """Raise ImageError where a disk of ``length`` bytes needs a larger L1 table than there may be."""
    needed = -(-length // (1 << Geometry(header).span_bits))
    if needed * 8 > layout.MAX_L1_SIZE:
        raise ImageError(
            f"'{filename}' would need an L1 table of {needed} entries for {length} bytes, but at most "
            f"{layout.MAX_L1_SIZE // 8} are possible with its clusters of {header.cluster_size} bytes."
        )


def l1_entries(allocator: Allocator, length: int) -> int:
    """L1 entries that a disk of ``length`` bytes needs."""
    return -(-length // (1 << allocator.geometry.span_bits))


async def grow_l1(allocator: Allocator, entries: int) -> None:
    """Make the L1 table at least ``entries`` long."""
    image, geometry = allocator.image, allocator.geometry
    if entries <= len(image.l1):
        return
    header = image.header
    refuse_to_wait()
    async with allocator.committer.exclusive():
        old_offset, old_size = header.l1_table_offset, geometry.clusters(header.l1_size * 8)
        await image.announce("l1_grow_alloc_table")
        run = await allocator.refcounts.allocate(geometry.clusters(entries * 8), exact=True)
        await allocator.committer.write_refcounts()
        await image.put_l1_table(run.first << geometry.cluster_bits, entries)
        if old_size:
            allocator.refcounts.freed.add([HostRun(old_offset >> geometry.cluster_bits, old_size)])


async def clear_behind_end(allocator: Allocator, length: int, backing: Backing) -> bool:
    """Make what lies between the disk's end and ``length`` read as the new space of a growing disk must. Returns
    whether anything changed.

    Old mappings there (VM state, leftovers of a shrink) go. ``backing`` is what shall not show through.
    """
    size, geometry = allocator.image.header.size, allocator.geometry
    start = -(-size // geometry.cluster_size) * geometry.cluster_size
    if start >= length:
        return False
    return await discard.change(allocator, start, length - start, lambda entry: 0, backing=backing)


async def drop_behind_end(allocator: Allocator, old_size: int) -> None:
    """Drop what leads to clusters between the disk's end and where it was."""
    geometry, length = allocator.geometry, allocator.image.header.size
    start = -(-length // geometry.cluster_size) * geometry.cluster_size
    spans = -(-start // (1 << geometry.span_bits))
    first_whole = min(spans << geometry.span_bits, old_size)
    if start < first_whole:
        await discard.change(allocator, start, first_whole - start, lambda entry: 0)
    l1_index, end = spans, l1_entries(allocator, old_size)
    while (l1_index := next_entry(allocator.image.l1, l1_index, min(end, l1_index + _SKIPS_AT_ONCE))) < end:
        if allocator.image.l1[l1_index] & OFFSET_MASK:
            await allocator.committer.relieve()
            async with allocator.image.mutex:
                await _drop_table(allocator, l1_index)
        l1_index += 1
        await trio.lowlevel.checkpoint()


async def _drop_table(allocator: Allocator, l1_index: int) -> None:
    """Drop an L2 table with everything that it leads to."""
    image, geometry = allocator.image, allocator.geometry
    table = await allocator.clusters.table_at(l1_index)
    assert table is not None
    offset = image.l1[l1_index] & OFFSET_MASK
    what = image.metadata_at(offset, geometry.cluster_size)
    if what is not None:
        raise await image.mark_corrupt(f"L1 entry {l1_index} leads to {offset}, where its {what} lies")
    bad = allocator.clusters.find_bad(table)
    if bad is not None:
        words = geometry.entry_words
        raise await allocator.clusters.bad_entry(
            (l1_index << geometry.span_bits) + (bad << geometry.cluster_bits), table[bad * words : (bad + 1) * words]
        )
    dropped = list(geometry.descriptors(table))
    await discard.check_dropped(allocator, dropped)
    image.put_l1_entry(l1_index, 0)
    image.dirty.forget_l2(offset)
    image.l2.drop(offset)  # another table may be written there next
    allocator.space.free_entries(dropped, reason=Reason.REQUEST)
    allocator.refcounts.freed.add([HostRun(offset >> geometry.cluster_bits, 1)], reason=Reason.REQUEST)


async def shorten_file(allocator: Allocator) -> None:
    """Cut off the file what lies behind the last cluster in use."""
    async with allocator.committer.exclusive():
        pass
    async with allocator.committer.exclusive():
        await allocator.committer.write_refcounts()
        await allocator.image.barrier()
        end = (await allocator.refcounts.last_used() + 1) << allocator.geometry.cluster_bits
        node = allocator.image.storage.node
        if end < node.length:
            await space.truncate(node, end)


async def preallocate(allocator: Allocator, start: int, end: int, mode: str) -> None:
    """Give every cluster in ``[start, end)``, behind the disk's end, a host cluster that reads as zeroes.

    ``mode``: metadata leaves the host file sparse, falloc reserves its space, full writes it.
    """
    geometry = allocator.geometry
    cluster, last = start >> geometry.cluster_bits, geometry.clusters(end)
    while cluster < last:
        l1_index = cluster >> geometry.l2_bits
        table_end = min(last, l1_index + 1 << geometry.l2_bits)
        await allocator.committer.relieve()
        async with allocator.image.mutex:
            await _preallocate_table(allocator, cluster, table_end, mode)
        await trio.lowlevel.checkpoint()
        cluster = table_end


async def give_back(allocator: Allocator, end: int) -> None:
    """Undo :func:`preallocate` up to ``end`` as far as it got: the disk does not grow."""
    try:
        await drop_behind_end(allocator, end)
        async with allocator.image.mutex:
            allocator.refcounts.release_kept()
        await shorten_file(allocator)
    except FusediskError as exc:
        log.warning("%s: clusters are leaked: %s", allocator.image.filename, exc)


async def _preallocate_table(allocator: Allocator, cluster: int, end: int, mode: str) -> None:
    geometry, image = allocator.geometry, allocator.image
    l1_index = cluster >> geometry.l2_bits
    table = (await allocator.table_for_write(l1_index))[:]
    while cluster < end:
        at = (cluster & geometry.l2_mask) * geometry.entry_words
        if table[at] & OFFSET_MASK:
            cluster += 1
            continue
        run = await allocator.space.allocate(cluster, end - cluster)
        host, size = run.first << geometry.cluster_bits, run.clusters << geometry.cluster_bits
        try:
            await _make_host_range(allocator.space.edge.node, allocator.space.place(host), size, mode)
        except BaseException:
            allocator.space.return_unused(run)
            raise
        entry = host | COPIED
        if allocator.refcounts.encrypted and geometry.version >= 3:
            # Zeroes of the file are none of the guest's.
            entry |= ZERO
        entries = array("Q", range(entry, entry + size, geometry.cluster_size))
        words = allocator.clusters.with_bitmaps(entries, table[at : at + run.clusters * geometry.entry_words])
        await image.put_l2_entries(l1_index, cluster & geometry.l2_mask, words)
        cluster += run.clusters


async def _make_host_range(node: Node, host: int, length: int, mode: str) -> None:
    """Let a range of new clusters exist in the file and read as zeroes."""
    present = min(max(node.length - host, 0), length)
    if mode == "full":
        for offset in range(host, host + present, len(ZEROES)):
            await io.write(node, offset, (ZEROES[: host + present - offset],))
    elif mode == "falloc" and present:
        await io.write_zeroes(node, host, present)
    else:
        await _make_zero(node, host, present)
    if present < length:
        await space.truncate(node, host + length, "off" if mode == "metadata" else mode)


async def _make_zero(node: Node, offset: int, length: int) -> None:
    """Let a range read as zeroes, and leave the holes that are in it."""
    end = offset + length
    while offset < end:
        status = await chain_status(node, offset, end - offset)
        if not status.zero:
            await io.write_zeroes(node, offset, status.length, MAY_UNMAP)
        offset += status.length
