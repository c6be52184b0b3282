"""``fusedisk info`` says what ``qemu-img info`` says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import qemu_img
from tests.support.commands import fusedisk
from tests.support.images import KIB, MIB, make_qcow2, make_sparse_raw, random_chain


def _theirs(image: Path | str, *options: str) -> Any:
    return json.loads(qemu_img("info", "--output=json", *options, image))


def _ours(image: Path | str, *options: str) -> Any:
    return fusedisk("info", "--output", "json", *options, image).json


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"cluster_size": 512},
        {"cluster_size": "2M", "lazy_refcounts": "on"},
        {"refcount_bits": 1},
        {"refcount_bits": 64},
        {"compression_type": "zstd"},
        {"preallocation": "metadata"},
        {"preallocation": "falloc"},
    ],
    ids=str,
)
def test_qcow2(tmp_path: Path, options: dict[str, object]) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", 10 * MIB, "write 1M 64k", **options)
    assert _ours(image) == _theirs(image)


@pytest.mark.parametrize(("bit", "fact"), [(1, "dirty:"), (2, "corrupt:")])
def test_images_that_are_marked(tmp_path: Path, bit: int, fact: str) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", MIB, lazy_refcounts="on")
    with image.open("r+b") as file:
        file.seek(79)  # the lowest incompatible features
        file.write(bytes([bit]))
    assert _ours(image) == _theirs(image)
    (line,) = [line for line in fusedisk("info", image).out.splitlines() if fact in line]
    assert "yes" in line


def test_bitmaps(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", 10 * MIB)
    qemu_img("bitmap", "--add", image, "lost")
    with image.open("r+b") as file:
        content = file.read()
        file.seek(content.rindex(b"lost") - 12 + 3)  # its flags, the lowest byte
        file.write(b"\3")
    assert "bitmaps:          lost (64 KiB, in-use, auto)\n" in fusedisk("info", image).out
    qemu_img("bitmap", "--add", image, "chain")
    qemu_img("bitmap", "--add", "--disable", "-g", "2M", image, "old")
    assert _ours(image) == _theirs(image)
    assert (
        "bitmaps:          lost (64 KiB, in-use, auto), chain (64 KiB, auto), old (2 MiB)\n"
        in fusedisk("info", image).out
    )
    with image.open("r+b") as file:
        file.seek(95)  # the lowest autoclear features
        file.write(b"\0")
    assert _ours(image) == _theirs(image)
    assert "bitmaps:" not in fusedisk("info", image).out


def test_raw(tmp_path: Path) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", 3 * MIB, (100_000, 5000))
    assert _ours(image) == _theirs(image)
    assert _ours(image, "-f", "raw") == _theirs(image, "-f", "raw")


def test_snapshots(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", MIB, "write 0 64k")
    for name in ("before", "after an update", "ünïcode"):
        qemu_img("snapshot", "-c", name, image)
    ours = _ours(image)
    assert [snapshot["name"] for snapshot in ours["snapshots"]] == ["before", "after an update", "ünïcode"]
    assert ours == _theirs(image)


def test_a_relative_backing_file(tmp_path: Path) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", MIB)
    (tmp_path / "sub").mkdir()
    image = make_qcow2(tmp_path / "sub" / "top.qcow2", None, backing=base)
    ours = _ours(image)
    assert ours["backing-filename"] == "../base.qcow2"
    assert ours["full-backing-filename"] == f"{tmp_path}/sub/../base.qcow2"
    assert ours == _theirs(image)


def test_a_backing_file_that_is_missing_is_named_and_not_opened(tmp_path: Path) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", MIB)
    image = make_qcow2(tmp_path / "top.qcow2", None, backing=base)
    base.unlink()
    assert _ours(image) == _theirs(image)


def test_a_backing_file_of_unknown_format(tmp_path: Path) -> None:
    image = tmp_path / "top.qcow2"
    make_sparse_raw(tmp_path / "base.raw", MIB)
    make_qcow2(image, MIB, backing=tmp_path / "base.raw", compat="0.10")
    # The name of the format is the only extension: taking it out leaves a header as old versions wrote it.
    content = bytearray(image.read_bytes())
    place = content.index(b"\xe2\x79\x2a\xca")
    content[place : place + 16] = bytes(16)
    image.write_bytes(content)
    ours = _ours(image)
    assert "backing-filename-format" not in ours
    assert ours == _theirs(image)


def test_a_data_file_is_named_and_not_opened(tmp_path: Path) -> None:
    data = tmp_path / "x.data"
    image = make_qcow2(tmp_path / "x.qcow2", MIB, "write 0 256k", data_file=data)
    assert _ours(image) == _theirs(image)
    assert f"data file:        {data}\n" in fusedisk("info", image).out
    data.unlink()
    assert _ours(image) == _theirs(image)
    assert f"data file:        {data} (missing)\n" in fusedisk("info", image).out


def test_a_chain_is_told_as_far_as_it_goes(tmp_path: Path) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", MIB)
    middle = make_qcow2(tmp_path / "middle.qcow2", None, backing=base)
    top = make_qcow2(tmp_path / "top.qcow2", None, backing=middle)
    base.unlink()
    done = fusedisk("info", "--backing-chain", "--output", "json", top)
    assert [image["filename"] for image in json.loads(done.out)] == [str(top), str(middle)]
    assert (done.code, done.err) == (
        1,
        f"fusedisk: the backing file of '{middle}' cannot be opened: Could not open '{base}': No such file or "
        "directory\n",
    )
    assert "backing file:   base.qcow2\nfound at:       " in fusedisk("info", middle).out
    assert f"{base} (missing)" in fusedisk("info", middle).out


def test_a_chain_that_comes_back_to_itself(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", MIB)
    qemu_img("rebase", "-u", "-b", image, "-F", "qcow2", image)
    done = fusedisk("info", "--backing-chain", "--output", "json", image)
    assert [image["filename"] for image in json.loads(done.out)] == [str(image)]
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "comes back to" in done.err


@pytest.mark.parametrize(
    ("offset", "value", "what"),
    [
        (40, 1 << 24, "its L1 table at 16777216 with 8 bytes, past the end of the file"),
        (48, 1 << 24, "its refcount table at 16777216 with 65536 bytes, past the end of the file"),
        (60, 1 << 32, "its snapshot table at 0, but expected a multiple of 65536 behind the header"),
    ],
)
def test_tables_in_impossible_places(tmp_path: Path, offset: int, value: int, what: str) -> None:
    """info still prints the header; every other command refuses the image."""
    image = make_qcow2(tmp_path / "x.qcow2", 10 * MIB, "write 0 64k")
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(8, "big"))
    done = fusedisk("info", "--output", "json", image)
    assert (done.code, done.err.count("\n")) == (0, 1)
    assert f"'{image}' has {what}" in done.err
    theirs = _theirs(image)
    theirs.pop("snapshots", None)  # what QEMU makes of the header's bytes
    assert done.json == theirs
    done = fusedisk("map", image)
    assert (done.code, done.out) == (1, "")
    assert what in done.err


def test_an_incomplete_image_is_told(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", 10 * MIB, "write 0 1M")
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - MIB // 2)
    assert _ours(image) == _theirs(image)
    assert "is incomplete" in fusedisk("info", image).err


@pytest.mark.parametrize("seed", range(6))
def test_chains(tmp_path: Path, seed: int) -> None:
    image = random_chain(tmp_path, seed)
    assert _ours(image, "--backing-chain") == _theirs(image, "--backing-chain")


def test_an_image_given_by_options(tmp_path: Path) -> None:
    make_qcow2(tmp_path / "x.qcow2", MIB)
    options = f"driver=qcow2,file.driver=file,file.filename={tmp_path}/x.qcow2"
    assert _ours(options) == json.loads(qemu_img("info", "--output=json", "--image-opts", options))


def test_a_window_is_named_by_its_options(tmp_path: Path) -> None:
    make_sparse_raw(tmp_path / "x.raw", MIB)
    ours = _ours(f"driver=raw,file.driver=file,file.filename={tmp_path}/x.raw,offset=4096")
    assert ours["filename"].startswith("json:{")
    assert ours["virtual-size"] == MIB - 4096
    assert _ours(ours["filename"]) == ours


def test_for_people(tmp_path: Path) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", 10 * MIB, cluster_size="128k")
    (tmp_path / "sub").mkdir()
    image = make_qcow2(tmp_path / "sub" / "top.qcow2", None, backing=base)
    qemu_img("snapshot", "-c", "first", base)
    top, below = fusedisk("info", "--backing-chain", "--allow-path", tmp_path, image).out.split("\n\n")
    facts = dict(line.split(":", 1) for line in top.splitlines())
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    assert facts["image"] == str(image)
    assert facts["format"] == "qcow2"
    assert facts["virtual size"] == "10 MiB (10485760 bytes)"
    assert facts["cluster size"] == "64 KiB"
    assert facts["backing file"] == "../base.qcow2"
    assert facts["found at"] == f"{tmp_path}/sub/../base.qcow2"
    assert facts["backing format"] == "qcow2"
    assert facts["compat"] == "1.1"
    assert facts["lazy refcounts"] == "no"
    assert "128 KiB" in below
    assert "first" in below.splitlines()[-1]


def test_while_a_writer_holds_the_image(tmp_path: Path) -> None:
    from tests.support.processes import qemu_io_holding

    image = make_qcow2(tmp_path / "x.qcow2", 64 * KIB)
    with qemu_io_holding(image):
        refused = fusedisk("info", image)
        assert refused.code == 1
        assert refused.err.startswith('fusedisk: Failed to get shared "write" lock')
        assert str(image) in refused.err
        assert _ours(image, "-U") == _theirs(image, "-U")
        assert fusedisk("info", "-U", image).err == ""
        assert fusedisk("map", "-U", image).err == (
            f"fusedisk: '{image}' is being written to by another program: what you read may be out of date or "
            "inconsistent.\n"
        )
    assert fusedisk("map", "-U", image).err == ""
    assert fusedisk("info", image).code == 0
