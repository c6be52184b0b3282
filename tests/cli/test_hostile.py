"""Broken and hostile input: each kind has its sentence on stderr and exit code 1, never a traceback."""

from __future__ import annotations

import logging
import os
import random
import struct
import sys
from pathlib import Path

import pytest

from fusedisk.cli.output import LineFormatter
from tests.conftest import qemu_img
from tests.support.commands import fusedisk, fusedisk_process
from tests.support.images import KIB, MIB, make_qcow2, make_sparse_raw
from tests.support.processes import qemu_io_holding
from tests.support.thinning import thinned

COMMANDS = (["info"], ["info", "--backing-chain"], ["map"])


def _refused(*args: str | Path, code: int = 1) -> str:
    """The sentence with which a command is refused: 2 stands for a wrong value on the command line."""
    done = fusedisk(*args)
    assert done.code == code, done
    assert done.out == "" or args[0] == "map" or "--backing-chain" in args
    (line,) = done.err.splitlines()
    assert line.startswith("fusedisk: ")
    return line


def _told(image: Path) -> str:
    """The sentence that ``info`` has for a broken image, whether or not there is something else to tell."""
    done = fusedisk("info", "-f", "qcow2", image)
    assert done.code == (0 if done.out else 1), done
    (line,) = done.err.splitlines()
    if done.out:
        assert _refused("map", "-f", "qcow2", image) == line
    return line


def _patched(image: Path, offset: int, layout: str, value: int) -> Path:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(layout, value))
    return image


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_missing_file(tmp_path: Path, command: list[str]) -> None:
    assert (
        _refused(*command, tmp_path / "none")
        == f"fusedisk: Could not open '{tmp_path}/none': No such file or directory"
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_things_that_are_no_files(tmp_path: Path, command: list[str]) -> None:
    assert _refused(*command, tmp_path) == f"fusedisk: '{tmp_path}' is a directory, expected a regular file."
    assert "the file name is empty" in _refused(*command, "", code=2)


def test_a_wrong_format_given(tmp_path: Path) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", MIB)
    sentence = _told(image)
    assert str(image) in sentence
    assert "qcow2" in sentence
    assert "there is no image format 'qcow3', known are qcow2, raw." in _refused("info", "-f", "qcow3", image, code=2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("driver=raw,file.filename={0},colour=red", "raw has no option 'colour' (it has: offset, size)."),
        ("driver=raw,offset=1M", "raw needs the option 'file'."),
        ("driver=raw,file.filename={0},offset=many", "raw option 'offset' is 'many', expected a number of bytes"),
        (
            "driver=raw,file.filename={0},offset=2M",
            "offset 2097152 and size to the end ask for more than the 1048576 bytes",
        ),
        ("driver=raw,file.filename={0},driver=raw", "option 'driver' is given twice."),
        ("driver=raw,file={0}", "there is no node '{0}'."),
        (
            "driver=raw,file.filename={0},read-only=maybe",
            "option 'read-only' is 'maybe', expected 'on' or 'off'.",
        ),
        (
            "driver=raw,file.filename={0},backing=x",
            "raw has no backing file, the option 'backing' is for formats that do.",
        ),
        ("file.driver=file", "file needs the option 'filename', the path of the file."),
        ('{{"driver": ["raw"]}}', "driver"),
        ('{{"driver": "raw", "file": 3}}', "file"),
        ('{{"driver": "raw"', "the JSON options could not be read"),
        ("json:[]", "the JSON options are a list, expected an object."),
        ("gopher:x", "'gopher:x' asks for the protocol 'gopher', known are "),
    ],
)
def test_wrong_options(tmp_path: Path, options: str, sentence: str) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", MIB)
    assert sentence.format(image) in _refused("info", options.format(image), code=2)


# --- locks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_image_in_use(tmp_path: Path, command: list[str]) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", 64 * KIB)
    with qemu_io_holding(image):
        sentence = _refused(*command, image)
        assert 'Failed to get shared "write" lock' in sentence
        assert str(image) in sentence
        assert fusedisk(*command, "-U", image).code == 0
    assert fusedisk(*command, image).code == 0


