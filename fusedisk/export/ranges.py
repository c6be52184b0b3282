"""Requests on ranges of a file beside reading and writing: holes, allocation, copies.

They may span a whole disk, so they go in steps: other requests get their turn in between, and a cancelled request has
done whole steps.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from fusedisk.core.errors import FusediskError, NotSupportedError, OutOfRangeError
from fusedisk.export.export import Export

log = logging.getLogger(__name__)

ZERO_STEP = 256 << 20
"""Bytes zeroed in one step, which is serialised against all other requests."""
ALLOCATE_STEP = 8 << 20
COPY_STEP = 1 << 20
MOST_COPIED = 64 << 20
"""The most bytes that one copy request copies; the caller asks again for the rest."""
_LOOKUPS_AT_ONCE = 64


async def seek(export: Export, offset: int, whence: int) -> int:
    """Return the offset of the next data (SEEK_DATA) or hole (SEEK_HOLE) from ``offset`` on.

    A hole is a range that is known to read as zeroes without reading it; there is one at the end of every disk. Raises
    OutOfRangeError with ENXIO past the end, and if no data is left.
    """
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise NotSupportedError(f"'{export.name}' cannot be searched for {whence}.", errno=errno.EINVAL)
    end = export.length
    if not 0 <= offset < end:
        raise OutOfRangeError(f"'{export.name}' ends at {end}, nothing is behind {offset}.", errno=errno.ENXIO)
    lookups = 0
    while offset < end:
        status = await export.backend.block_status(offset, end - offset)
        if status.zero == (whence == os.SEEK_HOLE):
            return offset
        offset += status.length
        lookups += 1
        if lookups % _LOOKUPS_AT_ONCE == 0:
            await trio.lowlevel.checkpoint()
    if whence == os.SEEK_HOLE:
        return end
    raise OutOfRangeError(f"'{export.name}' has no more data.", errno=errno.ENXIO)


async def zero(export: Export, offset: int, length: int, *, punch: bool, keep_size: bool) -> None:
    """Make a range read as zeroes. ``punch`` gives its space back, as far as the disk's settings allow that."""
    async with _room(export, offset, length, keep_size=keep_size) as end:
        while offset < end:
            step = min(ZERO_STEP - offset % ZERO_STEP, end - offset)
            if step < end - offset:
                # What reads as zeroes already costs next to nothing: terabytes of it take one step.
                status = await export.backend.block_status(offset, end - offset)
                step = max(step, status.length if status.zero else 0)
            export.touch()
            await export.backend.write_zeroes(offset, step, may_unmap=punch)
            export.touch()
            offset += step
            await trio.lowlevel.checkpoint()


async def allocate(export: Export, offset: int, length: int, *, keep_size: bool) -> None:
    """Reserve the space of a range, so that no write to it can fail for lack of space. It reads as before."""
    async with _room(export, offset, length, keep_size=keep_size) as end:
        while offset < end:
            step = min(ALLOCATE_STEP - offset % ALLOCATE_STEP, end - offset)
            await export.backend.preallocate(offset, step)
            offset += step
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def _room(export: Export, offset: int, length: int, *, keep_size: bool) -> AsyncIterator[int]:
    """Extend the disk for a range, unless ``keep_size``, and yield the end of the range. The caller asks for that, as
    with truncate, so the disk need not be growable. After a failure inside, the disk has its old length."""
    export.check_writable()
    before, end = export.length, offset + length
    if end > before:
        if keep_size:
            end = before
        else:
            await export.extend(end)
    longer = export.length
    try:
        yield end
    except BaseException:
        if longer > before:
            with trio.CancelScope(shield=True):
                await _shrink(export, longer, before)
        # The kernel forgets what it has cached of the range and of the size only where nothing fails.
        if export.on_change is not None:
            export.on_change(True)
        raise


async def _shrink(export: Export, length: int, before: int) -> None:
    """Undo the extension of the disk to ``length`` bytes, unless another request has made it longer since."""
    if export.length != length:
        return
    try:
        await export.truncate(before)
    except FusediskError as exc:
        log.warning("%s: it stays %d bytes long after a request that failed: %s", export.name, length, exc)


async def copy(source: Export, offset: int, target: Export, position: int, length: int) -> int:
    """Copy a range, holes as holes; returns how many bytes were copied: fewer where the source ends or a later part
    failed, at most MOST_COPIED. What was asked for must not overlap itself."""
    target.check_writable()
    length = min(length, MOST_COPIED, source.length - offset)
    done = 0
    while done < length:
        step = min(COPY_STEP, length - done)
        try:
            done += await _copy_step(source, offset + done, target, position + done, step)
        except FusediskError:
            # The kernel forgets only what it has cached of bytes that are said to be copied.
            if not done:
                raise
            break
        await trio.lowlevel.checkpoint()
    return done


async def _copy_step(source: Export, offset: int, target: Export, position: int, length: int) -> int:
    status = await source.backend.block_status(offset, length)
    source.check_read(offset, status.length)
    if status.zero and position + status.length <= target.length:
        target.touch()
        await target.backend.write_zeroes(position, status.length, may_unmap=True)
        target.touch()
        return status.length
    return await target.write(position, memoryview(await source.read(offset, status.length)))
