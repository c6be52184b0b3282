"""Backing files that are not there, not allowed, not images, or lead back to where they came from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import FusediskError, GateError, HostError, ImageError
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, require_root, run_tool
from tests.hostile.sentence import assert_sentence

MIB = 1 << 20


def _overlay(path: Path, backing: str, format: str = "qcow2") -> Path:
    """An image that names any backing file at all."""
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", format, path, "1M")
    return path


async def _refused(path: Path, *, gate: Gate | None = None) -> FusediskError:
    before = sorted(os.listdir("/proc/self/fd"))
    graph = Graph(DRIVERS, gate)
    for writable in (False, True):
        with pytest.raises(FusediskError) as caught:
            await graph.open_backend(str(path), writable=writable)
        assert not graph.nodes
        assert_sentence(caught.value, path)
    assert sorted(os.listdir("/proc/self/fd")) == before
    return caught.value


async def test_a_missing_backing_file_is_named(tmp_path: Path) -> None:
    error = await _refused(_overlay(tmp_path / "top.qcow2", "gone.qcow2"))
    assert isinstance(error, HostError)
    assert str(error) == (
        f"the backing file of '{tmp_path}/top.qcow2' cannot be opened: Could not open '{tmp_path}/gone.qcow2': "
        "No such file or directory"
    )


async def test_a_missing_file_deep_in_the_chain_is_named_with_who_wants_it(tmp_path: Path) -> None:
    _overlay(tmp_path / "a.qcow2", "gone.raw", "raw")
    _overlay(tmp_path / "b.qcow2", "a.qcow2")
    error = await _refused_with(tmp_path, _overlay(tmp_path / "c.qcow2", "b.qcow2"))
    assert f"the backing file of '{tmp_path}/a.qcow2' cannot be opened" in str(error)
    assert "gone.raw" in str(error)


async def _refused_with(directory: Path, path: Path) -> FusediskError:
    graph = Graph(DRIVERS)
    with pytest.raises(FusediskError) as caught:
        await graph.open_backend(str(path))
    assert not graph.nodes
    assert_sentence(caught.value, directory)
    return caught.value


async def test_an_image_that_backs_itself(tmp_path: Path) -> None:
    error = await _refused(_overlay(tmp_path / "self.qcow2", "self.qcow2"))
    assert isinstance(error, ImageError)
    assert str(error) == (
        f"the backing chain of '{tmp_path}/self.qcow2' is circular: it comes back to '{tmp_path}/self.qcow2'."
    )


async def test_two_images_that_back_each_other(tmp_path: Path) -> None:
    _overlay(tmp_path / "a.qcow2", "b.qcow2")
    _overlay(tmp_path / "b.qcow2", "a.qcow2")
    assert "is circular" in str(await _refused(tmp_path / "a.qcow2"))


async def test_a_long_loop_entered_from_outside(tmp_path: Path) -> None:
    for n in range(20):
        _overlay(tmp_path / f"{n}.qcow2", f"{(n + 1) % 20}.qcow2")
    outside = _overlay(tmp_path / "outside.qcow2", "7.qcow2")
    error = await _refused_with(tmp_path, outside)
    assert "comes back to" in str(error)


@pytest.mark.parametrize("wrapper", ["qcow2", "raw", "copy-on-read"])
async def test_a_loop_by_json_names(tmp_path: Path, wrapper: str) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        below = {"driver": "qcow2", "file": {"driver": "file", "filename": str(tmp_path / f"{other}.qcow2")}}
        reference = below if wrapper == "qcow2" else {"driver": wrapper, "file": below}
        _overlay(tmp_path / f"{name}.qcow2", f"json:{json.dumps(reference)}", wrapper)
    graph = Graph(DRIVERS)
    with pytest.raises(FusediskError) as caught:
        await graph.open_backend(str(tmp_path / "a.qcow2"))
    assert_sentence(caught.value, tmp_path)
    assert not graph.nodes


async def test_a_loop_by_links(tmp_path: Path) -> None:
    _overlay(tmp_path / "a.qcow2", "link.qcow2")
    (tmp_path / "link.qcow2").symlink_to("a.qcow2")
    assert "is circular" in str(await _refused(tmp_path / "a.qcow2"))


async def test_a_backing_file_elsewhere_needs_leave(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "1M")
    for number, name in enumerate(("../base.qcow2", str(tmp_path / "base.qcow2"))):
        top = _overlay(inner / f"{number}.qcow2", name)
        error = await _refused(top)
        assert isinstance(error, GateError)
        assert str(error) == (
            f"'{top}' refers to '{name}', which lies outside the image's own directory "
            f"(allow it with --allow-path {tmp_path} if you trust the image)."
        )
        for gate in (Gate([str(tmp_path)]), Gate(allow_any=True)):
            graph = Graph(DRIVERS, gate)
            backend = await graph.open_backend(str(top))
            assert backend.length == 1 << 20
            await graph.close()


@pytest.mark.parametrize(
    "reference",
    [
        {"driver": "raw", "file": {"driver": "file", "filename": "/etc/hostname"}},
        {"driver": "raw", "file.driver": "file", "file.filename": "/etc/hostname"},
        {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": "ok.qcow2"},
            "backing.file.filename": "/etc/hostname",
        },
        {"driver": "raw", "file": {"driver": "host_device", "filename": "/dev/zero"}},
        {"driver": "raw", "file": {"driver": "null-co", "latency-ns": 10**18}},
        {"driver": "raw", "file": {"driver": "blkdebug", "image": {"driver": "file", "filename": "ok.qcow2"}}},
        {"driver": "raw", "file": {"filename": "blkdebug::ok.qcow2"}},
        {"driver": "raw", "file": {"filename": 'json:{"driver": "file", "filename": "/etc/hostname"}'}},
        {"driver": "blkdebug", "config": "pipe", "image": {"driver": "file", "filename": "ok.qcow2"}},
        {"driver": "blklogwrites", "file.filename": "ok.qcow2", "log.filename": "log"},
        {"driver": "qcow2", "file.filename": "ok.qcow2", "encrypt.key-file": "pipe"},
        {"driver": "raw", "file": "somebody"},
        {"driver": "file", "filename": "/etc/hostname"},
    ],
)
async def test_json_names_cannot_go_around_the_gate(
    tmp_path: Path, reference: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor from within the image's own directory, which relative names start from."""
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "ok.qcow2", "1M")
    os.mkfifo("pipe")
    (tmp_path / "log").write_bytes(bytes(MIB))
    top = _overlay(tmp_path / "top.qcow2", f"json:{json.dumps(reference)}", "raw")
    error = await _refused(top)
    assert isinstance(error, GateError)
    assert "if you trust the image" in str(error)
    assert (tmp_path / "log").read_bytes() == bytes(MIB)


