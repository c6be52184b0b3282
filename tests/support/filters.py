"""Drivers for tests of what filters and drivers of many children are promised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import trio

from fusedisk.block.graph.registry import Registry
from fusedisk.block.model.children import ChildSpec, Role, children_in_list
from fusedisk.block.model.driver import Driver
from fusedisk.block.model.edge import Child
from fusedisk.block.model.extent import DATA, Extent, WriteExtent
from fusedisk.block.model.flags import Buffer
from fusedisk.block.request import io, space
from fusedisk.block.request.filter import FilterDriver
from fusedisk.core.options import Options, option
from tests.support.registry import FORMAT_DRIVERS as DRIVERS


class BareDriver(FilterDriver):
    """A filter that changes nothing."""

    name = "bare"
    can_run_at_once = True
    child_specs = (ChildSpec("file", Role.FILTERED),)


@dataclasses.dataclass(slots=True)
class JoinedOptions(Options):
    """The children say it all."""


class JoinedDriver(Driver):
    """Its children, one behind the other. The last one may grow and shrink."""

    name = "joined"
    passes_status = True
    can_run_at_once = True
    options_type = JoinedOptions

    @classmethod
    def children_of(cls, options: Mapping[str, Any]) -> tuple[ChildSpec, ...]:
        return children_in_list(options, "children", Role.DATA)

    @property
    def _parts(self) -> list[Child]:
        return list(self.node.children.values())

    def _find(self, offset: int, length: int) -> tuple[Child, int, int]:
        """The child at ``offset``, the offset in it, and how much of the range lies there."""
        *others, last = self._parts
        for edge in others:
            if offset < edge.node.length:
                return edge, offset, min(length, edge.node.length - offset)
            offset -= edge.node.length
        return last, offset, length

    async def length(self) -> int:
        return sum(edge.node.length for edge in self._parts)

    def lookup(self, offset: int, length: int) -> Extent:
        child, place, count = self._find(offset, length)
        return Extent(DATA, count, child, place, recurse=True)

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent:
        child, place, count = self._find(offset, length)
        return WriteExtent(count, child, place)

    async def map(self, offset: int, length: int) -> Extent:
        return self.lookup(offset, length)

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        return self.lookup_in_place(offset, length)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        end = offset + length
        while offset < end:
            child, place, count = self._find(offset, end - offset)
            await io.write_zeroes(child.node, place, count, flags)
            offset += count

    async def discard(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            child, place, count = self._find(offset, end - offset)
            await space.discard(child.node, place, count)
            offset += count

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        *others, last = self._parts
        await space.truncate(last.node, length - sum(edge.node.length for edge in others), preallocation, flags)

    def has_zero_init(self) -> bool:
        return all(edge.node.driver.has_zero_init() for edge in self._parts)


@dataclasses.dataclass(slots=True)
class TicketsOptions(Options):
    """Options of ``tickets``."""

    tickets: int = option(4, kind="int", help="requests that go first")


class TicketsDriver(FilterDriver):
    """Lets some requests pass, then holds each back until somebody issues new tickets or drains the node."""

    name = "tickets"
    options_type = TicketsOptions
    child_specs = (ChildSpec("file", Role.FILTERED),)
    moves_bytes = True

    async def open(self) -> None:
        self.left = self.options.tickets
        self.waiting = 0
        self._changed = trio.Event()
        self._drains = False

    def issue(self, count: int) -> None:
        """Let more requests pass."""
        self.left += count
        self._changed.set()
        self._changed = trio.Event()

    def drain_begin(self) -> None:
        self._drains = True
        self.issue(0)

    def drain_end(self) -> None:
        self._drains = False

    async def _pay(self) -> None:
        self.waiting += 1
        try:
            while self.left <= 0 and not self._drains:
                await self._changed.wait()
        finally:
            self.waiting -= 1
        self.left -= 1

    async def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        await self._pay()
        await super().preadv(offset, buffers)

    async def pwritev(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        await self._pay()
        await super().pwritev(offset, buffers, flags)


CONTRACT_DRIVERS = Registry(
    {
        **DRIVERS._table,
        "bare": "tests.support.filters:BareDriver",
        "joined": "tests.support.filters:JoinedDriver",
        "tickets": "tests.support.filters:TicketsDriver",
    },
    DRIVERS.prefixes,
    DRIVERS._probed,
)
"""All real drivers, and those of this module."""
