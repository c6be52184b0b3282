"""``memory``: a protocol driver for tests. Its bytes lie in a :class:`Store`, which outlives the node."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fusedisk.block.model.driver import Driver
from fusedisk.block.model.extent import DATA, ZERO, Extent
from fusedisk.block.model.flags import Buffer
from fusedisk.block.model.limits import Limits
from fusedisk.core.errors import NoSpaceError, NotSupportedError
from fusedisk.core.options import Options, option
from tests.support.stepping import Call, Steps


class Store:
    """The bytes behind a ``memory`` node, its limits, and what happens to its requests (``steps``)."""

    def __init__(self, content: bytes | int = 0, *, zeroes: bool = True, discard: bool = True, **limits: int) -> None:
        """``content``: the bytes, or how many zeroes. ``zeroes`` and ``discard``: whether the operations are there.
        ``limits``: fields of :class:`Limits`."""
        self.data = bytearray(content)
        self.zeroes = zeroes
        self.discard = discard
        self.limits = limits
        self.steps = Steps()
        self.opened = 0
        self.capacity = 1 << 40
        """Where the disk is full: writes past it raise NoSpaceError."""
        self.durable = bytes(self.data)
        """The content at the last flush to disk."""
        self.permissions: list[tuple[int, int]] = []
        """Committed permissions, the newest last."""


_STORES: dict[str, Store] = {}


@contextmanager
def stores(**named: Store) -> Iterator[None]:
    """Make stores known by file name: ``memory:NAME`` opens them."""
    _STORES.update(named)
    try:
        yield
    finally:
        for name in named:
            del _STORES[name]


@dataclasses.dataclass(slots=True)
class MemoryOptions(Options):
    """Options of ``memory``."""

    filename: str = option("", help="name of the store")


class MemoryDriver(Driver):
    """Moves bytes from and to a store. Asserts what the engine promises about alignment and limits."""

    name = "memory"
    prefixes = ("memory",)
    is_protocol = True
    moves_bytes = True
    options_type = MemoryOptions
    store: Store

    def exact_filename(self) -> str | None:
        return f"memory:{self.options.filename}"

    async def open(self) -> None:
        store = _STORES[self.options.filename]
        await store.steps.take("open")
        store.opened += 1
        self.store = store

    async def close(self) -> None:
        self.store.opened -= 1
        await self.store.steps.take("close")

    async def reopen_prepare(self, config: Any, options: Any) -> object:
        await self.store.steps.take("reopen")
        return await super().reopen_prepare(config, options)

    def reopen_commit(self, state: object) -> None:
        self.store.steps.calls.append(Call("reopen-commit", 0, 0))

    def reopen_abort(self, state: object) -> None:
        self.store.steps.calls.append(Call("reopen-abort", 0, 0))

    async def length(self) -> int:
        await self.store.steps.take("length")
        return len(self.store.data)

    def refresh_limits(self, limits: Limits) -> None:
        for name, value in self.store.limits.items():
            setattr(limits, name, value)

    def commit_permissions(self, perm: int, shared: int) -> None:
        self.store.permissions.append((perm, shared))

    async def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check(offset, sum(map(len, buffers)), self.node.limits.max_transfer)
        await self.store.steps.take("read", offset, sum(map(len, buffers)))
        for buffer in buffers:
            found = self.store.data[offset : offset + len(buffer)]
            buffer[:] = found + bytes(len(buffer) - len(found))
            offset += len(buffer)

    async def pwritev(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        self._check(offset, sum(map(len, buffers)), self.node.limits.max_transfer)
        await self.store.steps.take("write", offset, sum(map(len, buffers)), flags)
        self._put(offset, b"".join(buffers))
        await self.store.steps.take("written", offset)

    async def map(self, offset: int, length: int) -> Extent:
        await self.store.steps.take("map", offset, length)
        zero = not self.store.data[offset]
        count = 1
        while count < length and (not self.store.data[offset + count]) == zero:
            count += 1
        return Extent(ZERO if zero else DATA, count, None, offset)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        limits = self.node.limits
        self._check(offset, length, limits.max_write_zeroes, max(limits.zeroes_alignment, limits.request_alignment))
        await self.store.steps.take("zero", offset, length, flags)
        if not self.store.zeroes:
            raise NotSupportedError("memory without write-zeroes.")
        self._put(offset, bytes(length))

    async def discard(self, offset: int, length: int) -> None:
        unit = self.node.limits.discard_alignment
        tail = (offset + length) % unit and offset + length != self.node.length
        assert not offset % unit, f"discard at {offset}"
        assert not tail, f"discard of {length} at {offset}"
        assert length <= self.node.limits.max_discard
        await self.store.steps.take("discard", offset, length)
        if not self.store.discard:
            raise NotSupportedError("memory without discard.")
        self._put(offset, bytes(length))

    async def flush_to_os(self) -> None:
        await self.store.steps.take("flush-to-os")

    async def flush_to_disk(self) -> None:
        content = bytes(self.store.data)
        await self.store.steps.take("flush")
        self.store.durable = content

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        await self.store.steps.take("truncate", length)
        if length > self.store.capacity:
            raise NoSpaceError("Could not resize 'memory': No space left on device")
        self.store.data[length:] = bytes(max(0, length - len(self.store.data)))

    def _check(self, offset: int, length: int, limit: int, unit: int = 0) -> None:
        unit = unit or self.node.limits.request_alignment
        assert length > 0, "an empty request reached the driver"
        assert length <= limit, f"{length} bytes in one request, at most {limit} were promised"
        assert not offset % unit, f"offset {offset} is not aligned to {unit}"
        assert not length % unit, f"length {length} is not aligned to {unit}"

    def _put(self, offset: int, content: bytes) -> None:
        data = self.store.data
        if offset + len(content) > self.store.capacity:
            raise NoSpaceError("Could not write to 'memory': No space left on device")
        if offset > len(data):
            data += bytes(offset - len(data))
        data[offset : offset + len(content)] = content
