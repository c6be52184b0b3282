"""Random runs as in ``test_random_runs.py``, of encrypted images.

In files of their own, so that several processes run them at the same time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.runner import run_or_explain
from tests.differential.scenario import ENCRYPTED, Scenario


@pytest.mark.slow
@pytest.mark.seeds(16, first=ENCRYPTED)
async def test_encrypted_images(seed: int, batches: int | None, tmp_path: Path) -> None:
    await run_or_explain(Scenario.of(seed), tmp_path, batches)
