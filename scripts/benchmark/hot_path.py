"""Where the time of a 4 KiB read goes: a mount in this process, its system calls timed, under fio's load.

    .venv/bin/python -m scripts.benchmark.hot_path [raw|qcow2] [DEPTH]

A timed call costs about a tenth of a microsecond more than one that is not.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.block.request.immediate import Immediate
from fusedisk.drivers.table import DRIVERS
from fusedisk.export.opening import ImageRequest, OpenSettings, open_exports
from fusedisk.export.registry import Registry
from fusedisk.mount import umount_calls
from fusedisk.mount.operations import Operations
from fusedisk.mount.session import Session, mount_options
from fusedisk.mount.settings import Passthrough, ServeSettings

SIZE = 256 << 20
SECONDS = 4


class Clock:
    """Seconds and calls by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def around(self, owner: Any, attribute: str, name: str) -> None:
        """Time every call of a function."""
        timed = getattr(owner, attribute)
        self.seconds[name], self.calls[name] = 0.0, 0

        @functools.wraps(timed)
        def call(*args: Any, **keywords: Any) -> Any:
            start = perf_counter()
            try:
                return timed(*args, **keywords)
            finally:
                self.seconds[name] += perf_counter() - start
                self.calls[name] += 1

        setattr(owner, attribute, call)


def make_image(path: Path, fmt: str) -> None:
    """A fully allocated image, warm in the page cache."""
    subprocess.run(["qemu-img", "create", "-q", "-f", fmt, path, str(SIZE)], check=True)
    subprocess.run(["qemu-io", "-f", fmt, "-c", f"write -q -P 7 0 {SIZE}", path], check=True, stdout=subprocess.DEVNULL)


def load(path: str, depth: int) -> dict[str, Any]:
    """fio's view of random reads; blocks."""
    command = ["fio", "--name=x", f"--filename={path}", "--rw=randread", "--bs=4k", "--direct=1", "--ioengine=libaio"]
    command += [f"--iodepth={depth}", f"--runtime={SECONDS}", "--time_based", f"--size={SIZE}", "--output-format=json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)["jobs"][0]["read"]
    return found


async def measure(image: Path, mountpoint: Path, fmt: str, depth: int, before: Callable[[], None]) -> dict[str, Any]:
    """Mount, read, unmount; ``before`` is called when the load is about to begin."""
    graph = Graph(DRIVERS)
    settings = OpenSettings(format=fmt)
    exports = await open_exports(graph, [ImageRequest(str(image), str(image))], settings)
    session = Session(
        str(mountpoint),
        Operations(Registry(graph, exports)),
        mount_options([str(image)], read_only=False, allow_other=False),
        ServeSettings(passthrough=Passthrough.OFF),
    )
    session.start()
    try:
        async with trio.open_nursery() as nursery:
            ready = trio.Event()
            nursery.start_soon(session.serve, ready.set)
            await ready.wait()
            path = str(mountpoint / exports[0].name)
            before()
            found = await trio.to_thread.run_sync(load, path, depth)
            await trio.to_thread.run_sync(umount_calls.unmount, str(mountpoint))
    finally:
        session.close()
        await graph.close()
    return found


def main() -> None:
    """See the module."""
    fmt, depth = sys.argv[1] if len(sys.argv) > 1 else "qcow2", int(sys.argv[2]) if len(sys.argv) > 2 else 1
    clock = Clock()
    clock.around(os, "readv", "readv from /dev/fuse, and asking in vain")
    clock.around(os, "preadv", "preadv from the page cache")
    clock.around(os, "write", "write to /dev/fuse")
    clock.around(Immediate, "read", "finding the place, preadv included")
    start = 0.0

    def begin() -> None:
        nonlocal start
        for name in clock.seconds:
            clock.seconds[name], clock.calls[name] = 0.0, 0
        start = os.times().user + os.times().system

    with tempfile.TemporaryDirectory(prefix="fusedisk-hot.") as folder:
        image, mountpoint = Path(folder, f"disk.{fmt}"), Path(folder, "mnt")
        mountpoint.mkdir()
        make_image(image, fmt)
        found = trio.run(measure, image, mountpoint, fmt, depth, begin)
    reads = found["total_ios"]
    print(
        f"{fmt}, depth {depth}: {found['iops'] / 1000:.1f} k reads/s, {SECONDS * 1e6 / reads:.1f} us of the clock each"
    )
    print(f"{(os.times().user + os.times().system - start) / reads * 1e6:8.2f} us of processor time each")
    for name, seconds in clock.seconds.items():
        print(f"{seconds / reads * 1e6:8.2f} us, {clock.calls[name] / reads:5.2f} calls: {name}")


if __name__ == "__main__":
    main()
