"""The library in trio: `fusedisk.open`."""

from __future__ import annotations

import asyncio
import errno
import inspect
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

import fusedisk
from fusedisk.core.errors import (
    GateError,
    HostError,
    ImageError,
    LockConflictError,
    NoMediumError,
    OptionError,
    OutOfRangeError,
    ReadOnlyError,
)
from tests.conftest import qemu_img, qemu_io
from tests.support.images import KIB, MIB, make_overlay, make_qcow2, make_sparse_raw
from tests.support.processes import qemu_io_holding


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_overlay(tmp_path)


@pytest.fixture
async def disk(image: Path) -> AsyncIterator[fusedisk.Disk]:
    """The image, open for writing."""
    async with fusedisk.open(image, writable=True) as disk:
        yield disk


async def test_what_a_disk_is(disk: fusedisk.Disk, image: Path) -> None:
    assert (disk.size, disk.format, disk.writable, disk.filename) == (4 * MIB, "qcow2", True, str(image))


async def test_reading(disk: fusedisk.Disk) -> None:
    data = await disk.read(MIB - 2, 4)
    assert data == b"\0\0\x09\x09"
    assert type(data) is bytes
    buffer = bytearray(b"?" * 6)
    await disk.read_into(MIB, memoryview(buffer)[1:5])
    assert buffer == b"?\x09\x09\x09\x09?"
    assert await disk.read(4 * MIB, 0) == b""


async def test_writing(disk: fusedisk.Disk, image: Path) -> None:
    await disk.write(10, b"bytes")
    await disk.write(20, bytearray(b"bytearray"), fua=True)
    await disk.write(40, memoryview(b"--view--")[2:6])
    assert (await disk.read(8, 38)).replace(b"\0", b".") == b"..bytes.....bytearray...........view.."
    await disk.write_zeroes(MIB, 64 * KIB)
    assert not any(await disk.read(MIB, 64 * KIB))
    await disk.write(2 * MIB, b"x" * 64 * KIB)
    await disk.discard(2 * MIB, 64 * KIB)
    assert not any(await disk.read(2 * MIB, 64 * KIB)), "unmapped: clusters behind the backing file read as zeroes"
    await disk.flush()
    await disk.truncate(5 * MIB)
    assert disk.size == 5 * MIB
    assert await disk.read(5 * MIB - 1, 1) == b"\0"
    await disk.close()
    qemu_img("check", "-q", image)
    qemu_io(image, "read -P 0 1M 64k", "read -P 0 2M 64k")
    assert json.loads(qemu_img("info", "--output=json", image))["virtual-size"] == 5 * MIB


async def test_information_is_qemu_imgs(disk: fusedisk.Disk, image: Path) -> None:
    await disk.write(0, b"x")
    await disk.flush()
    information, chain = await disk.info(), await disk.info_chain()
    entries = [entry async for entry in disk.extents()]
    await disk.close()
    assert information == json.loads(qemu_img("info", "--output=json", image))
    assert chain == json.loads(qemu_img("info", "--output=json", "--backing-chain", image))
    theirs = json.loads(qemu_img("map", "--output=json", image))
    assert [(e.start, e.length, e.depth, e.present, e.zero, e.data, e.offset) for e in entries] == [
        (*(t[key] for key in ("start", "length", "depth", "present", "zero", "data")), t.get("offset")) for t in theirs
    ]


async def test_extents_of_a_part(disk: fusedisk.Disk) -> None:
    entries = [entry async for entry in disk.extents(MIB + 512, 100)]
    assert [(entry.start, entry.length, entry.data, entry.depth) for entry in entries] == [(MIB + 512, 100, True, 1)]
    status = await disk.block_status(MIB, 4096)
    assert (status.length, status.data, status.depth) == (4096, True, 1)
    with pytest.raises(OptionError, match="the start of the map is"):
        _ = [entry async for entry in disk.extents(5 * MIB)]


