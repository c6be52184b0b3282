"""Files that the kernel reads and writes past us, at the speed of the host file below (Linux 6.9, root).

An open file that is passed through stays so until it is closed, since the kernel has no way to end that. So a node
that has such files open lets nobody come between (operation ``replace``), and whether it is eligible is looked at
whenever its file is opened and nobody has it open yet: all handles of a file must be of one kind.

What the kernel does with the host file we do not see. Sizes, times and what there is to flush are therefore looked at
as if there had been writes. A write past the end would make the host file longer whatever we say, so a disk that may
not grow is passed through for writing only if the user asked for exactly that.
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
    """The host file of one export, as the kernel knows it."""

    __slots__ = ("handles", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.handles = 0


class PassedThrough:
    """The files of one mount that the kernel serves itself."""

    def __init__(self, device: int, mode: Passthrough) -> None:
        self._device = device
        self._mode = mode
        self._backings: dict[Export, _Backing] = {}
        self._others: dict[Export, int] = {}
        """How many handles there are that are not passed through."""

    def opened(self, export: Export) -> int:
        """A handle of ``export`` is being opened; returns the number of the kernel's backing file for it, 0 to serve
        it ourselves."""
        backing = self._backings.get(export)
        if backing is None and not self._others.get(export):
            backing = self._begin(export)
        if backing is None:
            self._others[export] = self._others.get(export, 0) + 1
            return 0
        backing.handles += 1
        return backing.number

    def closed(self, export: Export, number: int) -> None:
        """A handle that was opened with this number is closed."""
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
            log.error("the kernel did not let go of the file of '%s': %s", export.name, exc.strerror)

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
