"""Counters of a user of the graph, by kind of request."""

from __future__ import annotations

import enum


class Kind(enum.Enum):
    """What a request does, for counting, throttling and error policies."""

    READ = "read"
    WRITE = "write"
    ZEROES = "zeroes"
    DISCARD = "discard"
    FLUSH = "flush"
    OTHER = "other"
    """Moves none of the guest's data: resize, snapshots, block status. Not counted, throttled or left to a policy."""


_READ, _WRITE, _ZEROES, _DISCARD, _FLUSH = Kind.READ, Kind.WRITE, Kind.ZEROES, Kind.DISCARD, Kind.FLUSH
"""A global is found faster than a member of an enum."""


class Accounting:
    """Counts the answered operations, their bytes and the failures of a backend."""

    __slots__ = (
        "bytes_discarded",
        "bytes_read",
        "bytes_written",
        "bytes_zeroed",
        "discards",
        "failed",
        "flushes",
        "reads",
        "writes",
        "zeroes",
    )

    def __init__(self) -> None:
        self.reads = self.bytes_read = 0
        self.writes = self.bytes_written = 0
        self.zeroes = self.bytes_zeroed = 0
        self.discards = self.bytes_discarded = 0
        self.flushes = self.failed = 0

    def done(self, kind: Kind, length: int) -> None:
        """Count an answered request. The short ways count their own."""
        if kind is _READ:
            self.reads += 1
            self.bytes_read += length
        elif kind is _WRITE:
            self.writes += 1
            self.bytes_written += length
        elif kind is _ZEROES:
            self.zeroes += 1
            self.bytes_zeroed += length
        elif kind is _DISCARD:
            self.discards += 1
            self.bytes_discarded += length
        elif kind is _FLUSH:
            self.flushes += 1
