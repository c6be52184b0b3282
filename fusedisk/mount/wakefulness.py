"""Keeping the machine's processors from sleeping while a mount is busy, for who asked for that.

Who reads one block after the other makes the processors take turns: whoever waits sleeps until the other is done, and a
processor with nothing to do sleeps, too. Waking one up takes microseconds, and in a virtual machine the hypervisor:
more than a request takes. The kernel lets root say how long that may take (power management quality of service,
``/dev/cpu_dma_latency``, Documentation/power/pm_qos_interface.rst), for as long as the file is open. It holds for the
whole machine and costs its power, so it is said only while requests come close upon each other.
"""

from __future__ import annotations

import logging
import os
import struct

import trio

from fusedisk.core.errors import HostError

log = logging.getLogger(__name__)

DEVICE = "/dev/cpu_dma_latency"
_IDLE_DRIVER = "/sys/devices/system/cpu/cpuidle/current_driver"
_LATENCY = struct.Struct("=i")
"""Microseconds."""
_ANY = 2_000_000_000
"""What the kernel takes where nobody wants anything."""
_LIGHTEST = 2
"""What the lightest sleep of a processor takes, which costs next to no power."""
_NONE = 0
"""No sleep at all: idle processors spin. In a virtual machine the lightest one takes the hypervisor already."""
_LINGER = 0.05
"""Seconds after the last request for which processors stay awake, at least; twice that at most."""


class Wakefulness:
    """What one mount wants of the processors."""

    def __init__(self) -> None:
        """Wants nothing yet. Raises HostError where we may not want anything."""
        try:
            self._file = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise HostError(
                f"'{DEVICE}' could not be opened for writing, which --low-latency takes: {exc.strerror}. "
                "Mount as root, or without it.",
                errno=exc.errno,
            ) from exc
        self._wanted = _NONE if _is_virtual() else _LIGHTEST
        self._awake = False
        self._used = False
        self._begun = trio.Event()

    def close(self) -> None:
        """Want nothing any more."""
        os.close(self._file)

    def busy(self) -> None:
        """Requests come close upon each other."""
        self._used = True
        if not self._awake:
            self._awake = True
            self._want(self._wanted)
            self._begun.set()

    async def run(self) -> None:
        """Let processors sleep again, whenever nothing has come for a while."""
        while True:
            await self._begun.wait()
            while self._used:
                self._used = False
                await trio.sleep(_LINGER)
            self._begun = trio.Event()
            self._awake = False
            self._want(_ANY)

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
