"""Persistent dirty bitmaps: what keeps them, what makes them invalid and when, and what is said about it."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import fusedisk
from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.reopen import reopen
from fusedisk.block.image.amend import amend_node
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.core.errors import CorruptImageError, HostError, NoSpaceError, NotSupportedError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.entries import COPIED, OFFSET_MASK
from tests.conftest import qemu_img, qemu_io, run_tool
from tests.support.memory import Store
from tests.support.qcow2 import (
    Snapshots,
    assert_clean,
    assert_not_corrupt,
    driver_of,
    in_memory,
    opened,
    saved,
)

MIB = 1 << 20
CLUSTER = 65536
IN_USE, AUTO = "in-use", "auto"


def image_with_bitmaps(folder: Path, *, size: str = "16M", **bitmaps: str) -> Path:
    """An image of QEMU's with some data, a snapshot and bitmaps: by name, the options of ``qemu-img bitmap``."""
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, size)
    qemu_img("snapshot", "-c", "before", path)
    for name, options in bitmaps.items():
        qemu_img("bitmap", "--add", *options.split(), path, name)
    return path


def bitmaps_of(image: Path) -> dict[str, list[str]]:
    """What QEMU says of each bitmap: its flags."""
    data = json.loads(qemu_img("info", "--output=json", image))["format-specific"]["data"]
    return {bitmap["name"]: bitmap["flags"] for bitmap in data.get("bitmaps", [])}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """With a bitmap that tracks writes and one that does not."""
    return image_with_bitmaps(tmp_path, chain="", off="-g 4096 --disable")


KEPT = {"chain": [AUTO], "off": []}


def fingerprint(image: Path) -> tuple[bytes, int]:
    return image.read_bytes(), image.stat().st_mtime_ns


async def nothing(backend: Backend) -> None:
    """Open and close."""


async def look(backend: Backend) -> None:
    await backend.read(0, backend.length)
    await backend.block_status(0, backend.length)
    await backend.flush()


async def ask_for_nothing(backend: Backend) -> None:
    """Requests that have nothing to change."""
    await backend.discard(4 * MIB, MIB)
    await backend.truncate(backend.length)
    await backend.flush()


@pytest.mark.parametrize("use", [nothing, look, ask_for_nothing])
async def test_an_image_is_not_touched_before_a_write_needs_it(
    image: Path, use: Callable[[Backend], Awaitable[None]]
) -> None:
    content = bytearray(image.read_bytes())
    content[88:96] = (layout.BITMAPS | 1 << 40).to_bytes(8, "big")  # and a feature that nobody knows
    image.write_bytes(content)
    before = fingerprint(image)
    async with opened(image, discard="unmap") as backend:
        await use(backend)
    assert fingerprint(image) == before


async def test_the_first_write_makes_what_tracks_invalid_and_nothing_else(image: Path) -> None:
    async with opened(image) as backend:
        assert driver_of(backend).specific_information()["bitmaps"][0]["flags"] == [AUTO]  # type: ignore[index]
        await backend.write(0, b"x")
        assert driver_of(backend).specific_information()["bitmaps"][0]["flags"] == [IN_USE, AUTO]  # type: ignore[index]
    assert bitmaps_of(image) == {"chain": [IN_USE, AUTO], "off": []}
    assert_clean(image)
    async with opened(image) as backend:
        await backend.write(MIB, b"y")
    assert bitmaps_of(image) == {"chain": [IN_USE, AUTO], "off": []}
    qemu_img("bitmap", "--remove", image, "chain")
    assert_clean(image)


