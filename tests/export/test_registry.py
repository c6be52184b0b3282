"""Exports that come, change and go."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import NoMediumError, OperationBlockedError, OptionError, ReadOnlyError
from fusedisk.drivers.table import DRIVERS
from fusedisk.export.export import Export
from fusedisk.export.opening import ImageRequest, OpenSettings
from fusedisk.export.registry import Change, Face, Registry

RAW = OpenSettings(format="raw")


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    """An empty one."""
    graph = Graph(DRIVERS)
    yield Registry(graph)
    await graph.close()


class Client(Face):
    """A face whose files are open as the test says."""

    def __init__(self) -> None:
        self.open = 0
        self.seen: list[tuple[Change, str]] = []

    def opens(self, export: Export, *, writing: bool = False) -> int:
        return self.open

    async def told(self, change: Change, export: Export) -> None:
        self.seen.append((change, export.name))


def image(folder: Path, name: str, content: bytes = b"abcdefgh" * 512) -> ImageRequest:
    path = folder / f"{name}.img"
    path.write_bytes(content)
    return ImageRequest(str(path), str(path))


async def test_a_file_has_its_inode_in_whatever_order_files_come(registry: Registry, tmp_path: Path) -> None:
    await registry.add([image(tmp_path, "a"), image(tmp_path, "b")], RAW)
    first = {export.name: export.inode for export in registry}
    await registry.remove("a")
    await registry.remove("b")
    await registry.add([image(tmp_path, "b")], RAW)
    await registry.add([image(tmp_path, "a")], RAW)
    assert {export.name: export.inode for export in registry} == first


async def test_a_name_in_use_is_refused(registry: Registry, tmp_path: Path) -> None:
    await registry.add([image(tmp_path, "a")], RAW)
    other = image(tmp_path, "other")
    with pytest.raises(OptionError, match="would both be the file 'a'"):
        await registry.add([ImageRequest(other.text, other.spec, name="a")], RAW)
    assert len(registry) == 1
    await registry.add([other], RAW)  # closed again, so not locked


async def test_an_open_file_goes_only_by_force(registry: Registry, tmp_path: Path) -> None:
    client = Client()
    registry.faces.append(client)
    (export,) = await registry.add([image(tmp_path, "a")], RAW)
    await export.write(0, b"new")
    client.open = 1
    with pytest.raises(OperationBlockedError, match="'a' is open: close it first, or remove it by force"):
        await registry.remove("a")
    await registry.remove("a", force=True)
    assert (tmp_path / "a.img").read_bytes()[:3] == b"new"
    assert client.seen == [(Change.ADDED, "a"), (Change.REMOVED, "a")]
    (again,) = await registry.add([image(tmp_path, "a")], RAW)
    assert (again.inode, again.generation) == (export.inode, 1)


async def test_another_medium_has_the_same_name_and_inode(registry: Registry, tmp_path: Path) -> None:
    (export,) = await registry.add([image(tmp_path, "a")], RAW)
    inode = export.inode
    await export.write(0, b"old")
    await registry.change_medium("a", image(tmp_path, "b", b"b" * 8192), RAW)
    assert (tmp_path / "a.img").read_bytes()[:3] == b"old"
    assert await export.read(0, 4) == b"bbbb"
    found = await export.attributes()
    assert (found.inode, found.size) == (inode, 8192)
    assert export.write_now(0, memoryview(b"x")) or await export.write(0, b"x")
    await registry.change_medium("a", None, RAW)
    assert (tmp_path / "b.img").read_bytes()[:2] == b"xb"
    assert (await export.attributes()).size == 0
    for request in (export.read(0, 1), export.write(0, b"x"), export.truncate(1)):
        with pytest.raises(NoMediumError, match="'a' has no medium") as caught:
            await request
        assert caught.value.errno == errno.ENOMEDIUM
    assert not export.write_now(0, memoryview(b"x"))
    await export.flush()


async def test_nothing_is_written_on_the_spot_while_the_medium_is_exchanged(registry: Registry, tmp_path: Path) -> None:
    """So that the face can look at each write."""

    class Writer(Face):
        tried: bool | None = None

        async def told(self, change: Change, export: Export) -> None:
            if change is Change.MEDIUM:
                self.tried = export.exchanging and export.write_now(0, memoryview(b"x"))

    writer = Writer()
    (export,) = await registry.add([image(tmp_path, "a")], RAW)
    registry.faces.append(writer)
    assert export.write_now(0, memoryview(b"x"))
    await registry.change_medium("a", image(tmp_path, "b", b"b" * 8192), RAW)
    assert writer.tried is False
    assert not export.exchanging
    assert export.write_now(0, memoryview(b"x"))


async def test_a_medium_that_does_not_open_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    (export,) = await registry.add([image(tmp_path, "a")], RAW)
    missing = str(tmp_path / "missing.img")
    with pytest.raises(Exception, match="No such file"):
        await registry.change_medium("a", ImageRequest(missing, missing), RAW)
    assert await export.read(0, 4) == b"abcd"


async def test_read_only_and_back(registry: Registry, tmp_path: Path) -> None:
    (export,) = await registry.add([image(tmp_path, "a")], RAW)
    await registry.set_writable("a", False)
    assert not export.writable
    assert not export.mode & 0o222
    assert not export.write_now(0, memoryview(b"x"))
    with pytest.raises(ReadOnlyError):
        await export.write(0, b"x")
    assert await export.read(0, 1) == b"a"
    await registry.set_writable("a", True)
    assert export.mode & 0o200
    await export.write(0, b"x")
    await registry.resize("a", 8192)
    assert (await export.attributes()).size == 8192
