"""Progress bars: on a terminal's stderr only, and never in the output."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.commands import fusedisk_process, process_command, process_environment
from tests.support.images import MIB, make_qcow2, make_sparse_raw


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
    out, shown = _with_a_terminal("map", "-p", "--output", "json", "-f", "raw", image)
    assert sum(entry["length"] for entry in json.loads(out)) == 64 * MIB
    assert "mapping" in shown
    assert "64.0 MiB" in shown
    assert "start" not in shown


def test_preallocation_shows_its_progress(tmp_path: Path) -> None:
    out, shown = _with_a_terminal("create", "-p", "-o", "preallocation=full", tmp_path / "x.raw", "64M")
    assert out.startswith("Created ")
    assert "preallocating" in shown
    assert (tmp_path / "x.raw").stat().st_size == 64 * MIB


def test_without_a_terminal_there_is_none(image: Path) -> None:
    assert fusedisk_process("map", "--output", "json", "-f", "raw", image).err == ""


def test_a_quick_command_shows_none(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", MIB)
    assert _with_a_terminal("snapshot", "-c", "now", image)[1] == ""


def test_what_takes_long_shows_it_by_itself() -> None:
    """Although nothing is told to it."""
    script = """
import sys
from fusedisk.cli.progress import progress
with progress("working", 1, bytes=False):
    sys.stdin.read()
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=process_environment() | {"TERM": "xterm"},
        stdin=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while b"working" not in shown:
        shown += os.read(ours, 65536)
    process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0


@pytest.mark.parametrize(
    "line",
    [
        "check {0}",
        "map {0}",
        "measure -O qcow2 {0}",
        "snapshot -c now {0}",
        "amend -o compat=1.1 {0}",
        "resize --preallocation falloc {0} +1M",
        "create -o preallocation=full {0}.new 1M",
    ],
)
def test_programs_read_lines(tmp_path: Path, line: str) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", MIB, "write 0 64k", compat="0.10")
    name, *args = line.format(image).split()
    done = fusedisk_process(name, "--progress", *args)
    assert done.code == 0
    lines = done.err.splitlines()
    assert all(re.fullmatch(r"\([0-9]{1,3}\.00/100%\)", found) for found in lines)
    assert (lines[0], lines[-1]) == ("(0.00/100%)", "(100.00/100%)")
    assert fusedisk_process("info", image).err == ""
