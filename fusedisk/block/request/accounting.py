"""Counters of a user of the graph."""

from __future__ import annotations


class Accounting:
    """Counts the operations, bytes and failures of a backend."""

    __slots__ = ("bytes_read", "bytes_written", "discards", "failed", "flushes", "reads", "writes", "zeroes")

    def __init__(self) -> None:
        self.reads = self.bytes_read = 0
        self.writes = self.bytes_written = 0
        self.zeroes = self.discards = self.flushes = self.failed = 0
