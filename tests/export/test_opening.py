"""From image arguments to exports."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fusedisk.block.graph.filenames import parse_argument
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import OptionError
from fusedisk.drivers.table import DRIVERS
from fusedisk.export.opening import ImageRequest, OpenSettings, absolute, open_exports, take_name


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    graph = Graph(DRIVERS)
    yield graph
    await graph.close()
    assert not graph.nodes


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("vm.img", {"file": {"driver": "file", "filename": "/here/vm.img"}}),
        ("file:vm.img", {"file": {"driver": "file", "filename": "/here/vm.img"}}),
        ("./a:b.img", {"file": {"driver": "file", "filename": "/here/a:b.img"}}),
        ('json:{"driver":"raw","file.filename":"x"}', {"driver": "raw", "file": {"filename": "/here/x"}}),
        (
            "driver=qcow2,file.driver=file,file.filename=a:b,backing.file.filename=../c",
            {
                "driver": "qcow2",
                "file": {"driver": "file", "filename": "/here/a:b"},
                "backing": {"file": {"filename": "/c"}},
            },
        ),
        ("driver=raw,file.filename=file:x", {"driver": "raw", "file": {"filename": "file:x"}}),
        ("driver=null-co,size=5", None),
    ],
)
def test_names_become_absolute(monkeypatch: pytest.MonkeyPatch, text: str, options: dict[str, object] | None) -> None:
    monkeypatch.setattr(os, "getcwd", lambda: "/here")
    if text.startswith("driver=null"):
        options = {"driver": "null-co", "size": "5"}
    assert absolute(parse_argument(text), DRIVERS) == options


def test_the_name_is_the_mounts() -> None:
    assert take_name("vm.img") == ("vm.img", None)
    assert take_name({"driver": "raw", "name": "x"}) == ({"driver": "raw"}, "x")
    with pytest.raises(OptionError, match="'name' is a int"):
        take_name({"name": 5})
    with pytest.raises(OptionError, match="is not a valid file name"):
        take_name({"name": "a/b"})


async def test_exports_are_named_and_numbered(graph: Graph, tmp_path: Path) -> None:
    for name in ("a.img", "b.raw"):
        (tmp_path / name).write_bytes(bytes(1024))
    images = [ImageRequest(str(tmp_path / name), str(tmp_path / name)) for name in ("a.img", "b.raw")]
    images[1].name = "other"
    exports = await open_exports(graph, images, OpenSettings(format="raw"))
    assert [export.name for export in exports] == ["a", "other"]
    assert exports[0].inode != exports[1].inode
    assert all(export.writable for export in exports)


async def test_the_images_own_read_only_is_obeyed(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(bytes(1024))
    spec = {"driver": "raw", "file": {"filename": str(tmp_path / "a.img")}, "read-only": "on"}
    (export,) = await open_exports(graph, [ImageRequest("a", spec)], OpenSettings())
    assert not export.writable


async def test_a_throw_away_overlay_without_a_backing_name(
    graph: Graph, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An image that only options can name can be overlaid too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    spec = {"driver": "null-co", "size": 1 << 20, "read-zeroes": True}
    (export,) = await open_exports(graph, [ImageRequest("nothing", spec)], OpenSettings(overlay=True))
    await export.write(5, b"kept for now")
    assert bytes(await export.read(0, 20)) == bytes(5) + b"kept for now" + bytes(3)
    assert export.overlay == "throw-away"
    assert export.image.driver.name == "null-co"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["writeback", "writethrough", "unsafe"])
async def test_cache_modes_reach_the_nodes(graph: Graph, tmp_path: Path, mode: str) -> None:
    (tmp_path / "a.img").write_bytes(bytes(1024))
    images = [ImageRequest("a", str(tmp_path / "a.img"))]
    (export,) = await open_exports(graph, images, OpenSettings(format="raw", cache=mode))
    assert export.backend.write_cache is (mode != "writethrough")
    assert all(node.config.cache_no_flush is (mode == "unsafe") for node in graph.nodes.values())
