"""Requests that are answered without waiting, and with no I/O but one transfer from or to the page cache.

A short way past the door (:mod:`.io`) for requests that need nothing from it: :mod:`.ways` says that it is open,
everything is aligned, nothing is serialising, the mapping is in memory and the bytes are in the page cache. Nothing
here suspends, so a request is finished before any other can begin, and need not be tracked.

One rule for all that answers *without waiting*, here, in the drivers (``lookup``, ``read_now``, ``cached_pieces`` and
the others of their section) and in exports (``read_now``, ``lend_now``, ``write_now``): it either has the answer or
*declines*. To decline is to return False where the answer would be True, None where it would be a value. It says
nothing about why, raises nothing, and the caller goes through the door, which waits and words the errors. A coroutine
has no value to decline with, so inside :func:`~fusedisk.core.at_once.run_at_once` it raises WouldWait; the caller of
``run_at_once`` turns that into declining at once.

The layers of a read-only backing chain do not change while the graph does not, so where each range leads, through all
layers, is remembered. Small requests also use :mod:`.places`.
"""

from __future__ import annotations

from bisect import bisect_right

from fusedisk.block.model.driver import Driver
from fusedisk.block.model.extent import DATA, SPECIAL, UNALLOCATED, ZERO
from fusedisk.block.model.flags import Buffer
from fusedisk.block.model.node import Node
from fusedisk.block.model.observer import Change
from fusedisk.block.request.attempts import Attempts
from fusedisk.block.request.chains import Fill, learn
from fusedisk.block.request.checks import PROBE_SIZE
from fusedisk.block.request.places import PLACE_BITS, PLACE_SIZE, Place, Places
from fusedisk.block.request.runs import RunMap
from fusedisk.block.request.ways import CLOSED, Requester, Ways, ways_of
from fusedisk.core.zeroes import is_zero, zero_fill

Lent = tuple[int, int, int]
"""A part of a host file: its descriptor, an offset and a length in bytes."""


class Pieces(list[memoryview]):
    """A range as views of our own memory."""


_MOST_LENT = 16
"""The most parts of host files that one range may consist of."""

_WRITE = Change.WRITE
"""A global is found faster than a member of an enum."""

_MOST_RUNS = 1 << 16
"""Kept for one chain: some 20 MiB."""


