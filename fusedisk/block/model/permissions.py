"""Permissions on edges: what a parent needs of a node and what it lets others do meanwhile.

Bits as QEMU numbers them, since the image locks carry them between processes.
"""

from __future__ import annotations

CONSISTENT_READ = 1
"""Reads see data that makes sense (not an intermediate state of somebody's job)."""
WRITE = 2
"""Change the visible data."""
WRITE_UNCHANGED = 4
"""Write what reads the same afterwards (copy-on-read, stream)."""
RESIZE = 8
"""Change the length."""

ALL = CONSISTENT_READ | WRITE | WRITE_UNCHANGED | RESIZE

NAMES = {
    CONSISTENT_READ: "consistent read",
    WRITE: "write",
    WRITE_UNCHANGED: "write unchanged",
    RESIZE: "resize",
}


def names(permissions: int) -> str:
    """``write, resize`` for messages."""
    return ", ".join(name for bit, name in NAMES.items() if permissions & bit)


def of_backing(perm: int, shared: int) -> tuple[int, int]:
    """Return what an overlay needs of its backing file and shares there, see ``Driver.child_permissions``."""
    share = CONSISTENT_READ | WRITE_UNCHANGED
    if shared & WRITE:
        share |= WRITE | RESIZE
    return perm & CONSISTENT_READ, share
