"""Crashes while settings change: the image opens, is sound, and holds what it held, in its snapshots too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from fusedisk.block.graph.graph import Graph
from tests.crash.amending import AMENDING
from tests.crash.judge import Checker, judge
from tests.crash.recording import Recording
from tests.crash.replay import Crash, power_cuts, prefixes
from tests.support.memory import Store, stores
from tests.support.qcow2 import MEMORY_DRIVERS
from tests.support.thinning import thinned


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


@pytest.mark.parametrize("name", thinned(AMENDING))
async def test_process_death(name: str, tmp_path: Path, checker: Checker) -> None:
    recording = await AMENDING[name].record(tmp_path, seed=1)
    changes = sum(operation.kind in ("write", "discard") for operation in recording.log)
    crashes = list(prefixes(recording.base, recording.log, max(1, changes // 60)))
    assert await check_crashes(recording, crashes, checker) > 5


@pytest.mark.parametrize("name", thinned(AMENDING))
async def test_power_cut(name: str, tmp_path: Path, checker: Checker) -> None:
    await _check_power_cuts(name, tmp_path, checker, seed=1, cuts=30, tries=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", AMENDING)
@pytest.mark.parametrize("seed", [2, 3])
async def test_many_crashes(name: str, seed: int, tmp_path: Path, checker: Checker) -> None:
    recording = await AMENDING[name].record(tmp_path, seed)
    await check_crashes(recording, list(prefixes(recording.base, recording.log, 1)), checker)
    await _check_power_cuts(name, tmp_path, checker, seed, cuts=300, tries=5)


async def _check_power_cuts(name: str, folder: Path, checker: Checker, seed: int, cuts: int, tries: int) -> None:
    recording = await AMENDING[name].record(folder, seed)
    random_ = random.Random(seed)
    changes = [cut for cut, operation in enumerate(recording.log, 1) if operation.kind in ("write", "discard")]
    chosen = sorted(random_.sample(changes, min(cuts, len(changes))))
    crashes = list(power_cuts(recording.base, recording.log, random_, tries, cuts=chosen))
    assert await check_crashes(recording, crashes, checker) > 5
