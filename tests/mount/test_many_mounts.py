"""One process that mounts and unmounts a thousand times has no more descriptors, memory or threads than before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require_fuse
from tests.support.commands import process_environment

_SCRIPT = """
import gc, os, sys, threading
import psutil, trio
from fusedisk.block.graph.graph import Graph
from fusedisk.drivers.table import DRIVERS
from fusedisk.export.opening import ImageRequest, OpenSettings, open_exports
from fusedisk.export.registry import Registry
from fusedisk.mount import own_mount
from fusedisk.mount.operations import Operations
from fusedisk.mount.session import Session, mount_options

image, mountpoint, times, channel = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]

async def once():
    graph = Graph(DRIVERS)
    exports = await open_exports(graph, [ImageRequest(image, image)], OpenSettings(format="raw", read_only=True))
    operations = Operations(Registry(graph, exports))
    session = Session(mountpoint, operations, mount_options([image], read_only=True, allow_other=False))
    session._settings.channel = channel == "auto"
    session.start()
    async with trio.open_nursery() as nursery:
        ready = trio.Event()
        nursery.start_soon(session.serve, ready.set)
        await ready.wait()
        def look():
            with open(f"{mountpoint}/disk", "rb") as file:
                return file.read(4096)
        assert await trio.to_thread.run_sync(look) == b"x" * 4096
        assert await trio.to_thread.run_sync(own_mount.unmount_own, mountpoint, session.device) is None
    session.close()
    await graph.close()

def state():
    gc.collect()
    process = psutil.Process()
    return process.num_fds(), process.memory_info().rss >> 20, threading.active_count()

async def main():
    for number in range(times):
        if number == times // 10:
            print(*state())
        await once()
    print(*state())

trio.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("channel", ["auto", "off"])
def test_a_thousand_mounts(tmp_path: Path, channel: str) -> None:
    require_fuse()
    image, mountpoint = tmp_path / "disk.img", tmp_path / "mnt"
    image.write_bytes(b"x" * 65536)
    mountpoint.mkdir()
    times = 1000 if channel == "auto" else 100
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, image, mountpoint, str(times), channel],
            capture_output=True,
            text=True,
            env=process_environment(),
            timeout=300,
            check=False,
        )
    finally:
        while os.path.ismount(mountpoint):
            subprocess.run(["umount", "-l", mountpoint], check=True)
    assert done.returncode == 0, done.stderr
    early, late = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert late[0] == early[0], "descriptors"
    assert late[1] <= early[1] + 4, "MiB of memory"
    assert late[2] <= early[2] + 2, "threads"
