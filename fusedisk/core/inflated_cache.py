"""Inflated pieces of an image, bounded in bytes, and those that are being inflated right now.

Pieces that are inflated together stay together, in one memory, until one of them proves that it is worth keeping: then
it gets a copy of its own.

A piece has a key that says where its compressed data lies, so two pieces may have the same key one after the other:
its host space is freed and holds something else later. So whoever frees it calls :meth:`InflatedCache.drop` before
the space can be used again. That holds for loads under way too: what they read is theirs to use no more.

What is asked for long after it came, or after its neighbours were asked for, is kept in preference to what is not, so
that reading an image from one end to the other does not cost those their pieces who read some of them all the time.
Long, since who reads on in small steps asks for each piece many times in a row.

All of it is synchronous, but for waiting.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import trio

from fusedisk.core.inflate import Content

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


class Run:
    """Pieces that come together."""

    __slots__ = ("_done", "asked", "content", "errors", "finished", "keys", "memory", "places", "size")

    def __init__(self, keys: Iterable[int], size: int) -> None:
        self.keys = array("Q", keys)
        self.size = size
        """Bytes of each piece."""
        self.places = dict(zip(self.keys, range(0, len(self.keys) * size, size), strict=True))
        """Where in the content the piece of a key is; those that are not here are to be had no more."""
        self.content: Content = b""
        """The pieces one behind the other, once they are there."""
        self.memory = 0
        """Bytes that the content takes up."""
        self.asked: int | None = None
        """Bytes that had come when one of the pieces was last asked for."""
        self.finished = False
        self.errors: dict[int, str] = {}
        """Why pieces could not be inflated. An exception would hold all that was in its reach in memory."""
        self._done: trio.Event | None = None

    def get(self, key: int) -> Content | None:
        """A piece, once the run is finished."""
        place = self.places.get(key)
        if place is None:
            return None
        if len(self.content) == self.size:
            return self.content
        return memoryview(self.content)[place : place + self.size]

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
        """Bytes. What came last stays, however large it is."""
        self.size = 0
        """Bytes of memory that the pieces take up."""
        self._new: OrderedDict[int | Run, tuple[Content, int]] = OrderedDict()
        """Runs, and pieces that came alone by their key: the content, and how many bytes had come by then."""
        self._runs: dict[int, Run] = {}
        """Runs, also those under way, by the keys that they have a place for."""
        self._came = 0
        """Bytes."""
        self._proof = capacity // _SHARE_OF_PROOF
        self._proven: OrderedDict[int, Content] = OrderedDict()
        self._proven_size = 0
        self._proven_capacity = capacity - capacity // _SHARE_OF_NEW

    def __len__(self) -> int:
        return sum(len(each.places) if isinstance(each, Run) else 1 for each in self._new) + len(self._proven)

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
        if new is not None:
            content, came = new
            if self._came - came < self._proof:
                self._new.move_to_end(key)
                return content
            del self._new[key]
            self.size -= len(content)
        else:
            run = self._runs.get(key)
            if run is None or not run.finished:
                return None
            content = run.get(key)
            if content is None or self._is_in_use(run):
                self._use(run)
                return content
            # It would keep its neighbours in memory.
            content = bytes(content)
            self._new.move_to_end(run)
            self._take_out(run, key)
        self._prove(key, content)
        self._make_room()
        return content

    def _prove(self, key: int, content: Content) -> None:
        self._proven[key] = content
        self._proven_size += len(content)
        self.size += len(content)
        while self._proven_size > self._proven_capacity and len(self._proven) > 1:
            # It gets another chance.
            oldest, demoted = self._proven.popitem(last=False)
            self._proven_size -= len(demoted)
            self._new[oldest] = demoted, self._came

    def get_all(self, keys: array[int]) -> list[Content] | None:
        """The pieces, if all of them are there, in as few parts as they are in memory."""
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
        """Pieces that lie together, are all still there, and prove nothing: the first of them, and how many."""
        run = self._runs.get(keys[0])
        if run is None or not run.finished or not self._is_in_use(run) or len(run.places) < len(run.keys):
            return None
        place = run.places[keys[0]]
        first = place // run.size
        there = run.keys[first : first + len(keys)]
        return (run, place, len(there)) if there == keys[: len(there)] else None

    def _is_in_use(self, run: Run) -> bool:
        """Whether who asks for a piece proves nothing. What goes ahead of several readers may have come long before
        they get there: so what counts is when a piece was asked for."""
        return run.asked is None or self._came - run.asked < self._proof

    def _use(self, run: Run) -> None:
        run.asked = self._came
        self._new.move_to_end(run)

    def loading(self, key: int) -> Run | None:
        """The run under way that a piece which is asked for comes with."""
        run = self._runs.get(key)
        if run is None or run.finished:
            return None
        run.asked = self._came
        return run

    def knows(self, key: int) -> bool:
        """Whether the piece is there or on its way."""
        return key in self._runs or key in self._new or key in self._proven

    def begin(self, keys: Iterable[int], size: int, *, asked: bool = True) -> Run:
        """Start to load pieces of ``size`` bytes that are neither there nor on their way; :meth:`finish` is called for
        it whatever happens. ``asked``: somebody waits for them, rather than that they come ahead of who may."""
        run = Run(keys, size)
        if asked:
            run.asked = self._came
        self._runs.update(dict.fromkeys(run.keys, run))
        return run

    def finish(self, run: Run, content: Content | None, errors: Mapping[int, str]) -> None:
        """The pieces are there, one behind the other, but for those with an error, by their key. Without content it is
        not known what they are."""
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
                self.keep(key, content)
            else:
                self._came += len(content)
                if run.asked is not None:
                    run.asked = self._came
                run.memory = memoryview(content.obj).nbytes if isinstance(content, memoryview) else len(content)
                self._add(run, content, run.memory)
        run.finish()

    def keep(self, key: int, content: Content) -> None:
        """Keep the piece of a key that has none and no load under way."""
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
        """What the key stands for is freed."""
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
        """Give a piece's place up, and the run with its last one."""
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
