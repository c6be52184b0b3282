"""The check that every session ends with finds what a test could leave behind, and cleans it up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ToolError, clean_leaks, qemu_img, qemu_io, require_root, require_tool, run_tool


def test_nothing_to_find(tmp_path: Path) -> None:
    assert clean_leaks(tmp_path) == []


@pytest.mark.root
def test_mounts_and_loops_are_found_and_cleaned(tmp_path: Path) -> None:
    require_root()
    image = tmp_path / "a disk.raw"
    image.write_bytes(bytes(1 << 20))
    mountpoint = tmp_path / "a mount"
    mountpoint.mkdir()
    loop = run_tool("losetup", "--find", "--show", image).strip()
    run_tool("mount", "-t", "tmpfs", "leaktest", mountpoint)

    found = clean_leaks(tmp_path)

    assert found == [f"mount {mountpoint} (leaktest)", f"loop device {loop} on {image}"]
    assert not os.path.ismount(mountpoint)
    assert clean_leaks(tmp_path) == []


def test_a_process_is_found_and_ended(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import signal; print(flush=True); signal.pause()", f"{tmp_path}/image"],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    with child.stdout:
        child.stdout.readline()
        found = clean_leaks(tmp_path, patience=0)
        assert child.wait() == -9
    assert len(found) == 1
    assert found[0].startswith(f"process {child.pid}: {sys.executable} ")


def test_a_mismatch_in_qemu_io_raises(tmp_path: Path) -> None:
    require_tool("qemu-io")
    image = tmp_path / "d.qcow2"
    qemu_img("create", "-f", "qcow2", image, "1M")
    assert "wrote 65536/65536 bytes" in qemu_io(image, "write -P 5 0 64k", "read -P 5 0 64k")
    with pytest.raises(ToolError, match="verification failed"):
        qemu_io(image, "read -P 6 0 64k", fmt="qcow2")


def test_a_failing_tool_raises_with_its_words(tmp_path: Path) -> None:
    require_tool("qemu-img")
    with pytest.raises(ToolError, match="No such file or directory"):
        qemu_img("info", tmp_path / "absent.qcow2")
