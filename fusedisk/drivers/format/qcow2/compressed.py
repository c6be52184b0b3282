"""Reading compressed clusters: raw deflate with a window of 4 KiB, or zstd.

Clusters are inflated whole, many of a run at a time, ahead of sequential readers, and are cached for a while. A reader
of a cluster that is being inflated waits for that. When the cache is full, the first read of a small part of a cluster
inflates no more than it needs (:mod:`fusedisk.compression.glances`).

Why this is safe beside writers: rewriting a compressed cluster frees its host clusters while other requests may be
reading them. Before they can be used again, the cache drops their content (``inflated_cache``) and
discards loads of them that are under way, whose readers then resolve the guest offset again. Content comes from the
cache in the same instant in which the L2 entry is read, or from a load that was under way in that instant.

Source: docs/interop/qcow2.txt, "Compressed Clusters Descriptor" and "Compression type".
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable
from functools import partial

from fusedisk.block.model.extent import Extent
from fusedisk.block.model.node import Node
from fusedisk.block.request import background
from fusedisk.compression.glances import Glances
from fusedisk.compression.inflate import Content, InflateError
from fusedisk.compression.inflate_pool import inflate_pool
from fusedisk.compression.inflated_cache import Run
from fusedisk.compression.readahead import Readahead
from fusedisk.core.errors import CorruptImageError, FusediskError
from fusedisk.drivers.format.inflating import INLINE_SIZE, Inflater, Where
from fusedisk.drivers.format.qcow2.cluster import ClusterMap
from fusedisk.drivers.format.qcow2.layout import COMPRESSION_NAMES

WINDOW_BITS = -12
BATCH = 2 << 20
"""Bytes that one request inflates at once; a single cluster may be as large."""
AHEAD_BATCH = 2 << 20
"""Bytes that one task inflates at once ahead of readers."""
AHEAD_THREADS = min(len(os.sched_getaffinity(0)), 8)
"""Tasks that inflate ahead, where there are no processes for that."""


class CompressedReader:
    """Reads the compressed clusters of one image."""

    def __init__(self, node: Node, clusters: ClusterMap) -> None:
        self.node = node
        self.clusters = clusters
        self.image = clusters.image
        geometry = self.image.geometry
        self._size, self._bits, self._mask = geometry.cluster_size, geometry.cluster_bits, geometry.cluster_mask
        self._cache = self.image.inflated
        self._readahead = Readahead(self._size, self._cache.capacity, AHEAD_BATCH)
        self._inflater = Inflater(self._cache, _CODECS[self.image.header.compression_type], self._read)
        self._glances = Glances(self._size, self._cache.capacity)
        self._compressed = memoryview(bytearray())
        """For the data of a cluster that is inflated at once."""
        self._ahead = 0
        """Tasks that inflate ahead."""

    # --- requests ---------------------------------------------------------------------------------------

    async def read(self, extent: Extent, offset: int, buffer: memoryview) -> int:
        """Fill a prefix of ``buffer`` with the guest bytes at ``offset``, where a compressed extent starts; returns its
        length. What is left, maybe all of it, is to be resolved anew.

        Raises CorruptImageError for data that does not inflate to a cluster.
        """
        inside = offset & self._mask
        parts: list[Content | Run | None] = []
        own: dict[int, None] = {}
        room = BATCH
        for entry in _entries(extent):
            part = self._cache.get(entry) or self._cache.loading(entry)
            if part is None and entry not in own:
                room -= self._size
                if room < 0 and own:
                    break
                own[entry] = None
            parts.append(part)
        length = min(len(parts) * self._size - inside, len(buffer))
        begun = self._begin(own, asked=True) if own else None
        self._notice(offset, length)
        if begun is not None:
            await self._inflater.run(*begun)
        done = 0
        for number, (entry, part) in enumerate(zip(_entries(extent), parts, strict=False)):
            if part is None and begun is not None:
                part, _ = begun
            if isinstance(part, Run):
                await part.wait()
                reason = part.errors.get(entry)
                if reason is not None:
                    raise self._damaged((offset & ~self._mask) + number * self._size, reason)
                part = part.get(entry)
            if part is None:
                break
            done += _copy(part, inside, buffer, done, length)
            inside = 0
        return done

    def read_cached(self, offset: int, buffer: memoryview, extent: Extent | None) -> bool:
        """Fill ``buffer`` if all its clusters are compressed and inflated already, or there is one that can be inflated
        at once; tells whether it did."""
        length = len(buffer)
        extent = extent or self.clusters.lookup(offset, length)
        if extent is None or not extent.compressed or extent.length != length:
            return False
        entries = _entries(extent)
        contents = self._cache.get_all(entries)
        if contents is None:
            content = self._inflate_now(entries[0], (offset & self._mask) + length) if len(entries) == 1 else None
            if content is None:
                return False
            contents = [content]
        self._notice(offset, length)
        inside, done = offset & self._mask, 0
        for content in contents:
            done += _copy(content, inside, buffer, done, length)
            inside = 0
        return True

    def pieces(self, extent: Extent, offset: int) -> list[memoryview] | None:
        """The bytes of a compressed extent at ``offset``, if all its clusters are inflated already."""
        if not extent.compressed:
            return None
        contents = self._cache.get_all(_entries(extent))
        if contents is None:
            return None
        length = extent.length
        self._notice(offset, length)
        pieces = [content if isinstance(content, memoryview) else memoryview(content) for content in contents]
        inside = offset & self._mask
        surplus = sum(map(len, pieces)) - inside - length
        if inside:
            pieces[0] = pieces[0][inside:]
        if surplus:
            pieces[-1] = pieces[-1][: len(pieces[-1]) - surplus]
        return pieces

    def source(self, extent: Extent, offset: int) -> tuple[Callable[[int, memoryview], bool], int]:
        """Return a function that fills buffers from the cluster at ``offset``, where a compressed extent starts, and
        how much of the cluster is left from there on."""
        return partial(self._read_cluster, _entries(extent)[0]), self._size - (offset & self._mask)

    def _read_cluster(self, entry: int, offset: int, buffer: memoryview) -> bool:
        inside, length = offset & self._mask, len(buffer)
        content = self._cache.get(entry)
        if content is None:
            content = self._inflate_now(entry, inside + length)
            if content is None:
                return False
        self._notice(offset, length)
        buffer[:] = memoryview(content)[inside : inside + length]
        return True

    def _inflate_now(self, entry: int, end: int) -> Content | None:
        """The content of a cluster whose data is in the host's page cache, at least its first ``end`` bytes, unless
        inflating it is for a thread."""
        storage = self.image.storage.node
        if self._size > INLINE_SIZE or storage.serialising or self._cache.loading(entry) is not None:
            return None
        start, length = self.image.geometry.compressed_range(entry)
        length = max(min(length, storage.length - start), 0)
        if length > len(self._compressed):
            self._compressed = memoryview(bytearray(length))
        data = self._compressed[:length]
        if not storage.driver.read_now(start, data):
            return None
        if not self._cache.has_room(self._size) and self._glances.first(entry, end):
            part = self._inflater.prefix(data, end)
            if part is not None:
                return part
        try:
            content = self._inflater.inflate(data, self._size)
        except InflateError:
            return None  # read raises the error
        self._glances.whole(entry)
        self._cache.keep(entry, content)
        return content

    def cached(self, entry: int, inside: int, length: int) -> memoryview | None:
        """``length`` bytes from offset ``inside`` of the cluster that an L2 entry describes, if it is inflated
        already. The entry is that of the active tables in this very instant."""
        content = self._cache.get(entry)
        return memoryview(content)[inside : inside + length] if content is not None else None

    # --- ahead of requests ------------------------------------------------------------------------------

    def _notice(self, offset: int, length: int) -> None:
        """Note a read, and start to inflate ahead if it is a part of a sequential one."""
        wanted = self._readahead.notice(offset, offset + length, self.image.header.size)
        if not wanted:
            return
        pool = inflate_pool()
        tasks = (pool.parallel(self._size) if pool is not None else 0) or AHEAD_THREADS
        # Running tasks take more work only when they are done.
        tasks = min(tasks, self._ahead + -(-wanted // AHEAD_BATCH))
        while self._ahead < tasks and background.start(self.node, self._go_ahead):
            self._ahead += 1

    async def _go_ahead(self, welcome: background.Welcome) -> None:
        try:
            while welcome():
                begun = self._begin_wanted()
                if begun is None:
                    return
                await self._inflater.run(*begun, threads=1)
            self._readahead.forget()
        except FusediskError:
            # A reader that really needs this cluster gets the error again.
            self._readahead.forget()
        finally:
            self._ahead -= 1

    def _begin_wanted(self) -> tuple[Run, list[Where]] | None:
        """Start a run with the clusters that sequential readers need next; None if there are none."""
        new: dict[int, None] = {}
        while not new and (stream := self._readahead.wanted()) is not None:
            room = AHEAD_BATCH
            stream.until = min(stream.until, self.image.header.size)  # it may have become shorter
            while room > 0 and stream.ahead < stream.until:
                length = min(stream.until - stream.ahead, max(room, self._size))
                extent = self.clusters.lookup(stream.ahead, length)
                if extent is None:
                    # Nobody has looked at that L2 table lately, or it is corrupt: not for us to find out.
                    stream.ahead = stream.until
                    break
                if extent.compressed:
                    new.update((entry, None) for entry in _entries(extent) if not self._cache.knows(entry))
                    room = AHEAD_BATCH - len(new) * self._size
                stream.ahead += extent.length
        return self._begin(new, asked=False) if new else None

    # --- inflating --------------------------------------------------------------------------------------

    def _begin(self, entries: Iterable[int], *, asked: bool) -> tuple[Run, list[Where]]:
        """Start a run with those of the clusters that are neither cached nor being inflated; returns also where they
        lie."""
        where = sorted(self.image.geometry.compressed_ranges(entries))
        return self._cache.begin((entry for _, _, entry in where), self._size, asked=asked), where

    async def _read(self, start: int, buffer: memoryview) -> None:
        await self.image.announce("read_compressed")
        await self.image.read_into(start, buffer)

    def _damaged(self, offset: int, reason: str) -> CorruptImageError:
        return CorruptImageError(
            f"'{self.image.filename}' has a compressed cluster for guest offset {offset} that does not inflate to "
            f"{self._size} bytes ({reason})."
        )


def _entries(extent: Extent) -> array[int]:
    """The L2 entries of a compressed extent's clusters."""
    assert isinstance(extent.token, array)
    return extent.token


def _copy(content: Content, inside: int, buffer: memoryview, done: int, length: int) -> int:
    """Copy what a cluster has from offset ``inside`` on to ``buffer[done:length]``, as far as there is room; returns
    how much that is."""
    count = min(len(content) - inside, length - done)
    if count == len(content):
        buffer[done : done + count] = content
    else:
        buffer[done : done + count] = memoryview(content)[inside : inside + count]
    return count


_CODECS = {0: "deflate-4k", 1: "zstd"}
assert _CODECS.keys() == COMPRESSION_NAMES.keys()
