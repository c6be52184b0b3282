"""``host_device``: a block device of the host.

Like ``file`` in how bytes move, in locks and in reopening; size, block sizes, geometry, discarding and zeroing
are the device's own. A device cannot be resized from here, but when it has changed its size by itself (a grown
logical volume, ``losetup -c``), a truncate to that very size takes note of it.

Not here: character devices, SCSI passthrough, zoned models.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from fusedisk.block.model import permissions
from fusedisk.block.model.extent import DATA, Extent
from fusedisk.block.model.limits import Limits
from fusedisk.core.errors import NotSupportedError, OptionError, host_error
from fusedisk.core.host_open import Found, kind_name
from fusedisk.core.image_locks import ImageLocks
from fusedisk.core.offload import run_host_io
from fusedisk.core.zeroes import ZEROES
from fusedisk.drivers.protocol.file import FileDriver
from fusedisk.drivers.protocol.host_io import write_vector
from fusedisk.drivers.protocol.host_ranges import DeviceRanges
from fusedisk.drivers.protocol.hostcalls import (
    device_geometry,
    device_read_only,
    device_size,
    discard_granularity,
    logical_block_size,
    physical_block_size,
)

_HEAD = 512
"""The bytes at the start of a device that a new image replaces, so that the old content is no longer recognised."""


class HostDeviceDriver(FileDriver):
    """A block device."""

    name = "host_device"
    prefixes = ("host_device",)
    ranges_type = DeviceRanges

    # --- life -------------------------------------------------------------------------------------------

    def _check_kind(self, mode: int) -> None:
        _check_block_device(mode, self.filename)

    def _open_descriptor(self, found: Found, flags: int, read_only: bool) -> int:
        fd = super()._open_descriptor(found, flags, read_only)
        if not read_only and device_read_only(fd):  # the kernel lets it be opened, and fails every write
            os.close(fd)
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return fd

    # --- size and limits --------------------------------------------------------------------------------

    async def length(self) -> int:
        with self._errors("read the size of"):
            return device_size(self.file.fd)

    def refresh_limits(self, limits: Limits) -> None:
        super().refresh_limits(limits)
        block = logical_block_size(self.file.fd)
        limits.zeroes_alignment = block
        limits.discard_alignment = max(block, discard_granularity(self.file.fd))

    # --- requests ---------------------------------------------------------------------------------------

    async def map(self, offset: int, length: int) -> Extent:
        return Extent(DATA, length, None, offset)

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        size = await self.length()
        if length != size:
            raise NotSupportedError(
                f"'{self.filename}' is a block device of {size} bytes, it cannot be resized to {length} from here."
            )

    # --- information ------------------------------------------------------------------------------------

    def information(self) -> dict[str, Any]:
        """Block sizes in bytes and, where the device claims one, its geometry."""
        with self._errors("ask for the block sizes of"):
            found: dict[str, Any] = {
                "logical-block-size": logical_block_size(self.file.fd),
                "physical-block-size": physical_block_size(self.file.fd),
            }
            geometry = device_geometry(self.file.fd)
        if geometry is not None:
            found["geometry"] = geometry._asdict()
        return found

    def has_zero_init(self) -> bool:
        return False

    # --- creation ---------------------------------------------------------------------------------------

    @classmethod
    async def create_file(cls, filename: str, size: int, preallocation: str, nocow: bool) -> None:
        """Take an existing device that has room for ``size`` bytes, and wipe its first 512 bytes."""
        if preallocation != "off":
            raise NotSupportedError(f"'{filename}' is a block device, there is nothing to preallocate on it.")
        await run_host_io(_take_device, filename, size)


def _check_block_device(mode: int, filename: str) -> None:
    if not stat.S_ISBLK(mode):
        raise OptionError(f"'{filename}' is {kind_name(mode)}, but 'host_device' opens block devices.")


def _take_device(filename: str, size: int) -> None:
    try:
        with Found(filename) as found:
            _check_block_device(found.mode, filename)
            fd = found.open(os.O_RDWR)
        try:
            room = device_size(fd)
            if size > room:
                raise NotSupportedError(
                    f"'{filename}' is a block device of {room} bytes, an image of {size} does not fit on it."
                )
            ImageLocks(fd, filename).check(
                permissions.WRITE | permissions.RESIZE, permissions.ALL & ~permissions.RESIZE
            )
            write_vector(fd, (ZEROES[: min(_HEAD, room)],), 0)
            os.fdatasync(fd)
        finally:
            os.close(fd)
    except ValueError as exc:
        raise OptionError(f"{filename!r} is not a valid path: {exc}.") from exc
    except OSError as exc:
        raise host_error(exc, filename, "create") from exc
