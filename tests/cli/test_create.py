"""``fusedisk create``: what it makes, what it refuses, and what it leaves behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.image.create import create_image
from fusedisk.core.errors import NoSpaceError
from fusedisk.drivers.format.raw import RawDriver
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, qemu_io
from tests.support.commands import fusedisk, fusedisk_process
from tests.support.images import KIB, MIB, make_qcow2, make_sparse_raw
from tests.support.processes import qemu_io_holding

FAILURES = ("Could not", "none.raw", "the backing file cannot be used", "file is a", "copy-on-read is a")
"""The first words of messages about things outside the command line; the exit code is 1 then, not 2."""


def _info(image: Path) -> dict[str, Any]:
    information = json.loads(qemu_img("info", "--output=json", image))
    assert isinstance(information, dict)
    return information


def _same_but_the_names(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for key in ("filename", "actual-size"):
        ours.pop(key), theirs.pop(key)
    assert ours == theirs


@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
        "cluster_size=512",
        "cluster_size=2M,refcount_bits=1",
        "refcount_bits=64",
        "compression_type=zstd",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full,nocow=on",
    ],
)
def test_qcow2_is_what_qemu_img_makes(tmp_path: Path, options: str) -> None:
    more = ["-o", options] if options else []
    done = fusedisk("create", "-f", "qcow2", *more, tmp_path / "ours.qcow2", "3M")
    assert done.code == 0, done.err
    qemu_img("create", "-q", "-f", "qcow2", *more, tmp_path / "theirs.qcow2", "3M")
    qemu_img("check", "-q", tmp_path / "ours.qcow2")
    _same_but_the_names(_info(tmp_path / "ours.qcow2"), _info(tmp_path / "theirs.qcow2"))
    # metadata: they are equal to the last hole; falloc and full depend on the host's filesystem
    if "falloc" not in options and "full" not in options:
        ours = [
            dict(entry, offset=None) for entry in json.loads(qemu_img("map", "--output=json", tmp_path / "ours.qcow2"))
        ]
        theirs = [
            dict(entry, offset=None)
            for entry in json.loads(qemu_img("map", "--output=json", tmp_path / "theirs.qcow2"))
        ]
        assert ours == theirs


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_raw(tmp_path: Path, preallocation: str) -> None:
    image = tmp_path / "x.raw"
    assert fusedisk("create", "-o", f"preallocation={preallocation}", image, "1M").code == 0
    found = image.stat()
    assert found.st_size == MIB
    assert (found.st_blocks * 512 >= MIB) == (preallocation != "off")
    assert not any(image.read_bytes())


def test_what_it_says(tmp_path: Path) -> None:
    make_qcow2(tmp_path / "base.qcow2", 10 * MIB)
    done = fusedisk("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / "top.qcow2")
    assert done.code == 0
    assert done.out.startswith(
        f"Created '{tmp_path}/top.qcow2', qcow2, 10 MiB (10485760 bytes), over 'base.qcow2' (qcow2): "
    )
    assert "cluster_size=65536" in done.out
    assert done.err == ""
    assert fusedisk("create", "-q", tmp_path / "x.raw", "1M") == (0, "", "")


@pytest.mark.parametrize(("asked", "made"), [("1000", 1024), ("1", 512), ("0", 0), ("1.5k", 1536), ("513", 1024)])
def test_sizes_are_whole_sectors(tmp_path: Path, asked: str, made: int) -> None:
    assert fusedisk("create", "-f", "raw", tmp_path / "x.raw", asked).code == 0
    assert (tmp_path / "x.raw").stat().st_size == made
    assert fusedisk("create", "-f", "qcow2", tmp_path / "x.qcow2", asked).code == 0
    assert _info(tmp_path / "x.qcow2")["virtual-size"] == made


def test_the_options_are_listed() -> None:
    done = fusedisk("create", "-f", "qcow2", "-o", "help")
    assert done.code == 0
    for name in ("size", "cluster_size", "compat", "backing_file", "preallocation"):
        assert f"{name}:" in done.out
    assert fusedisk("create", "-f", "file", "-o", "help").code == 2


# --- backing files --------------------------------------------------------------------------------------


def test_a_backing_file_is_stored_as_given_and_found_from_the_new_image(tmp_path: Path) -> None:
    make_qcow2(tmp_path / "base.qcow2", 5 * MIB, "write -P 9 1M 64k")
    (tmp_path / "sub").mkdir()
    top = tmp_path / "sub" / "top.qcow2"
    done = fusedisk_process("create", "-f", "qcow2", "-b", "../base.qcow2", "-F", "qcow2", top, cwd=Path("/"))
    assert done.code == 0, done.err
    assert _info(top)["backing-filename"] == "../base.qcow2"
    assert _info(top)["virtual-size"] == 5 * MIB
    qemu_io(top, "read -P 9 1M 64k")


def test_a_size_of_ones_own_over_a_backing_file(tmp_path: Path) -> None:
    make_sparse_raw(tmp_path / "base.raw", MIB)
    top = tmp_path / "top.qcow2"
    assert fusedisk("create", "-f", "qcow2", "-o", "backing_file=base.raw,backing_fmt=raw", top, "7M").code == 0
    assert _info(top)["virtual-size"] == 7 * MIB


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            ["-b", "base.raw", "x", "1M"],
            "'base.raw' is given without its format, and a guess could be wrong: add it with -F.",
        ),
        (["-F", "raw", "x", "1M"], "a backing format is given ('raw'), but no backing file."),
        (["-b", "none.raw", "-F", "raw", "x", "1M"], "none.raw': No such file or directory"),
        (["-b", "base.raw", "-F", "qcow2", "x", "1M"], "the backing file cannot be used: "),
        (["-b", "base.raw", "-F", "vhdy", "x", "1M"], "there is no image format 'vhdy'"),
        (
            ["-u", "-b", "none.raw", "-F", "raw", "x"],
            "needs a size, since its backing file is not opened to take it from.",
        ),
        (["-b", "x", "-F", "raw", "x", "1M"], "the new image 'x' cannot be its own backing file."),
        (["-u", "-b", "./x", "-F", "raw", "x", "1M"], "the new image 'x' cannot be its own backing file."),
        (
            ["-b", "base.raw", "-F", "raw", "-o", "backing_file=base.raw", "x", "1M"],
            "'backing_file' is given twice",
        ),
    ],
)
def test_backing_files_that_are_refused(tmp_path: Path, args: list[str], sentence: str) -> None:
    make_sparse_raw(tmp_path / "base.raw", MIB)
    done = fusedisk_process("create", "-f", "qcow2", *args, cwd=tmp_path)
    assert done.code == (1 if sentence.startswith(FAILURES) else 2)
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_raw_has_no_backing_file(tmp_path: Path) -> None:
    make_sparse_raw(tmp_path / "base.raw", MIB)
    done = fusedisk("create", "-b", "base.raw", "-F", "raw", tmp_path / "x.raw")
    assert (done.code, done.err) == (2, "fusedisk: raw images cannot have a backing file.\n")


def test_a_backing_file_that_is_not_looked_at(tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    assert fusedisk("create", "-u", "-f", "qcow2", "-b", "later.qcow2", "-F", "qcow2", top, "1M").code == 0
    assert _info(top)["backing-filename"] == "later.qcow2"


@pytest.mark.parametrize("spelling", ["base.qcow2", "./base.qcow2", "sub/../base.qcow2", "link.qcow2"])
def test_an_image_cannot_stand_on_itself(tmp_path: Path, spelling: str) -> None:
    (tmp_path / "sub").mkdir()
    base = make_qcow2(tmp_path / "base.qcow2", MIB, "write 0 64k")
    (tmp_path / "link.qcow2").symlink_to("base.qcow2")
    middle = make_qcow2(tmp_path / "middle.qcow2", None, backing=base)
    before = base.read_bytes()
    for backing in (spelling, str(middle)):
        done = fusedisk_process("create", "-f", "qcow2", "-b", backing, "-F", "qcow2", "base.qcow2", cwd=tmp_path)
        assert done.code == 2
        sentence = "is part of the backing chain that the new image would stand on"
        assert ("cannot be its own backing file" if backing == spelling else sentence) in done.err
        assert base.read_bytes() == before


def test_a_chain_that_leaves_its_directory_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    base = make_sparse_raw(tmp_path / "a" / "base.raw", MIB)
    make_qcow2(tmp_path / "b" / "middle.qcow2", None, backing=base)
    args = ["create", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", str(tmp_path / "b" / "top.qcow2")]
    done = fusedisk(*args)
    assert done.code == 1
    assert f"--allow-path {tmp_path}/a" in done.err
    assert fusedisk(*args, "--allow-path", str(tmp_path / "a")).code == 0


# --- what is refused, and what stays --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["-f", "qcow2", "x"], "the new image 'x' needs a size, such as 10G."),
        (["-f", "qcow2", "x", "10X"], "size is '10X', expected a number of bytes, such as 4096, 512M or 10G."),
        (["-f", "qcow2", "x", "9E"], "size is 9E, but it must lie between 0 and 2^63 - 1."),
        (["-f", "qcow2", "-o", "colour=red", "x", "1M"], "qcow2 has no option 'colour' (it has: "),
        (["-f", "qcow2", "-o", "cluster_size=3000", "x", "1M"], "cluster"),
        (["-f", "qcow2", "-o", "compat=2", "x", "1M"], "compat"),
        (["-f", "qcow2", "-o", "cluster_size", "x", "1M"], "'cluster_size' is not an option, expected KEY=VALUE."),
        (
            ["-f", "qcow2", "-o", "size=2M", "x", "1M"],
            "the option 'size' is given twice ('2M' and '1M').",
        ),
        (["-f", "vhdy", "x", "1M"], "there is no image format 'vhdy', known are qcow2, raw."),
        (["-f", "file", "x", "1M"], "there is no image format 'file', known are qcow2, raw."),
        (["-f", "copy-on-read", "x", "1M"], "there is no image format 'copy-on-read', known are qcow2, raw."),
        (["-f", "raw", "-o", "preallocation=metadata", "x", "1M"], "expected one of off, falloc, full."),
        (["-f", "raw", "none/x", "1M"], "Could not create 'none/x': No such file or directory"),
        (["-f", "raw", ".", "1M"], "Could not create '.'"),
        (["-f", "raw", "gopher:x", "1M"], "asks for the protocol 'gopher', known are"),
        (["-f", "raw", "null-co://", "1M"], "'null-co://' cannot be created, expected the name of a file or device."),
        (
            ["-f", "raw", 'json:{"driver":"null-co"}', "1M"],
            "cannot be created, expected the name of a file or device.",
        ),
    ],
)
def test_each_mistake_has_its_sentence(tmp_path: Path, args: list[str], sentence: str) -> None:
    done = fusedisk_process("create", *args, cwd=tmp_path)
    assert done.code == (1 if sentence.startswith(FAILURES) else 2)
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_image_in_use_is_not_touched(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", 64 * KIB, "write 0 64k")
    with qemu_io_holding(image):
        before = image.read_bytes()
        done = fusedisk("create", "--force", "-f", "qcow2", image, "1M")
        assert done.code == 1
        assert "is another process using" in done.err.lower()
        assert image.read_bytes() == before


def test_an_existing_image_is_replaced_with_force_only(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "x", 64 * MIB, "write 0 1M")
    before = image.read_bytes()
    done = fusedisk("create", "-f", "raw", image, "64k")
    sentence = f"'{image}' exists and holds {len(before)} bytes, which a new image would replace (--force)."
    assert done == (1, "", f"fusedisk: {sentence}\n")
    assert image.read_bytes() == before
    assert fusedisk("create", "--force", "-f", "raw", image, "64k").code == 0
    assert image.read_bytes() == bytes(64 * KIB)


class _Broken(RawDriver):
    """Fails when the image is written."""

    @classmethod
    async def create(cls, file: Any, options: Any, data_file: Any = None) -> None:
        raise NoSpaceError("the host is full.", errno=errno.ENOSPC)


@pytest.mark.parametrize("existed", [False, True])
async def test_a_failure_leaves_no_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool) -> None:
    image = tmp_path / "x.raw"
    if existed:
        image.write_bytes(b"old")
    monkeypatch.setitem(DRIVERS._loaded, "raw", _Broken)
    with pytest.raises(NoSpaceError, match="the host is full"):
        await create_image(DRIVERS, "raw", str(image), {"size": "1M"}, overwrite=True)
    assert image.exists() == existed


def test_a_name_that_looks_like_a_protocol(tmp_path: Path) -> None:
    assert fusedisk_process("create", "./a:b.raw", "1M", cwd=tmp_path).code == 0
    assert os.listdir(tmp_path) == ["a:b.raw"]
    assert fusedisk_process("create", "file:c.raw", "1M", cwd=tmp_path).code == 0
    assert sorted(os.listdir(tmp_path)) == ["a:b.raw", "c.raw"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("cluster_size=3", "cluster_size is 3"),
        ("preallocation=full,backing_file=base.qcow2,backing_fmt=qcow2", "preallocation is 'full'"),
        ("extended_l2=on,cluster_size=4k", "cluster_size is 4096"),
        ("refcount_bits=64,compat=0.10", "refcount_bits"),
        ("compression_type=zstd,compat=0.10", "compression_type"),
        ("data_file=none/data", "none/data"),
        ("cluster_size=512,size=1P", "L1 table"),
        ("encrypt.format=luks", "encrypt.key-file"),
        ("encrypt.format=luks,encrypt.key-file=none", "none"),
        ("encrypt.format=luks,encrypt.key-file=empty", "is empty"),
        ("encrypt.format=luks,encrypt.key-file=key,encrypt.cipher-alg=rot-13", "cipher"),
        ("encrypt.key-file=key", "encrypt.format"),
    ],
)
def test_wrong_options_cost_nothing(tmp_path: Path, options: str, sentence: str) -> None:
    image = make_qcow2(tmp_path / "image.qcow2", MIB, "write -P 5 0 64k")
    make_qcow2(tmp_path / "base.qcow2", MIB)
    (tmp_path / "empty").touch()
    (tmp_path / "key").write_text("secret")
    before = image.read_bytes()
    size = [] if "size=1P" in options else ["1M"]
    done = fusedisk_process("create", "--force", "-f", "qcow2", "-o", options, image, *size, cwd=tmp_path)
    assert done.code == (1 if "none" in options or "1P" in options else 2)
    assert sentence in done.err
    assert done.err.count("\n") == 1
    assert image.read_bytes() == before
