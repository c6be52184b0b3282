"""Encrypted images made, filled and read by QEMU's tools, and where their bytes lie."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from fusedisk.crypto import luks, luks_layout
from fusedisk.crypto.ciphers import SectorCipher
from tests.conftest import ToolError, qemu_img, run_tool

PASSPHRASE = "correct horse, battery"
"""The comma must reach QEMU doubled."""
MIB = 1 << 20

_EXTENSION_CRYPTO = 0x0537BE77
_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62


def secret(passphrase: str = PASSPHRASE, name: str = "sec0") -> list[str]:
    """The command line arguments that give a passphrase to one of QEMU's tools."""
    return ["--object", f"secret,id={name},data={passphrase.replace(',', ',,')}"]


def create_luks(path: Path, **options: str) -> Path:
    """A LUKS container of 4 MiB; ``options`` are QEMU's with underscores."""
    pairs = ["key-secret=sec0", "iter-time=10", *(f"{key.replace('_', '-')}={value}" for key, value in options.items())]
    qemu_img("create", "-q", *secret(), "-f", "luks", "-o", ",".join(pairs), path, "4M")
    return path


def create_qcow2(path: Path, encryption: str, passphrase: str = PASSPHRASE, **options: str) -> Path:
    """A qcow2 image of 4 MiB; ``options`` are those below QEMU's ``encrypt.``, with underscores."""
    pairs = {"format": encryption, "key-secret": "sec0"}
    if encryption == "luks":
        pairs["iter-time"] = "10"
    pairs |= {key.replace("_", "-"): value for key, value in options.items()}
    text = ",".join(f"encrypt.{key}={value}" for key, value in pairs.items())
    qemu_img("create", "-q", *secret(passphrase), "-f", "qcow2", "-o", text, path, "4M")
    return path


def run_qemu_io(path: Path, driver: str, *commands: str, passphrase: str = PASSPHRASE) -> None:
    """qemu-io commands on an encrypted image; a pattern that does not match or a failed request is an error."""
    prefix = "encrypt." if driver == "qcow2" else ""
    image = f"driver={driver},{prefix}key-secret=sec0,file.filename={path}"
    arguments = [argument for command in commands for argument in ("-c", command)]
    out = run_tool("qemu-io", *secret(passphrase), *arguments, "--image-opts", image)
    if "failed" in out:
        raise ToolError(f"qemu-io on {path}: {out}")


def passphrase_opens(path: Path, passphrase: str, driver: str = "luks") -> bool:
    """Whether QEMU opens the image with that passphrase."""
    try:
        run_qemu_io(path, driver, "read 0 512", passphrase=passphrase)
    except ToolError as exc:
        if "cannot unlock any keyslot" not in str(exc):
            raise
        return False
    return True


class Area(NamedTuple):
    """A LUKS header area in memory, and its header."""

    content: bytes
    header: luks_layout.Header

    def materials(self) -> dict[int, bytes]:
        """What :func:`luks.unlock` asks for."""
        ranges = self.header.material_ranges()
        return {slot: self.content[offset : offset + size] for slot, (offset, size) in ranges.items()}

    def unlock(self, passphrase: str = PASSPHRASE) -> luks.Unlocked:
        return luks.unlock(self.header, self.materials(), passphrase.encode(), "disk.luks")

    def cipher(self) -> SectorCipher:
        return SectorCipher(self.header.spec, self.unlock().master_key)


def luks_area(path: Path) -> Area:
    """The header area of a LUKS container."""
    content = path.read_bytes()
    return Area(content, luks_layout.parse(content[: luks_layout.HEADER_SIZE], len(content), path.name))


class Qcow2(NamedTuple):
    """A qcow2 image with one L2 table, in memory."""

    content: bytes

    def area(self) -> Area:
        """The LUKS header area that the header extension points at."""
        (at,) = struct.unpack_from(">I", self.content, 100)
        while True:
            kind, length = struct.unpack_from(">II", self.content, at)
            if kind == _EXTENSION_CRYPTO:
                break
            assert kind, "there is no crypto header extension"
            at += 8 + (length + 7) // 8 * 8
        start, size = struct.unpack_from(">QQ", self.content, at + 8)
        content = self.content[start : start + size]
        return Area(content, luks_layout.parse(content[: luks_layout.HEADER_SIZE], size, "disk.qcow2"))

    @property
    def cluster_size(self) -> int:
        return 1 << int.from_bytes(self.content[20:24], "big")

    def entry(self, guest: int) -> int:
        """The L2 entry of a guest offset."""
        (l1_table,) = struct.unpack_from(">Q", self.content, 40)
        (l1_entry,) = struct.unpack_from(">Q", self.content, l1_table)
        return int(
            struct.unpack_from(">Q", self.content, (l1_entry & _OFFSET_MASK) + guest // self.cluster_size * 8)[0]
        )

    def host_offset(self, guest: int) -> int:
        """Where the bytes of a guest offset lie."""
        entry = self.entry(guest)
        assert entry & _OFFSET_MASK
        assert not entry & _COMPRESSED
        return (entry & _OFFSET_MASK) + guest % self.cluster_size

    def compressed_bytes(self, guest: int) -> bytes:
        """The compressed data of a guest offset, and what follows it in its last sector."""
        entry = self.entry(guest)
        assert entry & _COMPRESSED
        shift = 62 - (self.cluster_size.bit_length() - 1 - 8)
        start, sectors = entry & ((1 << shift) - 1), (entry & (_COMPRESSED - 1)) >> shift
        return self.content[start : (start // 512 + sectors + 1) * 512]


def write_pieces(path: Path, pieces: list[luks.Piece], start: int = 0) -> None:
    """Apply what changes a header area to the file that holds it at ``start``."""
    with path.open("r+b") as file:
        for piece in pieces:
            file.seek(start + piece.offset)
            file.write(piece.data)
