"""The ``file`` driver on files of the host."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import (
    FusediskError,
)
from fusedisk.drivers.protocol.file import FileDriver
from fusedisk.drivers.table import DRIVERS
from tests.conftest import require_root, run_tool

KIB = 1 << 10
MIB = 1 << 20


@contextlib.asynccontextmanager
async def opened(path: Path, *, writable: bool = True, **options: Any) -> AsyncIterator[tuple[Backend, FileDriver]]:
    graph = Graph(DRIVERS)
    try:
        given = {"driver": "file", "filename": str(path)}
        for key, value in options.items():
            given[key.replace("__", ".").replace("_", "-")] = value
        backend = await graph.open_backend(given, writable=writable)
        assert isinstance(backend.node.driver, FileDriver)
        yield backend, backend.node.driver
    finally:
        await graph.close()


@contextlib.contextmanager
def largest_file(length: int) -> Iterator[None]:
    """Writes of this process past ``length`` fail, and those across it are done in part."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def mounted_tmpfs(path: Path, options: str) -> Iterator[Path]:
    require_root()
    path.mkdir()
    run_tool("mount", "-t", "tmpfs", "-o", options, "tmpfs", path)
    try:
        yield path
    finally:
        run_tool("umount", path)


async def refusal(path: Path | str, *, writable: bool = True, **options: Any) -> FusediskError:
    with pytest.raises(FusediskError) as caught:
        async with opened(Path(path), writable=writable, **options):
            pass
    return caught.value
