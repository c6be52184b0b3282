"""What the door checks before a request changes a node, as far as no data must be read for that."""

from __future__ import annotations

from fusedisk.block.model import permissions
from fusedisk.block.model.flags import UNCHANGED
from fusedisk.block.model.node import Node
from fusedisk.block.model.tracked import Request
from fusedisk.core.errors import (
    CorruptImageError,
    NoMediumError,
    OutOfRangeError,
    PermissionConflictError,
    ReadOnlyError,
)

PROBE_SIZE = 512
"""Bytes at the start of an image that decide its format (the header's BLOCK_PROBE_BUF_SIZE)."""


def check_writable(node: Node, flags: int = 0) -> None:
    """Raise an error if the node does not accept writes. ``flags``: UNCHANGED, or 0."""
    if node.closed:
        raise NoMediumError(f"Node '{node.name}' is closed.")
    if node.fenced is not None:
        raise CorruptImageError(f"'{node.filename}' accepts no writes since corruption was found: {node.fenced}")
    if node.config.read_only:
        raise ReadOnlyError(f"'{node.filename}' is open read-only, a write needs it writable.")
    wanted = permissions.WRITE | permissions.WRITE_UNCHANGED if flags & UNCHANGED else permissions.WRITE
    if not node.perm & wanted:
        raise PermissionConflictError(f"No user of node '{node.name}' has asked for the write permission.")


def check_end(node: Node, end: int, what: str, *, also_files: bool = False) -> None:
    """Raise OutOfRangeError if ``what`` goes past the node's end. Call it before a request waits for others and again
    afterwards, since they may have made the node shorter. Files grow, so they pass, unless ``also_files``."""
    if end > node.length and (also_files or not (node.driver.moves_bytes or node.driver.is_filter)):
        raise OutOfRangeError(f"{what} up to {end} goes past the end of '{node.filename}' at {node.length}.")


def guarding_request(end: int, align: int) -> Request:
    """Return the request for a change of the probed bytes. It covers all of them, so that no other request changes
    them meanwhile."""
    return Request(0, (max(end, PROBE_SIZE) + align - 1) & -align, True, serialising=True)
