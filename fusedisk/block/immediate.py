"""Requests that are answered at once: without waiting, without I/O but for one transfer from or to the page cache.

A short way past the door (:mod:`.io`) for what takes nothing of what the door is for: everything aligned, nothing
serialising, no hooks, no copy-on-read, mapping in memory, bytes in the page cache. Whatever else there is, the answer
is False, and the caller goes through the door, which also finds the words for errors. As nothing here suspends, a
request is finished before any other can begin, and need not be tracked.

What lies below the top layer of a read-only backing chain does not change as long as the graph does not, so where each
range of it leads, through all layers, is remembered: a chain of sixteen images costs one search more than a single one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING

from fusedisk.block import permissions
from fusedisk.block.driver import Buffer
from fusedisk.block.extent import DATA, SPECIAL, UNALLOCATED, ZERO
from fusedisk.block.io import PROBE_SIZE
from fusedisk.block.node import Node
from fusedisk.block.runs import RunMap
from fusedisk.core.zeroes import is_zero, zero_fill

if TYPE_CHECKING:
    from fusedisk.block.backend import Backend

_Fill = Callable[[int, Buffer], bool]
"""Fills a buffer from a place."""

_MOST_RUNS = 1 << 16
"""Kept of one chain: some 20 MiB."""
_ALIGNMENT = 1 << 21
"""Lookups begin at a multiple of this, so that random reads of neighbours share them."""
_LOOKAHEAD = 1 << 26
"""Bytes that one lookup asks about at most."""
_MOST_STEPS = 64
"""Extents that one miss looks up at most."""


class Immediate:
    """The short way to one backend's node."""

    __slots__ = ("_backend", "_chains", "_changes", "_detects", "_graph", "_node", "_off", "_reads", "_writes")

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._graph = backend.graph
        self._changes = -1
        self._off = False
        self._node: Node
        self._reads = self._writes = self._detects = False
        self._chains: dict[Node, RunMap[_Fill]] = {}

    def disable(self) -> None:
        """Answer nothing from now on."""
        self._off = True
        self._changes = -1

    def is_plain(self) -> bool:
        """Whether nothing in the graph must see requests, apart from finding their places."""
        if self._changes != self._graph.changes:
            self._look()
        return self._reads and not self._detects and not any(each.before_write for each in _below(self._node))

    def read(self, offset: int, buffer: Buffer) -> bool:
        """Fill ``buffer`` from ``offset``. False: it may hold anything."""
        if self._changes != self._graph.changes:
            self._look()
        backend, length = self._backend, len(buffer)
        if not self._reads or backend.quiesced or backend.root is None or offset + length > self._node.length:
            return False
        if not self._fill(self._node, offset, buffer, length):
            return False
        accounting = backend.accounting
        accounting.reads += 1
        accounting.bytes_read += length
        return True

    def write(self, offset: int, data: Buffer) -> bool:
        """Overwrite what has its place already. False: a part may be written, so the same is to be written again."""
        if self._changes != self._graph.changes:
            self._look()
        if not self._writes:
            return False
        backend, length, node = self._backend, len(data), self._node
        if (
            backend.quiesced
            or backend.root is None
            or offset + length > node.length
            or (self._detects and is_zero(data))
            or (node.guards_probe and offset < PROBE_SIZE)
            or not self._put(node, offset, data, length)
        ):
            return False
        accounting = backend.accounting
        accounting.writes += 1
        accounting.bytes_written += length
        return True

    def _look(self) -> None:
        """Work out anew, after a change of the graph, what holds for all requests."""
        self._changes = self._graph.changes
        self._chains.clear()
        backend = self._backend
        root = backend.root
        if root is None or self._off:
            self._reads = self._writes = False
            return
        self._node = node = root.node
        below = _below(node)
        # Whoever shares the image with another writer must ask the file each time.
        self._reads = not any(each.config.copy_on_read or each.config.force_share for each in below)
        self._writes = self._reads and bool(root.perm & permissions.WRITE) and backend.write_cache
        self._detects = any(each.config.detect_zeroes != "off" for each in below)
        for each in below:
            backing = each.backing
            if backing is not None and all(layer.config.read_only for layer in _below(backing.node)):
                self._chains[backing.node] = RunMap(_MOST_RUNS)

    # --- reading ----------------------------------------------------------------------------------------

    def _fill(self, node: Node, offset: int, buffer: Buffer, length: int) -> bool:
        if node.serialising:
            return False
        driver = node.driver
        if driver.moves_bytes:
            return driver.read_now(offset, buffer)
        while True:
            extent = driver.lookup(offset, length)
            if extent is None:
                return False
            status, count, child, place, _, _, _ = extent
            part = buffer if count == length else buffer[:count]
            if status == DATA:
                if not self._fill(child.node, place, part, count):  # type: ignore[union-attr]
                    return False
            elif status == UNALLOCATED:
                count = self._fill_below(node, offset, part, count)
                if not count:
                    return False
            elif status == ZERO:
                zero_fill(part)
            elif not driver.read_cached(offset, part):
                return False
            if count == length:
                return True
            offset += count
            length -= count
            buffer = buffer[count:]

    def _fill_below(self, node: Node, offset: int, buffer: Buffer, length: int) -> int:
        """Fill a prefix from what backs ``node``; returns its length, 0 where that takes more."""
        backing = node.children.get("backing")
        if backing is None:
            zero_fill(buffer)
            return length
        below = backing.node
        room = below.length - offset
        if room <= 0:
            zero_fill(buffer)
            return length
        if length > room:
            length = room
        runs = self._chains.get(below)
        if runs is None:
            return length if self._fill(below, offset, buffer[:length], length) else 0
        index = bisect_right(runs.starts, offset) - 1
        if index < 0 or offset >= runs.ends[index]:
            self._learn(runs, below, offset, length)
            index = runs.find(offset)
            if index < 0:
                return 0
        known = runs.ends[index] - offset
        if length > known:
            length = known
        part = buffer if length == len(buffer) else buffer[:length]
        return length if runs.targets[index](offset + runs.deltas[index], part) else 0

    def _learn(self, runs: RunMap[_Fill], node: Node, offset: int, length: int) -> None:
        """Find out where ``offset`` of a read-only chain leads, and what lies around it."""
        position, end = offset & -_ALIGNMENT, offset + length
        for _ in range(_MOST_STEPS):
            known = runs.find(position)
            if known >= 0:
                position = runs.ends[known]
            else:
                found = _resolve(node, position, _LOOKAHEAD)
                if found is None:
                    if position >= offset:
                        return
                    position = offset
                    continue
                position = _add(runs, position, found)
            if position >= end:
                return
        if position <= offset:
            found = _resolve(node, offset, length)
            if found is not None:
                _add(runs, offset, found)

    # --- writing ----------------------------------------------------------------------------------------

    def _put(self, node: Node, offset: int, data: Buffer, length: int) -> bool:
        if node.serialising or node.before_write or node.fenced is not None or node.config.read_only:
            return False
        driver = node.driver
        if driver.moves_bytes:
            if offset + length > node.length or not driver.write_now(offset, data):
                return False
            node.written += 1
            return True
        while True:
            extent = driver.lookup_in_place(offset, length)
            if extent is None:
                return False
            count, child, place, _, _, _ = extent
            if not self._put(child.node, place, data if count == length else data[:count], count):
                return False
            if count == length:
                node.written += 1
                return True
            offset += count
            length -= count
            data = data[count:]


