"""Clusters that wait to be freed: memory has lost the references, but perhaps not the file."""

from __future__ import annotations

import enum
import logging
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from fusedisk.block.model.edge import Child
from fusedisk.block.request import space
from fusedisk.core.errors import FusediskError
from fusedisk.drivers.format.qcow2.changes import Kind
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, HostRun, compressed_references, plain_runs
from fusedisk.drivers.format.qcow2.image import Image

log = logging.getLogger(__name__)


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


class FreedClusters:
    """The queue of references that memory has lost, but perhaps not the file."""

    def __init__(self, image: Image, change_refcounts: Callable[[int, list[int]], Awaitable[list[HostRun]]]) -> None:
        """*change_refcounts* takes the first cluster and the changes from there on; it returns what dropped to zero."""
        self.image = image
        self.items: list[Freed | ExternalRange] = []
        self.clusters = 0
        """The number of clusters in ``items``."""
        self.pass_discard: frozenset[Reason] = frozenset()
        """The reasons of freeing for which the space is given back to the host."""
        self._change_refcounts = change_refcounts

    def add(
        self, runs: Sequence[HostRun], *, references: dict[int, int] | None = None, reason: Reason = Reason.OTHER
    ) -> None:
        """Lower refcounts once the file has lost the references: by one in ``runs``, and for single clusters by the
        numbers in ``references``, whose keys must be in ascending order.
        """
        discard = reason in self.pass_discard
        freed = [Freed(run.first, [-1] * run.clusters, discard) for run in runs]
        for cluster, count in (references or {}).items():
            if freed and freed[-1].first + len(freed[-1].deltas) == cluster:
                freed[-1].deltas.append(-count)
            else:
                freed.append(Freed(cluster, [-count], discard))
        self.items += freed
        self.clusters += sum(item.clusters for item in freed)
        if self.image.changes is not None:
            kind = Kind.FREED_DISCARD if discard else Kind.FREED
            for item in freed:
                self.image.changes.add(kind, item.first, array("q", item.deltas).tobytes())

    def add_entries(self, entries: Sequence[int], *, reason: Reason = Reason.OTHER) -> None:
        """Call :meth:`add` for the clusters that L2 entries refer to."""
        for entry in entries:
            if entry & COMPRESSED:
                self.image.inflated.drop(entry)
        geometry = self.image.geometry
        self.add(plain_runs(entries, geometry), references=compressed_references(entries, geometry), reason=reason)

    def add_external(self, item: ExternalRange) -> None:
        """Give a range of an external data file back to the host once the file has lost the references to it."""
        self.items.append(item)
        self.clusters += item.clusters

    def take(self) -> list[Freed | ExternalRange]:
        """Remove and return everything. Pass it to :meth:`drop` when the file has lost these references, or to
        :meth:`put_back` if that fails."""
        freed, self.items, self.clusters = self.items, [], 0
        return freed

    def put_back(self, freed: list[Freed | ExternalRange]) -> None:
        """Undo :meth:`take`."""
        self.items = freed + self.items
        self.clusters += sum(item.clusters for item in freed)

    async def drop(self, freed: list[Freed | ExternalRange]) -> None:
        """Lower the refcounts, after which the clusters can be allocated again. Under the mutex, so that nobody
        allocates them before the host has their space back.

        A failure leaks the clusters and is only logged, since the caller's work is done.
        """
        bits = self.image.geometry.cluster_bits
        for item in freed:
            try:
                await self.image.announce("cluster_free")
                if isinstance(item, ExternalRange):
                    for first, end in item.parts:
                        await space.discard(item.edge.node, first << bits, end - first << bits)
                    item.parts.clear()
                    continue
                for first, count, _ in await self._change_refcounts(item.first, item.deltas):
                    if item.discard:
                        await space.discard(self.image.storage.node, first << bits, count << bits)
            except FusediskError as exc:
                log.warning("%s: clusters are leaked: %s", self.image.filename, exc)
