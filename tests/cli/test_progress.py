"""Progress bars: on a terminal's stderr only, and never in the output."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.commands import fusedisk_process, process_command, process_environment
from tests.support.images import MIB, make_sparse_raw


def _with_a_terminal(*args: str | Path) -> tuple[str, str]:
    """Output, and what a terminal at stderr shows."""
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def watch() -> None:
        try:
            while piece := os.read(ours, 65536):
                shown.append(piece)
        except OSError:
            pass  # the other end is closed

    environment = process_environment() | {"TERM": "xterm"}
    with subprocess.Popen(process_command(*args), env=environment, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        watcher = threading.Thread(target=watch)
        watcher.start()
        out, _ = process.communicate(timeout=60)
    watcher.join()
    os.close(ours)
    assert process.returncode == 0, shown
    return out.decode(), b"".join(shown).decode()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Many extents."""
    return make_sparse_raw(tmp_path / "x.raw", 64 * MIB, *((at * 16384, 1) for at in range(4000)))


def test_a_map_that_goes_to_a_file_shows_its_progress(image: Path) -> None:
    out, shown = _with_a_terminal("map", "--output", "json", "-f", "raw", image)
    assert sum(entry["length"] for entry in json.loads(out)) == 64 * MIB
    assert "mapping" in shown
    assert "64.0 MiB" in shown
    assert "start" not in shown


def test_preallocation_shows_its_progress(tmp_path: Path) -> None:
    out, shown = _with_a_terminal("create", "-o", "preallocation=full", tmp_path / "x.raw", "64M")
    assert out.startswith("Created ")
    assert "preallocating" in shown
    assert (tmp_path / "x.raw").stat().st_size == 64 * MIB


def test_without_a_terminal_there_is_none(image: Path) -> None:
    assert fusedisk_process("map", "--output", "json", "-f", "raw", image).err == ""
