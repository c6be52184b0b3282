"""Random runs as in ``test_random_runs.py``, of every large cluster size, version and depth.

In files of their own, so that several processes run them at the same time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.runner import run_or_explain
from tests.differential.scenario import COMBINATIONS, SYSTEMATIC, Scenario


@pytest.mark.slow
@pytest.mark.seeds(COMBINATIONS - COMBINATIONS // 2, first=SYSTEMATIC + COMBINATIONS // 2)
async def test_every_large_combination(seed: int, batches: int | None, tmp_path: Path) -> None:
    await run_or_explain(Scenario.of(seed), tmp_path, batches)
