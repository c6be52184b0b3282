"""Handles that can only write go past the kernel's page cache; readers through the cache see what they wrote."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import qemu_img
from tests.support.mounts import Mounts
from tests.support.qcow2 import assert_clean

PAGE = 4096
MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def disk(mounts: Mounts, tmp_path: Path) -> Path:
    """A mounted qcow2 disk full of ``o``."""
    (tmp_path / "full.raw").write_bytes(b"o" * SIZE)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", tmp_path / "full.raw", tmp_path / "disk.qcow2")
    return mounts.mount(tmp_path / "disk.qcow2") / "disk"


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags)
    try:
        yield handle
    finally:
        os.close(handle)


def test_readers_see_what_was_written(disk: Path) -> None:
    with opened(disk, os.O_RDONLY) as reader, opened(disk, os.O_RDWR) as both:
        assert os.pread(reader, SIZE, 0) == b"o" * SIZE  # all of it is cached
        memory = mmap.mmap(both, SIZE)
        assert memory[:SIZE] == b"o" * SIZE
        with opened(disk, os.O_WRONLY) as writer:
            assert os.pwrite(writer, b"new", 5 * PAGE - 1) == 3
            assert os.pread(reader, 5, 5 * PAGE - 2) == b"onewo"
            assert memory[5 * PAGE - 2 : 5 * PAGE + 3] == b"onewo"
            assert os.pwrite(both, b"twice", 5 * PAGE) == 5
            assert os.pwrite(writer, b"thrice", 5 * PAGE + 2) == 6
            assert memory[5 * PAGE : 5 * PAGE + 8] == os.pread(reader, 8, 5 * PAGE) == b"twthrice"
            memory[6 * PAGE] = 1
            assert os.pwrite(writer, b"\2", 6 * PAGE + 1) == 1
            assert memory[6 * PAGE : 6 * PAGE + 3] == b"\1\2o"
        assert os.pwrite(both, b"at last", 0) == 7
        assert os.pread(reader, 7, 0) == b"at last"
        memory.close()


def test_nobody_reads_old_bytes_under_load(disk: Path) -> None:
    """Others read the same pages all the time, by system calls and through memory."""
    pages, done = 2, threading.Event()

    def read_on(flags: int) -> None:
        rng = random.Random(flags)
        with opened(disk, flags) as handle:
            memory = mmap.mmap(handle, pages * PAGE, prot=mmap.PROT_READ)
            while not done.is_set():
                os.pread(handle, PAGE, rng.randrange(pages) * PAGE)
                memory[rng.randrange(pages * PAGE)]
            memory.close()

    readers = [threading.Thread(target=read_on, args=(flags,)) for flags in (os.O_RDONLY, os.O_RDWR)]
    for thread in readers:
        thread.start()
    stale = 0
    try:
        with opened(disk, os.O_WRONLY) as writer, opened(disk, os.O_RDONLY) as reader:
            memory = mmap.mmap(reader, pages * PAGE, prot=mmap.PROT_READ)
            for number in range(150):
                page, data = number % pages * PAGE, b"%08d" % number
                os.pwrite(writer, data, page)
                stale += os.pread(reader, 8, page) != data
                stale += memory[page : page + 8] != data
            memory.close()
    finally:
        done.set()
        for thread in readers:
            thread.join()
    assert not stale


def test_what_was_changed_through_memory_stays(disk: Path, tmp_path: Path) -> None:
    """Another program changes other bytes of the same pages, which come back whole."""
    pages, rounds, lost = 4, 150, 0
    mapped = f"""
import mmap, os, sys
memory = mmap.mmap(os.open({str(disk)!r}, os.O_RDWR), {pages * PAGE})
for line in sys.stdin:
    number = int(line)
    at = number % {pages} * {PAGE}
    memory[at:at + 8] = b"%08d" % number
    print(number, flush=True)
memory.flush()
"""
    command = [sys.executable, "-c", mapped]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process, opened(disk, os.O_WRONLY) as writer, opened(disk, os.O_RDONLY) as reader:
        for number in range(rounds):
            at = number % pages * PAGE
            print(number, file=process.stdin, flush=True)  # it stores while we write
            os.pwrite(writer, b"%08d" % -number, at + 2048)
            assert process.stdout.readline() == f"{number}\n"
            lost += os.pread(reader, 8, at + 2048) != b"%08d" % -number
            lost += os.pread(reader, 8, at) != b"%08d" % number
        process.stdin.close()
    assert process.returncode == 0
    assert not lost
    with opened(disk, os.O_RDONLY | os.O_DIRECT) as direct:
        buffer = mmap.mmap(-1, pages * PAGE)
        assert os.preadv(direct, [buffer], 0) == pages * PAGE
        for number in range(rounds - pages, rounds):
            at = number % pages * PAGE
            assert buffer[at : at + 8] == b"%08d" % number
            assert buffer[at + 2048 : at + 2056] == b"%08d" % -number


def test_dd_fills_a_disk(mounts: Mounts, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(SIZE)
    (tmp_path / "source").write_bytes(content)
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", str(SIZE))
    mount = mounts.mount(tmp_path / "disk.qcow2")
    subprocess.run(
        ["dd", f"if={tmp_path / 'source'}", f"of={mount / 'disk'}", "bs=100000", "conv=notrunc,fsync", "status=none"],
        check=True,
    )
    assert (mount / "disk").read_bytes() == content
    mounts.umount(mount)
    assert_clean(tmp_path / "disk.qcow2")
