"""Commands in a working directory that has been removed: ``../vm.qcow2`` is found all the same."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import qemu_img
from tests.support.commands import TIMEOUT, fusedisk, process_command, process_environment
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, mounts_below

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image with a backing file, one directory above the removed working directory."""
    make_qcow2(tmp_path / "base.qcow2", MIB)
    image = tmp_path / "vm.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", image)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    return image


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    with mounts_below(tmp_path) as found:
        yield found


@pytest.mark.usefixtures("image")
@pytest.mark.parametrize(
    "args",
    [
        "info --backing-chain ../vm.qcow2",
        "check ../vm.qcow2",
        "map ../vm.qcow2",
        "measure -O qcow2 ../vm.qcow2",
        "snapshot ../vm.qcow2",
        "amend -o lazy_refcounts=on ../vm.qcow2",
        "create -f qcow2 -b base.qcow2 -F qcow2 ../new.qcow2",
    ],
)
def test_commands_find_the_image(args: str) -> None:
    done = fusedisk(*args.split())
    assert (done.code, done.err) == (0, "")


@pytest.mark.usefixtures("image")
@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("umount ../none", "nothing is mounted at '{above}/none'."),
        ("detach ../vm.qcow2", "'../vm.qcow2' is not attached."),
        (
            "info vm.qcow2",
            "Could not find 'vm.qcow2': the working directory has been removed, change to an existing one.",
        ),
        (
            "detach vm.qcow2",
            "Could not find 'vm.qcow2': the working directory has been removed, change to an existing one.",
        ),
        (
            "umount mnt",
            "Could not find 'mnt': the working directory has been removed, change to an existing one.",
        ),
    ],
)
def test_commands_tell_what_is_missing(tmp_path: Path, args: str, sentence: str) -> None:
    done = fusedisk(*args.split())
    assert (done.code, done.err) == (1, f"fusedisk: {sentence.format(above=tmp_path)}\n")


@pytest.mark.usefixtures("image")
def test_mount_and_umount(tmp_path: Path, mounts: Mounts) -> None:
    on = mounts.directory()
    mounts.adopt(on)
    for args in (("mount", "../vm.qcow2", f"../{on.name}"), ("umount", f"../{on.name}")):
        done = subprocess.run(
            process_command(*args), env=process_environment(), capture_output=True, timeout=TIMEOUT, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert (on / "vm").exists() == (args[0] == "mount")
