"""What a run was made on, as far as it decides what the run finds."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_IDLE_DRIVER = Path("/sys/devices/system/cpu/cpuidle/current_driver")
_HALT_POLL = Path("/sys/module/haltpoll/parameters/guest_halt_poll_ns")
HALTPOLL = "haltpoll"
"""The kernel's driver for the idle processors of virtual machines."""


def describe() -> dict[str, str | int]:
    """The machine, by what each value is of; all are there, but empty where the kernel does not tell."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "idle": idle(),
    }


def idle() -> str:
    """How processors wait. What goes to and fro between two processes takes twice as long where a virtual machine's are
    halted at once, as it takes the hypervisor to wake each up."""
    driver = _read(_IDLE_DRIVER)
    nanoseconds = _read(_HALT_POLL)
    if driver != HALTPOLL or not nanoseconds:
        return driver
    return f"{driver} for {int(nanoseconds) // 1000} µs"


def summary() -> str:
    """The same, to be read."""
    about = describe()
    idle = f", idle by {about['idle']}" if about["idle"] else ""
    return f"Linux {about['kernel']}, Python {about['python']}, {about['cpus']} processors{idle}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
