"""Random reads, writes, zeroes, discards, flushes and resizes on qcow2 chains, many of them at the same time.

The content must equal a flat oracle's and QEMU's reading of the same file, also in the middle of it all; the image must
be without corruptions and leaks afterwards. Every run follows from its seed: ``pytest tests/differential --seed 7``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.runner import run_or_explain
from tests.differential.scenario import Scenario


@pytest.mark.seeds(12, quick=4)
async def test_some_of_everything(seed: int, batches: int | None, tmp_path: Path) -> None:
    await run_or_explain(Scenario.of(seed), tmp_path, batches)
