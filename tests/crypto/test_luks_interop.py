"""LUKS containers: QEMU and cryptsetup make them and we read, we make them and they read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fusedisk.crypto import ciphers, luks, luks_layout
from fusedisk.crypto.ciphers import SectorCipher
from tests.conftest import ToolError, qemu_img, require_tool, run_tool
from tests.crypto import images
from tests.crypto.images import MIB, PASSPHRASE
from tests.support.thinning import thinned

COMBINATIONS: list[dict[str, str]] = [
    {"cipher_alg": f"aes-{bits}", "cipher_mode": mode, "ivgen_alg": generator}
    for mode in ciphers.MODES
    for bits in ((128, 192, 256) if mode == "xts" else (128, 256))  # QEMU fails an assertion for 192 in other modes
    for generator in ciphers.IV_GENERATORS
]
COMBINATIONS += [{"hash_alg": name} for name in ciphers.HASHES]
COMBINATIONS += [{"cipher_alg": "aes-128", "cipher_mode": "cbc", "ivgen_alg": "essiv", "ivgen_hash_alg": "md5"}]
COMBINATIONS += [{"ivgen_alg": "plain64", "ivgen_hash_alg": "sha1"}]  # a hash that nobody needs

WRITES = [(5, 0, 512), (6, 65536 + 1024, 3 * 65536), (7, 2 * MIB - 512, MIB + 1024)]
"""Pattern, offset, length; the last is longer than one piece of ours."""


def _formatted(path: Path, **options: Any) -> SectorCipher:
    """A container of 4 MiB whose header is ours."""
    made = luks.format(PASSPHRASE.encode(), luks.Options(iterations=1000, **options))
    path.write_bytes(bytes(made.header.payload_offset + 4 * MIB))
    images.write_pieces(path, made.pieces)
    return SectorCipher(made.header.spec, made.master_key)


MADE_ALWAYS = [{"cipher_alg": "aes-128", "cipher_mode": "cbc", "ivgen_alg": "essiv"}, {"hash_alg": "sha512"}]


def _id(options: dict[str, str]) -> str:
    return "-".join(options.values()) or "defaults"


@pytest.mark.parametrize(
    "options",
    [*MADE_ALWAYS, *(pytest.param(options, marks=pytest.mark.slow) for options in COMBINATIONS)],
    ids=_id,
)
def test_qemu_makes_and_we_read(tmp_path: Path, options: dict[str, str]) -> None:
    """Slow because qemu-img measures the machine's speed for some seconds."""
    path = images.create_luks(tmp_path / "disk.luks", **options)
    images.run_qemu_io(path, "luks", *(f"write -P {pattern} {offset} {length}" for pattern, offset, length in WRITES))
    area = images.luks_area(path)
    assert area.header.pack() == area.content[: luks_layout.HEADER_SIZE]
    _assert_written(area, area.cipher())


