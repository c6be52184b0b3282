"""``blklogwrites``: passes everything through and logs each write, write-zeroes, discard and flush into a second file.

The log is that of the kernel's dm-log-writes (:mod:`.blklogwrites_layout`), so a crash at any point of the log
can be replayed, here or by the kernel's tools. An operation is logged when it is done, in the order of completion;
a flush holds the log while it runs, so that in front of its entry there is only what it has put on stable storage.
A resize is logged as what it looks like to a disk: the last new sector written with zeroes, or the cut-off ones
discarded.

Concurrent requests: the log is appended to under a mutex, which nothing below asks for. Source: QAPI's
BlockdevOptionsBlklogwrites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

from fusedisk.block.model.children import ChildSpec, Role
from fusedisk.block.model.flags import NO_FALLBACK, Buffer
from fusedisk.block.model.limits import Limits
from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.block.request.filter import FilterDriver
from fusedisk.core.errors import OptionError, OutOfRangeError
from fusedisk.core.locks import Mutex
from fusedisk.core.options import Options, option
from fusedisk.drivers.filter import blklogwrites_layout as layout
from fusedisk.drivers.filter.blklogwrites_layout import Entry, Superblock


@dataclasses.dataclass(slots=True)
class BlklogwritesOptions(Options):
    """Options of ``blklogwrites``."""

    log_append: bool = option(False, kind="bool", help="add to an existing log")
    log_sector_size: int = option(0, kind="size", help="unit of the log, and of all requests (default: 512)")
    log_super_update_interval: int = option(
        4096, kind="int", help="entries after which the log's superblock counts them, without a flush"
    )


class BlklogwritesDriver(FilterDriver):
    """Logs what changes the child ``file`` into the child ``log``. Writes nothing while the node is read-only."""

    name = "blklogwrites"
    child_specs = (ChildSpec("file", Role.FILTERED), ChildSpec("log", Role.FILE))
    options_type: ClassVar[type[Options]] = BlklogwritesOptions
    moves_bytes = True

    entries = 0
    """Entries in the log."""
    sector_size = layout.MIN_SECTOR_SIZE

    _next_sector = 1
    _counted = -1
    """Entries that the superblock on disk counts."""

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        self._mutex = Mutex()

    @property
    def log(self) -> Node:
        """The node that holds the log."""
        return self.node.children["log"].node

    # --- life -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Raises OptionError for options that do not fit together, ImageError for a log that is none."""
        options = self.options
        if options.log_append and options.log_sector_size:
            raise OptionError("blklogwrites option 'log-append' takes the sector size from the log, not from options.")
        if options.log_super_update_interval < 1:
            raise OptionError(
                f"blklogwrites option 'log-super-update-interval' is {options.log_super_update_interval}, expected 1 "
                "or more."
            )
        size = options.log_sector_size or layout.MIN_SECTOR_SIZE
        if not layout.is_sector_size(size):
            raise OptionError(
                f"blklogwrites option 'log-sector-size' is {size}, expected a power of two from "
                f"{layout.MIN_SECTOR_SIZE} to {layout.MAX_SECTOR_SIZE}."
            )
        self.sector_size = size
        if options.log_append and self.log.length:
            await self._find_end()
        if not self.node.config.read_only:
            await self._put_superblock()

    async def _find_end(self) -> None:
        """Continue behind the last entry that the log counts."""
        log = self.log
        head = await io.read_bytes(log, 0, min(layout.SUPERBLOCK_LENGTH, log.length))
        found = layout.parse_superblock(bytes(head), log.filename)
        sector, sectors = 1, -(-log.length // found.sector_size)
        for number in range(found.entries):
            offset = sector * found.sector_size
            data = bytes(await io.read_bytes(log, offset, min(layout.ENTRY_LENGTH, max(log.length - offset, 0))))
            sector += 1 + layout.parse_entry(data, number, sectors - sector - 1, log.filename).data_sectors
        self.sector_size, self.entries, self._next_sector = found.sector_size, found.entries, sector

    async def close(self) -> None:
        if not self.node.config.read_only:
            async with self._mutex:
                await self._put_superblock()

    def refresh_limits(self, limits: Limits) -> None:
        super().refresh_limits(limits)
        limits.request_alignment = max(self.sector_size, self.below.limits.request_alignment)

    # --- the log ----------------------------------------------------------------------------------------

    async def mark(self, text: str) -> None:
        """Put a named point into the log, which replaying can stop at. Raises OutOfRangeError where it is too long."""
        data = text.encode()
        room = self.sector_size - layout.ENTRY_LENGTH
        if len(data) > room:
            raise OutOfRangeError(f"The mark '{text}' takes {len(data)} bytes, but the log has room for {room}.")
        async with self._mutex:
            await self._append(Entry(0, 0, layout.MARK, len(data)), mark=data)

    async def _append(self, entry: Entry, data: Sequence[Buffer] = (), *, mark: bytes = b"") -> None:
        """Under the mutex. Without ``data`` that the entry says it has, zeroes are logged."""
        place, size = self._next_sector * self.sector_size, self.sector_size
        await io.write(self.log, place, (memoryview(entry.encode(size, mark)), *data))
        if entry.data_sectors and not data:
            await io.write_zeroes(self.log, place + size, entry.data_sectors * size)
        self._next_sector += 1 + entry.data_sectors
        self.entries += 1
        if entry.flags & layout.FLUSH or self.entries - self._counted >= self.options.log_super_update_interval:
            await self._put_superblock()

    async def _put_superblock(self) -> None:
        if self._counted != self.entries:
            await io.write(self.log, 0, (memoryview(Superblock(self.entries, self.sector_size).encode()),))
            self._counted = self.entries

    async def _log(self, offset: int, length: int, flags: int = 0, data: Sequence[Buffer] = ()) -> None:
        size = self.sector_size
        async with self._mutex:
            await self._append(Entry(offset // size, length // size, flags), data)

    # --- requests ---------------------------------------------------------------------------------------

    async def pwritev(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        await super().pwritev(offset, buffers, flags)
        await self._log(offset, sum(map(len, buffers)), 0, buffers)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        # Without the fallback below, so that the writes that it leads to come through here and are logged.
        await super().write_zeroes(offset, length, flags | NO_FALLBACK)
        await self._log(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await super().discard(offset, length)
        end = min(offset + length, self.node.length) // self.sector_size * self.sector_size
        if end > offset:
            await self._log(offset, end - offset, layout.DISCARD)

    async def flush(self, flush_layers: Callable[[], Awaitable[None]]) -> None:
        async with self._mutex:
            await io.flush(self.below)
            await self._append(Entry(0, 0, layout.FLUSH))
        await io.flush(self.log)

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        old, size = self.node.length, self.sector_size
        await super().truncate(length, preallocation, flags)
        if length > old and length >= size:
            await self._log(length // size * size - size, size)
        elif length < old:
            start = -(-length // size) * size
            await self._log(start, max(old - start, 0), layout.DISCARD)
