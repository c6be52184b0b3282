"""qcow2 images that are encrypted: with LUKS, and with the AES of old."""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.core.errors import FusediskError, ImageError, NotSupportedError, OptionError, PassphraseError
from fusedisk.drivers.format.qcow2 import layout
from tests.conftest import qemu_img
from tests.crypto.images import PASSPHRASE, create_qcow2, run_qemu_io, secret
from tests.support.commands import Outcome, fusedisk_process
from tests.support.qcow2 import create_image, driver_of, opened

CLUSTER = 65536
SIZE = 4 << 20


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(PASSPHRASE)
    return path


@asynccontextmanager
async def unlocked(path: Path, key: Path, *, writable: bool = True, **options: Any) -> AsyncIterator[Backend]:
    encrypt = {"encrypt.key-file": str(key)}
    async with opened(path, writable=writable, **encrypt, **options) as backend:
        yield backend


def _run(*args: str | os.PathLike[str], code: int = 0) -> Outcome:
    done = fusedisk_process(*args)
    assert done.code == code, done
    return done


def options_of(path: Path) -> str:
    return f"driver=qcow2,encrypt.key-secret=sec0,file.filename={path}"


def check(path: Path) -> None:
    """qemu-img and we find nothing wrong."""
    qemu_img("check", *secret(), "--image-opts", options_of(path))
    report = _run("check", "--output", "json", path).json
    assert not any(report.get(key) for key in ("corruptions", "leaks", "check-errors")), report


def plain(path: Path, to: Path) -> bytes:
    """What QEMU reads."""
    qemu_img("convert", *secret(), "--image-opts", options_of(path), "-O", "raw", to)
    return to.read_bytes()


async def made(path: Path, key: Path, encryption: str, **options: Any) -> Path:
    """An image that we make; the quickest key derivation."""
    encrypt = {"encrypt_format": encryption, "encrypt_key_file": str(key)}
    if encryption == "luks":
        encrypt["encrypt_iter_time"] = 10
    return await create_image(path, size=SIZE, **encrypt, **options)


@pytest.mark.parametrize("encryption", ["luks", "aes"])
async def test_what_qemu_wrote(tmp_path: Path, key: Path, encryption: str) -> None:
    image = create_qcow2(tmp_path / "x.qcow2", encryption)
    run_qemu_io(image, "qcow2", "write -P 9 100k 300k", "write -z 1M 64k", "write -P 8 2M 512")
    expected = bytearray(SIZE)
    expected[100 << 10 : 400 << 10] = b"\x09" * (300 << 10)
    expected[2 << 20 : (2 << 20) + 512] = b"\x08" * 512
    async with unlocked(image, key, writable=False) as backend:
        assert await backend.read(0, SIZE) == expected
        assert await backend.read((100 << 10) - 3, 1000) == bytes(3) + b"\x09" * 997
        assert (await backend.block_status(100 << 10, CLUSTER)).data


@pytest.mark.parametrize("encryption", ["luks", "aes"])
@pytest.mark.parametrize("by_us", [False, True])
@pytest.mark.slow
async def test_random_writes_are_what_qemu_reads(tmp_path: Path, key: Path, encryption: str, by_us: bool) -> None:
    image = tmp_path / "x.qcow2"
    if by_us:
        await made(image, key, encryption)
    else:
        create_qcow2(image, encryption)
    random_ = random.Random(encryption)
    oracle = bytearray(SIZE)
    async with unlocked(image, key, discard="unmap") as backend:
        for _ in range(80):
            length = random_.choice((1, 512, 700, 5000, CLUSTER, 300_000))
            offset = random_.randrange(SIZE - length)
            match random_.randrange(4):
                case 0:
                    await backend.write_zeroes(offset, length, may_unmap=random_.random() < 0.5)
                    oracle[offset : offset + length] = bytes(length)
                case _:
                    data = random_.randbytes(length)
                    await backend.write(offset, data)
                    oracle[offset : offset + length] = data
            if random_.random() < 0.1:
                await backend.flush()
        assert await backend.read(0, SIZE) == oracle
    check(image)
    assert plain(image, tmp_path / "plain") == oracle
    async with unlocked(image, key, writable=False) as backend:
        assert await backend.read(0, SIZE) == oracle


