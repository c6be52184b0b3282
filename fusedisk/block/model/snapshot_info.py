"""What an image tells of an internal snapshot."""

from __future__ import annotations

from typing import Any, NamedTuple


class SnapshotInfo(NamedTuple):
    """One internal snapshot."""

    id: str
    """Unique in the image. Bytes of ids and names that are not UTF-8 become surrogates, as in file names."""
    name: str
    """Need not be unique."""
    date: int
    """When it was made: nanoseconds since 1970 (UTC)."""
    vm_clock: int = 0
    """Nanoseconds for which the guest had run."""
    vm_state_size: int = 0
    """Bytes; 0 if it holds the disk only."""
    disk_size: int = 0
    """Bytes."""
    icount: int | None = None
    """Instructions that the guest had executed, if they were counted."""

    def information(self) -> dict[str, Any]:
        """Return the keys and values that ``qemu-img info --output=json`` prints."""
        information = {
            "vm-clock-nsec": self.vm_clock % 10**9,
            "name": _as_text(self.name),
            "date-sec": self.date // 10**9,
            "date-nsec": self.date % 10**9,
            "vm-clock-sec": self.vm_clock // 10**9,
            "id": _as_text(self.id),
            "vm-state-size": self.vm_state_size,
        }
        return information if self.icount is None else {"icount": self.icount} | information


def _as_text(name: str) -> str:
    """Return a name, which may hold any bytes, as valid text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
