"""The scripts of the README do what it says, and leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from scripts.benchmark.report import OURS, THEIRS
from tests.conftest import require_fuse, require_root, require_tool

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600


def _run(*command: str | Path, temporary: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=temporary,
        env=os.environ | {"TMPDIR": str(temporary), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _mounted_below(path: Path) -> list[str]:
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(path) in line]


@pytest.mark.slow
def test_the_demo_shows_the_files_of_a_disk(tmp_path: Path) -> None:
    require_root()
    require_fuse()
    shown = _run(ROOT / "scripts/demo", temporary=tmp_path)
    assert "ok 401 files compared by SHA-256, all equal" in shown
    assert "ok qemu-img check found nothing" in shown
    assert "Nothing is left behind." in shown
    assert not list(tmp_path.iterdir())
    assert not _mounted_below(tmp_path)


@pytest.mark.slow
def test_the_bench_prints_ratios(tmp_path: Path) -> None:
    require_fuse()
    for tool in ("fio", "qemu-storage-daemon"):
        require_tool(tool)
    results = tmp_path / "results.json"
    place = tmp_path / "images"
    place.mkdir()
    arguments = ("--runs", "1", "--runtime", "0.2", "--size", "16", "-w", "randread-4k-d1", "-f", "qcow2")
    _run(ROOT / "scripts/bench", *arguments, "--dir", place, "--json", results, temporary=tmp_path)
    (result,) = json.loads(results.read_text())["results"]
    assert set(result["median"]) == {OURS, THEIRS}
    assert not result["errors"]
    assert result["ratio"] == pytest.approx(result["median"][OURS] / result["median"][THEIRS], rel=0.01)
    assert not list(place.iterdir())
    assert not _mounted_below(tmp_path)
