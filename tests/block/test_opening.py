"""Opening from options of every shape: what users and images may say, and the sentence where they may not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import FusediskError, GateError, ImageError, NodeNotFoundError, OptionError
from tests.support.memory import Store, stores
from tests.support.registry import TEST_DRIVERS
from tests.support.toy import Table, tables


@pytest.fixture
def files(tmp_path: Path) -> Iterator[dict[str, Table]]:
    """Tables ``a``, ``b`` and ``c`` of images whose files a.toy, b.toy and c.toy lie in one directory."""
    found = {name: Table(512) for name in "abc"}
    for name in found:
        (tmp_path / f"{name}.toy").write_bytes(bytes(512))
    with tables(**found):
        yield found


def _image(directory: Path, name: str, **more: Any) -> dict[str, Any]:
    """Nested options of one of the images."""
    return {
        "driver": "toy",
        "table": name,
        "file": {"driver": "file", "filename": str(directory / f"{name}.toy")},
        **more,
    }


NESTED = {"driver": "memory", "filename": "disk"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"driver": ["toy"], "file": NESTED}, "option 'driver' is a list, expected a string."),
        ({"driver": {"a": 1}}, "option 'driver' is a dict, expected a string."),
        ({"driver": 5}, "option 'driver' is a int, expected a string."),
        (
            {"driver": "nonsense"},
            "there is no driver 'nonsense', known image formats are toy, raw.",
        ),
        (
            {"driver": "memory", "node-name": 7, "filename": "disk"},
            "option 'node-name' is a int, expected a string.",
        ),
        (
            {"driver": "memory", "node-name": [], "filename": "disk"},
            "option 'node-name' is a list, expected a string.",
        ),
        ({"driver": "memory", "node-name": "", "filename": "disk"}, "option 'node-name' is empty."),
        ({"driver": "raw", "file": 5}, "option 'file' is a int, expected the name of a node or its options."),
        ({"driver": "raw", "file": [1]}, "option 'file' is a list, expected the name of a node or its options."),
        ({"file": 5}, "option 'file' is a int, expected the name of a node or its options."),
        ({"driver": "raw", "file": "nobody"}, "there is no node 'nobody'."),
        ({"driver": "raw"}, "raw needs the option 'file'."),
        (
            {"driver": "raw", "file": {"driver": "memory", "filename": {"x": 1}}},
            "memory has no option 'filename.x' (it has: filename).",
        ),
        (
            {"driver": "raw", "file": NESTED, "filename": "x"},
            "'filename' and 'file' name the same thing: give one of them.",
        ),
        (
            {"driver": "raw", "file": NESTED, "backing": None},
            "raw has no backing file, the option 'backing' is for formats that do.",
        ),
        (
            {"driver": "toy", "table": "one", "file": NESTED, "backing": 5},
            "option 'backing' is a int, expected the name of a node or its options.",
        ),
        (
            {"driver": "toy", "table": "one", "file": NESTED, "backing": [1]},
            "option 'backing' is a list, expected the name of a node or its options.",
        ),
        ({"driver": "toy", "table": "one", "file": NESTED, "backing": "nobody"}, "there is no node 'nobody'."),
        ({}, "an image needs the option 'driver', 'file' or 'filename'."),
        ({"file": {}}, "options of a 'file' child need a 'driver' or a 'filename'."),
        (
            {"driver": "raw", "file": NESTED, "cache": "none"},
            "the option 'cache' has the members 'direct' and 'no-flush'.",
        ),
        (
            {"driver": "raw", "file": NESTED, "discard": "maybe"},
            "option 'discard' is 'maybe', expected one of ignore, unmap, off, on.",
        ),
        (
            {"driver": "raw", "file": NESTED, "detect-zeroes": []},
            "option 'detect-zeroes' is '[]', expected one of off, on, unmap.",
        ),
        (
            {"driver": "raw", "file": NESTED, "force-share": True},
            "force-share is for read-only images: add read-only=on.",
        ),
        (
            {"driver": "raw", "file": NESTED, "copy-on-read": 7},
            "option 'copy-on-read' is '7', expected 'on' or 'off'.",
        ),
        (
            {"driver": "raw", "file": NESTED, "size": float("inf")},
            "raw option 'size' is 'inf', expected a number of bytes, such as 4096, 512M or 10G.",
        ),
    ],
)
async def test_options_that_make_no_sense(graph: Graph, options: dict[str, Any], message: str) -> None:
    with stores(disk=Store(512)), tables(one=Table(512)):
        with pytest.raises(FusediskError) as caught:
            await graph.open_backend(options, writable=True)
        assert str(caught.value) == message
        assert not graph.nodes


async def test_a_json_name_with_nonsense(graph: Graph) -> None:
    for name in (
        "json:",
        "json:{",
        "json:[]",
        'json:{"driver": ["raw"]}',
        'json:{"a": {"00": 1}}',
        "nothing:x",
        "",
        "a\0b",
    ):
        with pytest.raises(OptionError):
            await graph.open_backend(name)
        assert not graph.nodes


async def test_a_child_by_name(graph: Graph) -> None:
    with stores(disk=Store(b"hello")):
        below = await graph.open_backend({**NESTED, "node-name": "d"})
        above = await graph.open_backend({"driver": "raw", "file": "d"})
        assert await above.read(0, 5) == b"hello"
        await below.close()
        await above.close()


async def test_probing_over_a_node_that_exists(graph: Graph) -> None:
    with stores(disk=Store(b"hello")):
        below = await graph.open_backend({**NESTED, "node-name": "d"})
        above = await graph.open_backend({"file": "d"})
        assert above.node.driver.name == "raw"
        assert await above.read(0, 5) == b"hello"
        with pytest.raises(OptionError):
            await graph.open_backend({"file": "d", "nonsense": 1})
        assert graph.node("d") is below.node
        await above.close()
        await below.close()


# --- backing files ------------------------------------------------------------------------------------------


async def test_a_missing_backing_file_is_named_with_the_image(
    graph: Graph, files: dict[str, Table], tmp_path: Path
) -> None:
    files["a"].backing = "gone/b.toy"
    with pytest.raises(FusediskError) as caught:
        await graph.open_backend(_image(tmp_path, "a"))
    assert str(caught.value) == (
        f"the backing file of '{tmp_path}/a.toy' cannot be opened: Could not open '{tmp_path}/gone/b.toy': "
        "No such file or directory"
    )
    assert not graph.nodes


def _json_name(options: dict[str, Any]) -> str:
    return "json:" + json.dumps(options)


async def test_a_chain_that_comes_back_to_itself(graph: Graph, files: dict[str, Table], tmp_path: Path) -> None:
    files["a"].backing = _json_name(_image(tmp_path, "b"))
    files["b"].backing = _json_name(_image(tmp_path, "a"))
    with pytest.raises(ImageError) as caught:
        await graph.open_backend(_image(tmp_path, "a"))
    assert str(caught.value) == (
        f"the backing chain of '{tmp_path}/a.toy' is circular: it comes back to '{tmp_path}/a.toy'."
    )
    assert not graph.nodes


async def test_a_loop_by_another_name_of_the_file(graph: Graph, files: dict[str, Table], tmp_path: Path) -> None:
    (tmp_path / "link.toy").symlink_to("a.toy")
    (tmp_path / "hard.toy").hardlink_to(tmp_path / "a.toy")
    for name in ("link.toy", "hard.toy"):
        files["a"].backing = _json_name(
            {"driver": "toy", "table": "a", "file.driver": "file", "file.filename": f"{tmp_path}/{name}"}
        )
        with pytest.raises(ImageError, match="is circular"):
            await graph.open_backend(_image(tmp_path, "a"))


async def test_a_loop_through_filters(graph: Graph, files: dict[str, Table], tmp_path: Path) -> None:
    """Each image names the other below a raw node, so that each opening starts a chain of its own."""
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        files[name].backing = _json_name({"driver": "raw", "file": _image(tmp_path, other)})
    with pytest.raises(ImageError, match="is circular"):
        await graph.open_backend(_image(tmp_path, "a"))
    assert not graph.nodes


async def test_a_long_chain(graph: Graph, tmp_path: Path) -> None:
    """Deeper than Python's own stack."""
    depth = 1500
    layers = {f"t{n}": Table(512, backing=None if n == 0 else "set below") for n in range(depth)}
    stores_ = {f"f{n}": Store(512) for n in range(depth)}
    for n in range(1, depth):
        below = {"driver": "toy", "table": f"t{n - 1}", "file": {"driver": "memory", "filename": f"f{n - 1}"}}
        layers[f"t{n}"].backing = _json_name(below)
    graph.gate.allow_any = True
    stores_["f0"].data[:] = bytes(512) + b"deep".ljust(512, b"\0")
    layers["t0"].put(0)
    with tables(**layers), stores(**stores_):
        top = {"driver": "toy", "table": f"t{depth - 1}", "file": {"driver": "memory", "filename": f"f{depth - 1}"}}
        backend = await graph.open_backend(top)
        assert await backend.read(0, 4) == b"deep"
        assert (await backend.block_status(0, 4)).depth == depth - 1
        await backend.close()


