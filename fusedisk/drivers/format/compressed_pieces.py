"""Compressed pieces of an image: one cache, one inflation however many requests wait, and readahead.

Pieces are inflated whole, many of a run at a time, ahead of sequential readers, and are cached for a while. A reader of
a piece that is being inflated waits for that. When the cache is full, the first read of a small part inflates
no more of a piece than it needs (:mod:`fusedisk.compression.glances`).

A format composes it: it gives a :class:`Source`, and answers SPECIAL extents whose token is the array of the keys of
their pieces. All pieces of an image have one size; a shorter last one, or pieces of several sizes, are the format's.

Why this is safe beside writers: rewriting a compressed piece frees its host space while other requests may be reading
it. Before the space can be used again, the format drops the key from the cache (``InflatedCache.drop``), which discards
loads that are under way, too; their readers then resolve the disk offset again. Content comes from the cache in the
same instant in which the key is looked up, or from a load that was under way in that instant.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from fusedisk.block.model.extent import Extent
from fusedisk.block.model.node import Node
from fusedisk.block.request import background
from fusedisk.compression.glances import Glances
from fusedisk.compression.inflate import Content, InflateError
from fusedisk.compression.inflate_pool import inflate_pool
from fusedisk.compression.inflated_cache import InflatedCache, Run
from fusedisk.compression.readahead import Readahead
from fusedisk.core.errors import CorruptImageError, FusediskError
from fusedisk.drivers.format.inflating import INLINE_SIZE, Inflater, Where

BATCH = 2 << 20
"""Bytes that one request inflates at once; a single piece may be as large."""
AHEAD_BATCH = 2 << 20
"""Bytes that one task inflates at once ahead of readers."""
AHEAD_THREADS = min(len(os.sched_getaffinity(0)), 8)
"""Tasks that inflate ahead, where there are no processes for that."""


class Source(Protocol):
    """What a format says of its compressed pieces. The key of a piece, a number, is the token of its extent."""

    size: int
    """Bytes of each piece, inflated: a power of two."""
    codec: str
    """A key of :data:`fusedisk.compression.inflate.CODECS`."""

    @property
    def storage(self) -> Node:
        """The node that holds the compressed data."""

    @property
    def length(self) -> int:
        """The length of the disk as it is now."""

    def place(self, key: int) -> tuple[int, int]:
        """Return where the data of a piece lies: host offset and length, maybe with something behind it."""

    def places(self, keys: Iterable[int]) -> list[Where]:
        """Return the same for each of many, and the key itself."""

    def lookup(self, offset: int, length: int) -> Extent | None:
        """See :meth:`fusedisk.block.model.driver.Driver.lookup`."""

    async def read(self, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with compressed data from a host offset on, with zeroes past the end of the file."""

    def damaged(self, offset: int, reason: str) -> CorruptImageError:
        """Return the error for the piece at a disk offset, which does not inflate to its length."""


