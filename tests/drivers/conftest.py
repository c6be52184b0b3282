"""What drivers are tried on: a file of the host, and a qcow2 image in memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.files import MIB
from tests.support.memory import Store
from tests.support.qcow2 import created_in_memory, pausing_everywhere


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file of 1 MiB of random bytes."""
    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(MIB))
    return path


@pytest.fixture
async def store() -> Store:
    """An empty qcow2 image of 64 MiB with clusters of 64 KiB."""
    return await created_in_memory(Store(), size=64 << 20)


@pytest.fixture
def every_pause() -> Iterator[None]:
    """Others run in every pause of a snapshot's work, however short ago the last one was."""
    with pausing_everywhere():
        yield