@pytest.mark.parametrize(("offset", "length"), [(4 * MIB, 1), (4 * MIB - 1, 2), (-1, 1), (0, -1), (1 << 70, 1)])
async def test_requests_that_are_not_on_the_disk(disk: fusedisk.Disk, offset: int, length: int) -> None:
    with pytest.raises(OutOfRangeError):
        await disk.read(offset, length)
    with pytest.raises(OutOfRangeError):
        await disk.write_zeroes(offset, length)
    with pytest.raises(OutOfRangeError):
        await disk.discard(offset, length)
    if length > 0:
        with pytest.raises(OutOfRangeError, match=r"disk.qcow2' is 4194304 bytes long|may be negative"):
            await disk.write(offset, bytes(length))


@pytest.mark.parametrize("offset", [-1, -512, -64 * KIB, -1 << 70])
async def test_nothing_lies_before_a_disk(tmp_path: Path, offset: int) -> None:
    """Not what comes before it in the file, nor what its last L2 table says."""
    raw, qcow2 = tmp_path / "x.raw", make_qcow2(tmp_path / "x.qcow2", MIB, "write -P 9 0 1M")
    raw.write_bytes(b"a" * MIB)
    before = raw.read_bytes(), qcow2.read_bytes()
    part = {"driver": "raw", "offset": MIB // 2, "file": {"driver": "file", "filename": str(raw)}}
    images: list[Any] = [part, qcow2]
    for image in images:
        async with fusedisk.open(image, writable=True) as disk:
            await disk.read(0, 1)
            for length in (1, 4 * KIB):
                with pytest.raises(OutOfRangeError, match="bytes at -"):
                    await disk.read(offset, length)
                with pytest.raises(OutOfRangeError):
                    await disk.read_into(offset, bytearray(length))
                with pytest.raises(OutOfRangeError):
                    await disk.write(offset, bytes(length))
    assert (raw.read_bytes(), qcow2.read_bytes()) == before


async def test_a_closed_disk(image: Path) -> None:
    async with fusedisk.open(image) as disk:
        pass
    with pytest.raises(NoMediumError):
        await disk.read(0, 1)
    await disk.close()


async def test_a_disk_that_is_not_writable(image: Path) -> None:
    before = image.read_bytes()
    async with fusedisk.open(image) as disk:
        assert not disk.writable
        with pytest.raises(ReadOnlyError):
            await disk.write(0, b"x")
        with pytest.raises(ReadOnlyError):
            await disk.write_zeroes(0, 1)
        with pytest.raises(ReadOnlyError):
            await disk.truncate(MIB)
    assert image.read_bytes() == before


async def test_each_way_to_name_an_image(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(image.parent)
    nested = {"driver": "qcow2", "file": {"driver": "file", "filename": "disk.qcow2"}}
    ways: list[Any] = [
        str(image),
        image,
        "disk.qcow2",
        "file:disk.qcow2",
        f"json:{json.dumps(nested)}",
        json.dumps(nested),
        "driver=qcow2,file.filename=disk.qcow2",
        nested,
        {"driver": "qcow2", "file.filename": "disk.qcow2"},
    ]
    for way in ways:
        async with fusedisk.open(way) as disk:
            assert await disk.read(MIB, 2) == b"\x09\x09", way


@pytest.mark.parametrize("name", ["json:x", "driver=raw", "{", "null-co:x"])
async def test_a_path_object_is_a_path_and_nothing_else(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_sparse_raw(Path(name), KIB, (0, 1))
    async with fusedisk.open(Path(name)) as disk:
        assert disk.size == KIB


async def test_options(image: Path, tmp_path: Path) -> None:
    raw = make_sparse_raw(tmp_path / "x.raw", MIB)
    async with fusedisk.open(raw, writable=True, format="raw", detect_zeroes="unmap", cache="unsafe") as disk:
        await disk.write(0, b"x" * 4096)
        await disk.write(0, bytes(4096))
        assert not (await disk.block_status(0, 4096)).data
    async with fusedisk.open(raw, writable=True, format="raw", discard="ignore") as disk:
        await disk.write(0, b"x" * 4096)
        await disk.discard(0, 4096)
        assert await disk.read(0, 4096) == b"x" * 4096
    async with fusedisk.open(image, writable=True, copy_on_read=True) as disk:
        await disk.read(MIB, 1)
        assert (await disk.block_status(MIB, 4096)).depth == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"cache": "fast"},
            "cache is 'fast', expected one of writeback, writethrough, none, directsync, unsafe.",
        ),
        ({"discard": "yes"}, "discard is 'yes', expected one of unmap, ignore."),
        ({"detect_zeroes": "yes"}, "detect_zeroes is 'yes', expected one of off, on, unmap."),
        ({"copy_on_read": True}, "copy_on_read keeps what is read in the image, so it needs writable=True."),
        ({"format": "vhdy"}, "there is no image format 'vhdy'"),
        ({"force_share": True, "writable": True}, "force-share is for read-only images"),
    ],
)
async def test_wrong_options(image: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError) as caught:
        async with fusedisk.open(image, **options):
            pass
    assert str(caught.value).startswith(sentence)


