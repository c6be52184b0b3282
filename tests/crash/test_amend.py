"""Crashes while settings change: the image opens, is sound, and holds what it held, in its snapshots too."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.amend import amend_node
from fusedisk.block.graph import Graph
from tests.crash.judge import Checker, judge
from tests.crash.recording import Guest, Recording
from tests.crash.replay import Crash, power_cuts, prefixes
from tests.crash.workloads import KIB, MIB, SNAPSHOTS, Workload, stamped
from tests.support.memory import Store, stores
from tests.support.qcow2 import MEMORY_DRIVERS

ZEROES = ("write -P 17 0 100k", "write -z 20k 60k", "write -z 120k 40k", "write -P 3 200k 8k")
SHARED_ZEROES = (*ZEROES, "snapshot one", "write -z 0 40k", "write -P 5 60k 12k", "snapshot two", "write -z 64k 20k")


async def _amend(changes: Iterable[dict[str, Any]], guest: Guest, random_: random.Random, unit: int) -> None:
    """One change after the other, with writes between."""
    backing = guest.backend.node.backing
    for change in changes:
        if isinstance(length := change.get("backing_file"), int):
            assert backing is not None
            change = {**change, "backing_file": _padded(backing.node.filename, length)}
        await amend_node(guest.backend.node, change, force=True)
        for _ in range(3):
            length = random_.randrange(1, 12) * 512
            await guest.write(random_.randrange((guest.length - length) // 512) * 512, stamped(length))
        await guest.flush()


def _amending(name: str, *changes: dict[str, Any], **settings: Any) -> Workload:
    return Workload(name, partial(_amend, changes), **settings)


def _padded(path: str, length: int) -> str:
    """Another name, about so long, of the same file."""
    folder, name = os.path.split(path)
    return f"{folder}/{'/' * (length - len(path))}{name}"


def _renames(*lengths: int) -> list[dict[str, Any]]:
    """Other names of these lengths for the backing file."""
    formats = itertools.cycle(("raw", "file"))
    return [{"backing_file": length, "backing_fmt": format} for length, format in zip(lengths, formats, strict=False)]


DOWN, UP = {"compat": "0.10"}, {"compat": "1.1"}

WORKLOADS = {
    workload.name: workload
    for workload in (
        _amending("versions", DOWN, UP, DOWN, prepare=ZEROES),
        _amending("versions-backing", DOWN, UP, DOWN, prepare=ZEROES, backing=True),
        _amending("versions-snapshots", DOWN, UP, prepare=SHARED_ZEROES, backing=True),
        _amending("versions-512", DOWN, UP, DOWN, prepare=SHARED_ZEROES, backing=True, cluster_size=512),
        _amending("versions-64k", DOWN, UP, DOWN, backing=True, cluster_size=64 * KIB, size=MIB),
        _amending("upgrade", UP, prepare=SNAPSHOTS, version=2),
        _amending("upgrade-64k", UP, DOWN, backing=True, cluster_size=64 * KIB, version=2),
        _amending("widths", *({"refcount_bits": bits} for bits in (64, 4, 32, 16, 8)), prepare=SNAPSHOTS),
        _amending(
            "widths-512", *({"refcount_bits": bits} for bits in (64, 1, 32)), prepare=ZEROES[:1], cluster_size=512
        ),
        _amending(
            "widths-lazy",
            {"refcount_bits": 32},
            {"lazy_refcounts": False},
            {"refcount_bits": 16, "compat": "0.10"},
            options="lazy_refcounts=on",
            prepare=ZEROES,
        ),
        _amending("lazy", *({"lazy_refcounts": lazy} for lazy in (True, False, True, False)), prepare=SNAPSHOTS),
        _amending("names", *_renames(5, 700, 3, 900, 901, 40), {"backing_file": ""}, backing=True),
        _amending("names-64k", *_renames(900, 5, 1000, 64), backing=True, cluster_size=64 * KIB, size=MIB),
        _amending("names-1k", *_renames(300, 250, 310, 5), backing=True, cluster_size=1024),
        _amending("names-v2", *_renames(300, 450, 30), UP, DOWN, backing=True, version=2),
    )
}


@pytest.fixture
def checker() -> Iterator[Checker]:
    with Checker() as checker:
        yield checker


async def snapshots_of(image: bytes) -> dict[str, bytes]:
    """What each snapshot holds, without what a backing file would show."""
    found: dict[str, bytes] = {}
    graph = Graph(MEMORY_DRIVERS)
    store = Store(0)
    store.data = bytearray(image)
    with stores(image=store):
        try:
            spec = {"driver": "qcow2", "file": {"driver": "memory", "filename": "image"}, "backing": None}
            disk = await graph.open_backend(spec, writable=True)
            for snapshot in disk.list_snapshots():
                await disk.apply_snapshot(snapshot.id)
                found[snapshot.name] = bytes(await disk.read(0, disk.length))
        finally:
            await graph.close()
    return found


async def check_crashes(recording: Recording, crashes: list[Crash], checker: Checker) -> int:
    """Judge crashes, and look into the snapshots of some; returns how many images were different."""
    result = await judge(recording, crashes, checker)
    assert not result.failures, "\n".join(result.failures)
    expected = await snapshots_of(recording.base)
    if expected:
        for crash in islice(crashes, 0, None, 7):
            assert await snapshots_of(crash.image) == expected, (crash.cut, crash.what)
    return result.different


@pytest.mark.parametrize("name", WORKLOADS)
async def test_process_death(name: str, tmp_path: Path, checker: Checker) -> None:
    recording = await WORKLOADS[name].record(tmp_path, seed=1)
    changes = sum(operation.kind in ("write", "discard") for operation in recording.log)
    crashes = list(prefixes(recording.base, recording.log, max(1, changes // 60)))
    assert await check_crashes(recording, crashes, checker) > 5


@pytest.mark.parametrize("name", WORKLOADS)
async def test_power_cut(name: str, tmp_path: Path, checker: Checker) -> None:
    await _check_power_cuts(name, tmp_path, checker, seed=1, cuts=30, tries=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("seed", [2, 3])
async def test_many_crashes(name: str, seed: int, tmp_path: Path, checker: Checker) -> None:
    recording = await WORKLOADS[name].record(tmp_path, seed)
    await check_crashes(recording, list(prefixes(recording.base, recording.log, 1)), checker)
    await _check_power_cuts(name, tmp_path, checker, seed, cuts=300, tries=5)


async def _check_power_cuts(name: str, folder: Path, checker: Checker, seed: int, cuts: int, tries: int) -> None:
    recording = await WORKLOADS[name].record(folder, seed)
    random_ = random.Random(seed)
    changes = [cut for cut, operation in enumerate(recording.log, 1) if operation.kind in ("write", "discard")]
    chosen = sorted(random_.sample(changes, min(cuts, len(changes))))
    crashes = list(power_cuts(recording.base, recording.log, random_, tries, cuts=chosen))
    assert await check_crashes(recording, crashes, checker) > 5
