"""How a mount serves its files."""

from __future__ import annotations

import dataclasses
import enum


class Passthrough(enum.Enum):
    """Whether the kernel may read and write the host file of a plain raw disk past us."""

    OFF = "off"
    AUTO = "auto"
    """Where that changes nothing but the speed."""
    ON = "on"
    """Although a write past the end makes the disk longer then."""


@dataclasses.dataclass(slots=True)
class ServeSettings:
    """What the user may choose about it."""

    channel: bool = True
    """Data is answered past pyfuse3."""
    kernel_cache: bool = True
    """The kernel may keep in its page cache what cannot change without its knowledge."""
    passthrough: Passthrough = Passthrough.AUTO
    low_latency: bool = False
    """Processors stay awake while requests come close upon each other; takes root."""
