"""Every command names the format of an image that fusedisk cannot open and refuses it; a guess causes a warning."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

import fusedisk as library
from fusedisk.core.errors import UnsupportedFeatureError
from tests.conftest import qemu_img
from tests.support.commands import fusedisk, fusedisk_process
from tests.support.images import MIB, make_qcow2, make_sparse_raw

VDI = "a VDI image, which fusedisk cannot open: convert it to qcow2 or raw first, or "
AS_IT_IS = "say --format raw to use its bytes as they are."


@pytest.fixture
def vdi(tmp_path: Path) -> Path:
    """An image of another format."""
    image = tmp_path / "x.vdi"
    qemu_img("create", "-q", "-f", "vdi", image, "1M")
    return image


def _overlay(base: Path) -> Path:
    """A qcow2 image over ``base`` that does not say what that is."""
    path = make_qcow2(base.parent / "top.qcow2", MIB, backing=base, compat="0.10")
    content = bytearray(path.read_bytes())
    place = content.index(b"\xe2\x79\x2a\xca")  # the only extension
    content[place : place + 16] = bytes(16)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "command",
    [
        ("info",),
        ("map",),
        ("check",),
        ("check", "-r", "all"),
        ("measure", "-O", "qcow2"),
        ("amend", "-o", "size=2M"),
        ("snapshot", "-l"),
    ],
)
def test_each_command_names_it(vdi: Path, command: tuple[str, ...]) -> None:
    before = vdi.read_bytes()
    done = fusedisk(*command, vdi)
    assert (done.code, done.out, done.err) == (1, "", f"fusedisk: '{vdi}' is {VDI}{AS_IT_IS}\n")
    assert vdi.read_bytes() == before


@pytest.mark.parametrize("options", [(), ("--overlay-file", "layer.qcow2")])
def test_it_is_not_mounted(vdi: Path, options: tuple[str, ...]) -> None:
    (vdi.parent / "mnt").mkdir()
    done = fusedisk_process("mount", *options, vdi, "mnt", cwd=vdi.parent)
    assert (done.code, done.out, done.err) == (1, "", f"fusedisk: '{vdi}' is {VDI}{AS_IT_IS}\n")
    assert not (vdi.parent / "layer.qcow2").exists()


async def test_nor_opened_from_python(vdi: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="is a VDI image"):
        async with library.open(vdi, writable=True):
            pass
    async with library.open(vdi, format="raw") as disk:
        assert await disk.read(0, 4) == b"<<< "


def test_nor_by_python_without_trio(vdi: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="is a VDI image"), library.open_sync(vdi):
        pass


def test_its_bytes_are_there_for_the_asking(vdi: Path) -> None:
    assert fusedisk("info", "--output", "json", "-f", "raw", vdi).json["virtual-size"] == vdi.stat().st_size
    options = f"driver=raw,file.driver=file,file.filename={vdi}"
    assert fusedisk("info", "--output", "json", options).json["virtual-size"] == vdi.stat().st_size


def test_what_is_compressed_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "x.raw.gz").write_bytes(gzip.compress(bytes(MIB)))
    assert fusedisk("info", tmp_path / "x.raw.gz").err == (
        f"fusedisk: '{tmp_path}/x.raw.gz' is a gzip file, which fusedisk cannot open: unpack it first, or {AS_IT_IS}\n"
    )


def test_a_backing_file_of_no_recorded_format(vdi: Path) -> None:
    top = _overlay(vdi)
    assert fusedisk("info", top).code == 0
    advice = f"fusedisk amend --force -o backing_fmt=raw {top}"
    done = fusedisk("map", top)
    assert (done.code, done.err) == (
        1,
        f"fusedisk: the backing file of '{top}' cannot be opened: '{vdi}' is {VDI}record it with '{advice}' to use its "
        "bytes as they are.\n",
    )
    given = f"driver=qcow2,file.filename={top},backing.file.filename={vdi}"
    assert "or give it the option driver=raw to use" in fusedisk("map", given).err
    assert fusedisk("map", f"{given},backing.driver=raw").code == 0
    assert fusedisk(*advice.split()[1:]).code == 0
    done = fusedisk("map", top)
    assert (done.code, done.err) == (0, "")


def test_a_filter_over_one(vdi: Path) -> None:
    options = f"driver=blkdebug,image.file.filename={vdi}"
    assert "or give it the option driver=raw to use" in fusedisk("map", options).err
    assert fusedisk("map", f"{options},image.driver=raw").code == 0


def test_its_name_is_no_format(vdi: Path) -> None:
    sentence = "fusedisk: there is no image format 'vdi', known are qcow2, raw.\n"
    for command in (
        ("info", "-f", "vdi", vdi),
        ("check", "-f", "vdi", vdi),
        ("amend", "-f", "vdi", "-o", "help"),
        ("create", "-f", "vdi", vdi.parent / "new.vdi", "1M"),
        ("create", "-f", "vdi", "-o", "help"),
        ("create", "-f", "qcow2", "-b", vdi, "-F", "vdi", vdi.parent / "new.qcow2"),
        ("measure", "--size", "1M", "-O", "vdi"),
        ("measure", "-O", "vdi", "-o", "help"),
    ):
        done = fusedisk(*command)
        assert (done.code, done.err) == (2, sentence), command
    assert "there is no image format 'blkdebug'" in fusedisk("info", "-f", "blkdebug", vdi).err


# --- what is only guessed -------------------------------------------------------------------------------


def test_a_guess_is_told_once(tmp_path: Path) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", MIB)
    done = fusedisk("map", image)
    assert (done.code, done.err) == (
        0,
        f"fusedisk: '{image}' is taken for raw, which is a guess: say --format raw if that is right.\n",
    )
    assert fusedisk("map", "-f", "raw", image).err == ""
    assert fusedisk("info", image).err == ""


def test_also_of_a_backing_file(tmp_path: Path) -> None:
    base = make_sparse_raw(tmp_path / "base.raw", MIB)
    top = _overlay(base)
    advice = f"fusedisk amend --force -o backing_fmt=raw {top}"
    assert fusedisk("map", top).err == (
        f"fusedisk: '{base}', the backing file of '{top}', is taken for raw, which is a guess: record it with "
        f"'{advice}' if that is right.\n"
    )
    assert fusedisk(*advice.split()[1:]).err == ""
    assert fusedisk("map", top).err == ""
