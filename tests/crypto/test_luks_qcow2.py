"""qcow2 images encrypted by QEMU: where the header lies, and which number a sector has."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import pytest

from fusedisk.crypto import luks, luks_layout
from fusedisk.crypto.ciphers import SectorCipher
from fusedisk.crypto.qcow_aes import legacy_cipher
from tests.conftest import qemu_img
from tests.crypto import images
from tests.crypto.images import PASSPHRASE, Qcow2

CLUSTER = 65536


def _scattered(path: Path) -> dict[int, int]:
    """Write a pattern to each of many clusters in random order, so that host and guest order differ."""
    random_ = random.Random(7)
    patterns = {cluster * CLUSTER: 1 + cluster for cluster in random_.sample(range(64), 20)}
    commands = [f"write -P {pattern} {offset} 64k" for offset, pattern in patterns.items()]
    images.run_qemu_io(path, "qcow2", *commands)
    return patterns


def test_luks_sectors_are_numbered_by_host_offset(qcow2_disk: Path) -> None:
    patterns = _scattered(qcow2_disk)
    image = Qcow2(qcow2_disk.read_bytes())
    cipher = image.area().cipher()
    moved = 0
    for guest, pattern in patterns.items():
        host = image.host_offset(guest)
        ciphertext = image.content[host : host + CLUSTER]
        assert cipher.decrypt(host // 512, ciphertext) == bytes([pattern]) * CLUSTER
        if host != guest:
            moved += 1
            assert cipher.decrypt(guest // 512, ciphertext) != bytes([pattern]) * CLUSTER
    assert moved > len(patterns) // 2


@pytest.mark.parametrize("passphrase", ["x", "exactly 16 bytes", "more than sixteen bytes"])
def test_legacy_sectors_are_numbered_by_guest_offset(tmp_path: Path, passphrase: str) -> None:
    path = images.create_qcow2(tmp_path / "disk.qcow2", "aes", passphrase)
    images.run_qemu_io(path, "qcow2", "write -P 3 3M 128k", "write -P 4 64k 64k", passphrase=passphrase)
    image = Qcow2(path.read_bytes())
    cipher = legacy_cipher(passphrase.encode())
    for guest, pattern in ((3 << 20, 3), ((3 << 20) + CLUSTER, 3), (CLUSTER, 4)):
        host = image.host_offset(guest)
        ciphertext = image.content[host : host + CLUSTER]
        assert cipher.decrypt(guest // 512, ciphertext) == bytes([pattern]) * CLUSTER
        assert cipher.decrypt(host // 512, ciphertext) != bytes([pattern]) * CLUSTER
        assert cipher.encrypt(guest // 512, bytes([pattern]) * CLUSTER) == ciphertext


def test_a_header_of_ours_in_qcow2(qcow2_disk: Path) -> None:
    """Replace QEMU's header area by ours and encrypt the clusters with our key: QEMU reads it all."""
    patterns = _scattered(qcow2_disk)
    image = Qcow2(qcow2_disk.read_bytes())
    area = image.area()
    start = image.content.index(area.content)
    made = luks.format(b"ours", luks.Options(iterations=1000, cipher_mode="cbc", ivgen_alg="essiv"))
    assert made.header.payload_offset <= len(area.content)
    cipher = SectorCipher(made.header.spec, made.master_key)
    hosts = {guest: image.host_offset(guest) for guest in patterns}
    images.write_pieces(
        qcow2_disk,
        [luks.Piece(start, bytes(len(area.content)))]
        + [luks.Piece(start + piece.offset, piece.data) for piece in made.pieces]
        + [
            luks.Piece(host, bytes(cipher.encrypt(host // 512, bytes([patterns[guest]]) * CLUSTER)))
            for guest, host in hosts.items()
        ],
    )
    reads = [f"read -P {pattern} {guest} 64k" for guest, pattern in patterns.items()]
    images.run_qemu_io(qcow2_disk, "qcow2", *reads, passphrase="ours")


def test_the_area_is_as_long_as_the_payload_offset(qcow2_disk: Path) -> None:
    """What a creator reserves: the extension holds the unrounded length, at a cluster's start."""
    image = Qcow2(qcow2_disk.read_bytes())
    area = image.area()
    assert len(area.content) == area.header.payload_offset == luks_layout.area_size(area.header.key_bytes)
    assert image.content.index(area.content) % CLUSTER == 0


@pytest.mark.parametrize("encryption", ["luks", "aes"])
def test_compressed_clusters_are_in_clear(qcow2_disk: Path, encryption: str) -> None:
    if encryption == "aes":
        images.create_qcow2(qcow2_disk, encryption)
    images.run_qemu_io(qcow2_disk, "qcow2", "write -c -P 5 0 64k")
    data = Qcow2(qcow2_disk.read_bytes()).compressed_bytes(0)
    assert zlib.decompressobj(-12).decompress(data, CLUSTER) == b"\5" * CLUSTER


def test_passphrases_that_qemu_changes(qcow2_disk: Path) -> None:
    key = Qcow2(qcow2_disk.read_bytes()).area().unlock().master_key
    qemu_img(
        "amend",
        *images.secret(),
        *images.secret("other", "sec1"),
        "--image-opts",
        f"driver=qcow2,encrypt.key-secret=sec0,file.filename={qcow2_disk}",
        "-o",
        "encrypt.state=active,encrypt.new-secret=sec1,encrypt.iter-time=10",
    )
    area = Qcow2(qcow2_disk.read_bytes()).area()
    assert area.unlock("other") == (1, key)
    assert area.unlock(PASSPHRASE) == (0, key)