@pytest.mark.parametrize("options", thinned(COMBINATIONS), ids=_id)
def test_we_make_and_qemu_reads_and_writes(tmp_path: Path, options: dict[str, str]) -> None:
    path = tmp_path / "disk.luks"
    cipher = _formatted(path, **options)
    payload = images.luks_area(path).header.payload_offset
    pieces = [
        luks.Piece(payload + offset, bytes(cipher.encrypt(offset // 512, bytes([pattern + 100]) * length)))
        for pattern, offset, length in WRITES
    ]
    images.write_pieces(path, pieces)
    reads = [f"read -P {pattern + 100} {offset} {length}" for pattern, offset, length in WRITES]
    writes = [f"write -P {pattern} {offset} {length}" for pattern, offset, length in WRITES]
    images.run_qemu_io(path, "luks", *reads, *writes)
    _assert_written(images.luks_area(path), cipher)


def _assert_written(area: images.Area, cipher: SectorCipher) -> None:
    for pattern, offset, length in WRITES:
        start = area.header.payload_offset + offset
        assert cipher.decrypt(offset // 512, area.content[start : start + length]) == bytes([pattern]) * length


def test_what_qemu_makes_is_where_ours_would_be(luks_disk: Path) -> None:
    """A new header differs from QEMU's in what is random or measured, and nowhere else."""
    theirs = images.luks_area(luks_disk).header
    ours = luks.format(b"x", luks.Options(iterations=1000)).header
    for header in (theirs, ours):
        header.mk_digest = header.mk_digest_salt = header.slots[0].salt = b""
        header.mk_digest_iterations = header.slots[0].iterations = 0
        header.uuid = ""
    assert ours == theirs
    assert ours.payload_offset == luks_layout.area_size(ours.key_bytes)


def test_a_wrong_passphrase_does_not_open_ours(tmp_path: Path) -> None:
    """So that the tests above show more than that QEMU opens anything."""
    path = tmp_path / "disk.luks"
    _formatted(path)
    assert images.passphrase_opens(path, PASSPHRASE)
    assert not images.passphrase_opens(path, PASSPHRASE + "!")


CRYPTSETUP = [("aes-xts-plain64", 512), ("aes-xts-plain", 256), ("aes-cbc-essiv:sha256", 256), ("aes-cbc-plain", 192)]


@pytest.mark.parametrize(("cipher", "bits"), CRYPTSETUP)
def test_cryptsetup_makes_and_we_unlock(tmp_path: Path, cipher: str, bits: int) -> None:
    """Two key slots, the first of them killed; 192 bits in CBC mode end amid a sector of key material."""
    path, first, second = tmp_path / "disk.luks", tmp_path / "first", tmp_path / "second"
    path.write_bytes(bytes(4 * MIB))
    first.write_text("first")
    second.write_text(PASSPHRASE)
    common = ["-q", "--pbkdf-force-iterations", "1000", "--key-file", str(first)]
    run_tool("cryptsetup", "luksFormat", "--type", "luks1", "--cipher", cipher, "--key-size", str(bits), *common, path)
    run_tool("cryptsetup", "luksAddKey", *common, path, second)
    assert images.luks_area(path).unlock("first").slot == 0
    run_tool("cryptsetup", "luksKillSlot", "-q", "--key-file", second, path, "0")
    area = images.luks_area(path)
    assert area.header.active_slots() == [1]
    opened = area.unlock()
    assert opened.slot == 1
    dumped = tmp_path / "key"
    run_tool("cryptsetup", "luksDump", "-q", "--dump-volume-key", "--volume-key-file", dumped, "-d", second, path)
    assert opened.master_key == dumped.read_bytes()


@pytest.mark.parametrize(("cipher", "bits"), CRYPTSETUP)
def test_we_make_and_cryptsetup_unlocks(tmp_path: Path, cipher: str, bits: int) -> None:
    _, mode, generator = cipher.split("-")
    name, _, hash = generator.partition(":")
    path, key = tmp_path / "disk.luks", tmp_path / "key"
    per_key = bits // 2 if mode == "xts" else bits
    _formatted(path, cipher_alg=f"aes-{per_key}", cipher_mode=mode, ivgen_alg=name, ivgen_hash_alg=hash or None)
    key.write_text(PASSPHRASE)
    run_tool("cryptsetup", "open", "--test-passphrase", "--key-file", key, path)
    key.write_text(PASSPHRASE + "!")
    require_tool("cryptsetup")
    with pytest.raises(ToolError, match="No key available"):
        run_tool("cryptsetup", "open", "--test-passphrase", "--key-file", key, path)
    dump = run_tool("cryptsetup", "luksDump", path)
    assert f"Cipher mode:   \t{cipher.removeprefix('aes-')}\n" in dump
    assert f"MK bits:       \t{bits}\n" in dump


def _amend(path: Path, *options: str) -> None:
    """qemu-img amend, which opens the container with the passphrase and knows ``other``, too."""
    opened = f"driver=luks,key-secret=sec0,file.filename={path}"
    secrets = [*images.secret(), *images.secret("other", "sec1")]
    qemu_img("amend", *secrets, "--image-opts", opened, "-o", ",".join(options))


def test_qemu_changes_the_passphrases_and_we_follow(luks_disk: Path) -> None:
    key = images.luks_area(luks_disk).unlock().master_key
    _amend(luks_disk, "state=active", "new-secret=sec1", "iter-time=10")
    area = images.luks_area(luks_disk)
    assert area.unlock() == (0, key)
    assert area.unlock("other") == (1, key)
    _amend(luks_disk, "state=inactive", "old-secret=sec1")
    assert images.luks_area(luks_disk).header.active_slots() == [0]


def test_we_change_the_passphrases_and_qemu_follows(luks_disk: Path) -> None:
    images.run_qemu_io(luks_disk, "luks", "write -P 9 0 1M")
    area = images.luks_area(luks_disk)
    opened = area.unlock()
    options = luks.Options(iterations=1000)
    images.write_pieces(luks_disk, luks.add_passphrase(area.header, opened.master_key, b"other", options, slot=5))
    assert images.passphrase_opens(luks_disk, PASSPHRASE)
    images.run_qemu_io(luks_disk, "luks", "read -P 9 0 1M", passphrase="other")

    area = images.luks_area(luks_disk)
    images.write_pieces(
        luks_disk, luks.remove_passphrase(area.header, area.materials(), PASSPHRASE.encode(), "disk.luks")
    )
    assert not images.passphrase_opens(luks_disk, PASSPHRASE)
    images.run_qemu_io(luks_disk, "luks", "read -P 9 0 1M", passphrase="other")
    assert images.luks_area(luks_disk).header.active_slots() == [5]


def test_random_passphrases(tmp_path: Path) -> None:
    """Text of many lengths and alphabets; PBKDF2 hashes what is longer than a block of its hash."""
    random_ = random.Random(20)
    for length in (1, 63, 64, 65, 200):
        passphrase = "".join(random_.choice("aZ9 ,=äß漢🔑") for _ in range(length))
        made = luks.format(passphrase.encode(), luks.Options(iterations=1000))
        path = tmp_path / f"{length}.luks"
        path.write_bytes(bytes(made.header.payload_offset + MIB))
        images.write_pieces(path, made.pieces)
        assert images.passphrase_opens(path, passphrase), passphrase
