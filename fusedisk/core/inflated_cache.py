"""Inflated pieces of an image, bounded in bytes, and those that are being inflated right now.

A piece has a key that says where its compressed data lies, so two pieces may have the same key one after the other:
its host space is freed and holds something else later. So whoever frees it calls :meth:`InflatedCache.drop` before
the space can be used again. That holds for loads under way too: what they read is theirs to use no more.

What is asked for long after it came is kept in preference to what is not, so that reading an image from one end to the
other does not cost those their pieces who read some of them all the time. Long, since who reads on in small steps asks
for each piece many times in a row, and a while after it was fetched ahead of them.

All of it is synchronous, but for waiting.
"""

from __future__ import annotations

import os
from collections import OrderedDict

import trio

from fusedisk.core.inflate import Content, InflateError

_LEAST_CAPACITY, _MOST_CAPACITY = 16 << 20, 128 << 20
_SHARE_OF_MEMORY = 64
_SHARE_OF_NEW = 4
"""The share of the room, one in so many, that is for pieces that are not proven."""
_SHARE_OF_PROOF = 6
"""The share of the room, one in so many, that must come in between before a piece that is asked for is proven. More
than goes ahead of a reader, less than there is room for."""


def inflated_capacity() -> int:
    """Bytes that one image's pieces may take up on this machine: a sixty-fourth of its memory, within reason."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(memory // _SHARE_OF_MEMORY, _LEAST_CAPACITY), _MOST_CAPACITY)


class Load:
    """One piece on its way into the cache."""

    __slots__ = ("_done", "content", "error", "finished", "key", "length", "size", "stale", "start")

    def __init__(self, key: int, start: int, length: int, size: int) -> None:
        self.key = key
        self.start = start
        """Host offset of the compressed data."""
        self.length = length
        """Bytes of compressed data, maybe with something behind it."""
        self.size = size
        """Bytes to inflate it to."""
        self.stale = False
        """The space was freed meanwhile."""
        self.finished = False
        self.content: Content | None = None
        """The piece, once it is there and not stale."""
        self.error: InflateError | None = None
        """Why it could not be inflated, unless it is stale."""
        self._done: trio.Event | None = None

    async def wait(self) -> None:
        """Wait until it is finished."""
        if not self.finished:
            if self._done is None:
                self._done = trio.Event()
            await self._done.wait()

    def finish(self) -> None:
        """Wake who waits."""
        self.finished = True
        if self._done is not None:
            self._done.set()


class InflatedCache:
    """Pieces by key: new ones, and proven ones that were asked for long after they came, least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        """Bytes. The piece that came last stays, however large it is."""
        self.size = 0
        """Bytes of memory that the pieces take up. A view takes up all of what it is a view of."""
        self._shared: dict[int, int] = {}
        """How many of the pieces are views of the same, by its id."""
        self._new: OrderedDict[int, tuple[Content, int]] = OrderedDict()
        """With what had come before."""
        self._came = 0
        """Bytes."""
        self._proof = capacity // _SHARE_OF_PROOF
        self._proven: OrderedDict[int, Content] = OrderedDict()
        self._proven_size = 0
        self._proven_capacity = capacity - capacity // _SHARE_OF_NEW
        self._loads: dict[int, Load] = {}

    def __len__(self) -> int:
        return len(self._new) + len(self._proven)

    def has_room(self, size: int) -> bool:
        """Whether a piece of so many bytes costs no other its place."""
        return self.size + size <= self.capacity

    def get(self, key: int) -> Content | None:
        """The piece, if it is there."""
        content = self._proven.get(key)
        if content is not None:
            self._proven.move_to_end(key)
            return content
        new = self._new.get(key)
        if new is None:
            return None
        content, came = new
        if self._came - came < self._proof:
            self._new.move_to_end(key)
            return content
        del self._new[key]
        if isinstance(content, memoryview):
            # It would keep its neighbours in memory.
            self._uncount(content)
            content = bytes(content)
            self.size += len(content)
        self._proven[key] = content
        self._proven_size += len(content)
        while self._proven_size > self._proven_capacity and len(self._proven) > 1:
            # It gets another chance.
            oldest, demoted = self._proven.popitem(last=False)
            self._proven_size -= len(demoted)
            self._new[oldest] = demoted, self._came
        return content

    def loading(self, key: int) -> Load | None:
        """The load under way for a key."""
        return self._loads.get(key)

    def knows(self, key: int) -> bool:
        """Whether the piece is there or on its way."""
        return key in self._proven or key in self._new or key in self._loads

    def begin(self, key: int, start: int, length: int, size: int) -> Load:
        """Start a load, for a key that has none; :meth:`finish` is called for it whatever happens."""
        load = self._loads[key] = Load(key, start, length, size)
        return load

    def finish(self, load: Load, result: Content | InflateError | None) -> None:
        """End a load: with the piece, with the reason why there is none, or with nothing where that is not known."""
        if not load.stale:
            del self._loads[load.key]
            if result is None or isinstance(result, InflateError):
                load.error = result
            else:
                load.content = result
                self.keep(load.key, result)
        load.finish()

    def drop(self, key: int) -> None:
        """What the key stands for is freed."""
        load = self._loads.pop(key, None)
        if load is not None:
            load.stale = True
        content = self._proven.pop(key, None)
        if content is not None:
            self._proven_size -= len(content)
            self._uncount(content)
        elif key in self._new:
            self._uncount(self._new.pop(key)[0])

    def clear(self) -> None:
        """Drop everything."""
        for load in self._loads.values():
            load.stale = True
        self._loads.clear()
        self._new.clear()
        self._proven.clear()
        self._shared.clear()
        self.size = self._proven_size = 0

    def keep(self, key: int, content: Content) -> None:
        """Keep the piece of a key that has none and no load under way."""
        self._new[key] = content, self._came
        self._came += len(content)
        self._count(content)
        while self.size > self.capacity and len(self) > 1:
            if len(self._new) > 1:
                _, (oldest, _) = self._new.popitem(last=False)
            else:
                _, oldest = self._proven.popitem(last=False)
                self._proven_size -= len(oldest)
            self._uncount(oldest)

    def _count(self, content: Content) -> None:
        if isinstance(content, memoryview):
            whole = content.obj
            views = self._shared[id(whole)] = self._shared.get(id(whole), 0) + 1
            if views == 1:
                self.size += memoryview(whole).nbytes
        else:
            self.size += len(content)

    def _uncount(self, content: Content) -> None:
        if isinstance(content, memoryview):
            whole = content.obj
            views = self._shared[id(whole)] = self._shared[id(whole)] - 1
            if not views:
                del self._shared[id(whole)]
                self.size -= memoryview(whole).nbytes
        else:
            self.size -= len(content)
