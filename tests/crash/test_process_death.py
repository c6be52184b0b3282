"""The process dies at any host write: nothing that was flushed is lost, and no image is corrupt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.judge import Checker, judge
from tests.crash.replay import prefixes
from tests.crash.workloads import FORMATS, WORKLOADS
from tests.support.thinning import thinned

ALL = WORKLOADS | FORMATS
MANY = [*WORKLOADS, *list(FORMATS)[::3]]
"""For the long runs: formats whose work the block table does share their code."""


@pytest.fixture
def checker() -> Iterator[Checker]:
    with Checker() as checker:
        yield checker


async def check_prefixes(name: str, folder: Path, checker: Checker, seed: int, count: int) -> None:
    recording = await ALL[name].record(folder, seed)
    changes = sum(operation.kind in ("write", "discard") for operation in recording.log)
    every = max(1, changes // count)
    result = await judge(recording, prefixes(recording.base, recording.log, every), checker)
    assert not result.failures, "\n".join(result.failures)
    assert result.different > 30


@pytest.mark.parametrize("name", [*thinned(WORKLOADS, 6), *thinned(FORMATS, 6)])
async def test_some_prefixes(name: str, tmp_path: Path, checker: Checker) -> None:
    await check_prefixes(name, tmp_path, checker, seed=1, count=40)


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("seed", [2, 3])
async def test_every_prefix(name: str, seed: int, tmp_path: Path, checker: Checker) -> None:
    await check_prefixes(name, tmp_path, checker, seed, count=10**9)
