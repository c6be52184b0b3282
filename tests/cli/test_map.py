"""``fusedisk map`` says what ``qemu-img map`` says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import qemu_img
from tests.support.commands import fusedisk
from tests.support.images import KIB, MIB, make_qcow2, make_sparse_raw, random_chain


def _theirs(image: Path | str, *options: str) -> list[dict[str, Any]]:
    entries = json.loads(qemu_img("map", "--output=json", *options, image))
    assert isinstance(entries, list)
    return entries


def _ours(image: Path | str, *options: str) -> list[dict[str, Any]]:
    entries = fusedisk("map", "--output", "json", *options, image).json
    assert isinstance(entries, list)
    return entries


def _table(text: str) -> list[tuple[int, int, int, str]]:
    """Rows of the human form as numbers, however they are spelt."""
    rows = [line.split() for line in text.splitlines()[1:]]
    return [(int(offset, 0), int(length, 0), int(place, 0), name) for offset, length, place, name in rows]


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    """One of each kind."""
    raw = make_sparse_raw(tmp_path / "sparse.raw", 3 * MIB, (100_000, 5000), (2 * MIB, 4096))
    plain = make_qcow2(tmp_path / "plain.qcow2", 4 * MIB, "write 1M 128k", "write -z 2M 64k", "write 3M 512")
    preallocated = make_qcow2(tmp_path / "preallocated.qcow2", 4 * MIB, "write 1M 128k", preallocation="metadata")
    short = make_qcow2(tmp_path / "short.qcow2", MIB, "write 512k 64k")
    long = make_qcow2(tmp_path / "long.qcow2", 3 * MIB, "write 2M 64k", backing=short)
    return {
        "empty raw": make_sparse_raw(tmp_path / "empty.raw", MIB),
        "sparse raw": raw,
        "full raw": make_sparse_raw(tmp_path / "full.raw", 64 * KIB, (0, 64 * KIB)),
        "no bytes": make_sparse_raw(tmp_path / "zero.raw", 0),
        "plain qcow2": plain,
        "compressed": make_qcow2(tmp_path / "compressed.qcow2", MIB, "write -c 0 128k", "write 256k 64k"),
        "preallocated": preallocated,
        "reserved zeroes": make_qcow2(tmp_path / "reserved.qcow2", MIB, "write 0 256k", "write -z 64k 64k"),
        "discarded": make_qcow2(tmp_path / "discarded.qcow2", MIB, "write 0 256k", "discard 64k 64k"),
        "v2": make_qcow2(tmp_path / "v2.qcow2", MIB, "write 0 64k", "discard 0 64k", compat="0.10"),
        "over longer": make_qcow2(tmp_path / "over.qcow2", MIB, "write 0 64k", backing=plain),
        "over shorter": make_qcow2(tmp_path / "longer.qcow2", 4 * MIB, "write 3584k 1k", backing=long),
        "over raw": make_qcow2(tmp_path / "onraw.qcow2", 4 * MIB, "write 64k 1k", backing=raw),
    }


def test_json_equals_qemu_imgs(images: dict[str, Path]) -> None:
    for kind, image in images.items():
        assert _ours(image) == _theirs(image), kind


def test_the_table_equals_qemu_imgs(images: dict[str, Path]) -> None:
    del images["compressed"]  # qemu-img has no table for these
    for kind, image in images.items():
        assert _table(fusedisk("map", image).out) == _table(qemu_img("map", image)), kind


@pytest.mark.parametrize("start", ["0", "512", "1000", "64k", "1M"])
@pytest.mark.parametrize("length", ["512", "100000", "3M", "1T"])
def test_a_part_of_the_disk(tmp_path: Path, start: str, length: str) -> None:
    below = make_sparse_raw(tmp_path / "below.raw", 2 * MIB, (0, 300_000), (MIB, 4096))
    image = make_qcow2(tmp_path / "top.qcow2", 4 * MIB, "write 100k 64k", backing=below)
    options = ("--start-offset", start, "--max-length", length)
    theirs = _theirs(image, "--start-offset=" + start, "--max-length=" + length)
    assert _ours(image, *options) == theirs


def test_a_window_of_a_file(tmp_path: Path) -> None:
    make_sparse_raw(tmp_path / "file.raw", MIB, (200_000, 1000))
    options = f"driver=raw,file.driver=file,file.filename={tmp_path}/file.raw,offset=4096,size=524288"
    assert _ours(options) == json.loads(qemu_img("map", "--output=json", "--image-opts", options))


def test_a_protocol_node(tmp_path: Path) -> None:
    make_sparse_raw(tmp_path / "file.raw", MIB, (200_000, 1000))
    options = f"driver=file,filename={tmp_path}/file.raw"
    assert _ours(options) == json.loads(qemu_img("map", "--output=json", "--image-opts", options))


@pytest.mark.parametrize("seed", range(12))
def test_random_chains(tmp_path: Path, seed: int) -> None:
    image = random_chain(tmp_path, seed)
    assert _ours(image) == _theirs(image)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1150))
def test_many_random_chains(tmp_path: Path, seed: int) -> None:
    image = random_chain(tmp_path, seed)
    assert _ours(image) == _theirs(image)


def test_compressed_ranges_say_so(images: dict[str, Path]) -> None:
    rows = [line.split() for line in fusedisk("map", images["compressed"]).out.splitlines()]
    assert ["0x0", "0x20000", "compressed"] in rows
    assert any(row[:2] == ["0x40000", "0x10000"] and row[3] == str(images["compressed"]) for row in rows)


def test_a_start_behind_the_end_is_refused(tmp_path: Path) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", MIB)
    for output in ("human", "json"):
        done = fusedisk("map", "-f", "raw", "-s", "2M", "--output", output, image)
        assert done == (2, "", "fusedisk: the start of the map is 2097152, expected 0 to the disk's end at 1048576.\n")


@pytest.mark.parametrize("where", [["-s", "4M"], ["-s", "4M", "-l", "512"], ["-s", "1M", "-l", "0"], ["-l", "0"]])
@pytest.mark.parametrize("output", ["human", "json"])
def test_nothing_is_told_as_qemu_img_tells_it(images: dict[str, Path], where: list[str], output: str) -> None:
    image = images["plain qcow2"]
    theirs = qemu_img("map", *where, f"--output={output}", image)
    assert fusedisk("map", *where, "--output", output, image).out == theirs


@pytest.mark.parametrize("text", ["0x200", "0X1fF", "1k", "1K", "0.5M", "1.0", "00012", "4M", "512b"])
def test_sizes_are_read_as_qemu_img_reads_them(tmp_path: Path, text: str) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", 4 * MIB)
    assert _ours(image, "-f", "raw", "-s", text) == _theirs(image, "-f", "raw", "-s", text)


@pytest.mark.parametrize("text", ["512 ", "1_000", "٣", "1e3", "-1", "1.5", "0x", "0x1.8", "0b1", "5\n"])
def test_what_qemu_img_refuses_as_a_size_is_refused(tmp_path: Path, text: str) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", 4 * MIB)
    options = ("map", "-f", "raw", f"--start-offset={text}", image)
    assert subprocess.run(["qemu-img", *options], capture_output=True).returncode == 1
    assert fusedisk(*options).code == 2


def test_a_wrong_size_is_wrong_usage(tmp_path: Path) -> None:
    done = fusedisk("map", "-l", "12x", tmp_path / "x.raw")
    assert done.code == 2
    assert "'12x', expected a number of bytes" in done.err


def test_the_text_is_qemu_imgs_to_the_byte(images: dict[str, Path]) -> None:
    for kind, image in images.items():
        assert fusedisk("map", "--output", "json", image).out == qemu_img("map", "--output=json", image), kind
