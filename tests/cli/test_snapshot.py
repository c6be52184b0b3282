"""``fusedisk snapshot`` does what ``qemu-img snapshot`` does, and each sees what the other did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ToolError, qemu_img, qemu_io
from tests.support.commands import Outcome, fusedisk, fusedisk_process


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk with the byte 1 everywhere in its first MiB."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "4M")
    qemu_io(path, "write -P 1 0 1M", fmt="qcow2")
    return path


def _theirs(image: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(qemu_img("info", "--output=json", image)).get("snapshots", [])
    return found


def _check(image: Path) -> None:
    qemu_img("check", "-q", image)


def test_made_here_and_applied_there(image: Path) -> None:
    done = fusedisk("snapshot", "-c", "first", image)
    assert (done.code, done.err) == (0, "")
    assert "snapshot 1 ('first')" in done.out
    _check(image)
    qemu_io(image, "write -P 2 0 1M", fmt="qcow2")
    qemu_img("snapshot", "-a", "first", image)
    qemu_io(image, "read -P 1 0 1M", fmt="qcow2")
    _check(image)
    qemu_img("snapshot", "-d", "first", image)
    _check(image)


def test_made_there_and_applied_and_deleted_here(image: Path) -> None:
    qemu_img("snapshot", "-c", "first", image)
    qemu_io(image, "write -P 2 0 1M", fmt="qcow2")
    assert fusedisk("snapshot", "-a", "first", image).code == 0
    _check(image)
    qemu_io(image, "read -P 1 0 1M", fmt="qcow2")
    done = fusedisk("snapshot", "-q", "-d", "first", image)
    assert (done.code, done.out, done.err) == (0, "", "")
    _check(image)
    assert _theirs(image) == []
    qemu_io(image, "read -P 1 0 1M", fmt="qcow2")


def test_the_list_in_json_is_what_qemu_tells(image: Path) -> None:
    assert fusedisk("snapshot", "--output", "json", image).json == []
    assert fusedisk("snapshot", image).out == ""
    qemu_img("snapshot", "-c", "theirs", image)
    made = fusedisk("snapshot", "--output", "json", "-c", "ours", image).json
    listed = fusedisk("snapshot", "-l", "--output", "json", image).json
    assert listed == _theirs(image)
    assert listed[1] == made
    assert fusedisk("snapshot", "-U", image).out.count("\n") == 3


def test_ids_are_chosen_as_qemu_chooses_them(tmp_path: Path, image: Path) -> None:
    other = tmp_path / "other.qcow2"
    shutil.copyfile(image, other)
    steps = (("-c", "a"), ("-c", "b"), ("-c", "a"), ("-d", "b"), ("-c", ""), ("-d", "a"), ("-c", "9"), ("-c", "d"))
    for option, name in steps:
        assert fusedisk("snapshot", "-q", option, name, image).code == 0
        qemu_img("snapshot", option, name, other)
        ours, theirs = ([(entry["id"], entry["name"]) for entry in _theirs(path)] for path in (image, other))
        assert ours == theirs


def test_what_a_name_stands_for(image: Path) -> None:
    for number, name in enumerate(("2", "one", "1", "one"), 1):
        qemu_io(image, f"write -P {number} 0 64k", fmt="qcow2")
        assert fusedisk("snapshot", "-c", name, image).code == 0
    for wanted, pattern in (("1", 1), ("2", 2), ("3", 3), ("one", 2)):
        assert fusedisk("snapshot", "-a", wanted, image).code == 0
        qemu_io(image, f"read -P {pattern} 0 64k", fmt="qcow2")
        qemu_img("snapshot", "-a", wanted, image)
        qemu_io(image, f"read -P {pattern} 0 64k", fmt="qcow2")
    # Deleting goes by name alone: "4" is an id, "2" the name of snapshot 1, and the first "one" is snapshot 2.
    assert fusedisk("snapshot", "-d", "4", image).code == 1
    with pytest.raises(ToolError):
        qemu_img("snapshot", "-d", "4", image)
    assert fusedisk("snapshot", "-d", "2", image).code == 0
    assert fusedisk("snapshot", "-d", "one", image).code == 0
    assert [entry["id"] for entry in _theirs(image)] == ["3", "4"]
    _check(image)


@pytest.mark.slow
def test_a_name_of_any_bytes(image: Path) -> None:
    name = "caf\udce9 \N{SNOWMAN}"
    assert fusedisk_process("snapshot", "-c", name, image).code == 0
    listed = fusedisk_process("snapshot", image)
    shown = "caf\N{REPLACEMENT CHARACTER} \N{SNOWMAN}"
    assert shown in listed.out
    assert fusedisk_process("snapshot", "--output", "json", image).json[0]["name"] == shown
    assert fusedisk_process("snapshot", "-a", name, image).code == 0
    assert fusedisk_process("snapshot", "-d", name, image).code == 0
    assert _theirs(image) == []


def _refused(done: Outcome, code: int, *words: str) -> None:
    assert done.code == code
    for word in words:
        assert word in done.err
    assert done.err.count("fusedisk: ") == 1
    assert not done.out


def test_what_is_refused(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    _refused(fusedisk("snapshot", "-a", "none", image), 1, str(image), "none")
    _refused(fusedisk("snapshot", "-d", "none", image), 1, str(image), "none")
    _refused(fusedisk("snapshot", "-c", "x" * 256, image), 2, "256 bytes", "255")
    _refused(fusedisk("snapshot", "-c", "x", "-d", "y", image), 2, "only one")
    _refused(fusedisk("snapshot", "-l", "-d", "y", image), 2, "only one")
    _refused(fusedisk("snapshot", "-U", "-c", "x", image), 2, "another process")
    assert image.read_bytes() == before
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(4096))
    _refused(fusedisk("snapshot", "-f", "raw", "-c", "x", raw), 1, str(raw), "raw")
    assert fusedisk("snapshot", "-f", "raw", raw).out == ""


def test_refcounts_that_are_too_narrow(tmp_path: Path) -> None:
    path = tmp_path / "narrow.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=2", path, "4M")
    qemu_io(path, "write -P 1 0 1M", fmt="qcow2")
    for name in ("one", "two"):
        assert fusedisk("snapshot", "-c", name, path).code == 0
    _refused(fusedisk("snapshot", "-c", "three", path), 1, str(path), "2 bits")
    _check(path)
    assert len(_theirs(path)) == 2
    shutil.copyfile(path, tmp_path / "copy.qcow2")
    with pytest.raises(ToolError):
        qemu_img("snapshot", "-c", "three", tmp_path / "copy.qcow2")
    assert fusedisk("snapshot", "-d", "one", path).code == 0
    assert fusedisk("snapshot", "-c", "three", path).code == 0
    _check(path)
    qemu_io(path, "read -P 1 0 1M", fmt="qcow2")


def test_a_snapshot_as_an_image(tmp_path: Path, image: Path) -> None:
    assert fusedisk("snapshot", "-c", "then", image).code == 0
    qemu_io(image, "write -P 2 0 1M", "truncate 8M", fmt="qcow2")
    spec = f"driver=qcow2,file.filename={image},internal-snapshot=then"
    assert fusedisk("info", "--output", "json", spec).json["virtual-size"] == 4 << 20
    entries = fusedisk("map", "--output", "json", spec).json
    assert [entry["length"] for entry in entries if entry["data"]] == [1 << 20]
    _refused(fusedisk("info", spec.replace("then", "now")), 1, str(image), "now")
    _refused(fusedisk("snapshot", "-c", "x", spec), 2, "read-only")
