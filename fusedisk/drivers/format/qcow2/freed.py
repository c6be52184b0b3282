"""Clusters that wait to be freed: memory has lost the references, but perhaps not the file."""

from __future__ import annotations

import enum
from typing import NamedTuple

from fusedisk.block.model.edge import Child


class Reason(enum.Enum):
    """Why references go; decides whether the host gets its space back (the pass-discard options)."""

    REQUEST = "request"
    """The guest discarded the data."""
    SNAPSHOT = "snapshot"
    """A snapshot was deleted or applied."""
    OTHER = "other"
    """Something else took its place."""


class Freed(NamedTuple):
    """References that are gone."""

    first: int
    """First host cluster, by number."""
    deltas: list[int]
    """The changes of the refcounts from there on; negative."""
    discard: bool
    """Whether the host space may go with the last reference."""

    @property
    def clusters(self) -> int:
        """How many clusters it is about."""
        return len(self.deltas)


class ExternalRange:
    """A range of an external data file that nothing refers to any more."""

    def __init__(self, edge: Child, first: int, clusters: int) -> None:
        self.edge = edge
        self.parts = [(first, first + clusters)]
        """Clusters by number, each as the first and the one behind the last."""

    @property
    def clusters(self) -> int:
        """How many clusters it is about."""
        return sum(end - first for first, end in self.parts)

    def take_back(self, first: int, end: int) -> None:
        """These clusters are used again."""
        parts = self.parts
        self.parts = [(low, min(high, first)) for low, high in parts if low < first]
        self.parts += [(max(low, end), high) for low, high in parts if high > end]
