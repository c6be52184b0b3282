"""``--low-latency``: keeps the machine's processors awake while a mount is busy.

A client that reads one block after the other and the daemon take turns: while one works the other sleeps, and so does
its processor. Waking a processor up takes microseconds, in a virtual machine a trip through the hypervisor: more than
a request takes. The kernel lets root limit that latency (power management quality of service,
``/dev/cpu_dma_latency``, Documentation/power/pm_qos_interface.rst) for as long as a file is open. The limit applies to
the whole machine and costs power, so it is set only while requests follow each other closely.
"""

from __future__ import annotations

import logging
import os
import struct

import trio

from fusedisk.core.errors import HostError
from fusedisk.core.locks import Signal

log = logging.getLogger(__name__)

DEVICE = "/dev/cpu_dma_latency"
_IDLE_DRIVER = "/sys/devices/system/cpu/cpuidle/current_driver"
_LATENCY = struct.Struct("=i")
"""Microseconds."""
_NO_LIMIT = 2_000_000_000
"""No limit: the kernel's default."""
_LIGHT_SLEEP = 2
"""Allows only the lightest sleep of a processor, which saves little power."""
_NEVER_SLEEP = 0
"""No sleep at all: idle processors spin. In a virtual machine even the lightest sleep traps into the hypervisor."""
_LINGER = 0.05
"""Processors stay awake for one to two times this many seconds after the last request."""


class Wakefulness:
    """The latency limit of one mount."""

    def __init__(self) -> None:
        """Open the device, without a limit yet. Raises HostError if that is not permitted."""
        try:
            self._file = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise HostError(
                f"'{DEVICE}' could not be opened for writing, which --low-latency takes: {exc.strerror}. "
                "Mount as root, or without it.",
                errno=exc.errno,
            ) from exc
        self._wanted = _NEVER_SLEEP if _is_virtual() else _LIGHT_SLEEP
        self._awake = False
        self._used = False
        self._begun = Signal()

    def close(self) -> None:
        """Close the device, which ends the limit."""
        os.close(self._file)

    def busy(self) -> None:
        """Note that requests follow each other closely."""
        self._used = True
        if not self._awake:
            self._awake = True
            self._want(self._wanted)
            self._begun.notify()

    async def run(self) -> None:
        """Lift the limit whenever no request has come for a while. Never returns."""
        while True:
            await self._begun.wait()
            while self._used:
                self._used = False
                await trio.sleep(_LINGER)
            self._awake = False
            self._want(_NO_LIMIT)

    def _want(self, latency: int) -> None:
        try:
            os.write(self._file, _LATENCY.pack(latency))
        except OSError as exc:
            log.warning("processors may sleep, as writing to '%s' failed: %s", DEVICE, exc.strerror)


def _is_virtual() -> bool:
    """Whether idle processors are halted by the hypervisor, as the kernel's driver for guests does it."""
    try:
        with open(_IDLE_DRIVER) as file:
            return file.read().strip() == "haltpoll"
    except OSError:
        return False
