"""Host operations that fail while settings change: memory and file agree, the data is there, and nothing is corrupt."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.block.image.amend import amend_node
from fusedisk.core.errors import CorruptImageError, FusediskError, HostError, NoSpaceError
from tests.drivers.test_qcow2_amend import contents, make
from tests.support.memory import Store, stores
from tests.support.qcow2 import MEMORY_DRIVERS, assert_not_corrupt

CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("cluster_size=4096", {"compat": "0.10"}),
    ("cluster_size=512", {"refcount_bits": 64}),
    ("cluster_size=4096,refcount_bits=32", {"refcount_bits": 16, "compat": "0.10"}),
    ("cluster_size=4096,compat=0.10", {"compat": "1.1", "lazy_refcounts": True}),
    ("cluster_size=65536", {"backing_file": "", "refcount_bits": 8}),
]


async def _run(
    image: bytes, base: bytes, change: dict[str, Any], fault: tuple[str, FusediskError, int]
) -> Store | None:
    """Amend an image in memory while an operation fails, then use it on; None where there is no such operation."""
    operation, error, number = fault
    graph = Graph(MEMORY_DRIVERS)
    store, below = Store(0), Store(0)
    store.data, below.data = bytearray(image), bytearray(base)
    spec: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "memory", "filename": "image"}}
    spec["backing"] = {"driver": "raw", "file": {"driver": "memory", "filename": "base"}}
    with stores(image=store, base=below):
        try:
            disk = await graph.open_backend(spec, writable=True)
            expected = bytes(await disk.read(0, disk.length))
            store.steps.fail(operation, error, skip=number)
            failed = False
            try:
                await amend_node(disk.node, change, force=True)
            except FusediskError:
                failed = True
            happened = not store.steps.heal()
            assert happened or not failed
            assert bytes(await disk.read(0, disk.length)) == expected
            if disk.node.fenced is None:
                await disk.write(300 * 1024, expected[300 * 1024 : 420 * 1024])
                assert bytes(await disk.read(0, disk.length)) == expected
        finally:
            store.steps.heal()
            try:
                await graph.close()
            except CorruptImageError:
                assert disk.node.fenced is not None
    return store if happened else None


@pytest.mark.parametrize("operation", ["write", "written", "flush", "read"])
@pytest.mark.parametrize(("options", "change"), CHANGES, ids=lambda value: str(value)[:50])
@pytest.mark.slow
async def test_every_operation_fails_once(tmp_path: Path, options: str, change: dict[str, Any], operation: str) -> None:
    image = make(tmp_path / "disk.qcow2", options, backing=True, snapshots=True)
    if "backing_file" in change:
        change = change | {"backing_file": f"{tmp_path}//disk.base", "backing_fmt": "raw"}
    before = contents(image)
    error = NoSpaceError("no space") if operation.startswith("writ") else HostError("the disk is gone")
    raw, base = image.read_bytes(), image.with_suffix(".base").read_bytes()
    seen = set()
    for number in itertools.count():
        store = await _run(raw, base, change, (operation, error, number))
        if store is None:
            break
        if bytes(store.data) in seen:
            continue
        seen.add(bytes(store.data))
        image.write_bytes(store.data)
        assert_not_corrupt(image)
    assert number > 1
    assert contents(image) == before