CHANGES: dict[str, Callable[[Backend], Awaitable[Any]]] = {
    "an overwrite": lambda backend: backend.write(0, b"new"),
    "a write": lambda backend: backend.write(8 * MIB, b"new"),
    "zeroes": lambda backend: backend.write_zeroes(0, CLUSTER),
    "a discard": lambda backend: backend.discard(0, CLUSTER),
    "a compressed write": lambda backend: backend.write_compressed(0, b"c" * CLUSTER),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_the_mark_is_durable_before_the_disk_changes(image: Path, tmp_path: Path, change: str) -> None:
    async with opened(image) as backend:
        await backend.write(0, b"old" * CLUSTER)
    qemu_img("bitmap", "--remove", image, "chain")
    qemu_img("bitmap", "--add", image, "again")
    store = Store(image.read_bytes())
    async with in_memory(store, discard="unmap") as backend:
        at = driver_of(backend).bitmaps
        flags = at.offset + at.tracking[0].position + 12
        await backend.read(0, CLUSTER)
        assert not store.steps.of("write")
        await CHANGES[change](backend)
        await backend.flush()
    changed = store.steps.of("write", "zero", "discard", "flush")
    assert [(call.operation, call.offset) for call in changed[:2]] == [("write", flags), ("flush", 0)]
    assert bitmaps_of(saved(store, tmp_path)) == {"again": [IN_USE, AUTO], "off": []}


@pytest.mark.parametrize("operation", ["write", "flush"])
async def test_nothing_changes_while_the_mark_cannot_be_made(image: Path, operation: str) -> None:
    store = Store(image.read_bytes())
    async with in_memory(store) as backend:
        store.steps.fail(operation, HostError("broken", errno=errno.EIO))
        with pytest.raises(HostError):
            await backend.write(0, b"x")
        written = [call.offset for call in store.steps.of("write")]
        assert written == [driver_of(backend).bitmaps.offset + 12]
        await backend.write(0, b"x")
        assert store.durable[written[0] : written[0] + 4] == (3).to_bytes(4, "big")


UNRECORDED: dict[str, Callable[[Backend], Awaitable[Any]]] = {
    "a snapshot": lambda backend: backend.create_snapshot(SnapshotInfo("", "new", 0)),
    "a snapshot's end": lambda backend: backend.delete_snapshot("1"),
    "VM state": lambda backend: backend.save_vmstate(0, memoryview(b"state" * CLUSTER)),
    "lazy refcounts": lambda backend: amend_node(backend.node, {"lazy_refcounts": "on"}),
    "the width of refcounts": lambda backend: amend_node(backend.node, {"refcount_bits": "8"}),
    "a backing file": lambda backend: amend_node(
        backend.node, {"backing_file": "base.raw", "backing_fmt": "raw"}, force=True
    ),
}


@pytest.mark.parametrize("change", UNRECORDED)
async def test_what_does_not_change_the_disk_keeps_all_bitmaps(image: Path, change: str) -> None:
    (image.parent / "base.raw").write_bytes(bytes(CLUSTER))
    content = bytearray(image.read_bytes())
    content[88:96] = (layout.BITMAPS | 1 << 40).to_bytes(8, "big")
    image.write_bytes(content)
    async with opened(image) as backend:
        await UNRECORDED[change](backend)
    assert image.read_bytes()[88:96] == layout.BITMAPS.to_bytes(8, "big"), "the bit that nobody knows is gone"
    assert bitmaps_of(image) == KEPT
    assert_clean(image)
    async with opened(image) as backend:
        await UNRECORDED["a snapshot"](backend)
        await backend.write(0, b"x")
    assert bitmaps_of(image) == {"chain": [IN_USE, AUTO], "off": []}
    assert_clean(image)


async def test_a_snapshot_is_not_applied_over_bitmaps(image: Path) -> None:
    """As in QEMU: none of them would record what changes."""
    before = fingerprint(image)
    async with opened(image) as backend:
        with pytest.raises(NotSupportedError, match="dirty bitmaps 'chain' and 'off', which would not record"):
            await backend.apply_snapshot("1")
    assert fingerprint(image) == before
    qemu_img("bitmap", "--remove", image, "off")
    async with opened(image) as backend:
        await backend.write(0, b"x")
        await backend.apply_snapshot("1")  # the bitmap says nothing any more
        assert await backend.read(0, 1) == b"\0"
    assert bitmaps_of(image) == {"chain": [IN_USE, AUTO]}
    assert_clean(image)


async def test_a_reopened_image_marks_its_bitmaps_too(image: Path) -> None:
    before = fingerprint(image)
    async with opened(image, writable=False) as backend:
        await reopen(backend.graph, {backend.node: {"read-only": False}})
        assert fingerprint(image) == before
        writer = backend.graph.attach(backend.node, "writer", writable=True)
        await writer.write(0, b"x")
        await writer.close()
    assert bitmaps_of(image) == {"chain": [IN_USE, AUTO], "off": []}
    assert_clean(image)


# --- another size of the disk ---------------------------------------------------------------------------


def dirty_ranges(image: Path, bitmap: str) -> list[tuple[int, int]]:
    """What a bitmap says has changed, as QEMU reads it: offsets and lengths."""
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/s"
        # It ends some time after its only client, and locks what it serves until then.
        copy = shutil.copy(image, folder)
        run_tool("qemu-nbd", "--fork", "-r", "-f", "qcow2", "-B", bitmap, "-k", socket, copy)
        options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
        found = json.loads(qemu_img("map", "--output=json", "--image-opts", options))
    return [(part["start"], part["length"]) for part in found if not part["data"]]


def image_with_small_clusters(folder: Path) -> Path:
    """Of 16 MiB, where a cluster of a bitmap is for 2 MiB, and one of a table for 128 MiB."""
    path = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "16M")
    for name, options in (("chain", ()), ("off", ("--disable",)), ("coarse", ("-g", "1M"))):
        qemu_img("bitmap", "--add", "-g", "512", *options, path, name)
    qemu_io(path, "write 1M 1536", "write 4095k 6k", "write 5M 512", "write 9M 100k", "write 15M 1M", fmt="qcow2")
    return path


