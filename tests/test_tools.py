"""How tests run other projects' tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ToolError, run_tool


def _tool(folder: Path, script: str) -> Path:
    path = folder / "tool"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_once_more_where_qemu_could_not_time_its_hashing(tmp_path: Path) -> None:
    """It happens at random, and to nobody's harm."""
    complaint = "qemu-img: x.qcow2: Unable to get accurate CPU usage"
    script = f'echo x >>"$1"; [ "$(wc -l <"$1")" -gt 3 ] && echo made || {{ echo "{complaint}" >&2; exit 1; }}'
    assert run_tool(str(_tool(tmp_path, script)), tmp_path / "calls") == "made\n"
    assert (tmp_path / "calls").read_text() == "x\n" * 4


def test_other_failures_are_failures(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="exited 3:\nno such disk"):
        run_tool(str(_tool(tmp_path, 'echo x >>"$1"; echo no such disk >&2; exit 3')), tmp_path / "calls")
    assert (tmp_path / "calls").read_text() == "x\n"
