"""Snapshots where something goes wrong: hostile tables, refcounts that are full, host errors at every request."""

from __future__ import annotations

import errno
import struct
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.core.errors import FusediskError, HostError, ImageError, OptionError
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.snapshots.table import Snapshot, encode_snapshots
from tests.conftest import qemu_img, qemu_io
from tests.support.images import make_qcow2
from tests.support.memory import Store
from tests.support.qcow2 import assert_clean, assert_not_corrupt, in_memory, opened

KIB = 1 << 10
MIB = 1 << 20


def named(name: str, id: str = "") -> SnapshotInfo:
    return SnapshotInfo(id, name, 0)


def entry_at(image: bytes | bytearray, offset: int, size: int = 8) -> int:
    return int.from_bytes(image[offset : offset + size], "big")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Two snapshots, and a disk that has changed since each; its L1 table has a second entry, without a table."""
    path = make_qcow2(tmp_path / "disk.qcow2", 4 * MIB, "write -P 1 0 512k", cluster_size=4096)
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 64k 64k", fmt="qcow2")
    qemu_img("snapshot", "-c", "two", path)
    qemu_io(path, "write -P 3 256k 512k", fmt="qcow2")
    return path


# --- hostile tables -------------------------------------------------------------------------------------


class Places:
    """Where the metadata of an image with snapshots lies."""

    def __init__(self, image: bytearray) -> None:
        self.table = entry_at(image, 64)
        self.l1 = entry_at(image, self.table)
        self.l2 = entry_at(image, self.l1) & 0x00FFFFFFFFFFFE00
        self.active_l1 = entry_at(image, 40)
        self.active_l2 = entry_at(image, self.active_l1) & 0x00FFFFFFFFFFFE00


BEHIND = 1 << 40

DAMAGE: dict[str, Any] = {
    "L1 table not aligned": lambda at: (at.table, ">Q", at.l1 + 512),
    "L1 table behind the end": lambda at: (at.table, ">Q", BEHIND),
    "L1 table too long": lambda at: (at.table + 8, ">I", 1 << 31),
    "L1 table longer than the file": lambda at: (at.table + 8, ">I", 1 << 20),
    "L1 entry with reserved bits": lambda at: (at.l1, ">Q", at.l2 | 2),
    "L1 entry not aligned": lambda at: (at.l1, ">Q", at.l2 + 512),
    "L1 entry behind the end": lambda at: (at.l1, ">Q", BEHIND),
    "L2 entry with reserved bits": lambda at: (at.l2 + 24, ">Q", 1 << 58 | 4096),
    "L2 entry not aligned": lambda at: (at.l2 + 24, ">Q", 4096 + 512),
    "L2 entry behind the end": lambda at: (at.l2 + 24, ">Q", BEHIND),
    "compressed entry behind the end": lambda at: (at.l2 + 24, ">Q", 1 << 62 | BEHIND),
    "disk too large": lambda at: (at.table + 48, ">Q", 1 << 62),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("operation", ["apply", "delete"])
async def test_a_damaged_snapshot_is_refused(image: Path, damage: str, operation: str) -> None:
    content = bytearray(image.read_bytes())
    offset, format, value = DAMAGE[damage](Places(content))
    struct.pack_into(format, content, offset, value)
    image.write_bytes(content)
    async with opened(image) as backend:
        with pytest.raises(ImageError) as caught:
            await _do(backend, operation)
        assert [found.name for found in backend.list_snapshots()] == ["one", "two"]
        # The disk goes on, and the other snapshot as well.
        assert await backend.read(64 * KIB, 4) == b"\2" * 4
        if damage != "L1 table longer than the file":  # which lies over everything
            await backend.write(0, b"still")
            await backend.apply_snapshot("2")
            assert await backend.read(256 * KIB, 4) == b"\1" * 4
    assert str(image) in str(caught.value)
    assert "\n" not in str(caught.value)


DAMAGED_ACTIVE = {
    "L1 entry with reserved bits": lambda at: (at.active_l1 + 8, ">Q", 2),
    "L1 entry behind the end": lambda at: (at.active_l1 + 8, ">Q", BEHIND),
    "L2 entry with reserved bits": lambda at: (at.active_l2 + 8 * 300, ">Q", 1 << 58 | 4096),
    "L2 entry behind the end": lambda at: (at.active_l2 + 8 * 300, ">Q", BEHIND),
}


@pytest.mark.parametrize("damage", DAMAGED_ACTIVE)
async def test_a_damaged_disk_is_not_kept(image: Path, damage: str) -> None:
    content = bytearray(image.read_bytes())
    offset, format, value = DAMAGED_ACTIVE[damage](Places(content))
    struct.pack_into(format, content, offset, value)
    image.write_bytes(content)
    async with opened(image) as backend:
        with pytest.raises(ImageError, match=r"disk\.qcow2"):
            await backend.create_snapshot(named("three"))
        assert len(backend.list_snapshots()) == 2
        assert await backend.read(64 * KIB, 4) == b"\2" * 4


async def test_refcounts_below_their_references(image: Path) -> None:
    """Found when they are counted down: nothing is written but the corrupt bit."""
    content = bytearray(image.read_bytes())
    block = entry_at(content, entry_at(content, 48))
    cluster = (entry_at(content, Places(content).l2) & 0x00FFFFFFFFFFFE00) // 4096
    struct.pack_into(">H", content, block + 2 * cluster, 0)
    image.write_bytes(content)
    async with opened(image) as backend:
        with pytest.raises(ImageError, match="less than its references"):
            await backend.delete_snapshot("1")
        assert backend.node.fenced is not None
    now = image.read_bytes()
    assert entry_at(now, 72) == layout.CORRUPT
    assert now[:72] == bytes(content[:72])


# --- limits ---------------------------------------------------------------------------------------------


def _entry(number: int, name: bytes = b"") -> Snapshot:
    return Snapshot(str(number).encode(), name, 0, 0, 0, 0, 0, 0, 0, None)


def test_there_are_only_so_many_snapshots() -> None:
    entries = [_entry(number) for number in range(layout.MAX_SNAPSHOTS)]
    assert len(encode_snapshots(entries, "x")) < 8 * MIB
    with pytest.raises(ImageError, match="65536 snapshots"):
        encode_snapshots([*entries, _entry(0)], "x")


def test_the_table_has_only_so_many_bytes() -> None:
    entries = [_entry(number, b"n" * 65_000) for number in range(1033)]
    with pytest.raises(ImageError, match="67108864"):
        encode_snapshots(entries, "x")


async def test_ids_and_names(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB)
    async with opened(path) as backend:
        assert (await backend.create_snapshot(named("n" * 255, "42nd"))).id == "42nd"
        assert (await backend.create_snapshot(named("x"))).id == "43"
        with pytest.raises(OptionError, match="already"):
            await backend.create_snapshot(named("y", "43"))
        for wrong in (named("n" * 256), named("a\0b"), named("x", "i" * 256)):
            with pytest.raises(OptionError, match="at most 255"):
                await backend.create_snapshot(wrong)
        assert len(backend.list_snapshots()) == 2
    assert_clean(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
async def test_full_refcounts_lose_nothing(tmp_path: Path, bits: int) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB, "write -P 1 0 512k", cluster_size=4096, refcount_bits=bits)
    most = (1 << bits) - 2
    async with opened(path) as backend:
        for number in range(most):
            await backend.create_snapshot(named(f"s{number}"))
        before = path.read_bytes()
        for _ in range(2):
            with pytest.raises(ImageError, match=f"{bits} bits"):
                await backend.create_snapshot(named("more"))
        assert path.read_bytes()[:72] == before[:72]
        assert len(backend.list_snapshots()) == most
        await backend.write(0, b"\2" * 4096)
        assert await backend.read(4096, 4) == b"\1" * 4
        if most:
            await backend.apply_snapshot("1")
            await backend.delete_snapshot("2")
            await backend.create_snapshot(named("again"))
    assert_clean(path)


# --- host errors ----------------------------------------------------------------------------------------


async def _content(store: Store, snapshot: str | None = None) -> bytes:
    options = {"internal-snapshot": snapshot} if snapshot else {}
    async with in_memory(store, writable=False, **options) as backend:
        return bytes(await backend.read(0, backend.length))


async def _do(backend: Backend, operation: str) -> None:
    if operation == "create":
        await backend.create_snapshot(named("three"))
    else:
        await (backend.apply_snapshot if operation == "apply" else backend.delete_snapshot)("1")


@pytest.mark.parametrize("kind", ["read", "write", "flush"])
@pytest.mark.parametrize("operation", ["create", "apply", "delete"])
async def test_an_error_at_every_host_request(image: Path, tmp_path: Path, operation: str, kind: str) -> None:
    """Either the operation is done or nothing has changed, in the file and in what this process goes on with."""
    original = image.read_bytes()
    held = {name: await _content(Store(original), name) for name in ("one", "two")}
    disk = await _content(Store(original))
    after = {**held, "three": disk} if operation == "create" else held
    if operation == "delete":
        after = {"two": held["two"]}
    failures = 0
    while True:
        store = Store(original)
        async with in_memory(store) as backend:
            store.steps.fail(kind, HostError("It broke.", errno=errno.EIO), skip=failures)
            failed = False
            try:
                await _do(backend, operation)
            except FusediskError:
                failed = True
            store.steps.heal()
            names = [found.name for found in backend.list_snapshots()]
            done = names == list(after) if operation != "apply" else await backend.read(0, 4 * MIB) == held["one"]
            assert names == list(after if done else held)
            assert await backend.read(0, 4 * MIB) == (held["one"] if done and operation == "apply" else disk)
            fenced = backend.node.fenced is not None
            assert not fenced or kind == "flush"
            if not fenced:
                await _do(backend, "create")
                await backend.write(0, b"more")
        if not failed:
            break
        failures += 1
        saved = tmp_path / "saved.qcow2"
        saved.write_bytes(store.data)
        (assert_not_corrupt if fenced else assert_clean)(saved)
        for name in after if done else held:
            assert await _content(store, name) == held.get(name, disk)
    assert done
    assert failures >= {"read": 2, "write": 6, "flush": 2}[kind]
