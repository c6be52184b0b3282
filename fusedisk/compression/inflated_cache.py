"""A bounded cache of inflated pieces of an image, with the loads that are under way.

It is a 2Q cache. A new piece is on probation; a piece that is requested again after a while is *proven* and protected.
So one sequential scan does not evict the pieces that others keep using. "After a while" matters: a reader that goes on
in small steps requests each piece many times in a row, which proves nothing.

Pieces that were inflated together form a run and share one buffer. A piece that proves itself gets a copy of its own.

The key of a piece says where its compressed data lies. The same key can stand for two pieces, one after the other,
when host space is freed and used again. So the code that frees space calls :meth:`InflatedCache.drop` before the space
can be reused. This covers loads under way, too: their result is not cached.

Everything is synchronous except waiting for a load.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from fusedisk.compression.inflate import Content

_LEAST_CAPACITY, _MOST_CAPACITY = 16 << 20, 128 << 20
_SHARE_OF_MEMORY = 64
_SHARE_OF_NEW = 4
"""1/N of the capacity is for new pieces."""
_SHARE_OF_PROOF = 6
"""A request proves a piece if 1/N of the capacity has arrived since the piece did: more than readahead fetches ahead of
a reader, less than the cache holds."""


def inflated_capacity() -> int:
    """Return how many bytes the pieces of one image may take up: 1/64 of this machine's memory, within bounds."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(memory // _SHARE_OF_MEMORY, _LEAST_CAPACITY), _MOST_CAPACITY)


class Run:
    """Pieces that were inflated together."""

    __slots__ = ("_done", "asked", "content", "errors", "finished", "keys", "memory", "places", "size")

    def __init__(self, keys: Iterable[int], size: int) -> None:
        self.keys = array("Q", keys)
        self.size = size
        """Bytes of each piece."""
        self.places = dict(zip(self.keys, range(0, len(self.keys) * size, size), strict=True))
        """Offset in ``content`` of each piece by its key. A piece without an entry is gone."""
        self.content: Content = b""
        """All pieces in order, once loaded."""
        self.memory = 0
        """Bytes of memory that ``content`` occupies."""
        self.asked: int | None = None
        """The cache's logical time (bytes arrived so far) of the last request for one of the pieces."""
        self.finished = False
        self.errors: dict[int, str] = {}
        """Why pieces could not be inflated, by key. Text, since an exception would keep its frames in memory."""
        self._done: trio.Event | None = None

    def get(self, key: int) -> Content | None:
        """Return a piece of a finished run; None if it is gone."""
        place = self.places.get(key)
        if place is None:
            return None
        if len(self.content) == self.size:
            return self.content
        return memoryview(self.content)[place : place + self.size]

    async def wait(self) -> None:
        """Wait until the run is finished."""
        if not self.finished:
            if self._done is None:
                self._done = trio.Event()
            await self._done.wait()

    def finish(self) -> None:
        """Wake the tasks that wait."""
        self.finished = True
        if self._done is not None:
            self._done.set()


