"""Compressed clusters: where their data lies, raw deflate with a window of 4 KiB or zstd.

Reading them is :mod:`fusedisk.drivers.format.compressed_pieces`; the key of a piece is its L2 entry.

Source: docs/interop/qcow2.txt, "Compressed Clusters Descriptor" and "Compression type".
"""

from __future__ import annotations

from collections.abc import Iterable

from fusedisk.block.model.node import Node
from fusedisk.core.errors import CorruptImageError
from fusedisk.drivers.format.compressed_pieces import CompressedPieces
from fusedisk.drivers.format.inflating import Where
from fusedisk.drivers.format.qcow2.cluster import ClusterMap
from fusedisk.drivers.format.qcow2.layout import COMPRESSION_NAMES

WINDOW_BITS = -12
_CODECS = {0: "deflate-4k", 1: "zstd"}
assert _CODECS.keys() == COMPRESSION_NAMES.keys()


class CompressedClusters:
    """The source of one image's compressed clusters, see :class:`~fusedisk.drivers.format.compressed_pieces.Source`."""

    def __init__(self, clusters: ClusterMap) -> None:
        self.image = clusters.image
        self.size = self.image.geometry.cluster_size
        self.codec = _CODECS[self.image.header.compression_type]
        self.place = self.image.geometry.compressed_range
        self.lookup = clusters.lookup

    @property
    def storage(self) -> Node:
        """The file of the image."""
        return self.image.storage.node

    @property
    def length(self) -> int:
        """The length that the header has: it may be less than the node's already."""
        return self.image.header.size

    def places(self, keys: Iterable[int]) -> list[Where]:
        """Return host offset, length and entry of each cluster's data."""
        return self.image.geometry.compressed_ranges(keys)

    async def read(self, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from a host offset on."""
        await self.image.announce("read_compressed")
        await self.image.read_into(start, buffer)

    def damaged(self, offset: int, reason: str) -> CorruptImageError:
        """Return the error for the cluster at a guest offset."""
        return CorruptImageError(
            f"'{self.image.filename}' has a compressed cluster for guest offset {offset} that does not inflate to "
            f"{self.size} bytes ({reason})."
        )


def compressed_reader(node: Node, clusters: ClusterMap) -> CompressedPieces:
    """Return the reader of one image's compressed clusters."""
    return CompressedPieces(node, CompressedClusters(clusters), clusters.image.inflated)
