"""Options of an open qcow2 image: lazy refcounts and the dirty bit, passing discards on, overlap checks."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.reopen import reopen
from fusedisk.block.image.check import open_for_check
from fusedisk.block.model.check_result import Repair
from fusedisk.core.errors import CorruptImageError, ImageError, OptionError
from fusedisk.core.progress import no_progress
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.entries import OFFSET_MASK
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, qemu_io, require_tool
from tests.support.memory import Store
from tests.support.qcow2 import assert_clean, created_in_memory, driver_of, in_memory, opened, saved

CLUSTER = 65536
MIB = 1 << 20


def is_dirty(image: bytes | bytearray | Path) -> bool:
    head = image.read_bytes()[:104] if isinstance(image, Path) else image
    return bool(int.from_bytes(head[72:80], "big") & layout.DIRTY)


# --- lazy refcounts -------------------------------------------------------------------------------------


async def test_lazy_refcounts_are_written_at_the_end(tmp_path: Path) -> None:
    store = await created_in_memory(Store(), size=64 * MIB, lazy_refcounts=True)
    async with in_memory(store) as backend:
        assert not is_dirty(store.data)
        await backend.write(0, b"t")
        await backend.flush()
        assert is_dirty(store.data)
        assert is_dirty(store.durable)
        block = driver_of(backend).refcounts.table[0]
        for number in range(1, 4):
            await backend.write(number * CLUSTER, b"x" * CLUSTER)
            await backend.flush()
        writes = [call for call in store.steps.of("write") if block <= call.offset < block + CLUSTER]
        assert not writes
        behind = tmp_path / "behind.qcow2"
        behind.write_bytes(store.data)
    assert not is_dirty(store.data)
    assert not is_dirty(store.durable)
    assert_clean(saved(store, tmp_path))
    assert "5 corruptions" in qemu_img("check", "-r", "all", behind, check=False)
    assert_clean(behind)


@pytest.mark.parametrize(("image", "option", "lazy"), [(True, None, True), (True, False, False), (False, True, True)])
async def test_the_option_wins_over_the_image(image: bool, option: bool | None, lazy: bool) -> None:
    store = await created_in_memory(Store(), size=MIB, lazy_refcounts=image)
    async with in_memory(store, **({} if option is None else {"lazy-refcounts": option})) as backend:
        await backend.write(0, b"t")
        await backend.flush()
        assert is_dirty(store.data) == lazy
    assert not is_dirty(store.data)


async def test_version_2_has_no_lazy_refcounts() -> None:
    store = await created_in_memory(Store(), size=MIB, compat="0.10")
    with pytest.raises(OptionError, match="version 2, but lazy-refcounts needs version 3"):
        async with in_memory(store, **{"lazy-refcounts": True}):
            pass


def left_open_by_qemu(folder: Path) -> Path:
    """An image with lazy refcounts whose user was killed."""
    image = folder / "vm.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", image, "8M")
    command = [require_tool("qemu-io"), "-f", "qcow2", "-c", "write -P 7 1M 2M", "-c", "flush", "-c", "sigraise 9"]
    done = subprocess.run([*command, str(image)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done
    return image


async def test_an_image_that_was_not_closed_is_repaired_when_it_is_opened_for_writing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = left_open_by_qemu(tmp_path)
    assert is_dirty(image)
    async with opened(image, writable=False) as backend:
        assert await backend.read(MIB, 2 * MIB) == b"\7" * 2 * MIB
        with pytest.raises(ImageError, match="must be repaired before it is written to"):
            await reopen(backend.graph, {backend.node: {"read-only": False}})
    assert is_dirty(image), "nobody wrote to it"
    assert not caplog.records
    async with opened(image) as backend:
        assert [record.getMessage() for record in caplog.records] == [
            f"'{image}' was not closed properly: its refcounts are checked before it is written to.",
            f"'{image}' can be written to: 32 wrong refcounts or COPIED flags were corrected, 0 leaked clusters given "
            "back.",
        ]
        assert not driver_of(backend).image.header.incompatible_features & layout.DIRTY
        assert await backend.read(MIB, 2 * MIB) == b"\7" * 2 * MIB
        await backend.write(4 * MIB, b"new")
    assert not is_dirty(image)
    assert_clean(image)
    qemu_io(image, "read -P 7 1M 2M", fmt="qcow2", options="-r")


@pytest.mark.parametrize("what", ["an L2 entry", "the snapshot table"])
async def test_a_plain_opening_mends_no_tables(tmp_path: Path, what: str) -> None:
    """What an entry leads to, however wrong, is given up only where somebody asks for a repair."""
    image = left_open_by_qemu(tmp_path)
    content = bytearray(image.read_bytes())
    if what == "an L2 entry":
        l1 = int.from_bytes(content[40:48], "big")
        l2 = int.from_bytes(content[l1 : l1 + 8], "big") & OFFSET_MASK
        content[l2 : l2 + 8] = (1 << 50).to_bytes(8, "big")  # behind the end of the file
    else:
        content[60:64] = (1).to_bytes(4, "big")
        content[64:72] = len(content).to_bytes(8, "big")
        entry = struct.pack(">QIHHIIQII", 1 << 50, 1, 1, 1, 0, 0, 0, 0, 24) + bytes(24) + b"1s"
        content += entry.ljust(CLUSTER, b"\0")
    image.write_bytes(content)
    with pytest.raises(ImageError, match=r"wrong, and not only its refcounts; 'fusedisk check -r all'"):
        async with opened(image):
            pass
    assert image.read_bytes() == content
    async with open_for_check(DRIVERS, str(image), writable=True) as found:
        assert (await found.driver.check(found.files, Repair.ALL, no_progress)).clean
    async with opened(image) as backend:
        await backend.write(0, b"x")
    assert_clean(image)


async def test_an_image_that_cannot_be_repaired_is_left_alone(tmp_path: Path) -> None:
    image = left_open_by_qemu(tmp_path)
    content = bytearray(image.read_bytes())
    content[72:80] = (layout.DIRTY | layout.CORRUPT).to_bytes(8, "big")
    image.write_bytes(content)
    with pytest.raises(ImageError, match="marked corrupt"):
        async with opened(image):
            pass
    assert image.read_bytes() == content


# --- discards -------------------------------------------------------------------------------------------


async def host_discards(options: dict[str, bool]) -> int:
    """How many discards reach the host for a discard of the guest's."""
    store = await created_in_memory(Store(), size=MIB)
    async with in_memory(store, discard="unmap", **options) as backend:
        await backend.write(0, b"x" * 4 * CLUSTER)
        await backend.flush()
        store.steps.calls.clear()
        await backend.discard(0, 2 * CLUSTER)
        await backend.flush()
        return len(store.steps.of("discard"))


