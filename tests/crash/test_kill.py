"""kill -9 of a writing process at random instants, again and again on one image: nothing that was answered is lost."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import qemu_img, qemu_io
from tests.crash.oracle import Oracle, View
from tests.crash.replay import SECTOR
from tests.crash.workloads import MIB
from tests.crash.writer import content, read_journal
from tests.support.commands import ROOT
from tests.support.qcow2 import assert_not_corrupt, opened, raw_content

MOST_LEAKS = 2048
"""Clusters that the rounds together may leak: nobody repairs the image in between."""

TIMEOUT = 60.0
"""Seconds without an answer after which the writer counts as hung."""


class Victims:
    """Makes processes that write, and kills them."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.writer"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill_one(self, image: Path, journal: Path, random_: random.Random) -> None:
        """Let a process write, and kill it after a random number of answered requests and some microseconds."""
        pipe = journal.with_suffix(".pipe")
        os.mkfifo(pipe)
        job = {"image": str(image), "journal": str(journal), "pipe": str(pipe), "seed": random_.randrange(1 << 30)}
        server = self._server
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        process = int(server.stdout.readline())
        answers = os.open(pipe, os.O_RDWR)
        try:
            left = random_.choice((1, 10, 100, 400)) * random_.randrange(1, 4)
            while left > 0:
                assert select.select([answers], [], [], TIMEOUT)[0], "the writer has failed"
                left -= len(os.read(answers, left))
            time.sleep(random_.random() * 0.004)  # the instant is to be random
        finally:
            os.kill(process, signal.SIGKILL)
            assert server.stdout.readline() == "ended\n"
            os.close(answers)
            pipe.unlink()

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()


@pytest.fixture
def victims() -> Iterator[Victims]:
    victims = Victims()
    yield victims
    victims.close()


def remember(oracle: Oracle, journal: Path) -> View:
    """Enter what the journal tells of into ``oracle``."""
    numbers: dict[int, int] = {}
    done: set[int] = set()
    flushes: dict[int, frozenset[int]] = {}
    durable: frozenset[int] = frozenset()
    for record in read_journal(journal):
        match record.what:
            case "writ":
                numbers[record.number] = oracle.begin(record.offset, content(record.number, record.length))
            case "zero":
                numbers[record.number] = oracle.begin(record.offset, bytes(record.length))
            case "size":
                numbers[record.number] = oracle.begin(0, b"", record.length)
            case "flsh":
                flushes[record.number] = frozenset(done)
            case "done" if record.number in numbers:
                done.add(numbers[record.number])
            case "done":
                durable |= flushes[record.number]
    return View(durable, frozenset(numbers.values()) - durable)


def make_images(folder: Path) -> list[Path]:
    """A plain image, and one with everything: backing file, snapshot, compressed clusters."""
    plain = folder / "plain.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", plain, "2M")
    base = folder / "base.raw"
    base.write_bytes(b"".join(b"base%04d" % index * 64 for index in range(MIB // SECTOR)))
    rich = folder / "rich.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", "-b", base, "-F", "raw", rich, "1M")
    qemu_io(rich, "write -P 17 0 100k", *(f"write -c -P 3 {200 + 4 * n}k 4k" for n in range(20)), fmt="qcow2")
    qemu_img("snapshot", "-c", "one", rich)
    return [plain, rich]


async def rounds(count: int, folder: Path, victims: Victims, seed: int) -> None:
    random_ = random.Random(seed)
    for image in make_images(folder):
        async with opened(image, writable=False) as backend:
            found = bytes(await backend.read(0, backend.length))
        for number in range(count // 2):
            journal = folder / f"{image.stem}-{number}.journal"
            victims.kill_one(image, journal, random_)
            oracle = Oracle(found)
            view = remember(oracle, journal)
            async with opened(image, writable=False) as backend:
                found = bytes(await backend.read(0, backend.length))
            complaints = list(oracle.complaints(found, view, zeroes_too=False))
            assert not complaints, f"{image}, round {number}: {complaints[0]} ({len(complaints)} like it)"
            assert assert_not_corrupt(image) < MOST_LEAKS
        assert raw_content(image, folder) == found, "QEMU reads something else"


async def test_nothing_flushed_is_lost(tmp_path: Path, victims: Victims) -> None:
    await rounds(20, tmp_path, victims, seed=1)


@pytest.mark.slow
async def test_nothing_flushed_is_lost_in_many_rounds(tmp_path: Path, victims: Victims) -> None:
    await rounds(200, tmp_path, victims, seed=2)
