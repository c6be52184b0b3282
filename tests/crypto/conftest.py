"""Images that QEMU makes once: each time it measures the machine's speed for a second or more."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.crypto import images


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    images.create_luks(folder / "disk.luks")
    images.create_qcow2(folder / "disk.qcow2", "luks")
    return folder


@pytest.fixture
def luks_disk(_made: Path, tmp_path: Path) -> Path:
    """An empty LUKS container with QEMU's defaults."""
    return Path(shutil.copy(_made / "disk.luks", tmp_path))


@pytest.fixture
def qcow2_disk(_made: Path, tmp_path: Path) -> Path:
    """An empty qcow2 image with LUKS and QEMU's defaults."""
    return Path(shutil.copy(_made / "disk.qcow2", tmp_path))
