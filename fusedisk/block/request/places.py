"""Where small requests lead: for each 64 KiB of a disk, until its mapping changes, or what may be overwritten does.

A second request takes one look into a table, however deep the chain of backing files is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fusedisk.block.model.extent import DATA, SPECIAL, UNALLOCATED, Extent
from fusedisk.block.model.flags import Buffer
from fusedisk.block.model.node import Node
from fusedisk.block.request.accounting import Accounting
from fusedisk.block.request.chains import Fill, fill_with_zeroes
from fusedisk.block.request.runs import RunMap

_Put = Callable[[int, Buffer], bool]
"""``Driver.write_now``."""

Place = tuple[Fill, int, int, Node | None, _Put | None]
"""The function that fills a buffer, its source offset minus the disk offset, the disk offset where that ends, the node
that may have serialising requests, and the function that overwrites, None where that needs more."""

PLACE_BITS = 16
PLACE_SIZE = 1 << PLACE_BITS
MOST_PLACES = 1 << 15
"""Kept for one disk: some 8 MiB."""
_REACH = 1 << 20
"""The most bytes that one lookup covers; the places that fall into its extent are remembered with it."""
STEADY = 64
"""After a change of the mapping, the least number of requests that remember no places."""
PAUSE = 1 << 19
"""The most such requests, if remembering does not pay: each place should be used several times."""


class Places:
    """The places of one disk."""

    __slots__ = ("_accounting", "_chains", "_looks", "_since", "_wait", "generation", "known", "pause")

    def __init__(self, accounting: Accounting, chains: Mapping[Node, RunMap[Fill]]) -> None:
        """``accounting``: of the requests that use the places. ``chains``: where the read-only backing chains lead."""
        self._accounting = accounting
        self._chains = chains
        self.known: dict[int, Place] = {}
        """By the number of 64 KiB."""
        self.generation = -1
        """The generation of the node's mapping that the places come from."""
        self.pause = 0
        """The number of requests until places are remembered again."""
        self._wait = STEADY
        """The number of requests between a change of the mapping and the first place that is remembered."""
        self._since = 0
        """The count of reads and writes when the first of the places was remembered."""
        self._looks = 0
        """The number of lookups for places since then."""

    def forget(self) -> None:
        """Forget all places after a change of the graph."""
        self.known.clear()
        self.generation = -1

    def outdate(self, generation: int) -> None:
        """Forget all places after a change of the mapping. If they did not pay, wait longer before making new ones."""
        if self.known:
            self._wait = STEADY if self._pay() else min(2 * self._wait + 1, PAUSE)
        self.known.clear()
        self.generation = generation
        self.pause = max(self.pause, self._wait)

    def _pay(self) -> bool:
        """Whether there were several requests for each lookup of places."""
        return self._requests() - self._since >= 4 * self._looks

    def _requests(self) -> int:
        return self._accounting.reads + self._accounting.writes

    def remember(self, node: Node, offset: int, *, writes: bool) -> None:
        """Remember where the 64 KiB of ``node`` around ``offset`` lead, if they lead to one place. ``writes``: writes
        may go there without waiting."""
        places = self.known
        if not places:
            self._since = self._requests()
            self._looks = 0
        elif len(places) >= MOST_PLACES:
            # If most requests found no place, the disk is too large for remembering.
            self.pause = 0 if self._pay() else PAUSE
            places.clear()
            return
        first = offset >> PLACE_BITS
        start = first << PLACE_BITS
        if node.driver.moves_bytes:
            self._looks += 1
            places[first] = _NOWHERE
            return
        longest = min(_REACH, node.length - start)
        extent = node.driver.lookup(start, longest)
        if extent is None:
            return
        writable = start + (_overwritable(node, start, extent) if writes else 0)
        place = self._place(node, extent, start, start, writable)
        if place is None:
            return
        self._looks += 1
        places[first] = place
        # If the lookup was cut off at its limit, the last place gets a lookup of its own: its extent may be longer.
        for other in range(first + 1, (start + extent.length >> PLACE_BITS) - (extent.length == _REACH)):
            position = other << PLACE_BITS
            if position + PLACE_SIZE > place[2]:
                place = self._place(node, extent, start, position, writable)
                if place is None:
                    return
            places[other] = place

    def _place(self, node: Node, extent: Extent, start: int, position: int, writable: int) -> Place | None:
        """Return where the disk leads at ``position`` inside an extent that begins at ``start`` and may be overwritten
        up to ``writable``; None if tables in memory do not tell."""
        status, count, child, place, _, _, _ = extent
        end = start + count
        if status == DATA:
            leaf = child.node  # type: ignore[union-attr]
            driver = leaf.driver
            put = driver.write_now if writable >= end and not leaf.config.read_only else None
            return (driver.read_now, place - start, end, leaf, put) if driver.moves_bytes else _NOWHERE
        if status == SPECIAL:
            if position != start:
                return None
            source = node.driver.cached_source(extent, start)
            return (source[0], 0, start + source[1], None, None) if source is not None else _NOWHERE
        backing = node.backing if status == UNALLOCATED else None
        if backing is None:
            return fill_with_zeroes, 0, end, None, None
        runs = self._chains.get(backing.node)
        if runs is None:
            return _NOWHERE  # the backing chain may change and grow
        if position >= backing.node.length:
            return fill_with_zeroes, 0, end, None, None
        index = runs.find(position)
        if index < 0:
            return None
        return runs.targets[index], runs.deltas[index], min(runs.ends[index], end), None, None


def _overwritable(node: Node, start: int, extent: Extent) -> int:
    """Return how many bytes of an extent at ``start`` may be overwritten where they lie, from its begin on."""
    if extent.status != DATA:
        return 0
    found = node.driver.lookup_in_place(start, extent.length)
    return found.length if found is not None and found[1:3] == (extent.child, extent.offset) else 0


_NOWHERE: Place = (fill_with_zeroes, 0, 0, None, None)
"""Stands for a place that cannot be remembered: no read fits into it."""
