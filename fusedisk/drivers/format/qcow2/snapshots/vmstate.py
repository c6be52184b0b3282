"""The state of a virtual machine, kept behind the disk's end: guest offsets from the first L2 table's span on that the
disk does not reach into, where a snapshot keeps it together with the disk.

Source: docs/interop/qcow2.txt, "Snapshots"; where it starts is QEMU's choice.
"""

from __future__ import annotations

from typing import Protocol

from fusedisk.block.model.extent import DATA, SPECIAL, Extent
from fusedisk.block.model.node import Node
from fusedisk.block.request import io, transfer
from fusedisk.core.errors import NotSupportedError, OutOfRangeError
from fusedisk.core.zeroes import zero_fill
from fusedisk.drivers.format.qcow2 import discard, layout, resize
from fusedisk.drivers.format.qcow2.allocation import Allocator

_CHUNK = 1 << 20
"""Bytes that are put together from old and new ones at a time; whole clusters, as the largest has twice as many."""


class VmStateImage(Protocol):
    """The part of the driver that is needed here."""

    node: Node
    allocator: Allocator

    async def map(self, offset: int, length: int) -> Extent:
        """See :meth:`fusedisk.block.model.driver.Driver.map`."""

    async def read_special(self, extent: Extent, offset: int, buffer: memoryview) -> None:
        """See :meth:`fusedisk.block.model.driver.Driver.read_special`."""


def vmstate_offset(allocator: Allocator) -> int:
    """The guest offset where VM state starts."""
    return resize.l1_entries(allocator, allocator.image.header.size) << allocator.geometry.span_bits


async def save(driver: VmStateImage, offset: int, data: memoryview) -> None:
    """Write VM state, whole clusters at a time: what surrounds it in its clusters is VM state too, not zeroes.

    Raises OutOfRangeError where the L1 table cannot get that long, and what writing raises.
    """
    allocator = driver.allocator
    if allocator.image.header.has_data_file:
        raise NotSupportedError(f"'{allocator.image.filename}' keeps its data in another file, which has no VM state.")
    allocator.end_settled = False
    start = vmstate_offset(allocator) + offset
    entries = resize.l1_entries(allocator, start + len(data))
    if entries * 8 > layout.MAX_L1_SIZE:
        raise OutOfRangeError(
            f"'{allocator.image.filename}' cannot hold {len(data)} bytes of VM state at {offset}: with its clusters of "
            f"{allocator.geometry.cluster_size} bytes, its L1 table would need {entries} entries, "
            f"and at most {layout.MAX_L1_SIZE // 8} are possible."
        )
    await resize.grow_l1(allocator, entries)
    size = allocator.geometry.cluster_size
    step = max(_CHUNK, size)
    while data:
        first = start // size * size
        part = data[: first + step - start]
        last = -(-(start + len(part)) // size) * size
        if start == first and start + len(part) == last:
            whole = part
        else:
            whole = memoryview(bytearray(last - first))
            await _read(driver, first, whole)
            whole[start - first : start - first + len(part)] = part
        await transfer.write(driver.node, first, (whole,), 0)
        start += len(part)
        data = data[len(part) :]


async def load(driver: VmStateImage, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` with VM state; zeroes where none was saved."""
    await _read(driver, vmstate_offset(driver.allocator) + offset, buffer)


async def _read(driver: VmStateImage, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from this image alone: no backing file has anything to do with it."""
    room = (len(driver.allocator.image.l1) << driver.allocator.geometry.span_bits) - offset
    if len(buffer) > room:
        room = max(0, room)
        zero_fill(buffer[room:])
        buffer = buffer[:room]
    while buffer:
        extent = await driver.map(offset, len(buffer))
        part = buffer[: extent.length]
        if extent.status == DATA:
            assert extent.child is not None
            await io.read(extent.child.node, extent.offset, part)
        elif extent.status == SPECIAL:
            await driver.read_special(extent, offset, part)
        else:
            zero_fill(part)
        offset += len(part)
        buffer = buffer[len(part) :]


async def drop(driver: VmStateImage, length: int) -> None:
    """The first ``length`` bytes of VM state are in a snapshot; the active state needs them no longer, and the next
    snapshot would keep them once more."""
    allocator = driver.allocator
    allocator.end_settled = False
    start = vmstate_offset(allocator)
    length = min(length, (len(allocator.image.l1) << allocator.geometry.span_bits) - start)
    if length > 0:
        await discard.change(allocator, start, length, lambda entry: 0)
