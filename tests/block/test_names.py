"""Every open node can print a name that opens the same thing again.

*The same thing* is the whole tree: drivers, their options, the settings of each node, and the children.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from fusedisk.block.graph.filenames import parse_argument
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.node import Node
from fusedisk.core.errors import FusediskError
from fusedisk.core.options import flatten
from fusedisk.drivers.table import DRIVERS
from tests.conftest import require_root, run_tool
from tests.support.images import KIB, MIB, make_qcow2, make_sparse_raw

Spec = str | dict[str, Any]


def describe(node: Node) -> Any:
    """All that makes a node what it is; not who named it."""
    return (
        node.driver.name,
        dataclasses.asdict(node.driver.options),
        dataclasses.asdict(dataclasses.replace(node.config, reference=None)),
        node.length,
        {name: describe(child.node) for name, child in sorted(node.children.items())},
    )


async def reopened(spec: Spec, *, writable: bool = False) -> tuple[str, Any]:
    """Open ``spec``, print it, open what was printed, check that it is the same; returns name and description."""
    printed, first = await _open(spec, writable)
    again, second = await _open(parse_argument(printed), writable)
    assert second == first
    assert again == printed
    # The options say it too, as a JSON object and as dotted keys.
    if printed.startswith("json:"):
        assert (await _open(parse_argument(printed.removeprefix("json:")), writable))[1] == first
        dotted = _dotted(json.loads(printed.removeprefix("json:")))
        if dotted is not None:
            assert (await _open(parse_argument(dotted), writable))[1] == first
    return printed, first


def _dotted(options: dict[str, Any]) -> str | None:
    flat = flatten(options)
    if any(value is None for value in flat.values()):
        return None  # 'backing': null has no dotted form
    texts = {key: ("on" if value else "off") if isinstance(value, bool) else str(value) for key, value in flat.items()}
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in texts.items())


async def _open(spec: Spec, writable: bool) -> tuple[str, Any]:
    graph = Graph(DRIVERS, Gate(allow_any=True))
    try:
        backend = await graph.open_backend(spec, writable=writable)
        return backend.node.printable_name, describe(backend.node)
    finally:
        await graph.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory with images, which is the current one."""
    make_sparse_raw(tmp_path / "x.raw", MIB, (0, 4096))
    make_qcow2(tmp_path / "base.qcow2", MIB)
    make_qcow2(tmp_path / "top.qcow2", None, backing=tmp_path / "base.qcow2")
    make_qcow2(tmp_path / "onraw.qcow2", None, backing=tmp_path / "x.raw")
    with _inside(tmp_path):
        yield tmp_path