# --- the gate -----------------------------------------------------------------------------------------------


async def test_an_image_may_refer_to_its_own_directory_only(
    graph: Graph, files: dict[str, Table], tmp_path: Path
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "a.toy").write_bytes(bytes(512))
    files["a"].backing = "../b.toy"
    with pytest.raises(GateError) as caught:
        await graph.open_backend(_image(inner, "a"))
    assert str(caught.value) == (
        f"'{inner}/a.toy' refers to '../b.toy', which lies outside the image's own directory "
        f"(allow it with --allow-path {tmp_path} if you trust the image)."
    )
    assert not graph.nodes
    for gate in (Gate([str(tmp_path)]), Gate([str(tmp_path / "b.toy")]), Gate(allow_any=True)):
        open_graph = Graph(TEST_DRIVERS, gate)
        backend = await open_graph.open_backend(_image(inner, "a"))
        assert backend.node.backing is not None
        await open_graph.close()


async def test_a_link_out_of_the_directory_is_seen_through(
    graph: Graph, files: dict[str, Table], tmp_path: Path
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "a.toy").write_bytes(bytes(512))
    (inner / "link").symlink_to(tmp_path / "b.toy")
    files["a"].backing = "link"
    with pytest.raises(GateError, match="outside the image's own directory"):
        await graph.open_backend(_image(inner, "a"))


