"""Where the bytes of a guest range lie: the drivers' answers, on which the core acts.

Plain tuples: one is made for every lookup of the hot path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fusedisk.block.model.edge import Child

DATA = 0
"""The bytes lie in ``child`` at ``offset``."""
ZERO = 1
"""The range reads as zeroes; with a ``child`` the space at ``offset`` is reserved (preallocated zeroes)."""
UNALLOCATED = 2
"""This layer has nothing: the bytes come from the backing file, zeroes if there is none or it is shorter. With a
``child`` the space at ``offset`` is reserved, and block status reports that, as QEMU does."""
SPECIAL = 3
"""The driver must transform the bytes itself (``read_special``): compressed or encrypted clusters."""


class Extent(NamedTuple):
    """The answer of ``Driver.map``: a prefix of the asked range with one status.

    Valid only until the next ``await``, unless a tracked request holds the range: host space is freed and moved only
    by serialising requests over the guest range, so a reader or writer may rely on its extents while it is tracked.
    """

    status: int
    length: int
    """The number of bytes that this holds for; at least 1, at most the length asked for."""
    child: Child | None = None
    offset: int = 0
    """Byte offset in ``child``."""
    recurse: bool = False
    """Block status should ask ``child`` whether the bytes are a hole (raw files, preallocation)."""
    compressed: bool = False
    token: object = None
    """Private data of the driver for ``read_special``."""


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
    """Old guest bytes behind the range that share its last new cluster, clipped to the disk's end. The driver leaves
    the rest of the cluster as zeroes."""


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
    """Host offset of the bytes in ``filename``, if they are stored there verbatim."""
    filename: str | None = None
    compressed: bool = False