@pytest.mark.parametrize("name", ["nbd://localhost/x", "http://example.org/x", "ssh:x", "host_device:/dev/null"])
async def test_protocols_cannot_go_around_the_gate(tmp_path: Path, name: str) -> None:
    await _refused(_overlay(tmp_path / "top.qcow2", name, "raw"))


@pytest.mark.parametrize(
    "name", ["json:", "json:{", "json:[]", 'json:{"driver": 5}', 'json:{"file": {"00": 1}}', "json:{}", "json:{\x01}"]
)
async def test_json_names_that_are_nonsense(tmp_path: Path, name: str) -> None:
    await _refused(_overlay(tmp_path / "top.qcow2", name))


async def test_a_backing_file_of_another_format_than_named(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"no image" * 100)
    error = await _refused(_overlay(tmp_path / "top.qcow2", "base.raw", "qcow2"))
    assert f"'{tmp_path}/base.raw' starts with the bytes 6e6f2069, expected qcow2's 514649fb." in str(error)


async def test_a_backing_file_of_an_unknown_format(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"x")
    top = _overlay(tmp_path / "top.qcow2", "base", "parallels")
    top.write_bytes(top.read_bytes().replace(b"parallels", b"nonsense\0"))
    error = await _refused(top)
    assert "there is no driver 'nonsense'" in str(error)


async def test_a_directory_as_backing_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert "is a directory" in str(await _refused(_overlay(tmp_path / "top.qcow2", "base", "raw")))


async def test_a_pipe_as_backing_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "base")
    assert "a pipe" in str(await _refused(_overlay(tmp_path / "top.qcow2", "base", "raw")))


async def test_a_read_only_chain_stays_unchanged(tmp_path: Path) -> None:
    """Backing files are opened read-only even where they could be written, and not touched."""
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "1M")
    top = _overlay(tmp_path / "top.qcow2", "base.qcow2")
    before = (tmp_path / "base.qcow2").read_bytes()
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(top), writable=True)
    await backend.write(0, b"x" * 100_000)
    assert backend.node.backing is not None
    assert backend.node.backing.node.config.read_only
    await backend.close()
    assert (tmp_path / "base.qcow2").read_bytes() == before


@pytest.mark.root
async def test_a_backing_file_on_a_mount_that_is_gone(tmp_path: Path) -> None:
    """An input/output error while opening is told, and leaves nothing open."""
    require_root()
    place = tmp_path / "place"
    place.mkdir()
    run_tool("mount", "-t", "tmpfs", "none", place)
    try:
        qemu_img("create", "-q", "-f", "qcow2", place / "base.qcow2", "1M")
        top = _overlay(tmp_path / "top.qcow2", "place/base.qcow2")
    finally:
        run_tool("umount", place)
    assert "No such file or directory" in str(await _refused(top))
