"""Where guest data lies: in the image's own file, or in an external data file.

In the image's file clusters are allocated, and references to them are counted. In an external data file every guest
cluster lies at its own guest offset; nothing is counted, and there is no metadata.

Host offset 0 of a data file holds data like any other, while 0 in an L2 entry means unallocated. So in memory that one
entry is :data:`FIRST_CLUSTER` instead, a host offset that no data file has; the file has 0 and the COPIED flag.

Source: docs/interop/qcow2.txt, "External data file", "Standard Cluster Descriptor".
"""

from __future__ import annotations

import abc
from array import array
from collections.abc import Sequence

from fusedisk.block.model.children import Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.extent import Extent, WriteExtent
from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.errors import FusediskError, ImageError, OptionError
from fusedisk.drivers.format.qcow2.cluster import ClusterMap
from fusedisk.drivers.format.qcow2.entries import COMPRESSED, FIRST_CLUSTER, OFFSET_MASK, HostRun, plain_runs
from fusedisk.drivers.format.qcow2.freed import ExternalRange, Reason
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.layout import Header
from fusedisk.drivers.format.qcow2.refcount import Refcounts
from fusedisk.drivers.format.qcow2.subclusters import SubclusterMap


async def open_data_file(node: Node, header: Header) -> Child | None:
    """Return the child for guest data, None if that is ``file``. Raises OptionError, or what opening raises."""
    given = node.children.get("data-file")
    if not header.has_data_file:
        if given is not None:
            raise OptionError(f"'{node.filename}' has no external data file, but the option 'data-file' was given.")
        return None
    if given is not None:
        return given
    if node.graph.look_only:
        return None
    name = header.data_file_name
    if name is None:
        raise ImageError(
            f"'{node.filename}' has an external data file and does not name it: give the option 'data-file'."
        )
    try:
        return await node.graph.open_child(node, "data-file", Role.DATA_FILE, name, implicit=True)
    except FusediskError as exc:
        exc.message = f"the data file of '{node.filename}' cannot be opened: {exc.message}"
        raise


class Space(abc.ABC):
    """Host clusters for guest data, by number. All under the image's mutex but :meth:`return_unused`."""

    edge: Child

    @abc.abstractmethod
    async def allocate(self, guest_cluster: int, count: int) -> HostRun:
        """Allocate adjacent clusters for the guest's from ``guest_cluster`` on: at least one, at most ``count``."""

    @abc.abstractmethod
    def allocate_now(self, guest_cluster: int, count: int) -> HostRun | None:
        """Do the same without waiting; None if that is not possible."""

    @abc.abstractmethod
    def return_unused(self, run: HostRun) -> None:
        """Take back unused clusters from :meth:`allocate`."""

    @abc.abstractmethod
    async def refcount(self, cluster: int) -> int:
        """Return how many L2 entries refer to a cluster."""

    @abc.abstractmethod
    def free_entries(self, entries: Sequence[int], *, reason: Reason = Reason.OTHER) -> None:
        """Release the clusters that removed L2 entries referred to."""

    @abc.abstractmethod
    async def zero(self, offset: int, length: int) -> None:
        """Fill clusters to which nothing refers with zeroes, unless they hold zeroes already."""

    def place(self, offset: int) -> int:
        """Turn an L2 entry's offset into the host offset."""
        return offset


class OwnSpace(Space):
    """The image's own file."""

    def __init__(self, image: Image, refcounts: Refcounts) -> None:
        self.edge = image.storage
        self._image = image
        self._refcounts = refcounts

    async def allocate(self, guest_cluster: int, count: int) -> HostRun:
        return await self._refcounts.allocate(count)

    def allocate_now(self, guest_cluster: int, count: int) -> HostRun | None:
        return self._refcounts.allocate_now(count)

    def return_unused(self, run: HostRun) -> None:
        self._refcounts.return_unused(run)

    async def refcount(self, cluster: int) -> int:
        return await self._refcounts.get(cluster)

    def free_entries(self, entries: Sequence[int], *, reason: Reason = Reason.OTHER) -> None:
        self._refcounts.freed.add_entries(entries, reason=reason)

    async def zero(self, offset: int, length: int) -> None:
        await self._image.zero_host(offset, length)