class CompressedPieces:
    """Reads the compressed pieces of one image."""

    def __init__(self, node: Node, source: Source, cache: InflatedCache) -> None:
        self.node = node
        self._source = source
        self._size, self._mask = source.size, source.size - 1
        self._cache = cache
        self._readahead = Readahead(self._size, self._cache.capacity, AHEAD_BATCH)
        self._inflater = Inflater(self._cache, source.codec, source.read)
        self._glances = Glances(self._size, self._cache.capacity)
        self._compressed = memoryview(bytearray())
        """For the data of a piece that is inflated at once."""
        self._ahead = 0
        """Tasks that inflate ahead."""

    # --- requests ---------------------------------------------------------------------------------------

    async def read(self, extent: Extent, offset: int, buffer: memoryview) -> int:
        """Fill a prefix of ``buffer`` with the guest bytes at ``offset``, where a compressed extent starts; returns its
        length. What is left, maybe all of it, is to be resolved anew.

        Raises CorruptImageError for data that does not inflate to a piece.
        """
        inside = offset & self._mask
        parts: list[Content | Run | None] = []
        own: dict[int, None] = {}
        room = BATCH
        for key in _keys(extent):
            part = self._cache.get(key) or self._cache.loading(key)
            if part is None and key not in own:
                room -= self._size
                if room < 0 and own:
                    break
                own[key] = None
            parts.append(part)
        length = min(len(parts) * self._size - inside, len(buffer))
        begun = self._begin(own, asked=True) if own else None
        self._notice(offset, length)
        if begun is not None:
            await self._inflater.run(*begun)
        done = 0
        for number, (key, part) in enumerate(zip(_keys(extent), parts, strict=False)):
            if part is None and begun is not None:
                part, _ = begun
            if isinstance(part, Run):
                await part.wait()
                reason = part.errors.get(key)
                if reason is not None:
                    raise self._source.damaged((offset & ~self._mask) + number * self._size, reason)
                part = part.get(key)
            if part is None:
                break
            done += _copy(part, inside, buffer, done, length)
            inside = 0
        return done

    def read_cached(self, offset: int, buffer: memoryview, extent: Extent | None) -> bool:
        """Fill ``buffer`` if all its pieces are compressed and inflated already, or there is one that can be inflated
        at once; tells whether it did."""
        length = len(buffer)
        extent = extent or self._source.lookup(offset, length)
        if extent is None or not extent.compressed or extent.length != length:
            return False
        keys = _keys(extent)
        contents = self._cache.get_all(keys)
        if contents is None:
            content = self._inflate_now(keys[0], (offset & self._mask) + length) if len(keys) == 1 else None
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
        """The bytes of a compressed extent at ``offset``, if all its pieces are inflated already."""
        if not extent.compressed:
            return None
        contents = self._cache.get_all(_keys(extent))
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
        """Return a function that fills buffers from the piece at ``offset``, where a compressed extent starts, and
        how much of the piece is left from there on."""
        return partial(self._read_piece, _keys(extent)[0]), self._size - (offset & self._mask)

    def _read_piece(self, key: int, offset: int, buffer: memoryview) -> bool:
        inside, length = offset & self._mask, len(buffer)
        content = self._cache.get(key)
        if content is None:
            content = self._inflate_now(key, inside + length)
            if content is None:
                return False
        self._notice(offset, length)
        buffer[:] = memoryview(content)[inside : inside + length]
        return True

    def _inflate_now(self, key: int, end: int) -> Content | None:
        """The content of a piece whose data is in the host's page cache, at least its first ``end`` bytes, unless
        inflating it is for a thread."""
        storage = self._source.storage
        if self._size > INLINE_SIZE or storage.serialising or self._cache.loading(key) is not None:
            return None
        start, length = self._source.place(key)
        length = max(min(length, storage.length - start), 0)
        if length > len(self._compressed):
            self._compressed = memoryview(bytearray(length))
        data = self._compressed[:length]
        if not storage.driver.read_now(start, data):
            return None
        if not self._cache.has_room(self._size) and self._glances.first(key, end):
            part = self._inflater.prefix(data, end)
            if part is not None:
                return part
        try:
            content = self._inflater.inflate(data, self._size)
        except InflateError:
            return None  # read raises the error
        self._glances.whole(key)
        self._cache.insert(key, content)
        return content

    def cached(self, key: int, inside: int, length: int) -> memoryview | None:
        """``length`` bytes from offset ``inside`` of the piece that a key stands for, if it is inflated
        already. The key is one that the tables hold in this very instant."""
        content = self._cache.get(key)
        return memoryview(content)[inside : inside + length] if content is not None else None

    # --- ahead of requests ------------------------------------------------------------------------------

    def _notice(self, offset: int, length: int) -> None:
        """Note a read, and start to inflate ahead if it is a part of a sequential one."""
        wanted = self._readahead.notice(offset, offset + length, self._source.length)
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
            # A reader that really needs this piece gets the error again.
            self._readahead.forget()
        finally:
            self._ahead -= 1

    def _begin_wanted(self) -> tuple[Run, list[Where]] | None:
        """Start a run with the pieces that sequential readers need next; None if there are none."""
        new: dict[int, None] = {}
        while not new and (stream := self._readahead.next_stream()) is not None:
            room = AHEAD_BATCH
            stream.until = min(stream.until, self._source.length)  # it may have become shorter
            while room > 0 and stream.ahead < stream.until:
                length = min(stream.until - stream.ahead, max(room, self._size))
                extent = self._source.lookup(stream.ahead, length)
                if extent is None:
                    # Nobody has looked at that table lately, or it is corrupt: not for us to find out.
                    stream.ahead = stream.until
                    break
                if extent.compressed:
                    new.update((key, None) for key in _keys(extent) if not self._cache.knows(key))
                    room = AHEAD_BATCH - len(new) * self._size
                stream.ahead += extent.length
        return self._begin(new, asked=False) if new else None

    # --- inflating --------------------------------------------------------------------------------------

    def _begin(self, keys: Iterable[int], *, asked: bool) -> tuple[Run, list[Where]]:
        """Start a run with those of the pieces that are neither cached nor being inflated; returns also where they
        lie."""
        where = sorted(self._source.places(keys))
        return self._cache.begin((key for _, _, key in where), self._size, asked=asked), where


def _keys(extent: Extent) -> array[int]:
    """Return the keys of a compressed extent's pieces."""
    assert isinstance(extent.token, array)
    return extent.token


def _copy(content: Content, inside: int, buffer: memoryview, done: int, length: int) -> int:
    """Copy what a piece has from offset ``inside`` on to ``buffer[done:length]``, as far as there is room; returns
    how much that is."""
    count = min(len(content) - inside, length - done)
    if count == len(content):
        buffer[done : done + count] = content
    else:
        buffer[done : done + count] = memoryview(content)[inside : inside + count]
    return count
