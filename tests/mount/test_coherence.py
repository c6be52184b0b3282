"""Several files that show the same bytes: no system call through one may see, or bring back, what was there before a
write through another."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
import trio.testing

from fusedisk.export.family import Family
from tests.conftest import require_root
from tests.support.fsx import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, copy_range, fallocate, send_range, splice_range
from tests.support.images import make_qcow2
from tests.support.mounts import PATIENCE, Mounts, wait_until
from tests.support.views import MODES, exercise, partitioned

SEEDS = int(os.environ.get("FUSEDISK_STRESS_SEEDS", "0"))
"""Seeds of ``scripts/stress``."""
FIRST = int(os.environ.get("FUSEDISK_STRESS_FIRST", "1"))
OPERATIONS = 400


MIB = 1 << 20
START = 2048 * 512
"""Of the first partition that ``partitioned`` makes."""
AT = 64 << 10
"""In it."""
LENGTH = 64 << 10


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw disk with two partitions."""
    partitioned(tmp_path / "disk.img")
    return tmp_path / "disk.img"


class _Files(NamedTuple):
    """The disk and its first partition, open."""

    disk: int
    part: int


@contextmanager
def _opened(on: Path) -> Iterator[_Files]:
    files = _Files(*(os.open(on / name, os.O_RDWR) for name in ("disk", "disk.p1")))
    try:
        yield files
    finally:
        for file in files:
            os.close(file)


def _write(files: _Files) -> bytes:
    data = os.urandom(LENGTH)
    assert os.pwrite(files.disk, data, START + AT) == LENGTH
    return data


def _copy(files: _Files) -> bytes:
    assert copy_range(files.disk, 4 * MIB, files.disk, START + AT, LENGTH) == LENGTH
    return os.pread(files.disk, LENGTH, 4 * MIB)


def _splice(files: _Files) -> bytes:
    assert splice_range(files.disk, 4 * MIB, files.disk, START + AT, LENGTH) == LENGTH
    return os.pread(files.disk, LENGTH, 4 * MIB)


def _punch(files: _Files) -> bytes:
    fallocate(files.disk, PUNCH_HOLE | KEEP_SIZE, START + AT, LENGTH)
    return bytes(LENGTH)


def _zero(files: _Files) -> bytes:
    fallocate(files.disk, ZERO_RANGE, START + AT, LENGTH)
    return bytes(LENGTH)


def _cut(files: _Files) -> bytes:
    size = os.fstat(files.disk).st_size
    os.ftruncate(files.disk, START + AT)
    os.ftruncate(files.disk, size)
    return bytes(LENGTH)


def _empty(files: _Files) -> bytes:
    os.close(os.open(f"/proc/self/fd/{files.disk}", os.O_RDWR | os.O_TRUNC))
    return bytes(LENGTH)


_CHANGES = {
    "write": _write,
    "copy_file_range": _copy,
    "splice": _splice,
    "punch": _punch,
    "zero": _zero,
    "truncate": _cut,
    "O_TRUNC": _empty,
}