class ExternalSpace(Space):
    """An external data file."""

    def __init__(self, image: Image, refcounts: Refcounts, edge: Child) -> None:
        self.edge = edge
        self._geometry = image.geometry
        self._bits = image.geometry.cluster_bits
        self._refcounts = refcounts
        self._given_up: list[ExternalRange] = []
        """Ranges that will be discarded, unless they are used again before."""

    async def allocate(self, guest_cluster: int, count: int) -> HostRun:
        return self.allocate_now(guest_cluster, count)

    def allocate_now(self, guest_cluster: int, count: int) -> HostRun:
        self._given_up = [item for item in self._given_up if item.parts]
        for item in self._given_up:
            item.take_back(guest_cluster, guest_cluster + count)
        fresh = not self._refcounts.encrypted and guest_cluster << self._bits >= self.edge.node.length
        if not guest_cluster:
            return HostRun(FIRST_CLUSTER >> self._bits, 1, fresh)
        return HostRun(guest_cluster, count, fresh)

    def return_unused(self, run: HostRun) -> None:
        """Do nothing: every cluster has its fixed offset, used or not."""

    async def refcount(self, cluster: int) -> int:
        return 1

    def free_entries(self, entries: Sequence[int], *, reason: Reason = Reason.OTHER) -> None:
        if reason in self._refcounts.freed.pass_discard:
            for run in plain_runs(entries, self._geometry):
                first = self.place(run.first << self._bits) >> self._bits
                item = ExternalRange(self.edge, first, run.clusters)
                self._given_up.append(item)
                self._refcounts.freed.add_external(item)

    async def zero(self, offset: int, length: int) -> None:
        # Bytes behind the file's end read as zeroes anyway.
        offset = self.place(offset)
        length = min(length, self.edge.node.length - offset)
        if length > 0:
            await io.write_zeroes(self.edge.node, offset, length)

    def place(self, offset: int) -> int:
        return offset & (FIRST_CLUSTER - 1)


class _NoMetadata:
    """Tells the overlap checks that a data file holds no metadata."""

    fixed_end = 0
    scattered: array[int] = array("Q")
    l2_places: array[int] = array("Q")

    def occupied_at(self, start: int, length: int) -> str | None:
        return None

    def fixed_at(self, start: int, length: int) -> str | None:
        return None


class _ExternalMap(ClusterMap):
    """A mapping whose clusters lie in a data file, at their own guest offsets."""

    def use(self, edge: Child) -> None:
        """Set the edge to the data file."""
        self.edge = edge
        self.guard = _NoMetadata()

    def lookup(self, offset: int, length: int) -> Extent | None:
        extent = super().lookup(offset, length)
        if extent is None or extent.child is None:
            return extent
        if extent.offset & (FIRST_CLUSTER - 1) != offset or extent.compressed:
            return None
        return extent._replace(offset=offset)

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent | None:
        extent = super().lookup_in_place(offset, length)
        if extent is None or extent.offset & (FIRST_CLUSTER - 1) != offset:
            return None
        return extent._replace(offset=offset)

    async def check_entry(self, offset: int) -> None:
        await super().check_entry(offset)
        table = self._tables.get(self._l1[offset >> self._span_bits] & OFFSET_MASK)
        if table is None:
            return
        entry = table[(offset >> self._cluster_bits & self._l2_mask) * self.image.geometry.entry_words]
        guest = offset & ~self._cluster_mask
        if entry & COMPRESSED:
            raise await self.image.mark_corrupt(
                f"the L2 entry for guest offset {guest} is compressed, which nothing in an external data file can be"
            )
        host = entry & OFFSET_MASK
        if host and host & (FIRST_CLUSTER - 1) != guest:
            raise await self.image.mark_corrupt(
                f"the L2 entry for guest offset {guest} leads to {host} in the external data file, expected the same "
                "offset"
            )


class ExternalClusterMap(_ExternalMap):
    """Plain L2 entries that lead into a data file."""


class ExternalSubclusterMap(_ExternalMap, SubclusterMap):
    """Extended L2 entries that lead into a data file."""
