"""Where the time of a request goes: a mount in this process, its system calls timed, under fio's load.

    .venv/bin/python -m scripts.benchmark.hot_path [FORMAT] [KIND] [DEPTH]

FORMAT is raw, qcow2 or subclusters; KIND read, write, first-write, fsync, write-1m or first-write-1m.

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
from typing import Any, NamedTuple

import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.block.request.immediate import Immediate
from fusedisk.drivers.format.qcow2.driver import Qcow2Driver
from fusedisk.drivers.protocol.file import FileDriver
from fusedisk.drivers.table import DRIVERS
from fusedisk.export.export import Export
from fusedisk.export.opening import ImageRequest, OpenSettings, open_exports
from fusedisk.export.registry import Registry
from fusedisk.mount import umount_calls
from fusedisk.mount.operations import Operations
from fusedisk.mount.session import Session, mount_options
from fusedisk.mount.settings import Passthrough, ServeSettings

SIZE = 256 << 20
SPARSE_SIZE = 64 << 30
"""First writes find enough space that nothing has been written to."""
SECONDS = 4
DRIVERS_OF = {"raw": "raw", "qcow2": "qcow2", "subclusters": "qcow2"}


class Load(NamedTuple):
    """What fio does."""

    pattern: str
    arguments: tuple[str, ...] = ()
    sparse: bool = False
    """The image holds nothing at first."""
    block: int = 4096
    """Bytes of a request."""


LOADS = {
    "read": Load("randread"),
    "write": Load("randwrite"),
    "first-write": Load("randwrite", ("--norandommap",), sparse=True),
    "fsync": Load("randwrite", ("--fsync=1",)),
    "write-1m": Load("write", block=1 << 20),
    "first-write-1m": Load("write", sparse=True, block=1 << 20),
}


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


def make_image(path: Path, fmt: str, load: Load) -> int:
    """An image that is empty, or fully allocated and warm in the page cache; returns its length in bytes."""
    size = SPARSE_SIZE if load.sparse else SIZE
    options = ["-o", "extended_l2=on"] if fmt == "subclusters" else []
    create = ["qemu-img", "create", "-q", "-f", DRIVERS_OF[fmt], *options]
    subprocess.run([*create, path, str(size)], check=True)
    if not load.sparse:
        fill: list[str | Path] = ["qemu-io", "-f", DRIVERS_OF[fmt], "-c", f"write -q -P 7 0 {SIZE}", path]
        subprocess.run(fill, check=True, stdout=subprocess.DEVNULL)
    return size


def run(path: str, load: Load, size: int, depth: int) -> dict[str, Any]:
    """fio's view; blocks."""
    command = ["fio", "--name=x", f"--filename={path}", f"--rw={load.pattern}", f"--bs={load.block}", "--direct=1"]
    command += [
        f"--ioengine={'libaio' if depth > 1 else 'psync'}",
        f"--iodepth={depth}",
        f"--runtime={SECONDS}",
        "--time_based",
        f"--size={size}",
    ]
    done = subprocess.run(
        [*command, *load.arguments, "--output-format=json"], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)["jobs"][0]["read" if load.pattern == "randread" else "write"]
    return found


async def measure(
    image: Path, mountpoint: Path, fmt: str, before: Callable[[], None], work: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """Mount, work on the file, unmount; ``before`` is called when the load is about to begin."""
    graph = Graph(DRIVERS)
    settings = OpenSettings(format=DRIVERS_OF[fmt])
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
            found = await trio.to_thread.run_sync(work, path)
            await trio.to_thread.run_sync(umount_calls.unmount, str(mountpoint))
    finally:
        session.close()
        await graph.close()
    return found


def clock_for(kind: str) -> Clock:
    """A clock around what requests of a kind consist of. What is indented is a part of the line above."""
    clock = Clock()
    clock.around(os, "readv", "readv from /dev/fuse, and asking in vain")
    clock.around(os, "write", "write to /dev/fuse")
    if kind == "read":
        clock.around(Immediate, "read", "finding the place and reading")
        clock.around(os, "preadv", "  preadv from the page cache")
        return clock
    clock.around(Export, "write_now", "finding or making the place, and writing")
    clock.around(FileDriver, "write_now", "  writing to the file")
    clock.around(os, "pwrite", "    pwrite to the page cache")
    if kind.startswith("first"):
        clock.around(Qcow2Driver, "map_write_now", "  allocating")
        clock.around(Qcow2Driver, "publish_now", "  entering it into the table")
    if kind == "fsync":
        clock.around(Export, "flush_now", "flushing")
        clock.around(os, "fdatasync", "  fdatasync of the host")
    return clock


def main() -> None:
    """See the module."""
    depth, fmt, kind = 1, "qcow2", "read"
    for word in sys.argv[1:]:
        if word.isdecimal():
            depth = int(word)
        elif word in LOADS:
            kind = word
        elif word in DRIVERS_OF:
            fmt = word
        else:
            sys.exit(f"'{word}' is neither a format, a number nor one of {', '.join(LOADS)}.")
    load = LOADS[kind]
    clock = clock_for(kind)
    start = 0.0

    def begin() -> None:
        nonlocal start
        for name in clock.seconds:
            clock.seconds[name], clock.calls[name] = 0.0, 0
        start = os.times().user + os.times().system

    with tempfile.TemporaryDirectory(prefix="fusedisk-hot.") as folder:
        image, mountpoint = Path(folder, f"disk.{fmt}"), Path(folder, "mnt")
        mountpoint.mkdir()
        size = make_image(image, fmt, load)
        found = trio.run(measure, image, mountpoint, fmt, begin, lambda path: run(path, load, size, depth))
    count, took = found["total_ios"], os.times().user + os.times().system - start
    each = SECONDS * 1e6 / count
    print(f"{fmt}, {kind}, depth {depth}: {found['iops'] / 1000:.1f} k a second, {each:.1f} us of the clock each")
    print(f"{took / count * 1e6:8.2f} us of processor time each")
    for name, seconds in clock.seconds.items():
        print(f"{seconds / count * 1e6:8.2f} us, {clock.calls[name] / count:5.2f} calls: {name}")


if __name__ == "__main__":
    main()