class InflatedCache:
    """New and proven pieces by key, each kind with the least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        """Bytes. The newest entry stays even if it is larger."""
        self.size = 0
        """Bytes of memory that all pieces occupy."""
        self._new: OrderedDict[int | Run, tuple[Content, int]] = OrderedDict()
        """Runs, and single pieces by key: the content, and the logical time at which it arrived."""
        self._runs: dict[int, Run] = {}
        """The run of each key, finished or under way."""
        self._came = 0
        """Logical time: bytes that have arrived so far."""
        self._proof = capacity // _SHARE_OF_PROOF
        self._proven: OrderedDict[int, Content] = OrderedDict()
        self._proven_size = 0
        self._proven_capacity = capacity - capacity // _SHARE_OF_NEW

    def __len__(self) -> int:
        return sum(len(each.places) if isinstance(each, Run) else 1 for each in self._new) + len(self._proven)

    def has_room(self, size: int) -> bool:
        """Whether a piece of ``size`` bytes fits without evicting another."""
        return self.size + size <= self.capacity

    def get(self, key: int) -> Content | None:
        """Return the piece; None if it is not cached. May move it to the proven pieces."""
        content = self._proven.get(key)
        # 1. Proven already.
        if content is not None:
            self._proven.move_to_end(key)
            return content
        new = self._new.get(key)
        if new is not None:
            content, came = new
            # 2. A new single piece, requested too soon to prove anything: it stays new.
            if self._came - came < self._proof:
                self._new.move_to_end(key)
                return content
            del self._new[key]
            self.size -= len(content)
        else:
            run = self._runs.get(key)
            # 3. Unknown, or under way: see loading().
            if run is None or not run.finished:
                return None
            content = run.get(key)
            # 4. Part of a run, requested too soon to prove anything, or gone from it: the run stays new.
            if content is None or self._is_in_use(run):
                self._use(run)
                return content
            # A view would keep the whole run in memory.
            content = bytes(content)
            self._new.move_to_end(run)
            self._take_out(run, key)
        # 5. Requested again after a while: it leaves the new pieces, or its run, and is proven.
        self._prove(key, content)
        self._make_room()
        return content

    def _prove(self, key: int, content: Content) -> None:
        self._proven[key] = content
        self._proven_size += len(content)
        self.size += len(content)
        while self._proven_size > self._proven_capacity and len(self._proven) > 1:
            # A demoted piece gets another chance as a new one.
            oldest, demoted = self._proven.popitem(last=False)
            self._proven_size -= len(demoted)
            self._new[oldest] = demoted, self._came

    def get_all(self, keys: array[int]) -> list[Content] | None:
        """Return the pieces in order, neighbours in one buffer; None unless all are cached."""
        found: list[Content] = []
        done = 0
        while done < len(keys):
            part = self._neighbours(keys[done:])
            if part is not None:
                run, first, count = part
                self._use(run)
                content: Content | None = memoryview(run.content)[first : first + count * run.size]
                done += count
            else:
                content = self.get(keys[done])
                done += 1
            if content is None:
                return None
            found.append(content)
        return found

    def _neighbours(self, keys: array[int]) -> tuple[Run, int, int] | None:
        """The run that starts with ``keys[0]``, the offset of that piece and how many of ``keys`` follow in it. None
        unless the run is complete and a request proves nothing."""
        run = self._runs.get(keys[0])
        if run is None or not run.finished or not self._is_in_use(run) or len(run.places) < len(run.keys):
            return None
        place = run.places[keys[0]]
        first = place // run.size
        there = run.keys[first : first + len(keys)]
        return (run, place, len(there)) if there == keys[: len(there)] else None

    def _is_in_use(self, run: Run) -> bool:
        """Whether a request for one of its pieces proves nothing. The time of the last request counts, not of arrival:
        what several readers share may have been fetched long before they reach it."""
        return run.asked is None or self._came - run.asked < self._proof

    def _use(self, run: Run) -> None:
        run.asked = self._came
        self._new.move_to_end(run)

    def loading(self, key: int) -> Run | None:
        """Return the run under way that will bring the piece, and note the request; None if there is none."""
        run = self._runs.get(key)
        if run is None or run.finished:
            return None
        run.asked = self._came
        return run

    def knows(self, key: int) -> bool:
        """Whether the piece is cached or under way."""
        return key in self._runs or key in self._new or key in self._proven

    def begin(self, keys: Iterable[int], size: int, *, asked: bool = True) -> Run:
        """Note that pieces of ``size`` bytes are being loaded; none may be cached or under way. The caller must call
        :meth:`finish` in all cases. ``asked``: a reader waits for them; False for readahead."""
        run = Run(keys, size)
        if asked:
            run.asked = self._came
        self._runs.update(dict.fromkeys(run.keys, run))
        return run

    def finish(self, run: Run, content: Content | None, errors: Mapping[int, str]) -> None:
        """Store the result of a load and wake the tasks that wait. ``content`` holds all pieces in order, ``errors``
        maps the keys of failed pieces to a reason. ``content=None``: the whole load failed."""
        for key in run.keys if content is None else errors:
            if key in run.places:
                self._take_out(run, key)
                if key in errors:
                    run.errors[key] = errors[key]
        if content is not None and run.places:
            run.content = content
            if len(run.keys) == 1 and not isinstance(content, memoryview):
                (key,) = run.keys
                del self._runs[key]
                self.insert(key, content)
            else:
                self._came += len(content)
                if run.asked is not None:
                    run.asked = self._came
                run.memory = memoryview(content.obj).nbytes if isinstance(content, memoryview) else len(content)
                self._add(run, content, run.memory)
        run.finish()

    def insert(self, key: int, content: Content) -> None:
        """Insert a single piece, whose key must be neither cached nor under way."""
        self._came += len(content)
        self._add(key, content, len(content))

    def _add(self, what: int | Run, content: Content, memory: int) -> None:
        self._new[what] = content, self._came
        self.size += memory
        self._make_room()

    def _make_room(self) -> None:
        while self.size > self.capacity and len(self._new) + len(self._proven) > 1:
            if len(self._new) == 1:
                _, content = self._proven.popitem(last=False)
                self._proven_size -= len(content)
                self.size -= len(content)
                continue
            oldest, (content, _) = self._new.popitem(last=False)
            if isinstance(oldest, Run):
                self.size -= oldest.memory
                for key in oldest.places:
                    del self._runs[key]
            else:
                self.size -= len(content)

    def drop(self, key: int) -> None:
        """Forget a piece, because its host space is about to be reused."""
        run = self._runs.get(key)
        if run is not None:
            self._take_out(run, key)
            return
        content = self._proven.pop(key, None)
        if content is not None:
            self._proven_size -= len(content)
        elif key in self._new:
            content, _ = self._new.pop(key)
        if content is not None:
            self.size -= len(content)

    def _take_out(self, run: Run, key: int) -> None:
        """Remove a piece from its run, and the run with its last piece."""
        del run.places[key], self._runs[key]
        if not run.places and run in self._new:
            del self._new[run]
            self.size -= run.memory

    def clear(self) -> None:
        """Drop everything."""
        for key, run in self._runs.items():
            del run.places[key]
        self._runs.clear()
        self._new.clear()
        self._proven.clear()
        self.size = self._proven_size = 0