async def test_discards_are_passed_on_as_asked() -> None:
    assert await host_discards({}) == 1
    assert await host_discards({"pass-discard-request": False}) == 0
    assert await host_discards({"pass-discard-request": True, "pass-discard-other": True}) == 1


async def test_space_that_is_freed_in_other_ways(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -c -P 3 0 64k", fmt="qcow2")
    for passes in (False, True):
        store = Store(path.read_bytes())
        async with in_memory(store, discard="unmap", **{"pass-discard-other": passes}) as backend:
            await backend.write(0, os.urandom(CLUSTER))
            await backend.flush()
        assert len(store.steps.of("discard")) == passes


@pytest.mark.parametrize("extended", [False, True])
async def test_discards_that_keep_the_clusters(tmp_path: Path, extended: bool) -> None:
    path = tmp_path / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"extended_l2={'on' if extended else 'off'}", path, "4M")
    qemu_io(path, "write -P 3 0 2M", "write -c -P 4 2M 64k", fmt="qcow2")
    qemu_img("snapshot", "-c", "one", path)
    qemu_io(path, "write -P 5 0 1M", fmt="qcow2")
    async with opened(path, discard="unmap", **_checks("on", "discard-no-unref")) as backend:
        before = (await backend.block_status(0, CLUSTER)).offset
        blocks = path.stat().st_blocks
        await backend.discard(0, 4 * MIB)
        assert await backend.read(0, 4 * MIB) == bytes(4 * MIB)
        assert path.stat().st_blocks * 512 <= blocks * 512 - MIB
        await backend.write(100, b"again")
        assert (await backend.block_status(0, CLUSTER)).offset == before
    assert_clean(path)
    qemu_io(path, "read -P 0 64k 4032k", fmt="qcow2", options="-r")
    qemu_img("snapshot", "-a", "one", path)
    qemu_io(path, "read -P 3 0 2M", "read -P 4 2M 64k", fmt="qcow2", options="-r")


