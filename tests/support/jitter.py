"""``jitter``: a filter for tests that lets other tasks run in the middle of every request.

Requests on files in the page cache hardly ever suspend, so nothing would interleave; here each gives way a few times,
before and after it acts. The choice is seeded, so runs can be repeated.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import trio

from fusedisk.block.graph.registry import Registry
from fusedisk.block.model.children import ChildSpec, Role
from fusedisk.block.model.flags import Buffer
from fusedisk.block.model.observer import Change
from fusedisk.block.request.filter import FilterDriver
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.options import Options, option
from fusedisk.drivers.table import DRIVERS


@dataclasses.dataclass(slots=True)
class JitterOptions(Options):
    """Options of ``jitter``."""

    seed: int = option(0, kind="int", help="of the random choices")


class JitterDriver(FilterDriver):
    """Passes everything through, not at once."""

    name = "jitter"
    options_type = JitterOptions
    child_specs = (ChildSpec("file", Role.FILTERED),)
    moves_bytes = True
    can_run_at_once = True

    async def open(self) -> None:
        self._rng = random.Random(self.options.seed)

    async def _give_way(self) -> None:
        for _ in range(self._rng.choice((0, 0, 1, 1, 2, 5))):
            refuse_to_wait()
            await trio.lowlevel.checkpoint()

    async def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        await self._give_way()
        await super().preadv(offset, buffers)
        await self._give_way()

    async def pwritev(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        await self._give_way()
        await super().pwritev(offset, buffers, flags)
        await self._give_way()

    def read_now(self, offset: int, buffer: Buffer) -> bool:
        return self._rng.random() < 0.8 and self.below.driver.read_now(offset, buffer)

    def write_now(self, offset: int, buffer: Buffer) -> bool:
        below = self.below
        if self._rng.random() < 0.2 or not below.driver.write_now(offset, buffer):
            return False
        below.take_length(max(below.length, offset + len(buffer)))
        below.changed(offset, len(buffer), Change.WRITE)
        return True

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self._give_way()
        await super().write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        await self._give_way()
        await super().discard(offset, length)

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        await self._give_way()
        await super().truncate(length, preallocation, flags)


JITTER_DRIVERS = Registry(
    {**DRIVERS._table, "jitter": "tests.support.jitter:JitterDriver"}, DRIVERS.prefixes, DRIVERS._probed
)
"""All real drivers and ``jitter``."""
