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

from fusedisk.compression.inflate import CODECS, Content, Inflate, InflateError
from fusedisk.compression.inflate_pool import Piece, inflate_pool
from fusedisk.compression.inflated_cache import InflatedCache, Run
from fusedisk.core.offload import run_cpu

INLINE_SIZE = 64 << 10
"""Bytes that are inflated in the trio thread: as long as a trip to a worker thread and back takes."""
HOST_GAP = 16 << 10
"""The largest gap in bytes between two pieces in the file that is read along with them, not skipped."""
HOST_READ = 1 << 20
"""The most bytes to read from the host at once, unless a single piece is longer."""

Read = Callable[[int, memoryview], Awaitable[None]]
"""Fills a buffer with compressed data from a host offset on, with zeroes past the end of the file."""
Where = tuple[int, int, int]
"""Where a piece's compressed data lies: host offset, length in bytes, maybe with something behind it, and the key."""
_Inflated = tuple[Content, dict[int, str]]
"""The inflated pieces, one after the other, and the reasons of failed ones, by their number."""
_Span = tuple[int, int, list[Where]]
"""Host offsets of start and end, and the pieces in between, of what is read as one."""


class Inflater:
    """Fills a cache with the pieces of one image."""

    def __init__(self, cache: InflatedCache, codec: str, read: Read) -> None:
        """``codec``: a key of CODECS."""
        self.cache = cache
        self.codec = codec
        kind = CODECS[codec]()
        self.inflate, self.prefix = kind.inflate, kind.prefix
        self._read = read

    async def run(self, run: Run, where: list[Where], *, threads: int = len(os.sched_getaffinity(0))) -> None:
        """Finish a run of pieces that lie there, in that order, by host offset, on up to ``threads`` threads or
        processes. Raises what reading raises; data that does not inflate is reported in :attr:`Run.errors`."""
        content, errors = None, {}
        try:
            content, failed = await self._inflated(_spans(where), run.size, min(threads, len(where)))
            errors = {run.keys[number]: error for number, error in failed.items()}
        finally:
            self.cache.finish(run, content, errors)

    async def _inflated(self, spans: list[_Span], size: int, threads: int) -> _Inflated:
        source_size = sum(end - start for start, end, _ in spans)
        content_size = sum(len(where) for _, _, where in spans) * size
        pool = inflate_pool() if content_size > INLINE_SIZE else None
        batch = pool.begin(source_size, content_size) if pool is not None else None
        if batch is None:
            source = memoryview(bytearray(source_size))
            pieces = await self._fill(source, spans)
            return await self._inflated_here(source, pieces, size, threads)
        try:
            pieces = await self._fill(batch.source, spans)
            content, missing = await batch.inflate(self.codec, pieces, size, threads)
            if not missing:
                return content, {}
            left = [pieces[number] for number in missing]
            again, failed = await self._inflated_here(batch.source, left, size, min(threads, len(left)))
            for place, number in enumerate(missing):
                if place not in failed:
                    content[number * size : (number + 1) * size] = again[place * size : (place + 1) * size]
            return content, {missing[number]: error for number, error in failed.items()}
        finally:
            batch.leave()

    async def _fill(self, source: memoryview, spans: list[_Span]) -> list[Piece]:
        """Read all compressed data."""
        pieces: list[Piece] = []
        place = 0
        for start, end, where in spans:
            await self._read(start, source[place : place + end - start])
            pieces += [(place + offset - start, length) for offset, length, _ in where]
            place += end - start
        return pieces

    async def _inflated_here(self, source: memoryview, pieces: list[Piece], size: int, threads: int) -> _Inflated:
        """By this process."""
        if len(pieces) * size <= INLINE_SIZE:
            return inflate_all(self.inflate, source, pieces, size)
        if threads == 1:
            return await run_cpu(inflate_all, self.inflate, source, pieces, size)
        content = memoryview(bytearray(len(pieces) * size))
        errors: dict[int, str] = {}

        async def work(number: int) -> None:
            first, end = number * len(pieces) // threads, (number + 1) * len(pieces) // threads
            part = content[first * size : end * size]
            found = await run_cpu(inflate_into, self.inflate, source, pieces[first:end], part)
            errors.update((first + number, error) for number, error in found.items())

        async with trio.open_nursery() as nursery:
            for number in range(threads):
                nursery.start_soon(work, number)
        return content, errors


def _spans(pieces: list[Where]) -> list[_Span]:
    """Pieces that are sorted by place, put together as far as they are to be read together."""
    spans: list[_Span] = []
    first, start, end = 0, pieces[0][0], pieces[0][0]
    for number, (offset, length, _) in enumerate(pieces):
        after = max(end, offset + length)
        if number > first and (offset > end + HOST_GAP or after - start > HOST_READ):
            spans.append((start, end, pieces[first:number]))
            first, start, after = number, offset, offset + length
        end = after
    spans.append((start, end, pieces[first:]))
    return spans


def inflate_all(inflate: Inflate, source: memoryview, pieces: Sequence[Piece], size: int) -> _Inflated:
    """Inflate the pieces; returns their content, and the reasons of failed ones."""
    if len(pieces) == 1:
        ((offset, length),) = pieces
        try:
            return inflate(source[offset : offset + length], size), {}
        except InflateError as exc:
            return b"", {0: str(exc)}
    content = memoryview(bytearray(len(pieces) * size))
    return content, inflate_into(inflate, source, pieces, content)


def inflate_into(inflate: Inflate, source: memoryview, pieces: Sequence[Piece], content: memoryview) -> dict[int, str]:
    """Fill ``content`` with what the pieces inflate to, as much each; returns why some do not, by their number."""
    size = len(content) // len(pieces)
    errors = {}
    for number, (offset, length) in enumerate(pieces):
        try:
            content[number * size : (number + 1) * size] = inflate(source[offset : offset + length], size)
        except InflateError as exc:
            errors[number] = str(exc)
    return errors
