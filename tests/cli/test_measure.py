"""``fusedisk measure`` tells what ``qemu-img measure`` does, for sizes and for images."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import qemu_img, qemu_io
from tests.support.commands import fusedisk
from tests.support.images import KIB, MIB, make_qcow2, make_sparse_raw, random_chain
from tests.support.processes import qemu_io_holding

SECRET = ("--object", "secret,id=key,data=secret")


def _theirs(*args: str | Path) -> Any:
    return json.loads(qemu_img("measure", "--output=json", *args))


def _ours(*args: str | Path) -> Any:
    return fusedisk("measure", "--output", "json", *args).json


def _options(rng: random.Random) -> str:
    """Random creation options that make an image."""
    cluster = rng.choice([512 << shift for shift in range(13)])
    options = [f"cluster_size={cluster}"]
    if rng.random() < 0.3:
        options.append("compat=0.10")
    elif rng.random() < 0.6:
        options.append(f"refcount_bits={1 << rng.randrange(7)}")
    if cluster >= 16 * KIB and rng.random() < 0.4:
        options.append("extended_l2=on")
    if rng.random() < 0.4:
        options.append(f"preallocation={rng.choice(['off', 'metadata', 'falloc', 'full'])}")
    if rng.random() < 0.2:
        options.append("data_file=x")
    return ",".join(options)


@pytest.mark.parametrize("seed", range(12))
def test_sizes(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        size = str(rng.choice([0, 1, 511, 513, rng.randrange(1 << 20), rng.randrange(1 << rng.randrange(1, 40))]))
        options = _options(rng)
        args = ("--size", size, "-O", "qcow2", "-o", options)
        assert _ours(*args) == _theirs(*args), (size, options)
    assert _ours("--size", str(rng.randrange(1 << 50)), "-O", "raw")["required"] % 512 == 0


@pytest.mark.parametrize("size", ["0", "1", "512", "1000000", "7E"])
def test_raw(size: str) -> None:
    assert _ours("--size", size, "-O", "raw") == _theirs("--size", size, "-O", "raw")


@pytest.mark.parametrize("seed", range(12))
def test_chains(tmp_path: Path, seed: int) -> None:
    top = random_chain(tmp_path, seed)
    rng = random.Random(seed)
    for options in (_options(rng), _options(rng), f"cluster_size={rng.choice([512, 65536])},backing_file=x"):
        args = ("-O", "qcow2", "-o", options, top)
        assert _ours(*args) == _theirs(*args), options
    assert _ours("-O", "raw", top) == _theirs("-O", "raw", top)


def test_a_raw_file_with_holes(tmp_path: Path) -> None:
    image = make_sparse_raw(tmp_path / "disk.raw", 9 * MIB + 512, (MIB, 100), (5 * MIB, MIB), (9 * MIB, 512))
    for cluster in (512, 4096, 2 * MIB):
        args = ("-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster}", image)
        assert _ours(*args) == _theirs(*args)


def test_bitmaps(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", 64 * MIB, "write 1M 100k", "write -z 2M 200k")
    for number, granularity in enumerate(("512", "4096", "65536", "1M")):
        qemu_img("bitmap", "--add", "-g", granularity, image, f"bitmap {number * 'x'}")
    qemu_io(image, "write 5M 64k", fmt="qcow2")
    for options in ("compat=0.10", "compat=1.1", "cluster_size=512", "cluster_size=2M"):
        args = ("-O", "qcow2", "-o", options, image)
        assert _ours(*args) == _theirs(*args), options
    assert _ours("-O", "qcow2", image)["bitmaps"] > 0


@pytest.mark.parametrize(
    ("mode", "cipher"),  # QEMU 7.2 fails an assertion on aes-192
    [
        ("xts", "aes-256"),
        ("xts", "aes-128"),
        ("cbc", "aes-128"),
        ("cbc", "aes-256"),
    ],
)
@pytest.mark.slow  # QEMU looks for a number of iterations first
def test_luks(cipher: str, mode: str) -> None:
    options = f"encrypt.format=luks,encrypt.cipher-alg={cipher},encrypt.cipher-mode={mode},cluster_size=4096"
    theirs = _theirs(*SECRET, "--size", "10M", "-O", "qcow2", "-o", f"{options},encrypt.key-secret=key")
    assert _ours("--size", "10M", "-O", "qcow2", "-o", options) == theirs


def test_text_for_people(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", MIB)
    done = fusedisk("measure", "-O", "qcow2", image)
    assert done.code == 0
    assert done.out.splitlines()[0].split() == ["required", "size:", "320", "KiB", "(327680", "bytes)"]
    assert "fully allocated size:" in done.out
    assert "bitmaps size:" in done.out
    assert "extended_l2" in fusedisk("measure", "-O", "qcow2", "-o", "help").out


def test_an_image_in_use(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", MIB, "write 0 64k")
    with qemu_io_holding(image):
        assert fusedisk("measure", "-O", "qcow2", image).code == 1
        assert _ours("-U", "-O", "qcow2", image) == _theirs("-U", "-O", "qcow2", image)


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        ((), 2, "Missing argument 'IMAGE' or option '--size'."),
        (("--size", "1M", "x"), 2, "IMAGE and --size exclude each other"),
        (("--size", "many"), 2, "many"),
        (("--size", "7E", "-O", "qcow2"), 2, "too large for clusters of 65536 bytes"),
        (("--size", "1M", "-O", "null-co"), 2, "there is no image format 'null-co', known are qcow2, raw."),
        (("--size", "1M", "-O", "qcow3"), 2, "there is no image format 'qcow3'"),
        (("--size", "1M", "-O", "qcow2", "-o", "cluster_size=3000"), 2, "'cluster_size' is 3000"),
        (("--size", "1M", "-O", "qcow2", "-o", "cluster_size=4k,extended_l2=on"), 2, "needs at least 16384"),
        (("--size", "1M", "-O", "qcow2", "-o", "refcount_bits=3"), 2, "'refcount_bits' is 3"),
        (("--size", "1M", "-O", "qcow2", "-o", "refcount_bits=8,compat=0.10"), 2, "version 2 has only 16"),
        (("--size", "1M", "-O", "qcow2", "-o", "colour=red"), 2, "no option 'colour'"),
        (("--size", "1M", "-O", "raw", "-o", "cluster_size=512"), 2, "no option 'cluster_size'"),
        (("--size", "1M", "-O", "qcow2", "-o", "compat=v2", "-o", "compat=v3"), 2, "given twice"),
    ],
)
def test_what_cannot_be_measured(args: tuple[str, ...], code: int, sentence: str) -> None:
    done = fusedisk("measure", *args)
    assert done.code == code
    assert sentence in done.err
    assert not done.out
