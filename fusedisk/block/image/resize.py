"""Resizing the disk of an image that is not in use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import trio

from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.registry import Registry
from fusedisk.block.image.create import whole_sectors
from fusedisk.core.errors import OptionError, WouldLoseDataError
from fusedisk.core.options import parse_size

Working = Callable[[int, int], AbstractAsyncContextManager[None]]


async def resize_image(
    drivers: Registry,
    spec: str | Mapping[str, Any],
    size: int | str,
    *,
    format: str | None = None,
    preallocation: str = "off",
    shrink: bool = False,
    gate: Gate | None = None,
    working: Working = lambda old, new: contextlib.nullcontext(),
) -> tuple[int, int]:
    """Open the image that ``spec`` and ``format`` name (as :meth:`Graph.open_backend` takes them) and resize its disk.

    ``size`` is in bytes, or text such as ``10G``, ``+1G`` or ``-512M``, rounded up to whole sectors; ``shrink`` allows
    to lose the data behind it. ``working`` is called with the old and the new size and entered while the disk is
    resized. Returns both sizes.

    Raises WouldLoseDataError, OptionError, and what opening and :meth:`Backend.truncate` raise.
    """
    graph = Graph(drivers, gate)
    try:
        backend = await graph.open_backend(spec, writable=True, format=format)
        backend.name = backend.node.filename
        await backend.require_keys()
        old = backend.length
        new = new_size(size, old)
        if new < old and not shrink:
            raise WouldLoseDataError(
                f"'{backend.name}' has a disk of {old} bytes, and would lose what lies behind {new} (--shrink)."
            )
        if new < old and preallocation != "off":
            raise OptionError(f"preallocation is '{preallocation}', but a shrinking disk has nothing to preallocate.")
        async with working(old, new):
            await backend.truncate(new, preallocation)
        await backend.close()
        return old, new
    finally:
        with trio.CancelScope(shield=True):
            await graph.close()


def new_size(size: int | str, old: int) -> int:
    """Return the size in whole sectors that ``size`` means for a disk of ``old`` bytes. Raises OptionError."""
    text = str(size)
    if not text.startswith(("+", "-")) or isinstance(size, int):
        return whole_sectors(parse_size(size))
    change = parse_size(text[1:], "the change of the size")
    new = old + change if text[0] == "+" else old - change
    if new < 0:
        raise OptionError(f"the disk has {old} bytes, so it cannot lose {change}.")
    return whole_sectors(parse_size(new))