@pytest.mark.parametrize("channel", ["auto", "off"])
def test_what_the_kernel_keeps_is_never_old(mounts: Mounts, image: Path, channel: str) -> None:
    """sendfile, splice and a private mapping take pages that the kernel has kept."""
    on = mounts.mount("--partitions", "-f", "raw", "--channel", channel, image)
    with (
        _opened(on) as files,
        mmap.mmap(files.part, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as memory,
    ):
        for name, change in _CHANGES.items():
            if channel == "off" and name in ("punch", "zero"):
                continue
            os.pwrite(files.part, b"old" * LENGTH, 0)
            assert memory[AT : AT + LENGTH] == send_range(files.part, AT, LENGTH) != bytes(LENGTH)
            expected = change(files)
            assert memory[AT : AT + LENGTH] == expected, name
            assert send_range(files.part, AT, LENGTH) == expected, name
            # What is copied from old pages would bring them back.
            assert splice_range(files.part, AT, files.part, 2 * LENGTH + 1, LENGTH) == LENGTH
            assert os.pread(files.disk, LENGTH, START + 2 * LENGTH + 1) == expected, name


@pytest.mark.parametrize("channel", ["auto", "off"])
def test_a_part_of_a_write_that_failed_is_seen(mounts: Mounts, image: Path, channel: str) -> None:
    """It ends with the disk, and O_DIRECT makes an error of that."""
    on = mounts.mount("--partitions", "-f", "raw", "--channel", channel, image)
    disk, part = os.open(on / "disk", os.O_RDWR | os.O_DIRECT), os.open(on / "disk.p2", os.O_RDONLY)
    size = os.fstat(part).st_size
    try:
        with mmap.mmap(-1, 8192) as page, mmap.mmap(part, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as memory:
            page[:] = b"new " * 2048
            assert memory[size - 4096 :] == bytes(4096)
            with pytest.raises(OSError, match="No space left"):
                os.pwritev(disk, [page], os.fstat(disk).st_size - 4096)
            assert memory[size - 4096 :] == page[:4096]
    finally:
        os.close(disk)
        os.close(part)


def test_writes_that_wait_for_the_page_cache_hold_up_no_read(
    mounts: Mounts, tmp_path: Path, image: Path, program: list[str]
) -> None:
    """More of them than requests are served at the same time: the pages that they wait for would never be read."""
    on = mounts.directory()
    mounts.start("--partitions", "-f", "raw", image, on=on, program=program)
    with _opened(on) as files, ThreadPoolExecutor(100) as pool:
        os.posix_fadvise(files.part, 0, 0, os.POSIX_FADV_RANDOM)  # no more than what is asked for
        (tmp_path / "broken").write_text(f"hold preadv {START}")
        try:
            held = pool.submit(send_range, files.part, 0, 4096)
            wait_until((tmp_path / "held").exists, "the page is being read")
            writes = [pool.submit(os.pwrite, files.disk, b"w", START + 8 + index) for index in range(90)]
            wait_until(lambda: image.read_bytes()[START + 8 :][:90] == b"w" * 90, "everything is written")
            other = pool.submit(send_range, files.part, 8192, 4096)
            assert other.result(PATIENCE) == image.read_bytes()[START + 8192 :][:4096]
            assert not held.done()
            assert not any(write.done() for write in writes)
        finally:
            (tmp_path / "broken").unlink()
        assert all(write.result(PATIENCE) == 1 for write in writes)
        assert len(held.result(PATIENCE)) == 4096
        assert send_range(files.part, 8, 90) == b"w" * 90


def test_shared_mappings_of_what_has_several_files_are_refused(mounts: Mounts, tmp_path: Path, image: Path) -> None:
    """Such a page would be written back whole, over what others have written to it meanwhile."""
    for options in ((), ("--channel=off",), ("--kernel-cache=off",), ("--passthrough=on",)):
        on = mounts.mount("--partitions", "-f", "raw", *options, image)
        with _opened(on) as files:
            for file in files:
                for protection in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
                    with pytest.raises(OSError, match="No such device") as caught:
                        mmap.mmap(file, 4096, prot=protection)
                    assert caught.value.errno == errno.ENODEV
        mounts.umount(on)


def test_what_has_one_file_or_does_not_change_may_be_mapped(mounts: Mounts, tmp_path: Path, image: Path) -> None:
    on = mounts.mount("--partitions", "-r", "-f", "raw", image)
    for name in ("disk", "disk.p1"):
        with (on / name).open("rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ) as memory:
            assert memory[:] == file.read(4096)
    mounts.umount(on)
    other = make_qcow2(tmp_path / "other.qcow2", MIB, "write -P 7 0 64k")
    on, done = mounts.try_mount("--partitions", "--discard=unmap", f"driver=raw,file.filename={image},name=disk", other)
    assert done.code == 0
    assert {"disk", "disk.p1", "other"} <= set(os.listdir(on))
    with (on / "other").open("r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
        memory[:2] = b"by"
        memory.flush()
        assert os.pread(file.fileno(), 3, 0) == b"by\x07"


class _Relative(NamedTuple):
    """An export, as far as a family knows it."""

    drop_pages: Callable[[], Awaitable[None]]


async def test_who_changes_what_is_being_dropped_waits_until_that_is_over() -> None:
    """The pages may hold what was there before its change."""
    family, dropped, go_on = Family(), [], trio.Event()

    async def drop_pages() -> None:
        dropped.append(len(dropped))
        await go_on.wait()

    export: Any = _Relative(drop_pages)
    family.keep(export, 0, 4096)
    family.keep(export, 8192, 12288)
    assert family.keeps(0, 1)
    assert family.keeps(12287, 12288)
    assert not family.keeps(12288, 1 << 40)
    over: list[str] = []

    async def change(name: str, start: int) -> None:
        await family.drop(start, start + 1)
        over.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change, "elsewhere", 1 << 30)
        await trio.testing.wait_all_tasks_blocked()
        assert over == ["elsewhere"]
        nursery.start_soon(change, "first", 9000)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(change, "second", 9000)
        await trio.testing.wait_all_tasks_blocked()
        assert over == ["elsewhere"]
        assert dropped == [0]
        assert family.keeps_some
        assert family.keeps(9000, 9001)
        family.keep(export, 8192, 12288)  # read while the others are being dropped
        go_on.set()
    assert sorted(over) == ["elsewhere", "first", "second"]
    assert dropped == [0, 1]
    assert not family.keeps_some
    assert not family.keeps(0, 1 << 63)


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_through_all_files(mounts: Mounts, tmp_path: Path, seed: int) -> None:
    """A sample of what ``scripts/stress`` does."""
    exercise(mounts, tmp_path, MODES[seed], seed, 100, loop=os.geteuid() == 0)


@pytest.mark.skipif(not SEEDS, reason="scripts/stress runs it")
@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_stress(mounts: Mounts, tmp_path: Path, seed: int) -> None:
    require_root()
    exercise(mounts, tmp_path, MODES[seed % len(MODES)], seed, OPERATIONS, loop=True)
