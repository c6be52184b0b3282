"""The header of qcow2 images as ``amend`` rewrites it, and what is refused with nothing changed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from fusedisk.block.image.amend import amend_image
from fusedisk.core.errors import FusediskError, ImageError, NotSupportedError, OptionError
from fusedisk.drivers.table import DRIVERS
from tests.conftest import ToolError, qemu_img, qemu_io
from tests.drivers.test_qcow2_amend import amend, content, contents, make, specific
from tests.support.qcow2 import assert_clean, opened

# --- the header -----------------------------------------------------------------------------------------


def _add_extension(image: Path, kind: int, data: bytes) -> None:
    """Put an extension in front of the others; there must be no backing file."""
    raw = bytearray(image.read_bytes())
    length = struct.unpack_from(">I", raw, 100)[0]
    padded = data + bytes(-len(data) % 8)
    size = 1 << struct.unpack_from(">I", raw, 20)[0]
    added = struct.pack(">II", kind, len(data)) + padded
    assert not any(raw[size - len(added) : size])
    raw[length:size] = added + raw[length : size - len(added)]
    image.write_bytes(raw)


async def test_unknown_extensions_survive(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", snapshots=False)
    _add_extension(image, 0x12345678, b"somebody needs this")
    before = content(image)
    for compat in ("0.10", "1.1"):
        await amend(image, compat=compat)
        assert struct.pack(">II", 0x12345678, 19) + b"somebody needs this" in image.read_bytes()[:4096]
        assert content(image) == before
    assert_clean(image)


@pytest.mark.parametrize("unit", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_names_of_the_backing_file(tmp_path: Path, unit: int, compat: str) -> None:
    """Short and long names by turns; the disk stays readable, and both tools read the same names."""
    image = make(tmp_path / "disk.qcow2", f"cluster_size={unit},compat={compat}", backing=True)
    before = contents(image)
    base = image.with_suffix(".base")
    longest = min(240, unit - 200)
    names = ["b" * longest, "short", "c" * (longest // 2), "d" * longest, "e"]
    for name in names:
        base = base.rename(tmp_path / name)
        await amend(image, force=True, backing_file=name, backing_fmt="raw")
        info = json.loads(qemu_img("info", "--output=json", image))
        assert (info["backing-filename"], info["backing-filename-format"]) == (name, "raw")
        assert contents(image) == before
    assert_clean(image)
    await amend(image, force=True, backing_file="")
    assert "backing-filename" not in json.loads(qemu_img("info", "--output=json", image))
    assert_clean(image)


async def test_a_name_of_full_length(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", snapshots=False)
    for name in ("./" * 500 + "a", "./" * 505 + "b", "c"):
        await amend(image, force=True, backing_file=name, backing_fmt="raw")
        assert json.loads(qemu_img("info", "--output=json", image))["backing-filename"] == name
    before = image.read_bytes()
    with pytest.raises(OptionError, match="longer than the 1023 bytes"):
        await amend(image, force=True, backing_file="x" * 1024, backing_fmt="raw")
    assert image.read_bytes() == before


async def test_a_header_without_room_is_refused(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "cluster_size=1024", snapshots=False)
    await amend(image, force=True, backing_file="a" * 700, backing_fmt="raw")
    before = image.read_bytes()
    with pytest.raises(ImageError, match="no room for the old header and the new one"):
        await amend(image, force=True, backing_file="b" * 700, backing_fmt="raw")
    assert image.read_bytes() == before


@pytest.mark.parametrize("raw", [False, True])
async def test_data_files(tmp_path: Path, raw: bool) -> None:
    image = tmp_path / "disk.qcow2"
    options = f"data_file={tmp_path / 'old.data'},data_file_raw={'on' if raw else 'off'}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, "1M")
    qemu_io(image, "write -P 5 64k 128k", fmt="qcow2")
    before = content(image)
    (tmp_path / "old.data").rename(tmp_path / "new.data")
    await amend_image(
        DRIVERS,
        {"driver": "qcow2", "file": {"filename": str(image)}, "data-file": {"filename": str(tmp_path / "new.data")}},
        {"data_file": str(tmp_path / "new.data"), "data_file_raw": "off", "refcount_bits": 32},
    )
    found = specific(image)
    assert (found["data-file"], found["data-file-raw"]) == (str(tmp_path / "new.data"), False)
    assert content(image) == before
    assert_clean(image)


# --- refusals -------------------------------------------------------------------------------------------

REFUSED = [
    ("", {"cluster_size": "64k"}, OptionError, "only be chosen when an image is created"),
    ("", {"preallocation": "full"}, OptionError, "only be chosen when an image is created"),
    ("", {"extended_l2": "on"}, OptionError, "only be chosen when an image is created"),
    ("", {"compression_type": "zstd"}, OptionError, "only be chosen when an image is created"),
    ("", {"encrypt.format": "luks"}, OptionError, "only be chosen when an image is created"),
    ("", {"colour": "red"}, OptionError, "no option 'colour'"),
    ("", {"refcount_bits": "3"}, OptionError, "refcount_bits is 3"),
    ("", {"refcount_bits": "128"}, OptionError, "refcount_bits is 128"),
    ("", {"compat": "1.2"}, OptionError, "'1.2'"),
    ("", {"size": "1000"}, OptionError, "multiple of 512"),
    ("", {"compat": "0.10", "refcount_bits": "32"}, OptionError, "needs compat=1.1"),
    ("", {"compat": "0.10", "lazy_refcounts": "on"}, OptionError, "needs compat=1.1"),
    ("", {"backing_file": "other", "backing_fmt": "raw"}, NotSupportedError, "--force"),
    ("", {"data_file": "other"}, OptionError, "no external data file"),
    ("", {"data_file_raw": "on"}, OptionError, "only be created so"),
    ("", {"encrypt.state": "inactive", "encrypt.keyslot": "0"}, OptionError, "not encrypted"),
    ("compat=0.10", {"lazy_refcounts": "on"}, OptionError, "needs compat=1.1"),
    ("compat=0.10", {"refcount_bits": "8"}, OptionError, "needs compat=1.1"),
    ("refcount_bits=8", {"compat": "0.10"}, NotSupportedError, "add refcount_bits=16"),
    ("cluster_size=64k,extended_l2=on", {"compat": "0.10"}, NotSupportedError, "extended L2 entries"),
    ("compression_type=zstd", {"compat": "0.10"}, NotSupportedError, "compresses with zstd"),
]


@pytest.mark.parametrize(("image_options", "options", "error", "words"), REFUSED, ids=lambda value: str(value)[:40])
async def test_refused_with_nothing_changed(
    tmp_path: Path, image_options: str, options: dict[str, str], error: type[FusediskError], words: str
) -> None:
    image = tmp_path / "disk.qcow2"
    make(image, image_options or "cluster_size=4096", snapshots=False)
    before = image.read_bytes()
    with pytest.raises(error, match=words) as caught:
        await amend_image(DRIVERS, str(image), options)
    assert "\n" not in str(caught.value)
    assert image.read_bytes() == before


async def test_downgrades_that_snapshots_forbid(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2")
    await amend(image, size="2M")
    before = image.read_bytes()
    with pytest.raises(NotSupportedError, match="2 snapshots of another disk size"):
        await amend(image, compat="0.10")
    with pytest.raises(ToolError, match="Internal snapshots prevent downgrade"):
        qemu_img("amend", "-o", "compat=0.10", image)
    assert image.read_bytes() == before
    await amend(image, compat="0.10", size="1M")
    assert specific(image)["compat"] == "0.10"


async def test_bitmaps_forbid_a_downgrade(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", snapshots=False)
    qemu_img("bitmap", "--add", image, "changes")
    with pytest.raises(NotSupportedError, match="persistent bitmaps"):
        await amend(image, compat="0.10")
    assert specific(image)["compat"] == "1.1"


async def test_an_image_in_use_is_refused(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2")
    async with opened(image):
        before = image.read_bytes()
        with pytest.raises(FusediskError, match="use"):
            await amend(image, compat="0.10")
        assert image.read_bytes() == before
