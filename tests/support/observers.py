"""An observer for tests that records its calls."""

from __future__ import annotations

from fusedisk.block.model.node import Node
from fusedisk.block.model.observer import Change, Observer


class Recorder(Observer):
    """Records each call as ``(kind, offset, length)``."""

    def __init__(self, *, before: bool = False, changes: bool = False, reads: bool = False) -> None:
        self.wants_before, self.wants_changes, self.wants_reads = before, changes, reads
        self.announced: list[tuple[Change, int, int]] = []
        self.changes: list[tuple[Change, int, int]] = []
        self.reads: list[tuple[int, int]] = []

    async def before_change(self, node: Node, offset: int, length: int, kind: Change) -> None:
        self.announced.append((kind, offset, length))

    def changed(self, node: Node, offset: int, length: int, kind: Change) -> None:
        self.changes.append((kind, offset, length))

    def read(self, node: Node, offset: int, length: int) -> None:
        self.reads.append((offset, length))
