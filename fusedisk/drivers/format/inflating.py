"""Reading and inflating pieces of an image, many at a time.

Compressed pieces mostly lie one behind the other, so the host is asked for all of them at once. A piece inflates in
about the time that a trip to a worker thread takes: so each thread, or process where there are some, gets many of them,
and few are inflated inline.

Memory: callers bound what they ask for at once; the compressed data of that is held meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence

import trio

from fusedisk.core.inflate import CODECS, Content, Inflate, InflateError
from fusedisk.core.inflate_pool import Piece, inflate_pool
from fusedisk.core.inflated_cache import InflatedCache, Load
from fusedisk.core.offload import run_cpu

INLINE_SIZE = 64 << 10
"""Bytes that are inflated in the trio thread: as long as a trip to a worker thread and back takes."""
HOST_GAP = 16 << 10
"""Bytes between two pieces in the file that are read along rather than read around."""
HOST_READ = 1 << 20
"""Bytes to read from the host at once, unless a single piece is longer."""

Read = Callable[[int, memoryview], Awaitable[None]]
"""Fills a buffer with compressed data from a host offset on, with zeroes past the end of the file."""
_Result = Content | InflateError
_Span = tuple[int, int, list[Load]]
"""Host offsets of start and end, and the loads in between, of what is read as one."""


class Inflater:
    """Fills a cache with the pieces of one image."""

    def __init__(self, cache: InflatedCache, codec: str, read: Read) -> None:
        """``codec``: a key of CODECS."""
        self.cache = cache
        self.codec = codec
        kind = CODECS[codec]()
        self.inflate, self.prefix = kind.inflate, kind.prefix
        self._read = read

    async def run(self, loads: list[Load], *, threads: int = len(os.sched_getaffinity(0))) -> None:
        """Finish the loads, on up to ``threads`` threads or processes. Raises what reading raises; data that does not
        inflate is told by :attr:`Load.error`."""
        results: Sequence[_Result] = ()
        loads.sort(key=lambda load: load.start)
        try:
            results = await self._inflated(_spans(loads), sum(load.size for load in loads), min(threads, len(loads)))
        finally:
            for index, load in enumerate(loads):
                self.cache.finish(load, results[index] if results else None)

    async def _inflated(self, spans: list[_Span], size: int, threads: int) -> list[_Result]:
        source_size = sum(end - start for start, end, _ in spans)
        pool = inflate_pool() if size > INLINE_SIZE else None
        batch = pool.begin(source_size, size) if pool is not None else None
        if batch is None:
            source = memoryview(bytearray(source_size))
            pieces = await self._fill(source, spans)
            return await self._inflated_here(source, pieces, threads)
        try:
            pieces = await self._fill(batch.source, spans)
            results: list[_Result | None] = [*await batch.inflate(self.codec, pieces, threads)]
            missing = [number for number, result in enumerate(results) if result is None]
            if missing:
                again = await self._inflated_here(batch.source, [pieces[number] for number in missing], threads)
                for number, result in zip(missing, again, strict=True):
                    results[number] = result
            return [result for result in results if result is not None]
        finally:
            batch.leave()

    async def _fill(self, source: memoryview, spans: list[_Span]) -> list[Piece]:
        """Read all compressed data."""
        pieces: list[Piece] = []
        place = 0
        for start, end, loads in spans:
            await self._read(start, source[place : place + end - start])
            pieces += [(place + load.start - start, load.length, load.size) for load in loads]
            place += end - start
        return pieces

    async def _inflated_here(self, source: memoryview, pieces: list[Piece], threads: int) -> list[_Result]:
        """By this process."""
        if sum(size for _, _, size in pieces) <= INLINE_SIZE:
            return inflate_all(self.inflate, source, pieces)
        if threads == 1:
            return await run_cpu(inflate_all, self.inflate, source, pieces)
        results: list[list[_Result]] = [[] for _ in range(threads)]

        async def work(number: int) -> None:
            part = slice(number * len(pieces) // threads, (number + 1) * len(pieces) // threads)
            results[number] = await run_cpu(inflate_all, self.inflate, source, pieces[part])

        async with trio.open_nursery() as nursery:
            for number in range(threads):
                nursery.start_soon(work, number)
        return [result for part in results for result in part]


def _spans(loads: list[Load]) -> list[_Span]:
    """Loads that are sorted by place, put together as far as they are to be read together."""
    spans: list[_Span] = []
    rest = loads
    while rest:
        start, count = rest[0].start, 1
        end = start + rest[0].length
        for load in rest[1:]:
            after = max(end, load.start + load.length)
            if load.start > end + HOST_GAP or after - start > HOST_READ:
                break
            end, count = after, count + 1
        spans.append((start, end, rest[:count]))
        rest = rest[count:]
    return spans


def inflate_all(inflate: Inflate, source: memoryview, pieces: Sequence[Piece]) -> list[_Result]:
    """What each piece inflates to, or why it does not."""
    results: list[_Result] = []
    for offset, length, size in pieces:
        try:
            results.append(inflate(source[offset : offset + length], size))
        except InflateError as exc:
            results.append(exc)
    return results
