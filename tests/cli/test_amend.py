"""``fusedisk amend``, and the same from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fusedisk
from fusedisk.core.errors import LockConflictError, NotSupportedError, OptionError
from tests.conftest import qemu_img, qemu_io
from tests.support.commands import Outcome, fusedisk_process
from tests.support.commands import fusedisk as run
from tests.support.qcow2 import assert_clean


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "8M")
    qemu_io(path, "write -P 5 1M 1M", "write -z 3M 1M", fmt="qcow2")
    return path


def _info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu_img("info", "--output=json", path))
    return found


def _refused(done: Outcome, code: int, *words: str) -> None:
    assert done.code == code, done
    assert done.err.startswith("fusedisk: ")
    assert done.err.count("\n") == (2 if "Try '" in done.err else 1)
    assert all(word in done.err for word in words), done.err
    assert not done.out


def test_settings_change_and_nothing_is_said(image: Path) -> None:
    done = run("amend", "-f", "qcow2", "-o", "size=16M,refcount_bits=32", "-o", "lazy_refcounts=on", image)
    assert done == Outcome(0, "", "")
    info = _info(image)
    data = info["format-specific"]["data"]
    assert (info["virtual-size"], data["refcount-bits"], data["lazy-refcounts"]) == (16 << 20, 32, True)
    qemu_io(image, "read -P 5 1M 1M", "read -P 0 3M 13M", fmt="qcow2")
    assert_clean(image)


def test_what_is_refused(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    _refused(run("amend", "-o", "cluster_size=4k", image), 2, "cluster_size", "created")
    _refused(run("amend", "-o", "colour=red", image), 2, "no option 'colour'")
    _refused(run("amend", "-o", "size=1G", "-o", "size=2G", image), 2, "'size' is given twice")
    _refused(run("amend", "-o", "size", image), 2, "KEY=VALUE")
    _refused(run("amend", "-o", "backing_file=", tmp_path / "none"), 1, "none")
    _refused(run("amend", "-o", "backing_file=x,backing_fmt=raw", image), 1, "--force")
    _refused(run("amend", image), 2, "-o")
    _refused(run("amend", "-o", "size=1G"), 2, "Missing argument 'IMAGE'")
    _refused(run("amend", "-f", "raw", "-o", "size=1G", image), 1, "raw images have no settings")
    assert image.read_bytes() == before


def test_help_on_options() -> None:
    done = run("amend", "-f", "qcow2", "-o", "help")
    assert done.code == 0
    names = [line.split(":")[0] for line in done.out.splitlines()]
    assert {"size", "compat", "refcount_bits", "encrypt.state", "lazy_refcounts"} <= set(names)
    assert "cluster_size" not in names
    _refused(run("amend", "-o", "help"), 2, "-f")
    _refused(run("amend", "-f", "raw", "-o", "help"), 1, "raw images have no settings")


def test_a_backing_file_that_has_moved(tmp_path: Path) -> None:
    base, image = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "4M")
    qemu_io(base, "write -P 7 0 1M", fmt="qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
    moved = base.rename(tmp_path / "moved.qcow2")
    assert run("amend", "--force", "-o", "backing_file=moved.qcow2,backing_fmt=qcow2", image) == Outcome(0, "", "")
    assert _info(image)["full-backing-filename"] == str(moved)
    qemu_io(image, "read -P 7 0 1M", fmt="qcow2")
    _refused(run("amend", "--force", "-o", "backing_file=disk.qcow2,backing_fmt=qcow2", image), 2, "its own")
    _refused(run("amend", "--force", "-o", "backing_file=other", image), 2, "backing_fmt")


def test_growing_asks_the_gate_for_the_backing_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    base, image = tmp_path / "elsewhere/base.raw", tmp_path / "here/disk.qcow2"
    base.write_bytes(b"x" * (2 << 20))
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image, "1M")
    before = image.read_bytes()
    _refused(run("amend", "-o", "size=3M", image), 1, "base.raw", "--allow-path")
    assert image.read_bytes() == before
    assert run("amend", "--allow-path", base.parent, "-o", "size=3M", image).code == 0
    qemu_io(image, "read -P 120 0 1M", "read -P 0 1M 2M", fmt="qcow2")
    assert run("amend", "-o", "refcount_bits=8", image).code == 0  # without a look at the backing file


def test_passphrases(tmp_path: Path) -> None:
    image, old, new = tmp_path / "disk.qcow2", tmp_path / "old", tmp_path / "new"
    old.write_text("first")
    new.write_text("second")
    options = f"encrypt.format=luks,encrypt.key-file={old},encrypt.iter-time=10"
    assert run("create", "-q", "-f", "qcow2", "-o", options, image, "1M").code == 0
    add = f"encrypt.state=active,encrypt.new-key-file={new},encrypt.iter-time=10"
    _refused(run("amend", "-o", add, image), 1, "--key-file")
    assert fusedisk_process("amend", "--key-file", "-", "-o", add, image, stdin="first\n").code == 0
    remove = f"encrypt.state=inactive,encrypt.old-key-file={old}"
    assert run("amend", "-o", remove, image).code == 0
    _refused(run("amend", "-o", remove, image), 1, "opens none of the key slots")
    _refused(run("amend", "-o", remove.replace(str(old), str(new)), image), 2, "lose all data")
    assert run("amend", "--force", "-o", remove.replace(str(old), str(new)), image).code == 0
    _refused(run("amend", "--key-file", new, "-o", add, image), 1, "no active key slot")


def test_options_that_open_the_image(image: Path) -> None:
    spec = f"driver=qcow2,file.driver=file,file.filename={image}"
    assert run("amend", "-o", "compat=0.10", spec).code == 0
    assert _info(image)["format-specific"]["data"]["compat"] == "0.10"
    spec = "json:" + json.dumps({"file.filename": str(image)})
    assert run("amend", "-o", "compat=1.1,refcount_bits=64", spec).code == 0
    assert _info(image)["format-specific"]["data"]["refcount-bits"] == 64


# --- the same from Python -------------------------------------------------------------------------------


async def test_from_trio(image: Path) -> None:
    seen: list[int] = []
    await fusedisk.amend(image, {"refcount_bits": 8}, progress=lambda done, total: seen.append(done * 100 // total))
    assert _info(image)["format-specific"]["data"]["refcount-bits"] == 8
    assert seen[-1] == 100
    with pytest.raises(NotSupportedError):
        await fusedisk.amend(image, {"compat": "0.10"})
    with pytest.raises(OptionError):
        await fusedisk.amend(image, {"compat": "0.11"})
    async with fusedisk.open(image, writable=True) as disk:
        with pytest.raises(LockConflictError):
            await fusedisk.amend(image, {"refcount_bits": 16})
        assert await disk.read(1 << 20, 4) == b"\x05" * 4


def test_without_trio(image: Path) -> None:
    fusedisk.amend_sync(image, {"size": 16 << 20, "compat": "0.10"})
    assert _info(image)["virtual-size"] == 16 << 20
    with fusedisk.open_sync(image) as disk:
        assert disk.size == 16 << 20
    fusedisk.amend_sync({"driver": "qcow2", "file": {"filename": str(image)}}, {"compat": "1.1"})
    assert _info(image)["format-specific"]["data"]["compat"] == "1.1"
