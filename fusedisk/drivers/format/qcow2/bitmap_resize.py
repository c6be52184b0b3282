"""Bitmaps of a disk that changes its length, as QEMU does it: new space counts as not changed, what goes is forgotten.

While the disk changes all bitmaps are marked as in use, so a crash leaves them invalid, never wrong. Then each is given
a table for the new length, and bits behind the disk's end are cleared, so that they do not come back when it grows.

Source: docs/interop/qcow2.txt, "Bitmaps".
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from fusedisk.core.errors import FusediskError
from fusedisk.drivers.format.qcow2.bitmap_directory import (
    MAX_BITMAP_SIZE,
    TABLE_OFFSET_FIELD,
    TABLE_SIZE_FIELD,
    Bitmap,
    bits_in,
    table_entries,
)
from fusedisk.drivers.format.qcow2.bitmaps import label
from fusedisk.drivers.format.qcow2.check_bitmaps import TABLE_ENTRY_OFFSET, TABLE_ENTRY_RESERVED
from fusedisk.drivers.format.qcow2.entries import HostRun, empty_table, encode_table
from fusedisk.drivers.format.qcow2.image import Image

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.resize_driver import ResizeDriver

log = logging.getLogger(__name__)


@asynccontextmanager
async def resizing(driver: ResizeDriver) -> AsyncIterator[None]:
    """Let the disk become longer or shorter inside; its valid bitmaps fit it afterwards, also where that fails."""
    bitmaps, committer = driver.bitmaps, driver.committer
    valid = bitmaps.valid
    if not valid:
        yield
        return
    async with committer.exclusive():
        await bitmaps.mark(valid, in_use=True)
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True):
            await _fit_all(driver, valid)
        raise
    await _fit_all(driver, valid)


async def _fit_all(driver: ResizeDriver, bitmaps: list[Bitmap]) -> None:
    """Ignore errors, since the resize itself is done."""
    fit: list[Bitmap] = []
    try:
        for bitmap in bitmaps if driver.image.writable else ():
            async with driver.committer.exclusive():
                if await _fit(driver, bitmap):
                    fit.append(bitmap)
        async with driver.committer.exclusive():
            driver.first_write.renew()
            await driver.bitmaps.mark(fit, in_use=False)
    except FusediskError as exc:
        log.debug("%s: %s", driver.image.filename, exc)
    lost = [bitmap for bitmap in bitmaps if bitmap.in_use]
    if lost:
        log.warning(
            "'%s' has %s, which could not follow its change of size and is invalid.", driver.image.filename, label(lost)
        )


async def _fit(driver: ResizeDriver, bitmap: Bitmap) -> bool:
    """Let a bitmap that is marked as in use fit the disk; returns whether it can. Under the mutex."""
    image, size = driver.image, driver.image.geometry.cluster_size
    if not _is_possible(image, bitmap.table_offset, bitmap.table_entries * 8):
        return False
    table = await image.read_table(bitmap.table_offset, bitmap.table_entries)
    places = [entry & TABLE_ENTRY_OFFSET for entry in table]
    if any(entry & TABLE_ENTRY_RESERVED for entry in table):
        return False
    if not all(_is_possible(image, place, size) for place in places if place):
        return False
    entries = table_entries(image.header, bitmap.granularity_bits)
    if not 0 < entries <= MAX_BITMAP_SIZE // size:
        return False
    if entries != len(table):
        await _move_table(driver, bitmap, (table + empty_table(max(entries - len(table), 0)))[:entries])
        dropped = [HostRun(place >> image.geometry.cluster_bits, 1) for place in places[entries:] if place]
        driver.refcounts.free(dropped)
    if entries <= len(places) and places[entries - 1]:
        bits = min(bits_in(image.header, bitmap.granularity_bits) - (entries - 1) * size * 8, size * 8)
        await _clear_bits(image, places[entries - 1], bits)
    return True


def _is_possible(image: Image, start: int, length: int) -> bool:
    """Whether a part of a bitmap may lie there."""
    inside = start + length <= image.storage.node.length
    return inside and not start & image.geometry.cluster_mask and image.occupied_at(start, length) is None


async def _move_table(driver: ResizeDriver, bitmap: Bitmap, table: array[int]) -> None:
    """Give a bitmap another table, which is in the file as a whole whatever part of it the directory tells of."""
    image, geometry, refcounts = driver.image, driver.image.geometry, driver.refcounts
    clusters = geometry.clusters(8 * len(table))
    run = await refcounts.allocate(clusters, exact=True)
    offset = run.first << geometry.cluster_bits
    await driver.committer.write_refcounts()
    await image.put_new_table(offset, bytes(encode_table(table)).ljust(clusters << geometry.cluster_bits, b"\0"))
    fields = [(TABLE_OFFSET_FIELD, offset.to_bytes(8, "big")), (TABLE_SIZE_FIELD, len(table).to_bytes(4, "big"))]
    if len(table) < bitmap.table_entries:
        fields.reverse()
    for field, data in fields:
        await image.barrier()
        await driver.bitmaps.put_field(bitmap, field, data)
    refcounts.free([HostRun(bitmap.table_offset >> geometry.cluster_bits, geometry.clusters(8 * bitmap.table_entries))])
    bitmap.table_offset, bitmap.table_entries = offset, len(table)


async def _clear_bits(image: Image, place: int, first: int) -> None:
    """Clear the bits of a bitmap's cluster from ``first`` on."""
    data = await image.read(place, image.geometry.cluster_size)
    kept = int.from_bytes(data, "little") & (1 << first) - 1
    cleared = kept.to_bytes(len(data), "little")
    if cleared != data:
        await image.put_bytes(place, cleared)
