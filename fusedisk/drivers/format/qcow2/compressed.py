"""Reading compressed clusters: raw deflate with a window of 4 KiB, or zstd.

A whole cluster is inflated at once; the last few are kept, since small sequential reads meet the same cluster
again and again. Output is bounded by one cluster whatever the data says. Clusters of up to 64 KiB are
inflated inline, as a trip to a worker thread costs about as much; larger ones go to a thread.

Why this is safe beside writers: rewriting a compressed cluster frees its host clusters while others may be
reading them. So after the data is read, the L2 entry is looked at again, and if it changed, the read starts
over with the new entry.

Source: docs/interop/qcow2.txt, "Compressed Clusters Descriptor" and "Compression type".
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable

import trio

from fusedisk.block.extent import Extent
from fusedisk.core.errors import CorruptImageError
from fusedisk.core.offload import run_cpu
from fusedisk.drivers.format.qcow2.cluster import ClusterMap
from fusedisk.drivers.format.qcow2.layout import COMPRESSION_NAMES

INLINE_SIZE = 64 << 10
"""Clusters up to this size are inflated in the trio thread."""
KEPT_BYTES = 4 << 20
"""Inflated clusters kept, at least two of them."""

_WINDOW_BITS = 12


class CompressedReader:
    """Inflates clusters of one image."""

    def __init__(self, clusters: ClusterMap) -> None:
        self.clusters = clusters
        self.image = clusters.image
        self._inflate = _INFLATERS[self.image.header.compression_type]()
        self._kept: OrderedDict[int, bytes] = self.image.inflated
        self._kept_max = max(2, KEPT_BYTES >> self.image.geometry.cluster_bits)
        self._under_way: dict[int, trio.Event] = {}

    async def read(self, extent: Extent, offset: int, buffer: memoryview) -> Extent | None:
        """Fill ``buffer`` with the guest bytes at ``offset`` of a compressed cluster.

        Returns None, or the extent to read instead where the cluster was rewritten meanwhile. Raises
        CorruptImageError for data that does not inflate to a cluster.
        """
        while extent.compressed:
            content = await self._content(extent.token, offset)
            if content is not None:
                inside = offset & self.image.geometry.cluster_mask
                buffer[:] = content[inside : inside + len(buffer)]
                return None
            extent = await self.clusters.map(offset, len(buffer))
        return extent

    async def _content(self, token: object, offset: int) -> bytes | None:
        """The cluster that an L2 entry describes; None if the guest offset has another entry by now."""
        assert isinstance(token, int)
        while True:
            content = self._kept.get(token)
            if content is not None:
                self._kept.move_to_end(token)
                return content
            under_way = self._under_way.get(token)
            if under_way is None:
                return await self._load(token, offset)
            # Somebody inflates this very cluster.
            await under_way.wait()

    async def _load(self, entry: int, offset: int) -> bytes | None:
        image = self.image
        done = self._under_way[entry] = trio.Event()
        try:
            start, length = image.geometry.compressed_range(entry)
            await image.announce("read_compressed")
            data = await image.read(start, length)
            content = await self._inflated(data, offset)
            if not await self._still(entry, offset):
                return None
            if isinstance(content, Exception):
                raise CorruptImageError(
                    f"'{image.filename}' has a compressed cluster for guest offset "
                    f"{offset & ~image.geometry.cluster_mask} "
                    f"that does not inflate to {image.geometry.cluster_size} bytes ({content})."
                ) from content
            # No await since the entry was looked at: what is kept belongs to an entry in use.
            self._kept[entry] = content
            while len(self._kept) > self._kept_max:
                self._kept.popitem(last=False)
            return content
        finally:
            del self._under_way[entry]
            done.set()

    async def _inflated(self, data: bytearray, offset: int) -> bytes | Exception:
        """The cluster, or why there is none: if it was rewritten meanwhile that does not matter."""
        size = self.image.geometry.cluster_size
        try:
            if size <= INLINE_SIZE:
                return self._inflate(data, size)
            return await run_cpu(self._inflate, data, size)
        except InflateError as exc:
            return exc

    async def _still(self, entry: int, offset: int) -> bool:
        """Whether the guest offset still has this L2 entry."""
        extent = await self.clusters.map(offset, 1)
        return extent.token == entry


class InflateError(Exception):
    """The data is not what the compression type asks for."""


Inflate = Callable[[bytearray, int], bytes]


def inflate_zlib(data: bytearray, size: int) -> bytes:
    """``size`` bytes from raw deflate data, which may be followed by anything. Raises InflateError."""
    try:
        content = zlib.decompressobj(-_WINDOW_BITS).decompress(data, size)
    except zlib.error as exc:
        raise InflateError(str(exc)) from exc
    return _whole(content, size)


def _zlib() -> Inflate:
    from isal import isal_zlib

    def inflate(data: bytearray, size: int) -> bytes:
        try:
            content: bytes = isal_zlib.decompressobj(-_WINDOW_BITS).decompress(data, size)
        except isal_zlib.error:  # type: ignore[misc]
            content = b""
        # zlib has the last word on what isal, the faster one, does not take.
        return content if len(content) == size else inflate_zlib(data, size)

    return inflate


def _zstd() -> Inflate:
    import zstandard

    def inflate(data: bytearray, size: int) -> bytes:
        try:
            with zstandard.ZstdDecompressor().stream_reader(data) as reader:
                return _whole(reader.read(size), size)
        except zstandard.ZstdError as exc:
            raise InflateError(str(exc)) from exc

    return inflate


def _whole(content: bytes, size: int) -> bytes:
    if len(content) != size:
        raise InflateError(f"it ends after {len(content)}")
    return content


_INFLATERS: dict[int, Callable[[], Inflate]] = {0: _zlib, 1: _zstd}
assert _INFLATERS.keys() == COMPRESSION_NAMES.keys()
