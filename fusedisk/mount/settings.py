"""How a mount serves its files."""

from __future__ import annotations

import dataclasses
import enum


class Passthrough(enum.Enum):
    """Whether the kernel may access the host file of a plain raw disk directly."""

    OFF = "off"
    AUTO = "auto"
    """If that changes nothing but the speed."""
    ON = "on"
    """Even though a write past the end then makes the disk longer."""


@dataclasses.dataclass(slots=True)
class ServeSettings:
    """The user's settings for serving."""

    channel: bool = True
    """Data is answered past pyfuse3."""
    kernel_cache: bool = True
    """The kernel may keep in its page cache what cannot change without its knowledge."""
    passthrough: Passthrough = Passthrough.AUTO
    low_latency: bool = False
    """Processors stay awake while requests come close upon each other; takes root."""
