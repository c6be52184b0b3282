"""The space of a host file: zeroing, freeing and reserving ranges in place. What the host turns out not to support is
not tried again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

from fusedisk.core.errors import NotSupportedError, host_error
from fusedisk.core.offload import run_host_io
from fusedisk.drivers.protocol.hostcalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    discard_device,
    fallocate,
    zero_device,
)

_UNSUPPORTED_ERRORS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ENOTTY, errno.EINVAL)
_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


class FileRanges:
    """The space of a regular file. The methods that wait raise NotSupportedError, with nothing changed, or
    HostError."""

    def __init__(self, fd: int, filename: str) -> None:
        self.fd, self.filename = fd, filename
        self._can_free = self._can_punch = self._can_zero = True

    async def zero(self, offset: int, length: int, *, may_free: bool) -> None:
        """Zero a range; the file grows to its end."""
        if may_free and self._can_punch:
            try:
                await self._run(self._punch_hole, offset, length)
                return
            except NotSupportedError:
                self._can_punch = False
        if not self._can_zero:
            raise self._no_fallocate()
        try:
            await self._run(self._zero_range, offset, length)
        except NotSupportedError:
            self._can_zero = False
            raise

    async def free(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Free the space of several ranges."""
        if not self._can_free:
            raise self._no_fallocate()
        try:
            await self._run(self._free_ranges, ranges)
        except NotSupportedError:
            self._can_free = False
            raise

    async def reserve(self, offset: int, length: int) -> None:
        """Allocate space for the holes of a range."""
        await self._run(fallocate, self.fd, FALLOC_FL_KEEP_SIZE, offset, length)

    async def _run(self, fn: Callable[..., None], *args: Any) -> None:
        try:
            await run_host_io(fn, *args)
        except OSError as exc:
            if exc.errno in _UNSUPPORTED_ERRORS:
                raise self._no_fallocate() from exc
            raise host_error(exc, self.filename, "zero or free a range of") from exc

    def _no_fallocate(self) -> NotSupportedError:
        return NotSupportedError(f"The host cannot zero or free a range of '{self.filename}' in place.")

    # --- in a worker thread; these raise OSError --------------------------------------------------------

    def _punch_hole(self, offset: int, length: int) -> None:
        """Zero a range and give its space back; the file grows to its end."""
        end = offset + length
        if end > os.fstat(self.fd).st_size:
            # Not by setting its size: somebody else may write behind this range meanwhile.
            fallocate(self.fd, 0, end - 1, 1)
        fallocate(self.fd, _PUNCH, offset, length)

    def _zero_range(self, offset: int, length: int) -> None:
        """Zero a range and keep its space; the file grows to its end."""
        fallocate(self.fd, FALLOC_FL_ZERO_RANGE, offset, length)

    def _free_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        for offset, length in ranges:
            self._free_range(offset, length)

    def _free_range(self, offset: int, length: int) -> None:
        fallocate(self.fd, _PUNCH, offset, length)


class DeviceRanges(FileRanges):
    """The space of a block device."""

    def _punch_hole(self, offset: int, length: int) -> None:
        # Works only if the device itself can zero, and then it may free the space.
        fallocate(self.fd, _PUNCH, offset, length)

    def _zero_range(self, offset: int, length: int) -> None:
        zero_device(self.fd, offset, length)

    def _free_range(self, offset: int, length: int) -> None:
        discard_device(self.fd, offset, length)
