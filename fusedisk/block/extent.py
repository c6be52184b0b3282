"""Where the bytes of a guest range lie: what drivers answer and the core acts on.

Plain tuples: one is made for every lookup of the hot path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fusedisk.block.child import Child

DATA = 0
"""The bytes lie in ``child`` at ``offset``."""
ZERO = 1
"""The range reads as zeroes; with a ``child`` the space at ``offset`` is reserved (preallocated zeroes)."""
UNALLOCATED = 2
"""This layer has nothing: look in the backing file, zeroes where there is none or it is shorter. With a ``child`` the
space at ``offset`` is reserved, and block status tells so, as QEMU does."""
SPECIAL = 3
"""The driver must transform the bytes itself (``read_special``): compressed or encrypted clusters."""


class Extent(NamedTuple):
    """The answer of ``Driver.map``: a prefix of the asked range with one status.

    Valid only until the next ``await`` unless the range is held by a tracked request: whoever frees or moves
    host space does it from a serialising request over the guest range, so a tracked reader or writer may rely
    on its extents while it is tracked.
    """

    status: int
    length: int
    """Bytes from the asked offset that this holds for; at least 1, at most what was asked."""
    child: Child | None = None
    offset: int = 0
    """Byte offset in ``child``."""
    recurse: bool = False
    """Block status should ask ``child`` whether the bytes are a hole there (raw files, preallocation)."""
    compressed: bool = False
    token: object = None
    """The driver's own, for ``read_special``."""


class WriteExtent(NamedTuple):
    """The answer of ``Driver.map_write``: where to put a prefix of the asked range.

    The core writes ``copy_head`` old bytes, the caller's bytes and ``copy_tail`` old bytes in one go at
    ``offset - copy_head`` of ``child``. Then, if ``allocation`` is not None, it calls ``publish(allocation)``;
    if anything failed before, ``abandon(allocation)``.
    """

    length: int
    child: Child
    offset: int
    """Byte offset in ``child`` of the first of the caller's bytes."""
    allocation: object = None
    copy_head: int = 0
    """Old guest bytes in front of the range that share its first new cluster."""
    copy_tail: int = 0
    """Old guest bytes behind the range that share its last new cluster (clipped to the disk's end: the rest of the
    cluster is the driver's to leave as zeroes)."""


class BlockStatus(NamedTuple):
    """Status of a guest range as ``qemu-img map`` reports it, from one node or along its chain."""

    length: int
    data: bool
    zero: bool
    allocated: bool
    """Some layer of the asked part of the chain holds this range (the *present* of ``map``)."""
    depth: int = 0
    """How many backing steps below the asked node the answer comes from."""
    offset: int | None = None
    """Host offset in ``filename`` where the bytes lie, if they lie there verbatim."""
    filename: str | None = None
    compressed: bool = False
