"""``fusedisk resize``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import qemu_img
from tests.support.commands import fusedisk
from tests.support.images import MIB, make_qcow2
from tests.support.processes import qemu_io_holding


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_qcow2(tmp_path / "disk.qcow2", 4 * MIB, "write -P 9 0 4M")


def _size(image: Path) -> int:
    return int(json.loads(qemu_img("info", "--output=json", image))["virtual-size"])


def test_sizes_and_differences(image: Path) -> None:
    for args, size in (
        (["8M"], 8 * MIB),
        (["+1M"], 9 * MIB),
        (["--shrink", "-512k"], 9 * MIB - 512 * 1024),
        (["-1p", "--shrink"], None),
        (["--shrink", "--", "-512k"], 8 * MIB),
        (["--preallocation", "metadata", "+1000"], 8 * MIB + 1024),
    ):
        done = fusedisk("resize", image, *args)
        assert done.code == (2 if size is None else 0), done
        assert size is None or _size(image) == size
    qemu_img("check", "-q", image)


def test_it_says_what_it_did(image: Path) -> None:
    assert fusedisk("resize", image, "8M").out == (
        f"Resized '{image}' from 4 MiB (4194304 bytes) to 8 MiB (8388608 bytes).\n"
    )
    assert fusedisk("resize", "-q", image, "9M") == (0, "", "")


def test_what_is_refused_costs_nothing(image: Path) -> None:
    before = image.read_bytes()
    for args, code, sentence in (
        (["2M"], 1, "has a disk of 4194304 bytes, and would lose what lies behind 2097152 (--shrink)."),
        (["-1M"], 1, "would lose what lies behind 3145728 (--shrink)."),
        (["--shrink", "-5M"], 2, "the disk has 4194304 bytes, so it cannot lose 5242880."),
        (["--shrink", "--preallocation", "full", "1M"], 2, "a shrinking disk has nothing to preallocate"),
        (["many"], 2, "size is 'many'"),
        (["+many"], 2, "the change of the size is 'many'"),
        (["--preallocation", "half", "8M"], 2, "'half' is not one of"),
        (["-f", "vhdy", "8M"], 2, "there is no image format 'vhdy'"),
        ([], 2, "Missing argument"),
    ):
        done = fusedisk("resize", image, *args)
        assert (done.code, done.out) == (code, ""), args
        assert sentence in done.err
    with qemu_io_holding(image):
        done = fusedisk("resize", image, "8M")
        assert (done.code, done.out) == (1, "")
        assert str(image) in done.err
        assert "lock" in done.err
    assert image.read_bytes() == before
