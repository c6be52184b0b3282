"""Inflated pieces of an image, bounded in bytes, and those that are being inflated right now.

A piece has a key that says where its compressed data lies, so two pieces may have the same key one after the other:
its host space is freed and holds something else later. So whoever frees it calls :meth:`InflatedCache.drop` before
the space can be used again. That holds for loads under way too: what they read is theirs to use no more.

All of it is synchronous, but for waiting.
"""

from __future__ import annotations

import os
from collections import OrderedDict

import trio

from fusedisk.core.inflate import InflateError

_LEAST_CAPACITY, _MOST_CAPACITY = 16 << 20, 128 << 20
_SHARE_OF_MEMORY = 64


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
        self.content: bytes | None = None
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
    """Least recently used pieces by key."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        """Bytes. The piece that came last stays, however large it is."""
        self.size = 0
        """Bytes kept."""
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._loads: dict[int, Load] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: int) -> bytes | None:
        """The piece, if it is there."""
        content = self._kept.get(key)
        if content is not None:
            self._kept.move_to_end(key)
        return content

    def loading(self, key: int) -> Load | None:
        """The load under way for a key."""
        return self._loads.get(key)

    def knows(self, key: int) -> bool:
        """Whether the piece is there or on its way."""
        return key in self._kept or key in self._loads

    def begin(self, key: int, start: int, length: int, size: int) -> Load:
        """Start a load, for a key that has none; :meth:`finish` is called for it whatever happens."""
        load = self._loads[key] = Load(key, start, length, size)
        return load

    def finish(self, load: Load, result: bytes | InflateError | None) -> None:
        """End a load: with the piece, with the reason why there is none, or with nothing where that is not known."""
        if not load.stale:
            del self._loads[load.key]
            if isinstance(result, bytes):
                load.content = result
                self._keep(load.key, result)
            else:
                load.error = result
        load.finish()

    def drop(self, key: int) -> None:
        """What the key stands for is freed."""
        load = self._loads.pop(key, None)
        if load is not None:
            load.stale = True
        content = self._kept.pop(key, None)
        if content is not None:
            self.size -= len(content)

    def clear(self) -> None:
        """Drop everything."""
        for load in self._loads.values():
            load.stale = True
        self._loads.clear()
        self._kept.clear()
        self.size = 0

    def _keep(self, key: int, content: bytes) -> None:
        self._kept[key] = content
        self.size += len(content)
        while self.size > self.capacity and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self.size -= len(oldest)
