"""Flushes without a task: they write all that other flushes write, or are made again, and nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.core.at_once import WouldWait, run_at_once
from fusedisk.core.errors import HostError
from fusedisk.drivers.protocol import file as file_driver
from fusedisk.drivers.protocol.host_file import FlushPace
from tests.conftest import qemu_img
from tests.support.qcow2 import assert_clean, opened, raw_content

MIB = 1 << 20
SIZE = 8 * MIB
FEATURES = {
    "plain": "cluster_size=64k",
    "small clusters": "cluster_size=512",
    "subclusters": "extended_l2=on",
    "lazy refcounts": "lazy_refcounts=on",
    "data file": "data_file={folder}/data.raw",
}


def made(folder: Path, feature: str) -> Path:
    options = FEATURES[feature].format(folder=folder)
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, folder / "disk.qcow2", str(SIZE))
    return folder / "disk.qcow2"


def flush_now(backend: Backend) -> bool:
    try:
        run_at_once(backend.flush())
    except WouldWait:
        return False
    return True


class QuickFor:
    """In place of a pace: the disk is quick for the next `answers` questions, then slow."""

    def __init__(self) -> None:
        self.answers = 0

    def is_quick(self, pace: FlushPace, writes: int) -> bool:
        self.answers -= 1
        return self.answers >= 0


@pytest.mark.parametrize("slow_rounds", [False, True])
@pytest.mark.parametrize("feature", FEATURES)
async def test_all_that_was_written_is_in_the_file(
    tmp_path: Path, feature: str, slow_rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after flushes that have to be made again, since the host's disk turns slow in their middle."""
    rng, content, at_once, quick = random.Random(feature), bytearray(SIZE), 0, QuickFor()
    monkeypatch.setattr(FlushPace, "is_quick", lambda pace, writes: quick.is_quick(pace, writes))
    path = made(tmp_path, feature)
    (tmp_path / "copy").mkdir()
    async with opened(path, discard="unmap") as backend:
        for turn in range(24):
            for _ in range(rng.randrange(1, 6)):
                length = rng.choice((512, 4096, 70000))
                offset = rng.randrange(SIZE - length)
                data = rng.randbytes(length)
                await backend.write(offset, data)
                content[offset : offset + length] = data
            if rng.random() < 0.3:
                start = rng.randrange(SIZE // 65536 - 2) * 65536
                await backend.write_zeroes(start, 65536, may_unmap=True)
                content[start : start + 65536] = bytes(65536)
            quick.answers = rng.randrange(3) if slow_rounds and turn % 2 else 1000
            if flush_now(backend):
                at_once += 1
            else:
                await backend.flush()
            for name in ("disk.qcow2", "data.raw"):
                if (tmp_path / name).exists():
                    shutil.copyfile(tmp_path / name, tmp_path / "copy" / name)
            if feature != "data file":  # the copy would lead to the original's data
                assert raw_content(tmp_path / "copy" / "disk.qcow2", tmp_path) == content
    assert at_once >= 5
    assert raw_content(path, tmp_path) == content
    assert_clean(path)


async def test_the_host_is_asked_once_for_each_barrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlushPace, "is_quick", lambda self, writes: True)
    calls: list[int] = []
    fdatasync = os.fdatasync

    def counted(fd: int) -> None:
        calls.append(fd)
        fdatasync(fd)

    monkeypatch.setattr(file_driver.os, "fdatasync", counted)
    path = made(tmp_path, "plain")
    async with opened(path) as backend:
        await backend.write(0, b"first")
        await backend.flush()
        calls.clear()
        await backend.write(0, b"again")
        assert flush_now(backend)
        assert len(calls) == 1, "an overwrite changes no metadata"
        await backend.write(MIB, b"new")
        assert flush_now(backend)
        assert len(calls) == 3, "refcounts and data come before the entry that leads to them"
        assert flush_now(backend)
        assert len(calls) == 3, "nothing was written since"


async def test_errors_of_the_host_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlushPace, "is_quick", lambda self, writes: True)

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    path = made(tmp_path, "plain")
    async with opened(path) as backend:
        await backend.write(0, b"first")
        await backend.flush()
        await backend.write(0, b"again")
        with monkeypatch.context() as patch:
            patch.setattr(file_driver.os, "fdatasync", broken)
            with pytest.raises(HostError, match="Could not flush"):
                flush_now(backend)
        with pytest.raises(HostError, match="an earlier flush failed"):
            await backend.flush()
        backend.node.children["file"].node.driver._flush_failure = None  # type: ignore[attr-defined]
    assert_clean(path)


def test_a_slow_flush_sends_the_next_ones_elsewhere() -> None:
    pace = FlushPace()
    assert not pace.is_quick(0), "nothing is known yet"
    for _ in range(FlushPace._LEAST):
        pace.measured(0.0001)
    assert pace.is_quick(1)
    assert not pace.is_quick(FlushPace.MOST_WRITES + 1), "it may have much to do"
    pace.measured(1.0)
    for _ in range(FlushPace._LEAST):
        pace.measured(0.0001)
    assert not pace.is_quick(1), "it takes longer to be trusted again"
    for _ in range(FlushPace._LEAST):
        pace.measured(0.0001)
    assert pace.is_quick(1)
    for _ in range(20):
        pace.measured(1.0)
    for _ in range(8 * FlushPace._MOST):
        pace.measured(0.0001)
    pace.measured(1.0)
    for _ in range(2 * FlushPace._LEAST):
        pace.measured(0.0001)
    assert pace.is_quick(1), "what was long ago is forgotten"
