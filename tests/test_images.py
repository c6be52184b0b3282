"""The library for whole images, and what a type checker and a beginner see of the package."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import fusedisk
from fusedisk.core import errors as core_errors
from fusedisk.errors import (
    FusediskError,
    HostError,
    LockConflictError,
    NotSupportedError,
    OptionError,
    OutOfRangeError,
    WouldLoseDataError,
)
from tests.conftest import qemu_img, require_root
from tests.support.commands import ROOT
from tests.support.images import KIB, MIB, make_overlay, make_qcow2, make_sparse_raw
from tests.support.processes import qemu_io_holding


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_qcow2(tmp_path / "disk.qcow2", 4 * MIB, "write -P 9 1M 64k")


async def test_checking(image: Path) -> None:
    assert (await fusedisk.check(image)).clean
    with image.open("r+b") as file:
        file.truncate(file.seek(0, 2) + 65536)
        file.seek(0x20000 + 2 * 6)  # the refcount of a cluster that nothing refers to
        file.write(b"\0\1")
    shares: list[tuple[int, int]] = []
    found = await fusedisk.check(image, repair="leaks", dry_run=True, progress=lambda *share: shares.append(share))
    assert (found.leaks_fixed, len(found.repairs)) == (0, 1)
    assert shares
    assert (await fusedisk.check(image, repair="all")).leaks_fixed == 1
    assert (await fusedisk.check(image)).clean
    with pytest.raises(NotSupportedError, match="raw, which has nothing to check"):
        await fusedisk.check(image, format="raw")
    with pytest.raises(OptionError, match="one of leaks, all"):
        await fusedisk.check(image, repair="everything")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="cannot be repaired"):
        await fusedisk.check(image, repair="all", force_share=True)


async def test_mapping(tmp_path: Path) -> None:
    overlay = make_overlay(tmp_path)
    async with fusedisk.open(overlay) as disk:
        entries = [entry async for entry in disk.extents()]
    assert await fusedisk.map(overlay) == entries
    assert len(entries) > 1
    (entry,) = await fusedisk.map(overlay, MIB, 512)
    assert (entry.start, entry.length) == (MIB, 512)
    with pytest.raises(OptionError, match="the disk's end at"):
        await fusedisk.map(overlay, 1 << 60)
    with pytest.raises(OptionError, match="expected 0 or more"):
        await fusedisk.map(overlay, 0, -1)


async def test_measuring(image: Path) -> None:
    copy = await fusedisk.measure("qcow2", image=image)
    assert copy.required == 6 * 64 * KIB
    empty = await fusedisk.measure("qcow2", "4M", options={"cluster_size": "64k"})
    assert (empty.required, empty.fully_allocated) == (copy.required - 64 * KIB, copy.fully_allocated)
    assert (await fusedisk.measure("raw", 1000)).required == 1024
    assert (await fusedisk.measure("raw", image=image)).required == 4 * MIB
    with pytest.raises(OptionError, match="there is no image format 'file'"):
        await fusedisk.measure("file", 512)
    with pytest.raises(OptionError, match="and not both"):
        await fusedisk.measure("raw", 512, image=image)


async def test_resizing(image: Path) -> None:
    for size, result in ((8 * MIB, 8 * MIB), ("+1M", 9 * MIB), ("10000000", 10000384)):
        await fusedisk.resize(image, size)
        async with fusedisk.open(image) as disk:
            assert disk.size == result
    with pytest.raises(WouldLoseDataError, match="would lose what lies behind 1048576"):
        await fusedisk.resize(image, MIB)
    await fusedisk.resize(image, MIB, shrink=True)
    with pytest.raises(OptionError, match="cannot lose 2097152"):
        await fusedisk.resize(image, "-2M", shrink=True)
    with pytest.raises(OptionError, match="nothing to preallocate"):
        await fusedisk.resize(image, "-512", shrink=True, preallocation="full")
    with qemu_io_holding(image), pytest.raises(LockConflictError):
        await fusedisk.resize(image, "+1M")
    async with fusedisk.open(image) as disk:
        assert disk.size == MIB
    qemu_img("check", "-q", image)


async def test_resizing_with_preallocation(tmp_path: Path) -> None:
    raw = make_sparse_raw(tmp_path / "x.raw", MIB)
    await fusedisk.resize(raw, "+1M", format="raw", preallocation="full")
    assert raw.stat().st_blocks * 512 >= MIB
    assert raw.stat().st_size == 2 * MIB
    with pytest.raises(OptionError, match="preallocation is 'half'"):
        await fusedisk.resize(raw, "+1M", preallocation="half")  # type: ignore[arg-type]


async def test_what_exists_is_not_replaced_by_surprise(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    with pytest.raises(WouldLoseDataError, match=f"exists and holds {len(before)} bytes"):
        await fusedisk.create(image, "raw", 512)
    data = tmp_path / "data"
    data.write_bytes(b"precious")
    with pytest.raises(WouldLoseDataError, match="data' exists and holds 8 bytes"):
        await fusedisk.create(tmp_path / "new", "qcow2", MIB, options={"data_file": str(data)})
    assert (image.read_bytes(), data.read_bytes()) == (before, b"precious")
    assert not (tmp_path / "new").exists()
    await fusedisk.create(image, "raw", 512, overwrite=True)
    assert image.read_bytes() == bytes(512)
    (tmp_path / "empty").touch()
    await fusedisk.create(tmp_path / "empty", "raw", 512)


@pytest.mark.root
async def test_a_block_device_is_not_replaced_by_surprise(tmp_path: Path) -> None:
    require_root()
    os.mknod(tmp_path / "device", stat.S_IFBLK | 0o600, os.makedev(7, 250))
    with pytest.raises(WouldLoseDataError, match="device' is a block device, whose content"):
        await fusedisk.create(tmp_path / "device", "raw", 512)


def test_without_trio(image: Path) -> None:
    assert fusedisk.check_sync(image).clean
    assert [entry.start for entry in fusedisk.map_sync(image, MIB, 512)] == [MIB]
    assert fusedisk.measure_sync("raw", 512).required == 512
    fusedisk.resize_sync(image, "+1M")
    with fusedisk.open_sync(image) as disk:
        assert disk.size == 5 * MIB


@pytest.mark.parametrize("length", [1 << 60, (1 << 63) - 1])
async def test_a_length_that_no_memory_has(length: int) -> None:
    async with fusedisk.open({"driver": "null-co", "size": (1 << 63) - 1}) as disk:
        with pytest.raises(HostError, match=f"^{length} bytes do not fit into memory at once"):
            await disk.read(0, length)


async def test_negative_ranges_are_named(image: Path) -> None:
    async with fusedisk.open(image) as disk:
        for request in (disk.read(-512, 512), disk.block_status(0, -1)):
            with pytest.raises(OutOfRangeError, match="neither number may be negative"):
                await request


# --- the package ----------------------------------------------------------------------------------------


def test_errors_has_every_error() -> None:
    classes = {
        name
        for name, found in vars(core_errors).items()
        if isinstance(found, type) and issubclass(found, FusediskError)
    }
    from fusedisk import errors

    assert set(errors.__all__) == classes
    assert all(getattr(errors, name) is getattr(core_errors, name) for name in classes)
    assert fusedisk.errors is errors


def test_names_for_people_and_for_type_checkers_are_the_same() -> None:
    tree = ast.parse((ROOT / "fusedisk/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    imported = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported | {"__version__"} == set(fusedisk.__all__)


def test_a_misspelt_name_fails_in_a_type_checker(tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text("import fusedisk\n\nfusedisk.open\nfusedisk.errors\nfusedisk.opne\n")
    # What the package imports is not looked at: that takes a minute.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=skip"),
            *(f"--cache-dir={tmp_path}/cache", str(snippet), "fusedisk/__init__.py"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    (wrong,) = [line for line in done.stdout.splitlines() if "snippet.py" in line]
    assert wrong.startswith(f'{snippet}:5: error: Module has no attribute "opne"'), done.stdout


@pytest.mark.parametrize("name", ["open", "mount", "attach"])
def test_a_with_that_lacks_its_async_says_what_to_use(image: Path, name: str) -> None:
    begin = getattr(fusedisk, name)
    manager = begin(image, "mnt") if name == "mount" else begin(image)
    sentence = rf"^fusedisk\.{name}\(\.\.\.\) needs 'async with'.*fusedisk\.{name}_sync"
    with pytest.raises(TypeError, match=sentence), manager:
        pass