# --- references -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)
def test_a_missing_backing_file_is_named_and_so_is_the_image(tmp_path: Path, command: list[str]) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", MIB)
    top = make_qcow2(tmp_path / "top.qcow2", None, backing=base)
    base.unlink()
    assert _refused(*command, top) == (
        f"fusedisk: the backing file of '{top}' cannot be opened: Could not open '{base}': No such file or directory"
    )


@pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)
def test_a_reference_outside_the_images_directory(tmp_path: Path, command: list[str]) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    base = make_sparse_raw(tmp_path / "a" / "base.raw", MIB)
    top = make_qcow2(tmp_path / "b" / "top.qcow2", None, backing=base)
    sentence = _refused(*command, top)
    assert f"'{top}' refers to '../a/base.raw', which lies outside the image's own directory" in sentence
    assert f"--allow-path {tmp_path}/a" in sentence
    assert _refused(*command, "--allow-path", tmp_path / "c", top) == sentence
    assert fusedisk(*command, "--allow-path", tmp_path / "a", top).code == 0
    assert fusedisk(*command, "--allow-path", base, top).code == 0
    assert fusedisk(*command, "--allow-any-reference", top).code == 0


def test_an_image_that_is_reached_by_a_link_finds_its_backing_file(tmp_path: Path) -> None:
    """Beside the link, as QEMU does; where there is none, beside the image."""
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "real" / "base.raw").write_bytes(b"base" * 128)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "real" / "top.qcow2")
    (tmp_path / "links" / "vm").symlink_to("../real/top.qcow2")
    found = fusedisk("info", "--output", "json", tmp_path / "links" / "vm").json
    assert Path(found["full-backing-filename"]).resolve() == tmp_path / "real" / "base.raw"
    (tmp_path / "links" / "base.raw").write_bytes(b"link" * 128)
    found = fusedisk("info", "--output", "json", tmp_path / "links" / "vm").json
    assert Path(found["full-backing-filename"]) == tmp_path / "links" / "base.raw"


def test_a_symbolic_link_is_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    make_sparse_raw(tmp_path / "a" / "base.raw", MIB)
    (tmp_path / "b" / "link.raw").symlink_to("../a/base.raw")
    top = make_qcow2(tmp_path / "b" / "top.qcow2", None, backing=tmp_path / "b" / "link.raw")
    assert "lies outside the image's own directory" in _refused("map", top)


@pytest.mark.parametrize(
    "reference",
    [
        "null-co://",
        'json:{"driver":"null-co"}',
        'json:{"driver":"raw","file":{"driver":"host_device","filename":"/dev/null"}}',
    ],
)
def test_a_reference_to_something_else_than_a_file_nearby(tmp_path: Path, reference: str) -> None:
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", reference, "-F", "raw", top, "1M")
    done = fusedisk("map", top)
    if "null-co" in reference:
        assert done.code == 0, "null-co reaches nothing"
    else:
        assert done.code == 1
        assert f"'{top}' refers to '{reference}'" in done.err


@pytest.mark.parametrize("length", thinned([1, 2, 3]))
@pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)
def test_chains_that_come_back_to_themselves(tmp_path: Path, length: int, command: list[str]) -> None:
    images = [tmp_path / f"{index}.qcow2" for index in range(length)]
    for index, image in enumerate(images):
        below = images[(index + 1) % length]
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", below.name, "-F", "qcow2", image, "1M")
    assert "is circular" in _refused(*command, images[0])
    assert fusedisk("info", images[0]).code == 0


# --- headers --------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 image with some data."""
    return make_qcow2(tmp_path / "x.qcow2", 4 * MIB, "write 0 1M", "write -c 2M 64k", "write -z 3M 64k")


@pytest.mark.parametrize("length", [0, 3, 4, 8, 40, 71, 72, 100, 103, 104, 111, 112, 511, 512, 4096])
def test_truncated_headers(image: Path, length: int) -> None:
    content = image.read_bytes()
    image.write_bytes(content[:length])
    sentence = _told(image)
    assert str(image) in sentence


