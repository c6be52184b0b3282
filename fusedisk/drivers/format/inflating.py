"""Reading and inflating pieces of an image, many at a time.

Compressed pieces mostly lie one behind the other, so the host is asked for all of them at once. A piece inflates in
about the time that a trip to a worker thread takes: so each thread gets many of them, and few are inflated inline.

Memory: callers bound what they ask for at once; the compressed data of that is held meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence

import trio

from fusedisk.core.inflate import Content, Inflate, InflateError
from fusedisk.core.inflated_cache import InflatedCache, Load
from fusedisk.core.offload import run_cpu

INLINE_SIZE = 64 << 10
"""Bytes that are inflated in the trio thread: as long as a trip to a worker thread and back takes."""
HOST_GAP = 16 << 10
"""Bytes between two pieces in the file that are read along rather than read around."""
HOST_READ = 1 << 20
"""Bytes to read from the host at once, unless a single piece is longer."""

Read = Callable[[int, int], Awaitable[bytearray]]
"""Reads compressed data: from host offset and length to bytes, zeroes past the end of the file."""
_Result = Content | InflateError


class Inflater:
    """Fills a cache with the pieces of one image."""

    def __init__(self, cache: InflatedCache, inflate: Inflate, read: Read) -> None:
        self.cache = cache
        self._inflate = inflate
        self._read = read

    async def run(self, loads: list[Load], *, threads: int = len(os.sched_getaffinity(0))) -> None:
        """Finish the loads, on up to ``threads`` threads. Raises what reading raises; data that does not inflate is
        told by :attr:`Load.error`."""
        results: list[_Result] = []
        loads.sort(key=lambda load: load.start)
        try:
            sources = await self._sources(loads)
            results = await self._inflated(sources, [load.size for load in loads], threads)
        finally:
            for index, load in enumerate(loads):
                self.cache.finish(load, results[index] if results else None)

    async def _sources(self, loads: list[Load]) -> list[memoryview]:
        """The compressed data of loads that are sorted by place."""
        sources: list[memoryview] = []
        while len(sources) < len(loads):
            first = len(sources)
            start, last = loads[first].start, first + 1
            end = start + loads[first].length
            for load in loads[last:]:
                after = max(end, load.start + load.length)
                if load.start > end + HOST_GAP or after - start > HOST_READ:
                    break
                end, last = after, last + 1
            data = memoryview(await self._read(start, end - start))
            for load in loads[first:last]:
                sources.append(data[load.start - start : load.start - start + load.length])
        return sources

    async def _inflated(self, sources: list[memoryview], sizes: list[int], threads: int) -> list[_Result]:
        total = sum(sizes)
        if total <= INLINE_SIZE:
            return inflate_all(self._inflate, sources, sizes)
        threads = min(threads, len(sources))
        if threads == 1:
            return await run_cpu(inflate_all, self._inflate, sources, sizes)
        results: list[list[_Result]] = [[] for _ in range(threads)]

        async def work(number: int) -> None:
            part = slice(number * len(sources) // threads, (number + 1) * len(sources) // threads)
            results[number] = await run_cpu(inflate_all, self._inflate, sources[part], sizes[part])

        async with trio.open_nursery() as nursery:
            for number in range(threads):
                nursery.start_soon(work, number)
        return [result for part in results for result in part]


def inflate_all(inflate: Inflate, sources: Sequence[memoryview], sizes: Sequence[int]) -> list[_Result]:
    """What each source inflates to, or why it does not."""
    results: list[_Result] = []
    for source, size in zip(sources, sizes, strict=True):
        try:
            results.append(inflate(source, size))
        except InflateError as exc:
            results.append(exc)
    return results
