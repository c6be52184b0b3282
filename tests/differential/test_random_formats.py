"""Random runs as in ``test_random_runs.py``, of every other format that has a profile.

In files of their own, so that several processes run them at the same time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.runner import run_or_explain
from tests.differential.scenario import Scenario
from tests.support.profiles import PROFILES


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "qcow2"])
@pytest.mark.seeds(24, quick=6)
async def test_every_format(name: str, seed: int, batches: int | None, tmp_path: Path) -> None:
    await run_or_explain(Scenario.of(seed, PROFILES[name]), tmp_path, batches)
