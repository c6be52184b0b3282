"""What a node can take in one request, and how its requests must be aligned."""

from __future__ import annotations


class Limits:
    """Limits of one node, in bytes. Drivers fill them in ``refresh_limits``; the request path obeys.

    They are those of QEMU's ``BlockLimits`` (block_int-common.h).
    """

    __slots__ = (
        "cluster_size",
        "discard_alignment",
        "length_unit",
        "max_discard",
        "max_transfer",
        "max_write_zeroes",
        "memory_alignment",
        "request_alignment",
        "zeroes_alignment",
    )

    def __init__(self) -> None:
        self.request_alignment = 1
        """Every read and write the driver sees starts and ends on this; the core does the rest by
        read-modify-write. A power of two."""
        self.memory_alignment = 1
        """Buffers should start on this (O_DIRECT); for others a driver makes a copy."""
        self.max_transfer = 1 << 30
        """The most bytes in one read or write."""
        self.zeroes_alignment = 1
        """``write_zeroes`` reaches the driver for whole units of this only; the core writes the edges."""
        self.max_write_zeroes = 1 << 40
        self.discard_alignment = 1
        """Discards are narrowed to whole units of this; the edges are dropped."""
        self.max_discard = 1 << 40
        self.cluster_size = 0
        """The format's unit of allocation, 0 if there is none. Serialising requests and copy-on-read widen to it."""
        self.length_unit = 1
        """A new length of the node must be a multiple of this."""
