"""Images that QEMU writes and we read, and the other way round."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.backend import Backend
from tests.conftest import qemu_img, qemu_io
from tests.support.oracle import random_bytes
from tests.support.qcow2 import (
    CLUSTER_SIZES,
    assert_clean,
    create_image,
    driver_of,
    opened,
    raw_content,
)
from tests.support.thinning import thinned

VERSIONS = ("0.10", "1.1")


def by_qemu(path: Path, size: str | int, *options: str, backing: Path | None = None) -> Path:
    arguments = [part for option in options for part in ("-o", option)]
    if backing is not None:
        arguments += ["-b", str(backing), "-F", "qcow2"]
    qemu_img("create", "-f", "qcow2", *arguments, path, str(size))
    return path


async def write_at_random(backend: Backend, oracle: bytearray, rng: random.Random, count: int, unit: int) -> None:
    """Writes, zeroes and discards around clusters of ``unit`` bytes, each compared where it was."""
    for _ in range(count):
        length = min(rng.choice((1, 512, unit - 1, unit, 3 * unit, rng.randrange(1, 8 * unit))), 1 << 20)
        offset = rng.randrange(max(1, len(oracle) - length))
        length = min(length, len(oracle) - offset)
        kind = rng.random()
        if kind < 0.6:
            data = random_bytes(rng, length)
            await backend.write(offset, data)
            oracle[offset : offset + length] = data
        elif kind < 0.85:
            await backend.write_zeroes(offset, length, may_unmap=kind < 0.7)
            oracle[offset : offset + length] = bytes(length)
        else:
            await backend.discard(offset, length)
            found = await backend.read(offset, length)
            # Whole clusters read as zeroes, the edges as before.
            for at, (now, before) in enumerate(zip(found, oracle[offset : offset + length], strict=True)):
                assert now in (0, before), f"after discard of {length} at {offset}: byte {at}"
            oracle[offset : offset + length] = found


@pytest.mark.parametrize("compat", VERSIONS)
@pytest.mark.parametrize("cluster_size", thinned(CLUSTER_SIZES))
async def test_what_we_write_qemu_reads(tmp_path: Path, cluster_size: int, compat: str) -> None:
    size = min(64 * cluster_size, 16 << 20) + 512
    image = await create_image(tmp_path / "x.qcow2", size=size, cluster_size=cluster_size, compat=compat)
    assert_clean(image)
    oracle = bytearray(size)
    rng = random.Random(cluster_size)
    async with opened(image, discard="unmap") as backend:
        await write_at_random(backend, oracle, rng, 60, cluster_size)
        assert await backend.read(0, size) == oracle
    assert_clean(image)
    assert raw_content(image, tmp_path) == oracle
    async with opened(image) as backend:
        assert await backend.read(0, size) == oracle
        await write_at_random(backend, oracle, rng, 30, cluster_size)
    assert_clean(image)
    assert raw_content(image, tmp_path) == oracle


@pytest.mark.parametrize("compat", VERSIONS)
@pytest.mark.parametrize("cluster_size", thinned(CLUSTER_SIZES))
async def test_what_qemu_writes_we_read_and_go_on_with(tmp_path: Path, cluster_size: int, compat: str) -> None:
    size = min(64 * cluster_size, 16 << 20)
    image = by_qemu(tmp_path / "x.qcow2", size, f"cluster_size={cluster_size}", f"compat={compat}")
    rng = random.Random(cluster_size)
    commands, oracle = [], bytearray(size)
    for pattern in range(1, 60):
        length = min(rng.choice((512, cluster_size, rng.randrange(1, 4 * cluster_size))) + 511 & -512, size)
        offset = rng.randrange(size - length + 1) & -512
        if rng.random() < 0.7:
            commands.append(f"write -P {pattern} {offset} {length}")
            oracle[offset : offset + length] = bytes([pattern]) * length
        else:
            commands.append(f"write -z {'-u' if rng.random() < 0.5 else ''} {offset} {length}")
            oracle[offset : offset + length] = bytes(length)
    qemu_io(image, *commands, fmt="qcow2")
    async with opened(image) as backend:
        assert await backend.read(0, size) == oracle
        await write_at_random(backend, oracle, rng, 40, cluster_size)
    assert_clean(image)
    assert raw_content(image, tmp_path) == oracle


@pytest.mark.parametrize("compat", VERSIONS)
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
async def test_overlays(tmp_path: Path, cluster_size: int, compat: str) -> None:
    """Three layers of different lengths and cluster sizes, partial clusters copied up, discards that hide."""
    base = by_qemu(tmp_path / "base.qcow2", 300 << 10, "cluster_size=4096")
    middle = by_qemu(tmp_path / "middle.qcow2", 200 << 10, f"compat={compat}", backing=base)
    qemu_io(base, "write -P 1 0 300k", fmt="qcow2")
    qemu_io(middle, "write -P 2 64k 10k", "write -z 100k 8k", fmt="qcow2")
    top = await create_image(
        tmp_path / "top.qcow2",
        size=400 << 10,
        cluster_size=cluster_size,
        compat=compat,
        backing_file="middle.qcow2",
        backing_fmt="qcow2",
    )
    oracle = bytearray(raw_content(top, tmp_path))
    assert oracle[:10] == b"\1" * 10
    async with opened(top, discard="unmap") as backend:
        assert await backend.read(0, len(oracle)) == oracle
        await write_at_random(backend, oracle, random.Random(cluster_size), 50, cluster_size)
        assert await backend.read(0, len(oracle)) == oracle
    assert_clean(top)
    assert raw_content(top, tmp_path) == oracle


@pytest.mark.parametrize("compat", VERSIONS)
@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_snapshots_are_never_overwritten(tmp_path: Path, cluster_size: int, compat: str) -> None:
    size = 128 * cluster_size
    image = by_qemu(tmp_path / "x.qcow2", size, f"cluster_size={cluster_size}", f"compat={compat}")
    oracle = bytearray(size)
    rng = random.Random(7)
    saved: dict[str, bytes] = {}
    for name in ("one", "two", "three"):
        async with opened(image, discard="unmap") as backend:
            await write_at_random(backend, oracle, rng, 40, cluster_size)
        assert_clean(image)
        qemu_img("snapshot", "-c", name, image)
        saved[name] = bytes(oracle)
        async with opened(image, discard="unmap") as backend:
            assert await backend.read(0, size) == oracle
            await write_at_random(backend, oracle, rng, 40, cluster_size)
        assert_clean(image)
    assert raw_content(image, tmp_path) == oracle
    for name, content in saved.items():
        out = tmp_path / "snapshot.raw"
        qemu_img("convert", "-l", f"snapshot.name={name}", "-f", "qcow2", "-O", "raw", image, out)
        assert out.read_bytes() == content, name
    for name in saved:
        qemu_img("snapshot", "-d", name, image)
        assert_clean(image)
    assert raw_content(image, tmp_path) == oracle


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, pytest.param(2 << 20, marks=pytest.mark.slow)])
async def test_compressed_clusters(tmp_path: Path, cluster_size: int, kind: str) -> None:
    size = max(32 * cluster_size, 1 << 20)
    rng = random.Random(cluster_size)
    oracle = bytearray(b"".join(rng.choice((b"abc", b"d", bytes(3))) * 171 for _ in range(size // 171 + 1))[:size])
    source = tmp_path / "source.raw"
    source.write_bytes(oracle)
    image = tmp_path / "x.qcow2"
    options = f"compression_type={kind},cluster_size={cluster_size}"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, source, image)
    async with opened(image, discard="unmap") as backend:
        for _ in range(40):
            offset = rng.randrange(size)
            length = rng.randrange(1, size - offset + 1)
            assert await backend.read(offset, length) == oracle[offset : offset + length]
        # Written over, zeroed and given back, whole and in part.
        await write_at_random(backend, oracle, rng, 60, cluster_size)
        assert await backend.read(0, size) == oracle
    assert_clean(image)
    assert raw_content(image, tmp_path) == oracle


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
async def test_every_refcount_width(tmp_path: Path, bits: int) -> None:
    """Also the growth of the refcount table: its first one covers less than the disk with clusters of 512 bytes."""
    size = 12 << 20
    image = await create_image(tmp_path / "x.qcow2", size=size, cluster_size=512, refcount_bits=bits)
    oracle = bytearray(size)
    async with opened(image, discard="unmap") as backend:
        before = driver_of(backend).image.header.refcount_table_clusters
        for offset in range(0, size, 1 << 20):
            data = bytes([1 + offset // (1 << 20)]) * (1 << 20)
            await backend.write(offset, data)
            oracle[offset : offset + (1 << 20)] = data
        await write_at_random(backend, oracle, random.Random(bits), 50, 512)
        grown = driver_of(backend).image.header.refcount_table_clusters
        assert grown > before or bits < 16
    assert_clean(image)
    assert raw_content(image, tmp_path) == oracle
    if bits > 1:
        qemu_img("snapshot", "-c", "one", image)
        async with opened(image) as backend:
            await write_at_random(backend, oracle, random.Random(bits), 50, 512)
        assert_clean(image)
        assert raw_content(image, tmp_path) == oracle


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_preallocation(tmp_path: Path, cluster_size: int, mode: str) -> None:
    size = (5 << 20) + 512
    options: dict[str, Any] = {"size": size, "cluster_size": cluster_size, "preallocation": mode}
    image = await create_image(tmp_path / "x.qcow2", **options)
    assert_clean(image)
    assert not any(raw_content(image, tmp_path))
    allocated = image.stat().st_blocks * 512
    assert (allocated >= size) == (mode in ("falloc", "full"))
    length = image.stat().st_size
    assert (length >= size) == (mode != "off")
    async with opened(image) as backend:
        await backend.write(1234, b"x" * 100000)
        assert await backend.read(0, 1234) == bytes(1234)
    assert image.stat().st_size == length or mode == "off", "a preallocated image does not grow"
    assert_clean(image)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"lazy_refcounts": "on", "refcount_bits": "64"},
        {"compression_type": "zstd", "cluster_size": "4096"},
    ],
)
@pytest.mark.parametrize("snapshot", [False, True])
async def test_information_is_what_qemu_img_prints(tmp_path: Path, options: dict[str, str], snapshot: bool) -> None:
    image = by_qemu(tmp_path / "x.qcow2", "10M", *(f"{key}={value}" for key, value in options.items()))
    if snapshot:
        qemu_img("snapshot", "-c", "first", image)
        qemu_img("snapshot", "-c", "a second one", image)
    theirs = json.loads(qemu_img("info", "--output=json", image))
    async with opened(image, writable=False) as backend:
        driver = driver_of(backend)
        assert driver.specific_information() == theirs["format-specific"]["data"]
        ours = driver.information()
        assert ours == {key: theirs[key] for key in ("cluster-size", "dirty-flag", "snapshots") if key in theirs}


async def test_a_disk_without_bytes(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=0)
    assert_clean(image)
    async with opened(image) as backend:
        assert backend.length == 0
        await backend.truncate(1 << 20)
        await backend.write(1000, b"there")
    assert_clean(image)
    assert raw_content(image, tmp_path)[1000:1005] == b"there"


async def test_a_huge_disk_takes_little_room(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=1 << 50, cluster_size=2 << 20)
    async with opened(image) as backend:
        await backend.write((1 << 50) - 5, b"there")
        await backend.discard(0, backend.length)
        assert await backend.read((1 << 50) - 10, 10) == bytes(5) + b"there"
    assert_clean(image)
    assert image.stat().st_blocks * 512 < 16 << 20


async def test_qemu_goes_on_with_our_image_and_we_with_its(tmp_path: Path) -> None:
    size = 8 << 20
    image = await create_image(tmp_path / "x.qcow2", size=size, cluster_size=1024)
    oracle = bytearray(size)
    rng = random.Random(3)
    for pattern in range(1, 6):
        async with opened(image, discard="unmap") as backend:
            await write_at_random(backend, oracle, rng, 30, 1024)
        offset = rng.randrange(size - (1 << 20)) & -512
        qemu_io(image, f"write -P {pattern} {offset} 700k", f"discard {offset} 100k", fmt="qcow2")
        oracle = bytearray(raw_content(image, tmp_path))
        assert_clean(image)
    async with opened(image) as backend:
        assert await backend.read(0, size) == oracle