@pytest.mark.parametrize("length", [65536 * n + m for n in range(1, 6) for m in (0, 512)])
def test_truncated_tables_are_refused_or_read_as_far_as_they_go(image: Path, length: int) -> None:
    content = image.read_bytes()
    image.write_bytes(content[:length])
    for command in COMMANDS:
        done = fusedisk(*command, image)
        assert done.code in (0, 1), done
        assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("offset", "layout", "value", "word"),
    [
        (4, ">I", 1, "version"),
        (4, ">I", 9, "version"),
        (20, ">I", 8, "cluster"),
        (20, ">I", 22, "cluster"),
        (20, ">I", 0xFFFFFFFF, "cluster"),
        (24, ">Q", 1 << 63, "size"),
        (36, ">I", 0x7FFFFFFF, "L1"),
        (40, ">Q", 1 << 62, "L1"),
        (40, ">Q", 0x10001, "L1"),
        (48, ">Q", 0x30001, "refcount"),
        (56, ">I", 0x7FFFFFFF, "refcount"),
        (60, ">I", 0x7FFFFFFF, "snapshot"),
        (32, ">I", 2, "encr"),
        (32, ">I", 3, "encr"),
        (8, ">Q", 1 << 60, "backing"),
        (72, ">Q", 1 << 40, "feature"),
        (96, ">I", 7, "refcount"),
        (100, ">I", 20, "header"),
    ],
)
def test_absurd_header_fields_are_named(image: Path, offset: int, layout: str, value: int, word: str) -> None:
    _patched(image, offset, layout, value)
    if offset == 8:
        _patched(image, 16, ">I", 100)
    sentence = _told(image)
    assert str(image) in sentence
    assert word.lower() in sentence.lower()


def test_unknown_features_are_refused_by_name(image: Path) -> None:
    # The feature table that qemu-img writes names bit 4; an entry of our own names bit 40.
    content = bytearray(image.read_bytes())
    place = content.index(b"extended L2 entries")
    content[place - 2 : place + 46] = bytes((0, 40)) + b"time travel".ljust(46, b"\0")
    image.write_bytes(content)
    _patched(image, 72, ">Q", 1 << 40)
    assert "time travel" in _refused("info", image)


@pytest.mark.parametrize("seed", thinned(range(150)))
def test_bytes_at_random_are_never_a_bug(image: Path, seed: int) -> None:
    random_ = random.Random(seed)
    content = bytearray(image.read_bytes())
    for _ in range(random_.randrange(1, 6)):
        # The header, its extensions, the refcount table, a refcount block, L1 and L2.
        place = random_.choice([0, 0, 0, 65536, 2 * 65536, 3 * 65536, 4 * 65536])
        at = place + random_.randrange(random_.choice([8, 112, 256]))
        content[at] = random_.choice([0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)])
    image.write_bytes(content)
    for command in COMMANDS:
        done = fusedisk(*command, "--output", "json", "--allow-any-reference", image)
        assert done.code in (0, 1), done
        assert len(done.err.splitlines()) <= 3, "two warnings and a sentence at most"


def test_no_permission(tmp_path: Path) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", MIB)
    assert fusedisk("info", image).code == 0, "everything is imported"
    image.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        sentence = _refused("info", image)
    finally:
        os.seteuid(user)
    assert sentence == f"fusedisk: Could not open '{image}': Permission denied"


# --- names that steer a terminal -------------------------------------------------------------------------

ODD = "\x1b[2J\n\x9b31m\u202eö"
SHOWN = r"\x1b[2J\x0a\x9b31m\u202eö"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """An image whose names hold what a terminal obeys."""
    make_qcow2(tmp_path / f"{ODD}.base", MIB)
    image = make_qcow2(tmp_path / f"{ODD}.qcow2", MIB, backing=tmp_path / f"{ODD}.base")
    qemu_img("snapshot", "-c", ODD, image)
    qemu_img("bitmap", "--add", image, ODD)
    return image


def _is_harmless(text: str) -> bool:
    return not any(char in text for char in ODD.replace("\n", "") if char in "\x1b\x9b\u202e")


