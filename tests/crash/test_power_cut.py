"""The power goes: of what was written since the last host flush any part is there, in any order, down to sectors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.judge import Checker, judge
from tests.crash.replay import power_cuts
from tests.crash.workloads import FORMATS, WORKLOADS
from tests.support.thinning import thinned

ALL = WORKLOADS | FORMATS
MANY = [*WORKLOADS, *list(FORMATS)[::3]]
"""For the long runs: formats whose work the block table does share their code."""


@pytest.fixture
def checker() -> Iterator[Checker]:
    with Checker() as checker:
        yield checker


async def check_power_cuts(name: str, folder: Path, checker: Checker, seed: int, cuts: int, tries: int) -> None:
    recording = await ALL[name].record(folder, seed)
    random_ = random.Random(seed)
    changes = [cut for cut, operation in enumerate(recording.log, 1) if operation.kind in ("write", "discard")]
    chosen = sorted(random_.sample(changes, min(cuts, len(changes))))
    crashes = power_cuts(recording.base, recording.log, random_, tries, cuts=chosen)
    result = await judge(recording, crashes, checker)
    assert not result.failures, "\n".join(result.failures)
    assert result.different > 20


@pytest.mark.parametrize("name", [*thinned(WORKLOADS, 6), *thinned(FORMATS, 6)])
async def test_some_power_cuts(name: str, tmp_path: Path, checker: Checker) -> None:
    await check_power_cuts(name, tmp_path, checker, seed=1, cuts=20, tries=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("seed", [2, 3])
async def test_many_power_cuts(name: str, seed: int, tmp_path: Path, checker: Checker) -> None:
    cuts = 150 if name in WORKLOADS else 30
    await check_power_cuts(name, tmp_path, checker, seed, cuts=cuts, tries=4)
