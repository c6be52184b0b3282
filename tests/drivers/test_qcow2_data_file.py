"""External data files: guest data apart from the metadata, raw or not."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import CorruptImageError, FusediskError, GateError, HostError, ImageError, OptionError
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, qemu_io
from tests.support.commands import fusedisk_process
from tests.support.files import MIB, largest_file
from tests.support.memory import Store, stores
from tests.support.qcow2 import MEMORY_DRIVERS, assert_clean, driver_of, opened, raw_content

CLUSTER = 65536
SIZE = 4 << 20
KINDS = ("plain", "raw", "extended")


def make(folder: Path, kind: str, *, by_us: bool = True, size: int = SIZE, more: str = "") -> Path:
    image = folder / "disk.qcow2"
    options = {"plain": "", "raw": ",data_file_raw=on", "extended": ",extended_l2=on"}[kind] + more
    # QEMU's tools take a relative name to start from where they run, and not from where the image is.
    options = f"data_file={folder / 'disk.data'}{options}"
    if by_us:
        done = fusedisk_process("create", "-f", "qcow2", "-o", options, image, str(size))
        assert not done.code, done
    else:
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, str(size))
    return image


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_us", [False, True])
async def test_random_requests(tmp_path: Path, kind: str, by_us: bool) -> None:
    image = make(tmp_path, kind, by_us=by_us)
    random_ = random.Random(kind)
    oracle = bytearray(SIZE)
    for _ in range(3):
        async with opened(image, discard="unmap") as backend:
            for _ in range(40):
                length = random_.choice((1, 700, 5000, CLUSTER, 300_000))
                offset = random_.choice((0, random_.randrange(SIZE - length)))
                match random_.randrange(5):
                    case 0:
                        await backend.write_zeroes(offset, length, may_unmap=random_.random() < 0.5)
                        oracle[offset : offset + length] = bytes(length)
                    case 1:
                        first, last = -(-offset // CLUSTER) * CLUSTER, (offset + length) // CLUSTER * CLUSTER
                        if first < last:
                            await backend.discard(first, last - first)
                            oracle[first:last] = bytes(last - first)
                    case _:
                        data = random_.randbytes(length)
                        await backend.write(offset, data)
                        oracle[offset : offset + length] = data
            assert await backend.read(0, SIZE) == oracle
        assert_clean(image)
        assert raw_content(image, tmp_path) == oracle
        if kind == "raw":
            assert (tmp_path / "disk.data").read_bytes() == oracle
    ours = fusedisk_process("map", "--output", "json", image).json
    assert _joined(ours) == _joined(json.loads(qemu_img("map", "--output=json", image)))


def _joined(found: list[dict[str, Any]]) -> list[tuple[int, bool]]:
    """Where data begins and ends."""
    changes: list[tuple[int, bool]] = []
    for extent in found:
        assert extent["data"] != extent["zero"]
        if not changes or changes[-1][1] != extent["data"]:
            changes.append((extent["start"], extent["data"]))
    return changes


@pytest.mark.parametrize("kind", KINDS)
async def test_what_qemu_wrote(tmp_path: Path, kind: str) -> None:
    image = make(tmp_path, kind, by_us=False)
    qemu_io(image, "write -P 9 0 1000", "write -P 8 1M 300k", "write -z 1100k 64k", fmt="qcow2")
    async with opened(image, writable=False) as backend:
        assert await backend.read(0, 1001) == b"\x09" * 1000 + b"\0"
        assert await backend.read(1 << 20, 300 << 10) == (
            b"\x08" * (76 << 10) + bytes(64 << 10) + b"\x08" * (160 << 10)
        )
        driver = driver_of(backend)
        assert (
            driver.specific_information()
            == json.loads(qemu_img("info", "--output=json", image))["format-specific"]["data"]
        )


@pytest.mark.parametrize("kind", ["plain", "extended"])
@pytest.mark.parametrize("at_once", [False, True])
async def test_what_a_failed_write_left_behind_the_end_is_not_read(tmp_path: Path, kind: str, at_once: bool) -> None:
    image = make(tmp_path, kind)
    os.truncate(tmp_path / "disk.data", 0)

    async def write(backend: Backend, offset: int, data: bytes) -> None:
        if not at_once or not backend.write_now(offset, memoryview(data)):
            await backend.write(offset, data)

    async with opened(image) as backend:
        await backend.write(0, b"a" * 512)
        with largest_file(2 * MIB + 8192), pytest.raises(FusediskError):
            await write(backend, 2 * MIB, b"S" * CLUSTER)
        await backend.write_zeroes(2 * MIB, CLUSTER)
        await backend.flush()
        await backend.write(2 * MIB + 60000, b"z" * 100)
        assert await backend.read(2 * MIB, CLUSTER) == bytes(60000) + b"z" * 100 + bytes(CLUSTER - 60100)
    qemu_io(image, f"read -P 0 {2 * MIB} 60000", fmt="qcow2")


async def test_guest_offset_0_is_host_offset_0(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    async with opened(image) as backend:
        await backend.write(0, b"first" * 30000)
        await backend.flush()
        l2 = driver_of(backend).image.l1[0] & ~(1 << 63)
        assert image.read_bytes()[l2 : l2 + 16] == (1 << 63).to_bytes(8, "big") + (1 << 63 | CLUSTER).to_bytes(8, "big")
        status = await backend.block_status(0, SIZE)
        assert (status.offset, status.filename) == (0, str(tmp_path / "disk.data"))
    async with opened(image) as backend:
        await backend.write(2, b"again")
        assert await backend.read(0, 10) == b"fiagainrst"
    assert (tmp_path / "disk.data").read_bytes()[:10] == b"fiagainrst"
    assert_clean(image)


@pytest.mark.parametrize("kind", KINDS)
async def test_resizing(tmp_path: Path, kind: str) -> None:
    image = make(tmp_path, kind, size=CLUSTER + 1024)
    async with opened(image) as backend:
        await backend.write(CLUSTER, b"x" * 1024)
        await backend.truncate(3 * CLUSTER)
        assert await backend.read(CLUSTER, 2 * CLUSTER) == b"x" * 1024 + bytes(2 * CLUSTER - 1024)
        await backend.write(3 * CLUSTER - 5, b"12345")
    assert_clean(image)
    if kind == "raw":
        assert (tmp_path / "disk.data").read_bytes() == raw_content(image, tmp_path)
    assert raw_content(image, tmp_path)[-5:] == b"12345"


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
async def test_preallocation(tmp_path: Path, preallocation: str) -> None:
    image = make(tmp_path, "plain", more=f",preallocation={preallocation}")
    assert_clean(image)
    data = (tmp_path / "disk.data").stat()
    assert data.st_size == SIZE
    assert (data.st_blocks * 512 >= SIZE) == (preallocation != "metadata")
    async with opened(image) as backend:
        assert await backend.read(0, SIZE) == bytes(SIZE)
        assert (await backend.block_status(0, SIZE)).offset == 0


async def test_data_is_durable_before_the_entry_that_leads_to_it(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    metadata, data = Store(image.read_bytes()), Store((tmp_path / "disk.data").read_bytes())
    calls: list[tuple[str, str]] = []
    for name, store in (("metadata", metadata), ("data", data)):
        take = store.steps.take

        async def watched(operation: str, *args: Any, name: str = name, take: Any = take) -> None:
            calls.append((name, operation))
            await take(operation, *args)

        store.steps.take = watched  # type: ignore[method-assign, assignment]
    with stores(image=metadata, data=data):
        graph = Graph(MEMORY_DRIVERS)
        backend = await graph.open_backend(
            {
                "driver": "qcow2",
                "file": {"driver": "memory", "filename": "image"},
                "data-file": {"driver": "memory", "filename": "data"},
            },
            writable=True,
        )
        await backend.write(0, b"x")
        await backend.flush()
        calls.clear()
        await backend.write(5 * CLUSTER, b"x")
        await backend.flush()
        done = [call for call in calls if call[1] in ("write", "flush")]
        assert done[0] == ("data", "write")
        assert done.index(("data", "flush")) < done.index(("metadata", "write"))
        assert done[-1] == ("metadata", "flush")
        await graph.close()


async def test_discards_reach_the_data_file_once_nothing_refers_to_it(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    data = tmp_path / "disk.data"
    async with opened(image, discard="unmap") as backend:
        await backend.write(0, b"x" * SIZE)
        await backend.flush()
        full = data.stat().st_blocks
        await backend.discard(CLUSTER, SIZE - 2 * CLUSTER)
        assert data.stat().st_blocks == full
        await backend.flush()
        assert data.stat().st_blocks * 512 <= 2 * CLUSTER
        assert await backend.read(0, SIZE) == b"x" * CLUSTER + bytes(SIZE - 2 * CLUSTER) + b"x" * CLUSTER


async def test_what_waits_to_be_given_back_is_counted_after_a_failed_commit_too(tmp_path: Path) -> None:
    """It decides when a commit is due."""
    image = make(tmp_path, "plain")
    metadata, data = Store(image.read_bytes()), Store((tmp_path / "disk.data").read_bytes())
    with stores(image=metadata, data=data):
        graph = Graph(MEMORY_DRIVERS)
        spec = {
            "driver": "qcow2",
            "file": {"driver": "memory", "filename": "image"},
            "data-file": {"driver": "memory", "filename": "data"},
            "discard": "unmap",
        }
        backend = await graph.open_backend(spec, writable=True)
        refcounts = driver_of(backend).refcounts
        await backend.write(0, b"x" * SIZE)
        await backend.flush()
        await backend.discard(CLUSTER, 3 * CLUSTER)
        assert refcounts.freed.clusters == 3
        metadata.steps.fail("write", HostError("broken", errno=errno.EIO))
        with pytest.raises(HostError):
            await backend.flush()
        assert refcounts.freed.clusters == 3
        assert not data.steps.of("discard")
        await backend.flush()
        assert refcounts.freed.clusters == 0
        assert [(call.offset, call.length) for call in data.steps.of("discard")] == [(CLUSTER, 3 * CLUSTER)]
        await graph.close()


# --- what is refused ------------------------------------------------------------------------------------


async def test_the_data_file_is_named_relative_to_the_image_and_passes_the_gate(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    (tmp_path / "disk.data").unlink()
    with pytest.raises(FusediskError, match=r"the data file of '.*disk\.qcow2' cannot be opened"):
        async with opened(image):
            pass
    content = bytearray(image.read_bytes())
    name = str(tmp_path / "disk.data").encode()
    at = content.index(name)
    for text, error, sentence in (
        (b"/etc/hosts", GateError, "refers to '/etc/hosts', which lies outside"),
        (b"nvme://x", OptionError, "asks for the protocol .nvme."),
    ):
        content[at : at + len(name)] = text.ljust(len(name), b"\0")
        image.write_bytes(content)
        graph = Graph(DRIVERS)
        with pytest.raises(error, match=sentence):
            await graph.open_backend(str(image))
        await graph.close()
    content[at : at + len(name)] = b"other".ljust(len(name), b"\0")
    image.write_bytes(content)
    (tmp_path / "other").write_bytes(b"beside the image")
    async with opened(image, writable=False) as backend:
        assert await backend.read(0, 16) == bytes(16)


async def test_the_option_wins_over_the_name(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    moved = (tmp_path / "disk.data").rename(tmp_path / "moved")
    data_file: dict[str, Any] = {"data-file": {"driver": "file", "filename": str(moved)}}
    async with opened(image, **data_file) as backend:
        await backend.write(0, b"moved")
    assert moved.read_bytes()[:5] == b"moved"
    plain = tmp_path / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", plain, "1M")
    with pytest.raises(OptionError, match="has no external data file"):
        async with opened(plain, **data_file):
            pass


@pytest.mark.parametrize(
    ("entry", "found"),
    [(1 << 63 | 5 * CLUSTER, "leads to 327680 in the external data file"), (1 << 62 | CLUSTER, "is compressed")],
)
@pytest.mark.parametrize("guest", [0, 1])
async def test_entries_that_cannot_be(tmp_path: Path, entry: int, found: str, guest: int) -> None:
    image = make(tmp_path, "plain")
    async with opened(image) as backend:
        await backend.write(0, b"x" * 3 * CLUSTER)
        await backend.flush()
        l2 = driver_of(backend).image.l1[0] & ~(1 << 63)
    content = bytearray(image.read_bytes())
    content[l2 + guest * 8 : l2 + guest * 8 + 8] = entry.to_bytes(8, "big")
    image.write_bytes(content)
    for writable in (False, True):
        async with opened(image, writable=writable) as backend:
            request = backend.write(guest * CLUSTER, b"new") if writable else backend.read(guest * CLUSTER, 10)
            with pytest.raises(CorruptImageError, match=found):
                await request


def test_options_of_create(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(SIZE))
    for options, sentence in (
        ("data_file_raw=on", "there is no data_file"),
        ("data_file=d,data_file_raw=on,backing_file=base.raw,backing_fmt=raw", "a raw file cannot show through"),
        ("data_file=d,compat=0.10", "needs compat=1.1"),
        ("data_file=x.qcow2", "cannot be its own data file"),
    ):
        done = fusedisk_process("create", "-f", "qcow2", "-o", options, tmp_path / "x.qcow2", "4M")
        assert done.code == 2
        assert sentence in done.err
        assert not (tmp_path / "x.qcow2").exists()
        assert not (tmp_path / "d").exists()


async def test_a_raw_data_file_with_a_backing_file(tmp_path: Path) -> None:
    image = make(tmp_path, "plain")
    content = bytearray(image.read_bytes())
    content[88:96] = (2).to_bytes(8, "big")
    content[2048:2060] = b"disk.backing"
    content[8:16], content[16:20] = (2048).to_bytes(8, "big"), (12).to_bytes(4, "big")
    image.write_bytes(content)
    with pytest.raises(ImageError, match="has a raw external data file and the backing file"):
        async with opened(image):
            pass
