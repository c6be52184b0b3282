"""The loop device that comes and goes together with a mount.

All work is done in threads: the kernel asks the daemon for the file's attributes and content meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import struct
from collections.abc import Sequence

import trio

from fusedisk.core.errors import FusediskError
from fusedisk.export.export import Export
from fusedisk.export.partitions.reading import read_table
from fusedisk.export.partitions.table import Partition, Table
from fusedisk.mount import loop_device
from fusedisk.mount.loop_device import LoopSettings

log = logging.getLogger(__name__)

_BLKPG = 0x1269
_BLKPG_ADD_PARTITION = 1
_PARTITION = struct.Struct("=2qi64s64s4x")
"""``struct blkpg_partition``."""
_ARGUMENT = struct.Struct("@3iP")
"""``struct blkpg_ioctl_arg``."""


class Attachment:
    """A loop device on one export, whose file is at ``path``."""

    def __init__(self, export: Export, path: str, settings: LoopSettings) -> None:
        self._export = export
        self._path = path
        self._settings = settings
        self.device: str | None = None
        """``/dev/loopN`` once it is attached."""
        self.settled = trio.Event()
        """:meth:`attach` has come to its end."""

    async def attach(self) -> str:
        """Attach a free device, its partitions included; returns its name. Raises a FusediskError, and then nothing is
        left attached."""
        export = self._export
        try:
            self.device = await trio.to_thread.run_sync(
                lambda: loop_device.attach(self._path, self._settings, read_only=not export.writable)
            )
            try:
                await self._add_partitions(self.device)
            except FusediskError:
                await self.release()
                raise
        finally:
            self.settled.set()
        return self.device

    async def _add_partitions(self, device: str) -> None:
        """Tell the kernel of partitions that it does not find itself: some are built without any table's format."""
        if loop_device.partitions(device):
            return
        table = await read_table(self._export.backend.read, self._export.backend.length)
        if isinstance(table, Table) and table.partitions:
            await trio.to_thread.run_sync(_add_all, device, table.partitions)

    async def release(self) -> None:
        """Take the device off the file, now or, if it is in use, as soon as it is not."""
        device = self.device
        if device is None:
            return
        try:
            await trio.to_thread.run_sync(
                lambda: loop_device.detach(device, self._path, force=True), abandon_on_cancel=True
            )
        except FusediskError as exc:
            log.error("%s", exc)


def _add_all(device: str, found: Sequence[Partition]) -> None:
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        log.warning("the partitions of '%s' could not be added: %s", device, exc)
        return
    try:
        for partition in found:
            try:
                _add(fd, partition)
            except OSError as exc:
                if exc.errno != errno.EBUSY:  # the kernel has found it meanwhile
                    log.warning("partition %d of '%s' could not be added: %s", partition.number, device, exc)
    finally:
        os.close(fd)


def _add(fd: int, partition: Partition) -> None:
    data = _PARTITION.pack(partition.start, partition.length, partition.number, b"", b"")
    buffer = ctypes.create_string_buffer(data, len(data))
    fcntl.ioctl(fd, _BLKPG, _ARGUMENT.pack(_BLKPG_ADD_PARTITION, 0, len(data), ctypes.addressof(buffer)))
