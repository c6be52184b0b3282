"""What is on disk when: fsync, and writes that are to be there when they return."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import require_tool, run_tool
from tests.support.commands import process_command
from tests.support.fsx import KEEP_SIZE, PUNCH_HOLE, fallocate
from tests.support.mounts import Mounts

MIB = 1 << 20


def _start_traced(mounts: Mounts, log: Path, *options: str | Path) -> tuple[Path, Callable[[], int]]:
    """A mount, and what counts how often it has flushed its files."""
    tracer = [require_tool("strace"), "-f", "-e", "trace=fdatasync,io_submit", "-o", str(log), *process_command()]
    on = mounts.directory()
    mounts.start(*options, on=on, program=tracer)
    return on, lambda: len(re.findall(r"fdatasync\(|IOCB_CMD_FDSYNC", log.read_text()))


def test_fsync_reaches_the_disk(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    """The daemon has had its file flushed when fsync returns to us, and before that only close asks for it."""
    on, flushes = _start_traced(mounts, tmp_path / "calls", raw)
    with (on / "disk").open("r+b", buffering=0) as handle:
        handle.write(b"x" * 4096)
        assert flushes() == 0
        os.fsync(handle.fileno())
        assert flushes() == 1
        handle.write(b"x" * 4096)
    assert flushes() == 2


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ([], "O_DSYNC"),
        (["--kernel-cache", "off"], "O_DSYNC"),
        (["--kernel-cache", "off"], "O_SYNC"),
        (["--kernel-cache", "off"], "RWF_DSYNC"),
        (["--kernel-cache", "off", "--channel", "off"], "O_DSYNC"),  # pyfuse3 does not tell of single writes
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_synchronous_write_is_on_disk_when_it_returns(
    mounts: Mounts, raw: Path, tmp_path: Path, options: list[str], flag: str
) -> None:
    of_write = getattr(os, flag) if flag.startswith("RWF") else 0
    on, flushes = _start_traced(mounts, tmp_path / "calls", *options, "-f", "raw", raw)
    descriptor = os.open(on / "disk", os.O_RDWR | (0 if of_write else getattr(os, flag)))
    try:
        for count in range(1, 4):
            before = flushes()
            assert os.pwritev(descriptor, [b"x" * 4096], count * 8192, of_write) == 4096
            assert flushes() > before
        if not of_write and "--channel" not in options:
            for mode in (0, PUNCH_HOLE | KEEP_SIZE):
                before = flushes()
                fallocate(descriptor, mode, 4096, 8192)
                assert flushes() > before
            before = flushes()
            assert os.copy_file_range(descriptor, descriptor, 4096, 0, MIB) == 4096
            assert flushes() > before
    finally:
        os.close(descriptor)


def test_synchronous_writes_of_many_at_once_are_on_disk_when_they_return(
    mounts: Mounts, raw: Path, tmp_path: Path
) -> None:
    """Of those the kernel flushes none itself, cached or not."""
    on, flushes = _start_traced(mounts, tmp_path / "calls", "-f", "raw", raw)
    fio = ["fio", "--name=x", f"--filename={on / 'disk'}", "--rw=write", "--bs=4k", "--size=80k", "--sync=dsync"]
    run_tool(*fio, "--direct=1", "--ioengine=libaio", "--iodepth=1", "--allow_file_create=0")
    assert flushes() >= 20