SIZES = [
    (16 * MIB + 1536,),
    (300 * MIB,),
    (5 * MIB + 512,),
    (4 * MIB, 17 * MIB),
    (130 * MIB, 120 * MIB),
    (1024, 16 * MIB),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
async def test_bitmaps_follow_the_size_of_the_disk_as_in_qemu(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    image = image_with_small_clusters(tmp_path)
    theirs = tmp_path / "theirs.qcow2"
    shutil.copy(image, theirs)
    async with opened(image) as backend:
        for size in sizes:
            await backend.truncate(size)
            qemu_img("resize", "-q", "--shrink", "-f", "qcow2", theirs, str(size))
    assert bitmaps_of(image) == {"chain": [AUTO], "off": [], "coarse": [AUTO]}
    assert_clean(image)
    for name in ("chain", "off", "coarse"):
        assert dirty_ranges(image, name) == dirty_ranges(theirs, name)
    async with opened(image) as backend:
        await backend.truncate(20 * MIB)
        await backend.write(0, b"x")
        await backend.truncate(300 * MIB)
    assert bitmaps_of(image) == {"chain": [IN_USE, AUTO], "off": [], "coarse": [IN_USE, AUTO]}
    assert_clean(image)


async def test_the_first_write_behind_a_resize_marks_them_again(tmp_path: Path) -> None:
    image = image_with_small_clusters(tmp_path)
    async with opened(image) as backend:
        await backend.truncate(9 * MIB + 10240)  # which changes an L2 table that stays
        await backend.write(0, b"x")
    assert bitmaps_of(image) == {"chain": [IN_USE, AUTO], "off": [], "coarse": [IN_USE, AUTO]}


@pytest.mark.parametrize(("old", "new"), [(16 * MIB, 300 * MIB), (16 * MIB, 5 * MIB), (140 * MIB, 120 * MIB)])
async def test_a_crash_while_the_disk_changes_its_size_leaves_bitmaps_right_or_invalid(
    tmp_path: Path, old: int, new: int
) -> None:
    image = image_with_small_clusters(tmp_path)
    qemu_img("resize", "-q", "-f", "qcow2", image, str(old))
    before = dirty_ranges(image, "chain")
    store = Store(image.read_bytes())
    taken = Snapshots()
    async with in_memory(store) as backend:
        taken.watch(store)
        await backend.truncate(new)
        taken.store = None
    valid = 0
    for content in dict.fromkeys(taken.taken):
        crashed = saved(content, tmp_path)
        assert_not_corrupt(crashed)
        if bitmaps_of(crashed)["chain"] == [AUTO]:
            valid += 1
            assert all(part in before or part[0] + part[1] == new for part in dirty_ranges(crashed, "chain"))
    assert valid >= 2, "before and after"


async def test_bitmaps_stay_valid_where_the_disk_cannot_grow(tmp_path: Path) -> None:
    image = image_with_small_clusters(tmp_path)
    store = Store(image.read_bytes())
    async with in_memory(store) as backend:
        store.capacity = len(store.data) + 4 * 512
        with pytest.raises(NoSpaceError):
            await backend.truncate(3 << 30)
        store.capacity = 1 << 40
        await backend.read(0, MIB)
    after = saved(store, tmp_path)
    assert bitmaps_of(after) == {"chain": [AUTO], "off": [], "coarse": [AUTO]}
    assert_clean(after)


async def test_a_bitmap_that_makes_no_sense_does_not_follow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = image_with_small_clusters(tmp_path)
    store = Store(image.read_bytes())
    async with in_memory(store) as backend:
        driver = driver_of(backend)
        table = driver.bitmaps.found[0].table_offset
        # Its last cluster is said to be where the L1 table is.
        store.data[table + 56 : table + 64] = driver.image.header.l1_table_offset.to_bytes(8, "big")
        await backend.truncate(15 * MIB)
        assert (await backend.read(MIB, 10)) == bytes([0xCD]) * 10
    assert [record.getMessage() for record in caplog.records] == [
        "'memory:image' has the dirty bitmap 'chain', which could not follow its change of size and is invalid."
    ]


# --- directories that make no sense ---------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["entry", "place", "count"])
async def test_an_invalid_directory_drops_all_bitmaps_at_the_first_change(image: Path, broken: str) -> None:
    async with opened(image, writable=False) as backend:
        directory = driver_of(backend).image.header.bitmap_directory
        assert directory is not None
        l1_table_offset = driver_of(backend).image.header.l1_table_offset
    content = bytearray(image.read_bytes())
    at = content.index(layout.EXTENSION_BITMAPS.to_bytes(4, "big")) + 8
    if broken == "entry":
        content[directory.offset + 12] = 0x80  # a reserved flag
    elif broken == "place":
        content[at + 16 : at + 24] = l1_table_offset.to_bytes(8, "big")
    else:
        content[at : at + 4] = (7).to_bytes(4, "big")
    image.write_bytes(content)
    async with opened(image) as backend:
        assert await backend.read(0, 10) == bytes(10)
        assert "bitmaps" not in driver_of(backend).specific_information()  # type: ignore[operator]
        assert image.read_bytes() == content
        await backend.create_snapshot(SnapshotInfo("", "new", 0))
    assert not image.read_bytes()[95] & layout.BITMAPS
    assert bitmaps_of(image) == {}


async def test_no_guest_data_go_over_the_directory(image: Path) -> None:
    async with opened(image) as backend:
        await backend.write(0, b"x")
        driver = driver_of(backend)
        l2, directory = driver.image.l1[0] & OFFSET_MASK, driver.bitmaps.offset
    content = bytearray(image.read_bytes())
    content[l2 : l2 + 8] = (COPIED | directory).to_bytes(8, "big")
    image.write_bytes(content)
    async with opened(image) as backend:
        with pytest.raises(CorruptImageError, match="bitmap directory lies"):
            await backend.write(0, b"y")


# --- words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bitmaps", "words"),
    [
        ({}, None),
        ({"off": "--disable"}, None),
        (
            {"chain": "", "off": "--disable"},
            "the dirty bitmap 'chain', which fusedisk does not keep up to date: the first write will make it invalid",
        ),
        (
            {"a": "", "b": ""},
            "the dirty bitmaps 'a' and 'b', which fusedisk does not keep up to date: the first write will make them",
        ),
        (dict.fromkeys("abcde", ""), "the dirty bitmaps 'a', 'b', 'c' and 2 more, which"),
    ],
)
async def test_what_a_write_will_cost_is_said_once_when_a_disk_is_opened_for_writing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bitmaps: dict[str, str], words: str | None
) -> None:
    image = image_with_bitmaps(tmp_path, **bitmaps)
    async with fusedisk.open(image) as disk:
        await disk.read(0, 10)
    assert not caplog.records, "it is read only"
    async with fusedisk.open(image, writable=True) as disk:
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        await disk.write(0, b"x")
        await disk.write(MIB, b"x")
    assert len(told) == len(caplog.records) == (words is not None)
    if words is not None:
        assert told[0].startswith(f"'{image}' has ")
        assert words in told[0]
        assert told[0].endswith("; open it read-only to avoid that.")


async def test_amending_says_nothing_of_bitmaps(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    await fusedisk.amend(image, {"lazy_refcounts": True})
    assert not caplog.records
    assert bitmaps_of(image) == KEPT
