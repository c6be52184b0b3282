"""``null-co``: a disk of a given size that forgets what is written to it.

For measuring everything but the storage, and as a stand-in in tests. Reads leave the buffer as it was, unless
``read-zeroes`` is on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from fusedisk.block.model.driver import Driver
from fusedisk.block.model.extent import DATA, ZERO, Extent
from fusedisk.block.model.flags import Buffer
from fusedisk.core.alone import sleep
from fusedisk.core.errors import OptionError
from fusedisk.core.options import Options, option
from fusedisk.drivers.protocol.host_io import zero_all


@dataclasses.dataclass(slots=True)
class NullOptions(Options):
    """Options of ``null-co``."""

    size: int = option(1 << 30, help="length of the disk", kind="size")
    latency_ns: int = option(0, help="nanoseconds that each request takes", kind="int")
    read_zeroes: bool = option(False, help="reads give zeroes, not whatever the buffer held", kind="bool")


class NullDriver(Driver):
    """A disk without storage. It has no state but its length."""

    name = "null-co"
    prefixes = ("null-co",)
    is_protocol = True
    moves_bytes = True
    options_type: ClassVar[type[Options]] = NullOptions

    _length = 0
    _latency = 0.0

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """``null-co://`` is the one file name; it takes its size from the options."""
        if filename != "//":
            raise OptionError(f"'null-co:{filename}' names a file, and null-co has none: expected null-co://.")
        return {}

    def may_be_named(self) -> bool:
        return not self.options.given()

    def exact_filename(self) -> str | None:
        return None if self.options.given() else "null-co://"

    async def open(self) -> None:
        if self.options.latency_ns < 0:
            raise OptionError(f"null-co option 'latency-ns' is {self.options.latency_ns}, expected 0 or more.")
        self._length = self.options.size
        self._latency = self.options.latency_ns / 1e9

    async def length(self) -> int:
        return self._length

    async def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.options.read_zeroes:
            zero_all(buffers)
        if self._latency:
            await sleep(self._latency)

    async def pwritev(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        self._length = max(self._length, offset + sum(map(len, buffers)))
        if self._latency:
            await sleep(self._latency)

    async def map(self, offset: int, length: int) -> Extent:
        return Extent(ZERO if self.options.read_zeroes else DATA, length, None, offset)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        self._length = max(self._length, offset + length)
        if self._latency:
            await sleep(self._latency)

    async def discard(self, offset: int, length: int) -> None:
        if self._latency:
            await sleep(self._latency)

    async def flush_to_disk(self) -> None:
        if self._latency:
            await sleep(self._latency)

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        self._length = length

    async def allocated_size(self) -> int | None:
        return 0

    def has_zero_init(self) -> bool:
        return bool(self.options.read_zeroes)