class Immediate:
    """The short way to one backend's node."""

    __slots__ = (
        "_attempts",
        "_backend",
        "_chains",
        "_changes",
        "_detects",
        "_graph",
        "_node",
        "_off",
        "_places",
        "_reads",
        "_ways",
        "_writes",
    )

    def __init__(self, backend: Requester) -> None:
        self._backend = backend
        self._graph = backend.graph
        self._changes = -1
        self._off = False
        self._node: Node
        self._ways = CLOSED
        self._reads = self._writes = self._detects = False
        """Copies of ``_ways``: an attribute is cheaper to look at than a field of a tuple's."""
        self._attempts = Attempts()
        self._chains: dict[Node, RunMap[Fill]] = {}
        self._places = Places(backend.accounting, self._chains)

    def disable(self) -> None:
        """Send everything through the door from now on."""
        self._off = True
        self._changes = -1

    def ways(self) -> Ways:
        """Return the short ways that are open to the backend now."""
        if self._changes != self._graph.changes:
            self._look()
        return self._ways

    def read(self, offset: int, buffer: Buffer) -> bool:
        """Fill ``buffer`` from ``offset``. False: ``buffer`` may hold anything."""
        if self._changes != self._graph.changes:
            self._look()
        length = len(buffer)
        if not self._reads or not length:  # closed, or nothing to do
            return False
        backend, node = self._backend, self._node
        if backend.drain_count or backend.root is None or offset + length > node.length:  # the door waits, or refuses
            return False
        places = self._places
        if node.generation != places.generation:
            places.outdate(node.generation)
        place = places.known.get(offset >> PLACE_BITS)
        if place is not None and offset + length <= place[2]:
            fill, delta, _, leaf, _ = place
            # Another request must end first, or the bytes are not in memory.
            if node.serialising or (leaf is not None and leaf.serialising) or not fill(offset + delta, buffer):
                return False
        else:
            if not self._fill(node, offset, buffer, length):
                return False
            if places.pause:
                places.pause -= 1
            elif place is None and length <= PLACE_SIZE:
                places.remember(node, offset, writes=self._writes)
        accounting = backend.accounting
        accounting.reads += 1
        accounting.bytes_read += length
        return True

    def lend(self, offset: int, length: int) -> list[Lent] | Pieces | None:
        """Return where the bytes of a range lie, as parts of host files in the host's page cache or as pieces of our
        memory, so that the caller can send them without a copy and then call :meth:`count_lent`. Valid until the next
        await. None: the bytes are elsewhere, use :meth:`read`."""
        if self._changes != self._graph.changes:
            self._look()
        backend = self._backend
        if not self._reads or backend.drain_count or backend.root is None or offset + length > self._node.length:
            return None
        parts: list[Lent] = []
        pieces = Pieces()
        if not self._trace(self._node, offset, length, parts, pieces):
            return None
        return pieces or parts

    def count_lent(self, length: int) -> None:
        """Count bytes that were sent from where :meth:`lend` found them."""
        accounting = self._backend.accounting
        accounting.reads += 1
        accounting.bytes_read += length

    def write(self, offset: int, data: Buffer) -> bool:
        """Overwrite space that is allocated already. False: a part may be written, so the caller must write all of it
        again."""
        if self._changes != self._graph.changes:
            self._look()
        length = len(data)
        if not self._writes or not length:  # closed, or nothing to do
            return False
        backend, node = self._backend, self._node
        if (
            backend.drain_count
            or backend.root is None
            or offset + length > node.length
            or (self._detects and is_zero(data))  # the door makes a write-zeroes of it
            or (node.guards_probe and offset < PROBE_SIZE)  # the door looks at what is written
        ):
            return False
        places = self._places
        if node.generation != places.generation:
            places.outdate(node.generation)
        place = places.known.get(offset >> PLACE_BITS)
        if place is not None and offset + length <= place[2] and place[4] is not None:
            if not self._put_at(node, offset, data, length, place):
                return False
        elif not self._put(node, offset, data, length):
            return False
        elif places.pause:
            places.pause -= 1
        elif place is None and length <= PLACE_SIZE and node.generation == places.generation:
            places.remember(node, offset, writes=True)
        accounting = backend.accounting
        accounting.writes += 1
        accounting.bytes_written += length
        return True

    def _look(self) -> None:
        """After a change of the graph, work out again which requests may use this way."""
        self._changes = self._graph.changes
        self._chains.clear()
        self._places.forget()
        backend = self._backend
        self._ways = ways = CLOSED if self._off else ways_of(backend)
        self._reads, self._writes, self._detects = ways.reads, ways.writes, ways.detects
        root = backend.root
        if root is None:
            return
        self._node = node = root.node
        for each in node.with_all_below():
            backing = each.backing
            if backing is not None and all(layer.config.read_only for layer in backing.node.with_all_below()):
                self._chains[backing.node] = RunMap(_MOST_RUNS)

    # --- reading ----------------------------------------------------------------------------------------

    def _fill(self, node: Node, offset: int, buffer: Buffer, length: int) -> bool:
        if node.serialising:
            return False
        driver = node.driver
        if driver.moves_bytes:
            return driver.read_now(offset, buffer)
        if offset + length > node.length:
            return False
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
            elif not driver.read_cached(offset, part, extent):
                return False
            if count == length:
                return True
            offset += count
            length -= count
            buffer = buffer[count:]

    def _fill_below(self, node: Node, offset: int, buffer: Buffer, length: int) -> int:
        """Fill a prefix from the backing chain of ``node``; returns its length, 0 if this way cannot."""
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
            learn(runs, below, offset, length)
            index = runs.find(offset)
            if index < 0:
                return 0
        known = runs.ends[index] - offset
        if length > known:
            length = known
        part = buffer if length == len(buffer) else buffer[:length]
        return length if runs.targets[index](offset + runs.deltas[index], part) else 0

    # --- lending ----------------------------------------------------------------------------------------

    def _trace(self, node: Node, offset: int, length: int, parts: list[Lent], pieces: Pieces) -> bool:
        """Add the file parts that a range of ``node`` consists of, or pieces of memory if they cover all of it."""
        driver = node.driver
        if node.serialising or len(parts) >= _MOST_LENT:
            return False
        if driver.moves_bytes:
            return _lend(driver, offset, length, parts)
        if offset + length > node.length:
            return False
        while True:
            extent = driver.lookup(offset, length)
            if extent is None:
                return False
            status, count, child, place, _, _, _ = extent
            if status == DATA:
                found = self._trace(child.node, place, count, parts, pieces)  # type: ignore[union-attr]
            elif status == SPECIAL and count == length and not parts:
                pieces += driver.cached_pieces(extent, offset) or ()
                return bool(pieces)
            else:
                found = status == UNALLOCATED and self._trace_below(node, offset, count, parts)
            if not found or count == length:
                return found
            if pieces:
                return False
            offset += count
            length -= count

    def _trace_below(self, node: Node, offset: int, length: int, parts: list[Lent]) -> bool:
        """Add the parts of the backing chain of ``node``, if the chain's runs are known already."""
        backing = node.backing
        runs = self._chains.get(backing.node) if backing is not None else None
        end = offset + length
        while runs is not None and offset < end:
            index = runs.find(offset)
            if index < 0 or len(parts) >= _MOST_LENT:
                return False
            # A target that reads from a file is a method of its driver.
            driver = getattr(runs.targets[index], "__self__", None)
            stop = min(runs.ends[index], end)
            if not isinstance(driver, Driver) or not driver.moves_bytes:
                return False
            if not _lend(driver, offset + runs.deltas[index], stop - offset, parts):
                return False
            offset = stop
        return runs is not None

    # --- writing ----------------------------------------------------------------------------------------

    def _put_at(self, node: Node, offset: int, data: Buffer, length: int, place: Place) -> bool:
        """Do as :meth:`_put` where it is known which bytes of a file to overwrite."""
        _, delta, _, leaf, put = place
        assert leaf is not None
        assert put is not None
        if node.serialising or node.fenced is not None or leaf.serialising or leaf.fenced is not None:
            return False
        there = offset + delta
        written = put(there, data)  # the driver tells of what it has written of it
        if written:
            if there + length > leaf.length:
                # An image file grows when clusters beyond its end are written.
                leaf.take_length(there + length)
            leaf.changed(there, length, _WRITE)
        node.changed(offset, length, _WRITE)
        return written

    def _put(self, node: Node, offset: int, data: Buffer, length: int) -> bool:
        if node.serialising or node.fenced is not None or node.config.read_only:
            return False
        driver = node.driver
        if driver.moves_bytes:
            if not driver.write_now(offset, data):  # the driver tells of what it has written of it
                return False
            if offset + length > node.length:
                # An image file grows when clusters beyond its end are written.
                node.take_length(offset + length)
            node.changed(offset, length, _WRITE)
            return True
        if offset + length > node.length:
            return False
        start = offset
        while True:
            extent = driver.lookup_in_place(offset, length)
            if extent is not None:
                count, child, place, _, _, _ = extent
                # Also where it fails, the child may have written a part of these bytes.
                written = self._put(child.node, place, data if count == length else data[:count], count)
            else:  # not allocated, or not known without I/O
                count = self._put_new(node, offset, data, length) if self._ways.at_once else 0
                written = count > 0
            if count == length or not written:
                changed = offset + count - start
                if changed:
                    node.changed(start, changed, _WRITE)
                return written
            offset += count
            length -= count
            data = data[count:]

    def _put_new(self, node: Node, offset: int, data: Buffer, length: int) -> int:
        """Write a prefix of the range to new space, with the old bytes around it; returns its length, 0 if this way
        cannot."""
        attempts = self._attempts
        if attempts.skipped():
            return 0
        driver = node.driver
        extent = driver.map_write_now(offset, length)
        if extent is None:
            return 0
        count, child, place, allocation, head, tail = extent
        part: Buffer | None = data if count == length else data[:count]
        if head or tail:
            part, place = self._surrounded(node, offset, data[:count], head, tail), place - head
        if part is None or not self._put(child.node, place, part, len(part)):
            driver.abandon(allocation)
            attempts.failed()
            return 0
        driver.publish_now(allocation)
        attempts.backoff = 0
        return count

    def _surrounded(self, node: Node, offset: int, data: Buffer, head: int, tail: int) -> Buffer | None:
        """Return ``data`` with the old bytes before and behind it; None if this way cannot read them."""
        if not self._reads:
            return None
        length = len(data)
        whole = memoryview(bytearray(head + length + tail))
        whole[head : head + length] = data
        if head and not self._fill(node, offset - head, whole[:head], head):
            return None
        if tail and not self._fill(node, offset + length, whole[head + length :], tail):
            return None
        return whole


def _lend(driver: Driver, offset: int, length: int, parts: list[Lent]) -> bool:
    """Add a range of a file, if it is in the page cache."""
    descriptor = driver.resident_descriptor(offset, length)
    if descriptor is None:
        return False
    parts.append((descriptor, offset, length))
    return True