async def test_images_that_do_not_open(tmp_path: Path, image: Path) -> None:
    with pytest.raises(HostError, match="No such file or directory") as missing:
        async with fusedisk.open(tmp_path / "none"):
            pass
    assert missing.value.errno == errno.ENOENT
    with pytest.raises(ImageError):
        async with fusedisk.open(make_sparse_raw(tmp_path / "x.raw", MIB), format="qcow2"):
            pass
    with qemu_io_holding(image):
        with pytest.raises(LockConflictError):
            async with fusedisk.open(image):
                pass
        async with fusedisk.open(image, force_share=True) as disk:
            assert disk.size == 4 * MIB


async def test_the_gate(image: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    outside = make_qcow2(tmp_path / "sub" / "x.qcow2", None, backing=image)
    with pytest.raises(GateError, match="lies outside the image's own directory"):
        async with fusedisk.open(outside):
            pass
    for options in ({"allow_paths": [tmp_path]}, {"allow_paths": [str(image)]}, {"allow_any_reference": True}):
        async with fusedisk.open(outside, **options) as disk:  # type: ignore[arg-type]
            assert disk.size == 4 * MIB


async def test_an_error_in_the_block_is_what_comes_out_and_the_disk_is_closed(image: Path) -> None:
    async def work() -> None:
        async with fusedisk.open(image, writable=True) as disk:
            await disk.write(0, b"written before")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    qemu_img("check", "-q", image)
    async with fusedisk.open(image) as disk:
        assert await disk.read(0, 14) == b"written before"


async def test_cancelling_closes_the_disk(image: Path) -> None:
    with trio.CancelScope() as scope:
        async with fusedisk.open(image, writable=True) as disk:
            await disk.write(0, b"written before")
            scope.cancel()
            await trio.sleep_forever()
    async with fusedisk.open(image, writable=True) as disk:
        assert await disk.read(0, 14) == b"written before"


async def test_a_forgotten_disk_is_closed_and_warned_about(image: Path) -> None:
    disk = await fusedisk.open(image, writable=True).__aenter__()
    await disk.write(0, b"kept")
    with pytest.warns(ResourceWarning, match=f"^the disk '{image}' was forgotten without closing it.$"):
        del disk
    async with fusedisk.open(image, writable=True) as again:
        assert await again.read(0, 4) == b"kept"
        closed = trio.Event()
        other = await fusedisk.open(image.with_name("base.qcow2"), force_share=True).__aenter__()
        other._backend.node.close_notifiers.append(lambda node: closed.set())
        with pytest.warns(ResourceWarning):
            del other
        with trio.fail_after(30):
            await closed.wait()


def test_a_disk_forgotten_at_the_end_of_the_run_is_closed(image: Path) -> None:
    events: list[str] = []

    async def main() -> None:
        disk = await fusedisk.open(image, writable=True).__aenter__()
        await disk.write(0, b"kept")
        disk._backend.node.close_notifiers.append(lambda node: events.append("closed"))

    with pytest.warns(ResourceWarning):
        trio.run(main)
    assert events == ["closed"]
    qemu_img("check", "-q", image)


def test_a_disk_forgotten_after_its_run_is_warned_about(image: Path) -> None:
    disks: list[fusedisk.Disk] = []

    async def main() -> None:
        disks.append(await fusedisk.open(image).__aenter__())

    trio.run(main)
    with pytest.warns(ResourceWarning, match="was forgotten"):
        disks.clear()


async def test_many_tasks_at_once(disk: fusedisk.Disk) -> None:
    async def work(index: int) -> None:
        random_ = random.Random(index)
        start = index * 256 * KIB
        for _ in range(20):
            at = start + random_.randrange(200 * KIB)
            data = bytes([index + 1]) * random_.randrange(1, 50 * KIB)
            await disk.write(at, data)
            assert await disk.read(at, len(data)) == data

    async with trio.open_nursery() as nursery:
        for index in range(16):
            nursery.start_soon(work, index)


async def test_creating(tmp_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    await fusedisk.create(base, "qcow2", "3M", options={"cluster_size": "128k", "lazy_refcounts": True})
    top = tmp_path / "top.qcow2"
    await fusedisk.create(top, "qcow2", backing="base.qcow2", backing_format="qcow2")
    information = json.loads(qemu_img("info", "--output=json", base))
    assert information["cluster-size"] == 128 * KIB
    assert information["format-specific"]["data"]["lazy-refcounts"] is True
    async with fusedisk.open(top, writable=True) as disk:
        assert disk.size == 3 * MIB
    with pytest.raises(OptionError, match="add it with -F"):
        await fusedisk.create(tmp_path / "x", "qcow2", backing="base.qcow2")
    with pytest.raises(OptionError, match="given twice"):
        await fusedisk.create(tmp_path / "x", "qcow2", 512, options={"size": 1024})
    with pytest.raises(HostError):
        await fusedisk.create(tmp_path / "none" / "x", "raw", 512)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["open", "create", "amend"])
def test_asyncio_is_told_what_to_use(image: Path, name: str) -> None:
    async def main() -> None:
        if name == "open":
            async with fusedisk.open(image):
                pass
        elif name == "create":
            await fusedisk.create(image, "raw", 512)
        else:
            await fusedisk.amend(image, {"size": 512})

    before = image.read_bytes()
    with pytest.raises(
        RuntimeError, match=rf"^fusedisk\.{name} is for .*trio\.run.*\.{name}_sync in asyncio.to_thread\.$"
    ):
        asyncio.run(main())
    assert image.read_bytes() == before


def test_what_asyncio_is_told_to_use(image: Path) -> None:
    async def main() -> bytes:
        with await asyncio.to_thread(fusedisk.open_sync, image) as disk:
            return await asyncio.to_thread(disk.read, MIB, 2)

    assert asyncio.run(main()) == b"\x09\x09"


# --- the package ----------------------------------------------------------------------------------------


def test_names() -> None:
    assert set(fusedisk.__all__) <= set(dir(fusedisk))
    for name in fusedisk.__all__:
        assert getattr(fusedisk, name) is not None
    assert fusedisk.errors.FusediskError is fusedisk.FusediskError
    for name in ("open", "create"):
        blocking = getattr(fusedisk, f"{name}_sync")
        assert blocking.__name__ == f"{name}_sync"
        assert inspect.signature(blocking).parameters == inspect.signature(getattr(fusedisk, name)).parameters
    with pytest.raises(AttributeError, match="module 'fusedisk' has no attribute 'opne'"):
        fusedisk.opne  # noqa: B018
