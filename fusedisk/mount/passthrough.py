"""FUSE passthrough: the kernel accesses the host file of a disk directly, bypassing the daemon (Linux 6.9, root).

A file that is passed through stays so until it is closed, since the kernel cannot end that earlier. So nothing can be
inserted above a node with such files (operation ``replace`` is blocked). Whether an export is eligible is decided when
its first handle is opened: all handles of a file must be of one kind.

We do not see what the kernel does with the host file, so for size, times and flushing we assume that there were writes.
A write past the end would make the host file longer without asking us, so a disk that may not grow is passed through
for writing only if the user asked for exactly that.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import struct

from fusedisk.export.export import Export
from fusedisk.mount.settings import Passthrough

log = logging.getLogger(__name__)

_OPEN_IOCTL = 0x4010E501
_CLOSE_IOCTL = 0x4004E502
_MAP = struct.Struct("=iIQ")
"""Descriptor, flags, padding."""
_NUMBER = struct.Struct("=I")


class _Backing:
    """The kernel's registration of one export's host file."""

    __slots__ = ("handles", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.handles = 0


class PassedThrough:
    """The files of one mount that the kernel accesses directly."""

    def __init__(self, device: int, mode: Passthrough) -> None:
        self._device = device
        self._mode = mode
        self._backings: dict[Export, _Backing] = {}
        self._others: dict[Export, int] = {}
        """The number of open handles that are not passed through."""

    def handle_opened(self, export: Export) -> int:
        """Handle the opening of a file. Returns the number of the kernel's backing file for it, 0 if we serve it."""
        backing = self._backings.get(export)
        if backing is None and not self._others.get(export):
            backing = self._begin(export)
        if backing is None:
            self._others[export] = self._others.get(export, 0) + 1
            return 0
        backing.handles += 1
        return backing.number

    def handle_closed(self, export: Export, number: int) -> None:
        """Handle the closing of a handle that was opened with this number."""
        if not number:
            self._others[export] -= 1
            return
        backing = self._backings[export]
        backing.handles -= 1
        if backing.handles:
            return
        del self._backings[export]
        export.end_passthrough()
        try:
            fcntl.ioctl(self._device, _CLOSE_IOCTL, _NUMBER.pack(number))
        except OSError as exc:
            log.error("the kernel did not release the file of '%s': %s", export.name, exc.strerror)

    def forget(self, export: Export) -> None:
        """Forget the handles of a file that was removed, none of which was passed through."""
        self._others.pop(export, None)

    def _begin(self, export: Export) -> _Backing | None:
        if self._mode is Passthrough.OFF:
            return None
        descriptor = export.passthrough_descriptor(may_grow=self._mode is Passthrough.ON)
        if descriptor is None:
            return None
        try:
            number = fcntl.ioctl(self._device, _OPEN_IOCTL, bytearray(_MAP.pack(descriptor, 0, 0)), True)
        except OSError as exc:
            # EPERM: not root. ELOOP, EOPNOTSUPP: a file on a stacked filesystem.
            log.log(
                logging.DEBUG if exc.errno == errno.EPERM else logging.WARNING,
                "'%s' is not passed through to its file: %s",
                export.name,
                exc.strerror,
            )
            return None
        export.begin_passthrough()
        self._backings[export] = backing = _Backing(number)
        return backing