def _below(node: Node) -> list[Node]:
    """``node`` and everything that it stands on."""
    found = {node: None}
    queue = [node]
    while queue:
        for edge in queue.pop().children.values():
            if edge.node not in found:
                found[edge.node] = None
                queue.append(edge.node)
    return list(found)


_Found = tuple[int, _Fill, int]
"""A length, what fills that much, and the place to give to it."""


def _add(runs: RunMap[_Fill], offset: int, found: _Found) -> int:
    """Remember what was found at ``offset``; returns where it ends."""
    count, fill, place = found
    runs.add(offset, offset + count, fill, place - offset if fill is not _zeroes else 0)
    return offset + count


def _resolve(node: Node, offset: int, length: int) -> _Found | None:
    """What fills a prefix of a range of a node; None where a layer's mapping is not in memory."""
    while True:
        length = min(length, node.length - offset)
        driver = node.driver
        if driver.moves_bytes:
            return length, driver.read_now, offset
        extent = driver.lookup(offset, length)
        if extent is None:
            return None
        status, count, child, place, _, _, _ = extent
        if status == DATA:
            assert child is not None
            if place >= child.node.length:
                return count, _zeroes, 0
            node, offset, length = child.node, place, count
            continue
        if status == SPECIAL:
            return count, driver.read_cached, offset
        backing = node.backing if status == UNALLOCATED else None
        if backing is None or offset >= backing.node.length:
            return count, _zeroes, 0
        node, length = backing.node, count


def _zeroes(place: int, buffer: Buffer) -> bool:
    zero_fill(buffer)
    return True