# --- overlap checks -------------------------------------------------------------------------------------


def entry_into_metadata(folder: Path, where: str) -> Path:
    """An image whose L2 entry for guest offset 0 leads to metadata and says that it may be overwritten."""
    image = folder / f"{where}.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_io(image, "write -P 1 0 64k", "write -P 2 64k 64k", fmt="qcow2")
    qemu_img("snapshot", "-c", "one", image)
    old_l2 = _number(image, _number(image, 40)) & layout_mask()
    qemu_io(image, "write -P 3 0 64k", fmt="qcow2")
    l1 = _number(image, 40)
    snapshots = _number(image, 64)
    places = {
        "header": 0,
        "refcount table": _number(image, 48),
        "refcount block": _number(image, _number(image, 48)),
        "snapshot's L1 table": _number(image, snapshots),
        "L2 table": _number(image, l1) & layout_mask(),
        "snapshot's L2 table": old_l2,
    }
    content = bytearray(image.read_bytes())
    l2 = places["L2 table"]
    content[l2 : l2 + 8] = (1 << 63 | places[where]).to_bytes(8, "big")
    image.write_bytes(content)
    return image


def layout_mask() -> int:
    return 0x00FF_FFFF_FFFF_FE00


def _number(image: Path, offset: int) -> int:
    with image.open("rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(8), "big")


CHECKED = {
    "refcount table": ("constant", "cached", "all"),
    "refcount block": ("cached", "all"),
    "snapshot's L1 table": ("cached", "all"),
    "L2 table": ("cached", "all"),
    "snapshot's L2 table": ("all",),
}


@pytest.mark.parametrize("where", CHECKED)
@pytest.mark.parametrize("mode", ["none", "constant", "cached", "all"])
async def test_writes_that_would_hit_metadata(tmp_path: Path, where: str, mode: str) -> None:
    image = entry_into_metadata(tmp_path, where)
    before = image.read_bytes()
    if mode in CHECKED[where]:
        with pytest.raises(CorruptImageError, match=f"where its {where} lies"):
            async with opened(image, **_checks(mode)) as backend:
                await backend.write(0, b"over")
        after = bytearray(image.read_bytes())
        assert int.from_bytes(after[72:80], "big") & layout.CORRUPT
        after[72:80] = before[72:80]
        assert after == before, "nothing but the corrupt bit has changed"
    elif where != "L2 table":
        async with opened(image, **_checks(mode, "overlap-check.template")) as backend:
            await backend.write(0, b"over")
        assert image.read_bytes() != before


async def test_unknown_overlap_check() -> None:
    store = await created_in_memory(Store(), size=MIB)
    with pytest.raises(OptionError, match="expected one of none, constant, cached, all"):
        async with in_memory(store, **_checks("some")):
            pass


def _checks(mode: str, option: str = "overlap-check") -> dict[str, Any]:
    return {option: mode}