@pytest.mark.parametrize("encryption", ["luks", "aes"])
async def test_writes_take_no_task(tmp_path: Path, key: Path, encryption: str) -> None:
    """Small ones are encrypted at once, where there are clusters."""
    image = await made(tmp_path / "x.qcow2", key, encryption)
    random_ = random.Random(encryption)
    oracle = bytearray(SIZE)
    async with unlocked(image, key) as backend:
        oracle[:] = random_.randbytes(SIZE)
        await backend.write(0, oracle)
        for _ in range(30):
            length = random_.choice((512, 4096))
            offset = random_.randrange((SIZE - length) // 512) * 512
            data = random_.randbytes(length)
            assert backend.write_now(offset, memoryview(data))
            oracle[offset : offset + length] = data
        assert await backend.read(0, SIZE) == oracle
    check(image)
    assert plain(image, tmp_path / "plain") == oracle


@pytest.mark.parametrize("encryption", ["luks", "aes"])
async def test_what_is_written_is_not_in_the_file(tmp_path: Path, key: Path, encryption: str) -> None:
    image = await made(tmp_path / "x.qcow2", key, encryption)
    async with unlocked(image, key) as backend:
        await backend.write(0, b"plaintext sector" * 32 * 200)
        await backend.write(1 << 20, b"plaintext sector")
    content = image.read_bytes()
    assert b"plaintext" not in content
    assert PASSPHRASE.encode() not in content


@pytest.mark.parametrize("encryption", ["luks", "aes"])
@pytest.mark.slow
async def test_a_snapshot_of_qemus_shares_clusters(tmp_path: Path, key: Path, encryption: str) -> None:
    image = create_qcow2(tmp_path / "x.qcow2", encryption)
    run_qemu_io(image, "qcow2", "write -P 9 0 256k")
    qemu_img("snapshot", *secret(), "-c", "one", "--image-opts", options_of(image))
    async with unlocked(image, key) as backend:
        await backend.write(1000, b"x" * 100_000)
    check(image)
    expected = b"\x09" * 1000 + b"x" * 100_000 + b"\x09" * ((256 << 10) - 101_000)
    assert plain(image, tmp_path / "plain")[: 256 << 10] == expected
    qemu_img("snapshot", *secret(), "-a", "one", "--image-opts", options_of(image))
    assert plain(image, tmp_path / "plain")[: 256 << 10] == b"\x09" * (256 << 10)


@pytest.mark.parametrize("encryption", ["luks", "aes"])
@pytest.mark.slow
async def test_growing_and_preallocation(tmp_path: Path, key: Path, encryption: str) -> None:
    image = await made(tmp_path / "x.qcow2", key, encryption)
    async with unlocked(image, key) as backend:
        await backend.write(SIZE - 1000, b"e" * 1000)
        await backend.truncate(SIZE + 1000 * 512)
        await backend.truncate(SIZE + (1 << 20), "metadata")
        assert await backend.read(SIZE - 1000, 1001000) == b"e" * 1000 + bytes(1_000_000)
        await backend.write(SIZE + 600_000, b"more")
    check(image)
    assert plain(image, tmp_path / "plain")[SIZE : SIZE + 600_004] == bytes(600_000) + b"more"
    preallocated = await made(tmp_path / "y.qcow2", key, encryption, preallocation="metadata")
    async with unlocked(preallocated, key) as backend:
        assert await backend.read(0, SIZE) == bytes(SIZE)


@pytest.mark.parametrize("encryption", ["luks", "aes"])
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
async def test_version_2_cannot_reserve_space_that_reads_as_zeroes(
    tmp_path: Path, key: Path, encryption: str, mode: str
) -> None:
    image = await made(tmp_path / "x.qcow2", key, encryption, compat="0.10")
    async with unlocked(image, key) as backend:
        with pytest.raises(NotSupportedError, match="would not read as zeroes"):
            await backend.truncate(2 * SIZE, mode)
        assert backend.length == SIZE
        await backend.truncate(2 * SIZE)
        assert await backend.read(SIZE, SIZE) == bytes(SIZE)
    check(image)


async def test_an_encrypted_backing_file(tmp_path: Path, key: Path) -> None:
    base = create_qcow2(tmp_path / "base.qcow2", "luks")
    run_qemu_io(base, "qcow2", "write -P 7 0 1M")
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top, "4M")
    backing = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(base)},
        "encrypt.key-file": str(key),
    }
    async with opened(top, backing=backing) as backend:
        await backend.write(777, b"top")
        assert await backend.read(700, 500) == b"\x07" * 77 + b"top" + b"\x07" * 420