@pytest.mark.parametrize("where", ["top", "nested", "probed"])
async def test_an_image_cannot_refer_to_nodes_of_the_process(
    graph: Graph, files: dict[str, Table], tmp_path: Path, where: str
) -> None:
    """Another user's disk may be open in the same daemon."""
    with stores(secret=Store(b"secret".ljust(512))):
        secret = await graph.open_backend({"driver": "memory", "filename": "secret", "node-name": "other"})
        reference = {
            "top": {"driver": "raw", "file": "other"},
            "nested": _image(tmp_path, "b", backing="other"),
            "probed": {"file": "other"},
        }[where]
        files["a"].backing = _json_name(reference)
        with pytest.raises(GateError) as caught:
            await graph.open_backend(_image(tmp_path, "a"))
        assert str(caught.value).startswith(f"'{tmp_path}/a.toy' refers to 'json:{{")
        assert "the node 'other'" in str(caught.value)
        assert list(graph.nodes) == ["other"]
        await secret.close()


async def test_an_image_neither_takes_names_nor_asks_for_write_access(
    graph: Graph, files: dict[str, Table], tmp_path: Path
) -> None:
    below = _image(tmp_path, "b", **{"read-only": False, "node-name": "vm2"})
    below["file"] |= {"read-only": False, "node-name": "vm3"}
    files["a"].backing = _json_name(below)
    backend = await graph.open_backend(_image(tmp_path, "a"), writable=True)
    assert backend.node.backing is not None
    base = backend.node.backing.node
    assert base.config.read_only
    assert base.children["file"].node.config.read_only
    for name in ("vm2", "vm3"):
        with pytest.raises(NodeNotFoundError):
            graph.node(name)
    await backend.close()
