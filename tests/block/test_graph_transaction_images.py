"""Transactions over real images and files: every filter goes in, names open again, image locks move along."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.reopen import reopen
from fusedisk.block.image.create import create_image
from fusedisk.block.model.node import NodeConfig
from fusedisk.core.errors import HostError, LockConflictError
from fusedisk.drivers.table import DRIVERS
from tests.support.graphs import assert_sound, read_by_name

SIZE = 1 << 20
FILTERS = [name for name in DRIVERS.names if DRIVERS.load(name).is_filter]


@asynccontextmanager
async def _chain(tmp_path: Path) -> AsyncIterator[Backend]:
    """A writable disk over three qcow2 images; the lowest is full of sevens."""
    base, middle, top = (str(tmp_path / f"{name}.qcow2") for name in ("base", "middle", "top"))
    await create_image(DRIVERS, "qcow2", base, {"size": SIZE})
    graph = Graph(DRIVERS)
    disk = await graph.open_backend(base, writable=True)
    await disk.write(0, b"\x07" * SIZE)
    await disk.close()
    for image, below in ((middle, base), (top, middle)):
        await create_image(DRIVERS, "qcow2", image, {"backing_file": below, "backing_fmt": "qcow2"})
    backend = await graph.open_backend(top, writable=True)
    yield backend
    await backend.close()
    assert not graph.nodes


def _options(driver: str, tmp_path: Path) -> dict[str, Any]:
    if driver != "blklogwrites":
        return {"driver": driver}
    (tmp_path / "log").touch()
    return {"driver": driver, "log": {"driver": "file", "filename": str(tmp_path / "log")}}


@pytest.mark.parametrize("driver", FILTERS)
@pytest.mark.parametrize("where", ["top", "storage"])
async def test_every_filter_goes_in_and_out(tmp_path: Path, driver: str, where: str) -> None:
    async with _chain(tmp_path) as backend:
        graph, top = backend.graph, backend.node
        plain = top.printable_name
        node = top if where == "top" else top.children["file"].node
        expected = b"\x07" * 10
        for turn in range(2):
            added = await graph.insert_filter(node, _options(driver, tmp_path))
            assert_sound(graph)
            await backend.write(turn, b"x")
            expected = expected[:turn] + b"x" + expected[turn + 1 :]
            await backend.flush()
            assert await backend.read(0, 10) == expected
            assert (await read_by_name(backend.node))[:10] == expected
            await graph.remove_filter(added)
            assert_sound(graph)
            assert added.closed
        assert backend.node is top
        assert top.printable_name == plain
        assert await backend.read(0, 10) == expected


async def test_the_plain_name_is_left_as_soon_as_it_opens_something_else(tmp_path: Path) -> None:
    async with _chain(tmp_path) as backend:
        graph, top = backend.graph, backend.node
        assert top.printable_name == top.filename == str(tmp_path / "top.qcow2")
        assert top.backing is not None
        assert top.backing.node.backing is not None
        other = tmp_path / "other.raw"
        other.write_bytes(b"\x08" * SIZE)
        options = {"driver": "raw", "file": {"driver": "file", "filename": str(other)}}
        await graph.replace(top.backing.node.backing, await graph.open_node(options, NodeConfig()))
        for name in (top.printable_name, top.filename, top.backing.node.printable_name):
            assert name.startswith("json:")
            assert "other.raw" in name
        assert await read_by_name(top) == b"\x08" * SIZE
        # The image itself is still found where it is.
        assert top.exact_filename() == str(tmp_path / "top.qcow2")
        # Its header is written again, so the plain name is right again.
        base = await graph.open_node(_qcow2(tmp_path / "base.qcow2"), NodeConfig())
        await graph.set_backing(top.backing.node, base, named=True)
        await backend.write(0, b"\x09")
        await backend.flush()
        assert top.printable_name == str(tmp_path / "top.qcow2")
        assert await read_by_name(top) == b"\x09" + b"\x07" * (SIZE - 1)


def _qcow2(path: Path) -> dict[str, Any]:
    """Options of a qcow2 image."""
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}


async def test_image_locks_follow_a_reopening_and_come_back_after_a_failure(tmp_path: Path) -> None:
    async with _chain(tmp_path) as backend:
        graph, top = backend.graph, backend.node
        storage = top.children["file"].node

        async def refused() -> None:
            other = Graph(DRIVERS)
            with pytest.raises(LockConflictError):
                await other.open_backend(str(tmp_path / "top.qcow2"), writable=True)
            await other.close()

        await reopen(graph, {top: {"cache.direct": True}})
        await refused()
        locks = storage.driver.locks  # type: ignore[attr-defined]

        def fail(perm: int, shared: int) -> None:
            raise HostError("injected.")

        # The storage is prepared and has its locks on two descriptors when the last check fails.
        assert top.backing is not None
        lowest = top.backing.node.children["file"].node.driver
        checks = iter([lambda *_: None, fail])
        lowest.check_permissions = lambda *args: next(checks)(*args)  # type: ignore[method-assign]
        with pytest.raises(HostError, match="injected"):
            await reopen(graph, {top: {"cache.direct": False}})
        del lowest.check_permissions  # type: ignore[method-assign]
        assert storage.driver.locks is locks  # type: ignore[attr-defined]
        await refused()
        reader = graph.attach(storage, "reader", writable=False)
        await reader.close()
        assert_sound(graph)
        await backend.write(0, b"x")


async def test_a_new_backing_file_is_the_one_that_the_first_write_notes(tmp_path: Path) -> None:
    """qcow2 records the state of its base with the first write; a base that was taken away must not be recorded."""
    async with _chain(tmp_path) as backend:
        graph, top = backend.graph, backend.node
        first_write = top.driver.first_write  # type: ignore[attr-defined]
        assert first_write.note_base is not None
        await graph.set_backing(top, None)
        assert first_write.note_base is None
