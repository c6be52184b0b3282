"""Containers that are not raw are recognised, and disks that are raw are never taken for one."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from fusedisk.block.graph.signatures import EDGE, recognise
from tests.conftest import qemu_img
from tests.support.images import MIB, make_sparse_raw


def _id(value: object) -> str:
    """What is compressed has the time in it, so it must not be a test's name."""
    return value if isinstance(value, str) else ""


def _what(content: bytes) -> str | None:
    found = recognise(content[:EDGE], content[-EDGE:])
    return found.what if found is not None else None


@pytest.mark.parametrize(
    ("format", "what"),
    [
        ("vmdk", "a VMDK image"),
        ("vmdk subformat=streamOptimized", "a VMDK image"),
        ("vmdk subformat=monolithicFlat", "the descriptor of a VMDK image"),
        ("vmdk subformat=twoGbMaxExtentSparse", "the descriptor of a VMDK image"),
        ("vdi", "a VDI image"),
        ("vdi static=on", "a VDI image"),
        ("vhdx", "a VHDX image"),
        ("vpc", "a VHD image"),
        ("vpc subformat=fixed", "a VHD image"),
        ("qed", "a QED image"),
        ("qcow", "a qcow image of version 1"),
        ("parallels", "a Parallels image"),
    ],
)
def test_what_qemu_img_makes(tmp_path: Path, format: str, what: str) -> None:
    raw, image = make_sparse_raw(tmp_path / "x.raw", 4 * MIB, (0, 512)), tmp_path / "x"
    name, _, options = format.partition(" ")
    more = ["-o", options] if options else []
    qemu_img("convert", "-f", "raw", "-O", name, *more, raw, image)
    assert _what(image.read_bytes()) == what


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("disk", bytes(1000))
    return file.getvalue()


def _tar(format: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        entry = tarfile.TarInfo("disk.vmdk")
        entry.size = 1000
        archive.addfile(entry, io.BytesIO(bytes(1000)))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(bytes(1000)), "a gzip file"),
        (bz2.compress(bytes(1000)), "a bzip2 file"),
        (bz2.compress(b""), "a bzip2 file"),
        (lzma.compress(bytes(1000)), "an xz file"),
        (_zip(), "a zip archive"),
        (_tar(tarfile.USTAR_FORMAT), "a tar archive"),
        (_tar(tarfile.GNU_FORMAT), "a tar archive"),
        (_tar(tarfile.PAX_FORMAT), "a tar archive"),
    ],
    ids=_id,
)
def test_what_python_makes(content: bytes, what: str) -> None:
    assert _what(content) == what


@pytest.mark.parametrize(
    ("magic", "what"),
    [
        (b"COWD\x01\0\0\0", "a VMDK image"),
        (b"\xbe\xba\xfe\xca\0\0\0\0\x01\0\0\0\x02\0\0\0", "a VMDK image"),
        (b"# Disk DescriptorFile\nversion=1\n", "the descriptor of a VMDK image"),
        (b"\r\n# disk descriptorfile\r\nversion=1\n", "the descriptor of a VMDK image"),
        (b"WithouFreSpacExt\x02\0\0\0", "a Parallels image"),
        (b"Bochs Virtual HD Image\0", "a bochs image"),
        (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "a cloop image"),
        (b"encrcdsa\0\0\0\x02", "an encrypted DMG image"),
        (b"shdw\0\0\0\x01\0\0\x02\0", "an ASIF image"),
        (b"sprs\0\0\0\x03", "a sparseimage"),
        (b"\x3a\xff\x26\xed\x01\0\0\0", "an Android sparse image"),
        (b"partclone-image\0", "a partclone image"),
        (b"EVF\x09\x0d\x0a\xff\0\x01", "an EWF image"),
        (b"EVF2\x0d\x0a\x81\0", "an EWF image"),
        (b"LVF\x09\x0d\x0a\xff\0", "logical evidence (EWF)"),
        (b"VMA\0\0\0\0\x01", "a Proxmox backup (VMA)"),
        (b"LUKS\xba\xbe\0\x01", "a LUKS volume"),
        (b"LUKS\xba\xbe\0\x02", "a LUKS volume"),
        (b"\x28\xb5\x2f\xfd\x04", "a zstd file"),
        (b"\x04\x22\x4d\x18", "an lz4 file"),
        (b"\x89LZO\0\x0d\x0a\x1a\x0a", "an lzop file"),
        (b"LZIP\x01", "an lzip file"),
        (b"7z\xbc\xaf\x27\x1c\0\x04", "a 7z archive"),
        (b"Rar!\x1a\x07\x01\0", "a rar archive"),
        (b"MSWIM\0\0\0", "a WIM archive"),
    ],
    ids=_id,
)
def test_what_begins_like_it(magic: bytes, what: str) -> None:
    assert _what(magic + bytes(4096)) == what
    assert _what(bytes(512) + magic + bytes(4096)) is None


@pytest.mark.parametrize(
    ("trailer", "what"),
    [(b"koly\0\0\0\x04\0\0\x02\0" + bytes(500), "a DMG image"), (bytes(504) + b"cdsaencr", "an encrypted DMG image")],
    ids=_id,
)
def test_what_ends_like_it(trailer: bytes, what: str) -> None:
    assert _what(bytes(4096) + trailer) == what
    assert _what(bytes(4096) + trailer + bytes(512)) is None


def _boot_sector(*pieces: tuple[int, bytes]) -> bytes:
    sector = bytearray(random.Random(5).randbytes(510) + b"\x55\xaa")
    for offset, data in ((0, b"\xeb\x63\x90"), *pieces):
        sector[offset : offset + len(data)] = data
    return bytes(sector)


def _altered(content: bytes, offset: int) -> bytes:
    changed = bytearray(content)
    changed[offset] ^= 1
    return bytes(changed)


def test_a_fixed_vhd_is_told_from_a_disk_by_the_checksum_of_its_footer(tmp_path: Path) -> None:
    raw, image = make_sparse_raw(tmp_path / "x.raw", MIB, (0, 512)), tmp_path / "x.vhd"
    qemu_img("convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed", raw, image)
    content = image.read_bytes()
    assert _what(content) == "a VHD image"
    assert _what(_altered(content, len(content) - 300)) is None
    assert _what(content + bytes(512)) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"x" * 100,
        b"\x1f\x8b\x08",
        b"conectix",
        bytes(MIB),
        _boot_sector(),
        _boot_sector((257, b"ustar\x0000"), (148, b"001234\0 ")),
        _boot_sector((64, b"\x7f\x10\xda\xbe")),
        _altered(_tar(tarfile.USTAR_FORMAT), 3),
        b"\x1f\x8b\x08\xff" + bytes(600),
        b"koly" + bytes(508),
        b"LUKS\xba\xbe\0\x09" + bytes(600),
        b"QFI\xfb\0\0\0\0" + bytes(600),
        b"# Disks\nversion=1\n",
        *(random.Random(seed).randbytes(2048) for seed in range(20)),
    ],
    ids=_id,
)
def test_what_is_raw_for_all_we_know(content: bytes) -> None:
    assert _what(content) is None
