"""Compressed clusters: raw deflate with a window of 4 KiB, or zstd.

Reading them is :mod:`fusedisk.drivers.format.compressed_pieces`, for which the key of a piece is its L2 entry.

Writing
-------
Each guest cluster is compressed on its own, and the results are packed into host clusters byte by byte: one starts
where the last one ended, and goes on in the next host cluster where that is the neighbour. Every host cluster that one
touches counts one reference for it. What does not get shorter is written as it is, and what is all zeroes becomes a
zero cluster.

Concurrent requests: the caller's request is serialised against all others over its clusters, so what they had may be
freed. Several clusters are on their way at once; each holds its references to host clusters from the moment it has a
place, so a place is nobody else's, and written before an L2 entry leads there. Clusters of up to 8 KiB are compressed
inline: a trip to a worker thread takes longer than the 70 microseconds that zlib needs.

Source: docs/interop/qcow2.txt, "Compressed Clusters Descriptor" and "Compression type".
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Awaitable, Callable, Iterable

import trio

from fusedisk.block.model.node import Node
from fusedisk.block.request import transfer
from fusedisk.core.errors import CorruptImageError, FusediskError, NotSupportedError
from fusedisk.core.offload import run_cpu
from fusedisk.core.zeroes import is_zero
from fusedisk.drivers.format.compressed_pieces import CompressedPieces
from fusedisk.drivers.format.inflating import Where
from fusedisk.drivers.format.qcow2.allocation import Allocator
from fusedisk.drivers.format.qcow2.cluster import ClusterMap
from fusedisk.drivers.format.qcow2.entries import COMPRESSED
from fusedisk.drivers.format.qcow2.layout import COMPRESSION_NAMES, EXTERNAL_DATA, SECTOR

_CODECS = {0: "deflate-4k", 1: "zstd"}
assert _CODECS.keys() == COMPRESSION_NAMES.keys()
INLINE_SIZE = 8 << 10
"""Clusters up to this size are compressed in the trio thread."""

_WINDOW_BITS = 12
_MEMORY_LEVEL = 9
_ZSTD_LEVEL = 3

Deflate = Callable[[bytes | memoryview], bytes]
Zero = Callable[[int, int], Awaitable[None]]
"""Makes clusters, by offset and length, read as zeroes; raises NotSupportedError where the image has no way."""


# --- reading -----------------------------------------------------------------------------------------


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


# --- writing -----------------------------------------------------------------------------------------


class CompressedWriter:
    """Compresses clusters of one writable image. Raises NotSupportedError for those that can have none."""

    def __init__(self, node: Node, allocator: Allocator, zero: Zero) -> None:
        header, filename = allocator.image.header, allocator.image.filename
        if header.crypt_method or header.incompatible_features & EXTERNAL_DATA:
            what = "is encrypted" if header.crypt_method else "has an external data file"
            raise NotSupportedError(f"'{filename}' {what}, so nothing in it can be compressed.")
        self.node = node
        self.allocator = allocator
        self.image = allocator.image
        self.refcounts = allocator.refcounts
        self._zero = zero
        self._deflate = _DEFLATERS[self.image.header.compression_type]()
        self._next = 0
        """Host offset behind what was placed last, as long as its cluster is :attr:`Refcounts.open_cluster`."""

    async def write(self, offset: int, data: memoryview) -> None:
        """Write whole clusters, or up to the disk's end. Raises the first error, after which no more clusters are
        begun; those that failed are as before."""
        size = self.image.geometry.cluster_size
        if len(data) <= size:
            await self._write_cluster(offset, data)
            return
        starts = iter(range(0, len(data), size))
        errors: list[FusediskError] = []

        async def work() -> None:
            for start in starts:
                if errors:
                    return
                try:
                    await self._write_cluster(offset + start, data[start : start + size])
                except FusediskError as exc:
                    errors.append(exc)
                # Small clusters are compressed without a trip to the scheduler.
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for _ in range(min(len(os.sched_getaffinity(0)) + 1, -(-len(data) // size))):
                nursery.start_soon(work)
        if errors:
            raise errors[0]

    async def _write_cluster(self, offset: int, data: memoryview) -> None:
        if is_zero(data):
            try:
                await self._zero(offset, len(data))
                return
            except NotSupportedError:
                pass  # version 2 over a backing file
        size = self.image.geometry.cluster_size
        content = data if len(data) == size else bytes(data).ljust(size, b"\0")
        packed = self._deflate(content) if size <= INLINE_SIZE else await run_cpu(self._deflate, content)
        place = await self._place(offset, len(packed)) if len(packed) < size else None
        if place is None:
            await transfer.write(self.node, offset, (data,), 0)
            return
        entry = self._entry(place, len(packed))
        try:
            await self.image.announce("write_compressed")
            await self.image.put_bytes(place, packed)
            with trio.CancelScope(shield=True):
                await self.image.announce("l2_update_compressed")
                words = (entry, 0) if self.image.geometry.extended_l2 else (entry,)
                await self.allocator.replace(offset, array("Q", words))
        except BaseException:
            self._give_up(place, len(packed))
            raise

    def _give_up(self, place: int, length: int) -> None:
        """Drop the references of a place that nothing leads to; it is not given out again."""
        bits = self.image.geometry.cluster_bits
        touched = range(place >> bits, (place + length - 1 >> bits) + 1)
        self.refcounts.freed.add((), references=dict.fromkeys(touched, 1))

    def _entry(self, place: int, length: int) -> int:
        """The descriptor of compressed data."""
        sectors = (place + length - 1) // SECTOR - place // SECTOR
        return COMPRESSED | sectors << self.image.geometry.compressed_size_shift | place

    async def _place(self, offset: int, length: int) -> int | None:
        """A host offset for the ``length`` bytes, less than a cluster, that a guest cluster was compressed to, with
        references counted; None where the file is so long that no descriptor leads to its end."""
        await self.allocator.committer.relieve()
        async with self.image.mutex:
            await self.allocator.replaceable(offset)
            await self.image.announce("cluster_alloc_bytes")
            place = await self._find_place(length)
            end = place + length
            if end > self.image.geometry.compressed_offset_mask:
                self._give_up(place, length)
                return None
            self._next = end
            self.refcounts.open_cluster = (end - 1) >> self.image.geometry.cluster_bits
            return place

    async def _find_place(self, length: int) -> int:
        geometry, refcounts = self.image.geometry, self.refcounts
        cluster = refcounts.open_cluster
        room = -self._next & geometry.cluster_mask
        if cluster < 0 or not room or await refcounts.get(cluster) >= refcounts.codec.maximum:
            return (await refcounts.allocate(1)).first << geometry.cluster_bits
        if length <= room:
            await refcounts.add(cluster, [1])
            return self._next
        run = await refcounts.allocate(1)
        if run.first != cluster + 1:
            return run.first << geometry.cluster_bits
        try:
            await refcounts.add(cluster, [1])
        except BaseException:
            refcounts.return_unused(run)
            raise
        return self._next


def deflate_zlib(content: bytes | memoryview) -> bytes:
    """Raw deflate data that an inflater with a window of 4 KiB takes."""
    deflater = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -_WINDOW_BITS, _MEMORY_LEVEL)
    return deflater.compress(content) + deflater.flush()


def _zstd() -> Deflate:
    import zstandard

    def deflate(content: bytes | memoryview) -> bytes:
        # Compressors are not for several threads at once, and cost next to nothing to make.
        compressed: bytes = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(content)
        return compressed

    return deflate


_DEFLATERS: dict[int, Callable[[], Deflate]] = {0: lambda: deflate_zlib, 1: _zstd}
assert _DEFLATERS.keys() == COMPRESSION_NAMES.keys()