@pytest.mark.parametrize("command", [["info"], ["info", "--backing-chain"], ["snapshot"], ["check"], ["map"]])
def test_names_do_not_steer_a_terminal(odd: Path, command: list[str]) -> None:
    done = fusedisk(*command, odd)
    assert done.code == 0
    assert _is_harmless(done.out)
    if command[0] != "check" and command[0] != "map":
        assert SHOWN in done.out
    missing = fusedisk(*command, f"{odd}\r\u2066")
    assert missing.code == 1
    (line,) = missing.err.split("\n")[:-1]
    assert line.startswith("fusedisk: ")
    assert f"{SHOWN}.qcow2\\x0d\\u2066'" in line


def test_the_snapshots_stay_a_table(odd: Path) -> None:
    qemu_img("snapshot", "-c", "plain", odd)
    heading, *rows = fusedisk("snapshot", odd).out.splitlines()
    assert [SHOWN in row for row in rows] == [True, False]
    assert len({row.rindex(" 00:00:00") if " 00:00:00" in row else row.rindex(" 0:00:00") for row in rows}) == 1
    assert {row.index("0 B") for row in rows} == {heading.index("VM STATE")}


def test_json_holds_the_names_as_they_are(odd: Path) -> None:
    (snapshot,) = fusedisk("snapshot", "--output", "json", odd).json
    assert snapshot["name"] == ODD
    assert fusedisk("info", "--output", "json", odd).json["filename"] == str(odd)


def test_usage_errors_and_what_verbose_says_do_not_steer_it(tmp_path: Path) -> None:
    for args in (["info", f"--{ODD}"], [ODD], ["create", "-f", ODD, tmp_path / "x", "1M"], ["map", "-s", ODD, "x"]):
        for verbose in ([], ["-vv"]):
            done = fusedisk(*verbose, *args)
            assert done.code in (1, 2)
            assert _is_harmless(done.err), done.err


def test_tracebacks_and_log_lines_do_not_steer_it() -> None:
    formatter = LineFormatter("%(levelname)s: %(message)s")
    try:
        raise ValueError(ODD)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "of '%s'", (ODD,), sys.exc_info())
    first, *others = formatter.format(record).split("\n")
    assert first == f"ERROR: of '{SHOWN}'"
    assert others[0] == "Traceback (most recent call last):"
    assert _is_harmless("\n".join(others))


def test_bytes_that_are_no_text_do_not_steer_it(tmp_path: Path) -> None:
    image = make_sparse_raw(tmp_path / os.fsdecode(b"x\x9b31m\xff.raw"), MIB)
    done = fusedisk_process("info", image)
    assert done.code == 0
    assert os.fsdecode(b"x\\x9b31m\xff.raw") in done.out


# --- names that the terminal cannot show -----------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_names_are_told_in_every_encoding(tmp_path: Path, environment: dict[str, str]) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", MIB)
    qemu_img("snapshot", "-c", "→\U0001f4be", image)
    for command in (["info"], ["snapshot"]):
        done = fusedisk_process(*command, image, env=environment)
        assert (done.code, done.err) == (0, "")
        assert r"\u2192\U0001f4be" in done.out
    done = fusedisk_process("snapshot", "-a", "x", f"{image}→", env=environment)
    assert done.code == 1
    assert done.err.startswith("fusedisk: Could not open")
    done = fusedisk_process("snapshot", "-a", "→", image, env=environment)
    assert done.code == 1
    assert "internal" not in done.err


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    sentence = r"the file name '\ud800' cannot be written in this system's utf-8."
    image = make_qcow2(tmp_path / "x.qcow2", MIB)
    name = r'json:{"driver":"file","filename":"\ud800"}'
    qemu_img("rebase", "-u", "-b", name, "-F", "raw", image)
    for environment in ({}, {"PYTHONIOENCODING": "ascii"}):
        done = fusedisk_process("info", name, env=environment)
        assert done == (2, "", f"fusedisk: {sentence}\n")
        done = fusedisk_process("info", "--backing-chain", image, env=environment)
        assert (done.code, done.out == "") == (1, False)
        assert done.err.splitlines() == [f"fusedisk: the backing file of '{image}' cannot be opened: {sentence}"]