@pytest.mark.slow
async def test_compressed_clusters_are_not_encrypted(tmp_path: Path, key: Path) -> None:
    image = create_qcow2(tmp_path / "x.qcow2", "luks")
    run_qemu_io(image, "qcow2", "write -c -P 5 0 64k", "write -P 6 64k 64k")
    async with unlocked(image, key) as backend:
        assert await backend.read(0, 2 * CLUSTER) == b"\x05" * CLUSTER + b"\x06" * CLUSTER
        await backend.write(100, b"new")
    check(image)
    assert plain(image, tmp_path / "plain")[:200] == b"\x05" * 100 + b"new" + b"\x05" * 97


# --- keys -----------------------------------------------------------------------------------------------


async def test_without_a_key_metadata_can_be_looked_at(tmp_path: Path, key: Path) -> None:
    image = await made(tmp_path / "x.qcow2", key, "luks")
    async with unlocked(image, key) as backend:
        await backend.write(0, b"data")
    async with opened(image, writable=False) as backend:
        assert (await backend.block_status(0, CLUSTER)).data
        assert await backend.read(CLUSTER, 10) == bytes(10)
        with pytest.raises(PassphraseError, match=r"x\.qcow2' is encrypted, but no key was given"):
            await backend.read(0, 10)
        with pytest.raises(PassphraseError, match="no key was given"):
            await backend.require_keys()
    theirs = json.loads(qemu_img("info", "--output=json", image))
    ours = _run("info", "--output", "json", image).json
    assert ours["encrypted"] is theirs["encrypted"] is True
    assert ours["format-specific"] == theirs["format-specific"]


async def test_wrong_keys(tmp_path: Path, key: Path) -> None:
    image = await made(tmp_path / "x.qcow2", key, "luks")
    before = image.read_bytes()
    key.write_text("wrong")
    async with unlocked(image, key) as backend:
        for _ in range(2):
            with pytest.raises(PassphraseError, match=r"opens none of the key slots of '.*x\.qcow2'"):
                await backend.write(0, b"data")
    assert image.read_bytes() == before
    key.unlink()
    async with unlocked(image, key, writable=False) as backend:
        with pytest.raises(FusediskError, match="No such file"):
            await backend.require_keys()


async def test_options_that_do_not_fit(tmp_path: Path, key: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=SIZE)
    with pytest.raises(OptionError, match="is not encrypted, but a key was given"):
        async with unlocked(image, key):
            pass
    for options, sentence in (
        ({"encrypt_format": "luks"}, "encrypt.format is set, but encrypt.key-file"),
        ({"encrypt_key_file": str(key)}, "encrypt.key-file is set, but encrypt.format"),
        ({"encrypt_format": "luks", "encrypt_key_file": str(key), "encrypt_cipher_alg": "rot13"}, "rot13"),
    ):
        with pytest.raises(OptionError, match=sentence):
            await create_image(tmp_path / "y.qcow2", size=SIZE, **options)


async def test_headers_that_contradict_themselves(tmp_path: Path, key: Path) -> None:
    image = await made(tmp_path / "x.qcow2", key, "luks")
    content = bytearray(image.read_bytes())
    content[32:36] = layout.CRYPT_AES.to_bytes(4, "big")
    image.write_bytes(content)
    with pytest.raises(ImageError, match="encryption method 1 and a pointer to a LUKS header"):
        async with unlocked(image, key):
            pass


async def test_writes_do_not_hit_the_luks_header(tmp_path: Path, key: Path) -> None:
    image = await made(tmp_path / "x.qcow2", key, "luks")
    async with unlocked(image, key) as backend:
        await backend.write(0, b"x")
        header = driver_of(backend).image.header
        assert header.crypto_header is not None
        start, length = header.crypto_header
        assert driver_of(backend).image.occupied_at(start + length - 1, 1) == "LUKS header"
