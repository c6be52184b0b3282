"""Opening the tests' own drivers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from tests.support.memory import Store, stores
from tests.support.toy import Table, tables


@asynccontextmanager
async def memory_backend(graph: Graph, store: Store, **options: Any) -> AsyncIterator[Backend]:
    """A writable backend on a ``memory`` node over ``store``, with more options of the node."""
    keys = {key: options.pop(key) for key in ("write_cache",) if key in options}
    with stores(disk=store):
        backend = await graph.open_backend(
            {"driver": "memory", "filename": "disk", **options}, name="disk", writable=True, **keys
        )
        yield backend
        await backend.close()


class Chain:
    """``toy`` images over each other, the base first: their tables, the stores of their files, options to open."""

    def __init__(self, *layers: Table, memory: dict[str, Any] | None = None) -> None:
        self.layers = layers
        self.files = [Store(512, **(memory or {})) for _ in layers]

    @contextmanager
    def known(self) -> Iterator[None]:
        """Make the tables and files findable by ``options``."""
        with (
            tables(**{f"layer{index}": table for index, table in enumerate(self.layers)}),
            stores(**{f"file{index}": store for index, store in enumerate(self.files)}),
        ):
            yield

    def options(self, **top: Any) -> dict[str, Any]:
        """Nested options for the whole chain; ``top`` are more options of the active layer."""
        options: dict[str, Any] | None = None
        for index in range(len(self.layers)):
            options = {
                "driver": "toy",
                "table": f"layer{index}",
                "node-name": f"layer{index}",
                "file": {"driver": "memory", "filename": f"file{index}"},
                "backing": options,
            }
        assert options is not None
        return {**options, **top}


@asynccontextmanager
async def chain_backend(graph: Graph, chain: Chain, **options: Any) -> AsyncIterator[Backend]:
    """A writable backend on the active layer of ``chain``."""
    with chain.known():
        backend = await graph.open_backend(chain.options(**options), name="disk", writable=True)
        yield backend
        await backend.close()