@contextmanager
def _inside(directory: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("name", ["top.qcow2", "x.raw", "./x.raw", "file:top.qcow2"])
async def test_a_plain_name_prints_as_a_plain_name(place: Path, name: str, writable: bool) -> None:
    printed, _ = await reopened(name, writable=writable)
    assert printed == name.removeprefix("file:")


@pytest.mark.parametrize(
    "name",
    [
        "json:x",
        "file:x",
        "gopher:x",
        "{x",
        '{"driver": "raw"}',
        "driver=raw",
        "file.filename=x,y",
        "a,b",
        "a=b",
        " ",
        "-f",
        "%s",
        "tab\tand\nline",
        "ünï",
        "\udcff",
        "a\\b",
        '"',
        "'",
        "~",
        "*",
    ],
)
async def test_any_file_name(tmp_path: Path, name: str) -> None:
    with _inside(tmp_path):
        make_sparse_raw(Path(f"./{name}"), 4 * KIB, (0, 100))
        _, probed = await reopened(f"./{name}")
        _, absolute = await reopened(f"{tmp_path}/{name}")
        _, forced = await reopened({"driver": "raw", "file": {"driver": "file", "filename": name}})
        if ":" not in name:
            assert (await reopened(parse_argument(name)))[1][3] == 4 * KIB
        assert probed[3] == absolute[3] == forced[3] == 4 * KIB


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_file_names_at_random(tmp_path: Path, name: str) -> None:
    if name in (".", "..") or len(os.fsencode(name)) > 255:
        return
    with _inside(tmp_path):
        file = make_sparse_raw(Path(f"./{name}"), 512)
        try:
            trio.run(reopened, f"./{name}")
            trio.run(reopened, {"driver": "file", "filename": name})
        finally:
            file.unlink()


FILE = {"driver": "file", "filename": "x.raw"}

SPECS: list[Spec] = [
    FILE,
    {**FILE, "locking": "off"},
    {**FILE, "locking": "on", "aio": "native"},
    "null-co://",
    {"driver": "null-co"},
    {"driver": "null-co", "size": "3M", "read-zeroes": True},
    {"driver": "raw", "file": FILE},
    {"driver": "raw", "filename": "x.raw"},
    {"file": FILE},
    {"filename": "x.raw"},
    {"driver": "raw", "file": FILE, "offset": 4096},
    {"driver": "raw", "file": FILE, "offset": "4k", "size": "512k"},
    {"driver": "raw", "file": FILE, "size": 512},
    {"driver": "raw", "file": {"driver": "raw", "file": FILE, "offset": 512}, "offset": 512},
    {"driver": "raw", "file": {"driver": "null-co", "size": 1024}},
    {"driver": "raw", "file": {"filename": "x.raw"}},
    {"driver": "qcow2", "filename": "top.qcow2"},
    {"driver": "qcow2", "file": {"driver": "file", "filename": "top.qcow2", "locking": "off"}},
    {"driver": "qcow2", "file.driver": "file", "file.filename": "top.qcow2"},
    {"driver": "qcow2", "file": {"driver": "raw", "file": {"driver": "file", "filename": "top.qcow2"}}},
    {"filename": "top.qcow2", "backing": None},
    {"filename": "base.qcow2", "backing": {"driver": "raw", "file": FILE}},
    {"filename": "base.qcow2", "backing": {"filename": "onraw.qcow2"}},
    {"filename": "top.qcow2", "backing": {"filename": "base.qcow2", "backing": None}},
    {"filename": "top.qcow2", "node-name": "disk"},
    {"file.filename": "top.qcow2", "node-name": "disk", "file.node-name": "storage"},
    {"driver": "blkdebug", "image": {"filename": "top.qcow2"}, "align": 4096},
    {"driver": "blkdebug", "image": {"filename": "x.raw"}, "inject-error": [{"event": "l2_update", "errno": 28}]},
    "onraw.qcow2",
    "file:onraw.qcow2",
    'json:{"file.filename": "onraw.qcow2", "driver": "qcow2"}',
    'json:{"driver": "raw", "file": {"driver": "file", "filename": "top.qcow2"}}',
]

SETTINGS: list[dict[str, Any]] = [
    {},
    {"read-only": True},
    {"cache": {"no-flush": True}},
    {"cache.direct": False, "cache.no-flush": False},
    {"discard": "unmap"},
    {"detect-zeroes": "on"},
    {"discard": "unmap", "detect-zeroes": "unmap"},
    {"auto-read-only": True},
    {"force-share": True, "read-only": True},
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("writable", [False, True])
async def test_every_shape(place: Path, spec: Spec, writable: bool) -> None:
    await reopened(spec, writable=writable)


@pytest.mark.parametrize("more", SETTINGS, ids=str)
@pytest.mark.parametrize("where", ["", "file.", "backing.", "backing.file."])
@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("probed", [False, True])
async def test_every_setting_at_every_node(
    place: Path, more: dict[str, Any], where: str, writable: bool, probed: bool
) -> None:
    if writable and "read-only" in more and "backing" not in where:
        return  # a writer needs these nodes writable
    options: dict[str, Any] = {"filename": "top.qcow2"} | ({} if probed else {"driver": "qcow2"})
    if where.startswith("backing."):
        options |= {"backing.filename": "base.qcow2"}
    if where.endswith("file."):
        del options["filename"]
        options |= {"file.filename": "top.qcow2"}
        if where == "backing.file.":
            del options["backing.filename"]
            options["backing.file.filename"] = "base.qcow2"
    _, (_, _, config, _, children) = await reopened(
        {**options, **{f"{where}{key}": value for key, value in more.items()}}, writable=writable
    )
    if where == "" and more.get("detect-zeroes") == "unmap":
        assert config["detect_zeroes"] == "unmap", "the setting arrived in the first place"
    assert {"backing", "file"} == set(children)


async def test_copy_on_read(place: Path) -> None:
    await reopened({"driver": "copy-on-read", "file": {"filename": "top.qcow2"}}, writable=True)
    await reopened({"filename": "top.qcow2", "copy-on-read": True}, writable=True)


async def test_log_of_writes(place: Path) -> None:
    Path("log").write_bytes(b"")
    log = {"driver": "file", "filename": "log"}
    printed, first = await _open({"driver": "blklogwrites", "file": FILE, "log": log}, True)
    again, second = await _open(parse_argument(printed), True)
    assert again == printed
    assert second[:4] == first[:4]
    assert second[4]["file"] == first[4]["file"]
    assert second[4]["log"][:3] == first[4]["log"][:3], "all but its length, since it grows with each use"


@pytest.mark.root
async def test_block_devices(place: Path) -> None:
    require_root()
    device = run_tool("losetup", "--find", "--show", place / "x.raw").strip()
    try:
        printed, _ = await reopened(device)
        assert printed == device
        await reopened({"driver": "host_device", "filename": device})
        await reopened({"driver": "raw", "file": {"driver": "host_device", "filename": device}, "offset": 512})
        await reopened(f"host_device:{device}")
    finally:
        run_tool("losetup", "--detach", device)


KEYS = st.sampled_from(
    [
        *sorted({key for spec in SPECS if isinstance(spec, dict) for key in flatten(spec)}),
        *(
            "file",
            "backing",
            "image",
            "backing.driver",
            "backing.size",
            "read-only",
            "file.read-only",
            "cache",
            "x.y",
            "",
        ),
    ]
)
VALUES = st.sampled_from(
    [
        *(None, True, False, 0, -1, 512, 1.5, 1 << 70, "", "on", "\0", "#block1"),
        *("raw", "file", "qcow2", "null-co", "blkdebug", "copy-on-read"),
        *("x.raw", "top.qcow2", "base.qcow2", "json:{}", "null-co://"),
        *([], {}, [1], [{}], {"a": 1}),
    ]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spec=st.sampled_from([spec for spec in SPECS if isinstance(spec, dict)]),
    changes=st.dictionaries(KEYS, VALUES, max_size=3),
    without=st.sets(KEYS, max_size=1),
    writable=st.booleans(),
)
def test_options_at_random_are_refused_in_a_sentence_or_print_again(
    place: Path, spec: dict[str, Any], changes: dict[str, Any], without: set[str], writable: bool
) -> None:
    options = {key: value for key, value in flatten(spec).items() if key not in without} | changes

    async def attempt() -> bool:
        try:
            await _open(options, writable)
        except FusediskError:
            return False
        await reopened(options, writable=writable)
        return True

    event("opens" if trio.run(attempt) else "is refused")
