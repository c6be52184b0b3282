"""Exercisers over real mounts: random operations of every kind against a copy in memory, fio and stress-ng."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.drivers.table import DRIVERS
from fusedisk.export import ranges
from fusedisk.export.export import Export, FileSettings
from tests.conftest import qemu_img, require_root, require_tool, run_tool
from tests.support.commands import ROOT, process_environment
from tests.support.fsx import (
    CHANNEL_ONLY,
    KEEP_SIZE,
    PUNCH_HOLE,
    RESIZING,
    ZERO_RANGE,
    Exerciser,
    FileTarget,
)
from tests.support.images import make_qcow2, make_sparse_raw
from tests.support.mounts import Mounts
from tests.support.thinning import thinned

MIB = 1 << 20
SIZE = 6 * MIB
PATIENCE = 240


def _raw(folder: Path, size: int) -> Path:
    return make_sparse_raw(folder / "disk.img", size, (MIB, 300_000), (size - 5000, 5000))


def _qcow2(folder: Path, size: int) -> Path:
    return make_qcow2(folder / "disk.qcow2", size, "write -P 3 1M 300000", "write -z 3M 128k")


def _small_clusters(folder: Path, size: int) -> Path:
    return make_qcow2(folder / "disk.qcow2", size, "write -P 3 1M 300000", cluster_size=512)


def _base(folder: Path, size: int) -> Path:
    """Shorter than what stands on it."""
    return make_qcow2(folder / "base.qcow2", size - 1_000_448, f"write -P 0xb5 0 {size // 2}")


def _overlay(folder: Path, size: int) -> Path:
    base = _base(folder, size)
    return make_qcow2(folder / "disk.qcow2", size, "write -P 3 1M 300000", "write -z 2M 1M", backing=base)


def _subclusters(folder: Path, size: int) -> Path:
    options = {"extended_l2": "on", "cluster_size": "128k"}
    return make_qcow2(folder / "disk.qcow2", size, "write -P 3 1M 300000", backing=_base(folder, size), **options)


_KINDS: dict[str, Callable[[Path, int], Path]] = {
    "raw": _raw,
    "qcow2": _qcow2,
    "small": _small_clusters,
    "overlay": _overlay,
    "subclusters": _subclusters,
}


def _format(image: Path) -> str:
    return "qcow2" if image.suffix == ".qcow2" else "raw"


def _content(image: Path, *, shared: bool = False) -> bytes:
    """What the disk holds, as qemu-img reads it; ``shared``: while somebody has it open."""
    flat = image.with_name("flat")
    qemu_img("convert", *(["-U"] if shared else []), "-f", _format(image), "-O", "raw", image, flat)
    try:
        return flat.read_bytes()
    finally:
        flat.unlink()


def _check(image: Path, content: bytes | bytearray) -> None:
    """The image must be sound and hold that."""
    if _format(image) == "qcow2":
        qemu_img("check", image)
    found = _content(image)
    assert len(found) == len(content)
    if found != content:
        first = next(at for at, pair in enumerate(zip(found, content, strict=True)) if pair[0] != pair[1])
        pytest.fail(f"the image holds something else at {first:#x}", pytrace=False)


@asynccontextmanager
async def _opened(image: Path) -> AsyncIterator[Backend]:
    """The image, writable and resizable."""
    graph = Graph(DRIVERS)
    options = {"driver": _format(image), "file": {"driver": "file", "filename": str(image)}}
    backend = await graph.open_backend(options, name="disk", writable=True)
    try:
        yield backend
    finally:
        await backend.close()


@pytest.mark.parametrize(
    ("kind", "options", "without", "seed"),
    thinned(
        [
            ("raw", ["--passthrough", "off"], RESIZING, 1),
            ("raw", ["--passthrough", "on"], RESIZING, 2),
            ("qcow2", [], RESIZING, 3),
            ("small", [], RESIZING, 4),
            ("overlay", [], RESIZING, 5),
            ("subclusters", [], RESIZING, 6),
            ("overlay", ["--kernel-cache", "off"], RESIZING, 7),
            ("overlay", ["--channel", "off"], RESIZING | CHANNEL_ONLY, 8),
            ("overlay", ["--detect-zeroes", "unmap", "--cache", "none"], RESIZING, 9),
            ("overlay", ["--copy-on-read", "--cache", "writethrough"], RESIZING, 10),
            ("overlay", ["--discard", "ignore"], RESIZING, 11),
            ("raw", ["--growable", "--passthrough", "off"], frozenset(), 12),
            ("qcow2", ["--growable"], frozenset(), 13),
            ("overlay", ["--growable"], frozenset(), 14),
            ("subclusters", ["--growable"], frozenset(), 15),
        ],
        3,
    ),
    ids=lambda value: "".join(value).replace("--", "-") if isinstance(value, list) else None,
)
@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_random_operations(
    mounts: Mounts, tmp_path: Path, kind: str, options: list[str], without: frozenset[str], seed: int, count: int
) -> None:
    image = _KINDS[kind](tmp_path, SIZE)
    content = _content(image)
    on = mounts.mount("-f", _format(image), *options, image)
    target = FileTarget(on / "disk")
    exerciser = Exerciser(target, content, seed * 1000 + count, without=without)
    try:
        exerciser.run(count)
    finally:
        target.close()
    mounts.umount(on)
    _check(image, exerciser.content)


@pytest.mark.parametrize("count", [150, pytest.param(2500, marks=pytest.mark.slow)])
def test_random_operations_through_a_disk_and_its_partition(mounts: Mounts, tmp_path: Path, count: int) -> None:
    """Two files show the same bytes, so neither may be mapped shared. More of that: test_coherence.py."""
    raw = tmp_path / "table.img"
    with raw.open("wb") as file:
        file.truncate(SIZE)
    command = [require_tool("sfdisk"), "-q", "--no-tell-kernel", str(raw)]
    subprocess.run(command, input="label: dos\n2048,6144\n", text=True, check=True, timeout=60)
    image = tmp_path / "disk.qcow2"
    qemu_img("convert", "-O", "qcow2", raw, image)
    head = raw.read_bytes()[:MIB]
    on = mounts.mount("--partitions", image)
    target = FileTarget(on / "disk", ((on / "disk.p1", MIB, 4 * MIB),))
    without = RESIZING | {"mapped_write"}
    exerciser = Exerciser(target, bytes(SIZE - MIB), 60_000 + count, start=MIB, without=without)
    try:
        exerciser.run(count)
    finally:
        target.close()
    mounts.umount(on)
    _check(image, head + exerciser.content)


@pytest.mark.parametrize("kind", ["overlay", "subclusters"])
@pytest.mark.parametrize("count", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_several_processes_on_one_disk(mounts: Mounts, tmp_path: Path, kind: str, count: int) -> None:
    """Each has its own part; the parts meet in the middle of clusters."""
    image = _KINDS[kind](tmp_path, SIZE)
    borders = [0, MIB + 4096, 3 * MIB - 12288, 4 * MIB + 20480, SIZE]
    on = mounts.mount(image)
    processes, copies = [], []
    for index, (start, stop) in enumerate(itertools.pairwise(borders)):
        copies.append(tmp_path / f"part{index}")
        numbers = map(str, (70_000 + index, count, start, stop))
        command = [sys.executable, "-m", "tests.support.fsx", str(on / "disk"), *numbers, str(copies[-1])]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=process_environment(), stderr=subprocess.PIPE))
    said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    for process, errors in zip(processes, said, strict=True):
        assert process.returncode == 0, errors.decode()
    mounts.umount(on)
    _check(image, b"".join(copy.read_bytes() for copy in copies))


class _ExportTarget:
    """An export in this process, asked as the channel asks it, from a thread."""

    def __init__(self, export: Export) -> None:
        self.export = export
        self.short = 0
        """Requests that needed no waiting."""

    def read(self, offset: int, length: int) -> bytes:
        async def work() -> bytes:
            buffer = bytearray(max(0, min(length, self.export.backend.length - offset)))
            if self.export.read_now(offset, memoryview(buffer)):
                self.short += 1
            else:
                await self.export.read_into(offset, memoryview(buffer))
            return bytes(buffer)

        return trio.from_thread.run(work)

    def write(self, offset: int, data: bytes) -> None:
        async def work() -> None:
            if self.export.write_now(offset, memoryview(data)):
                self.short += 1
            else:
                assert await self.export.write(offset, data) == len(data)

        trio.from_thread.run(work)

    direct_read = mapped_read = held_read = sent_read = read
    direct_write = mapped_write = write

    def allocate(self, mode: int, offset: int, length: int) -> None:
        async def work() -> None:
            keep_size, punch = bool(mode & KEEP_SIZE), bool(mode & PUNCH_HOLE)
            if mode & (PUNCH_HOLE | ZERO_RANGE):
                await ranges.zero(self.export, offset, length, punch=punch, keep_size=keep_size)
            else:
                await ranges.allocate(self.export, offset, length, keep_size=keep_size)

        trio.from_thread.run(work)

    def copy(self, offset: int, position: int, length: int) -> int:
        return trio.from_thread.run(ranges.copy, self.export, offset, self.export, position, length)

    splice = copy

    def holes(self, start: int, stop: int) -> list[tuple[int, int]]:
        async def work() -> list[tuple[int, int]]:
            found, position = [], start
            while position < stop:
                status = await self.export.backend.block_status(position, stop - position)
                if status.zero:
                    found.append((position, position + status.length))
                position += status.length
            return found

        return trio.from_thread.run(work)

    def resize(self, length: int) -> None:
        trio.from_thread.run(self.export.truncate, length)

    def flush(self) -> None:
        trio.from_thread.run(self.export.flush)

    def reopen(self) -> None:
        self.flush()

    def forget(self) -> None:
        trio.from_thread.run(self.export.backend.write_back)

    def close(self) -> None:
        """The caller closes the backend."""


@pytest.mark.parametrize("kind", ["raw", "overlay", "small", "subclusters"])
@pytest.mark.parametrize(("seed", "count"), [(80, 300), pytest.param(81, 2000, marks=pytest.mark.slow)])
async def test_the_short_way_changes_nothing(tmp_path: Path, kind: str, seed: int, count: int) -> None:
    """One seed with and without it: equal contents, and maps that tell of the same holes."""
    results = []
    for short in (True, False):
        folder = tmp_path / ("short" if short else "door")
        folder.mkdir()
        image = _KINDS[kind](folder, SIZE)
        async with _opened(image) as backend:
            if not short:
                backend.immediate.disable()
            settings = FileSettings(growable=True)
            target = _ExportTarget(await Export.open(backend, "disk", 2, settings))
            exerciser = Exerciser(target, _content(image, shared=True), seed, without=frozenset())
            await trio.to_thread.run_sync(exerciser.run, count)
            assert bool(target.short > count // 20) == short
        _check(image, exerciser.content)
        entries = json.loads(qemu_img("map", "--output=json", "-f", _format(image), image))
        # Where clusters lie, and so which entries go on in the host's file, may differ.
        runs = itertools.groupby(entries, lambda entry: (entry["zero"], entry["depth"]))
        results.append((bytes(exerciser.content), [(kind, next(run)["start"]) for kind, run in runs]))
    assert results[0][0] == results[1][0]
    assert results[0][1] == results[1][1]


_FIO = {
    "buffered": ["--ioengine=psync", "--rw=randrw", "--bsrange=512-64k", "--fsync=64"],
    "direct": ["--ioengine=libaio", "--rw=randrw", "--bs=4k", "--direct=1", "--iodepth=16"],
    "mapped": ["--ioengine=mmap", "--rw=randwrite", "--bs=4k"],
    "large": ["--ioengine=libaio", "--rw=rw", "--bs=1M", "--direct=1", "--iodepth=4"],
}
_FIO_TRIMS = {
    "trims": ["--ioengine=libaio", "--rw=randtrimwrite", "--bs=64k", "--direct=1", "--iodepth=8"],
    "trimmed": ["--ioengine=psync", "--rw=trimwrite", "--bs=64k", "--direct=1"],
}


def _fio(file: str, *options: str, size: int) -> None:
    """Two jobs side by side write, and check afterwards what they wrote; raises ToolError."""
    jobs = ["--numjobs=2", f"--size={size // 2}", f"--offset_increment={size // 2}"]
    if "--ioengine=mmap" in options:  # fio itself mistakes the place of a second job's mapping, on any file
        jobs = [f"--size={size}"]
    check = ["--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0", "--randseed=9"]
    run_tool("fio", "--name=job", f"--filename={file}", "--allow_file_create=0", *jobs, *check, *options)


@pytest.mark.parametrize(
    "kind", ["qcow2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("subclusters", "raw"))]
)
@pytest.mark.parametrize("way", list(_FIO))
def test_fio_reads_what_it_wrote(mounts: Mounts, tmp_path: Path, kind: str, way: str) -> None:
    image = _KINDS[kind](tmp_path, 16 * MIB)
    on = mounts.mount("-f", _format(image), image)
    _fio(str(on / "disk"), *_FIO[way], size=16 * MIB)
    content = (on / "disk").read_bytes()
    mounts.umount(on)
    _check(image, content)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qcow2", "overlay", "raw"])
@pytest.mark.parametrize("way", thinned(["buffered", "direct", "large", *_FIO_TRIMS], 2))
def test_fio_on_a_loop_device(mounts: Mounts, tmp_path: Path, kind: str, way: str) -> None:
    require_root()
    image = _KINDS[kind](tmp_path, 32 * MIB)
    on = mounts.mount("-f", _format(image), image)
    device = mounts.loop(on / "disk")
    _fio(device, *(_FIO | _FIO_TRIMS)[way], size=32 * MIB)
    mounts.detach(device)
    content = (on / "disk").read_bytes()
    mounts.umount(on)
    _check(image, content)


_STRESSORS = {
    "hdd": (200, "32m"),
    "seek": (300, "16m"),
    "fallocate": (20, "32m"),
    "copy-file": (100, "128m"),
    "readahead": (100, "32m"),
    "mmap": (5, "8m"),
    "sync-file": (2, "1m"),
    "aio": (100, None),
}
"""Operations, and the size of the file, by the name of the stressor."""


@pytest.mark.slow
@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_stress_ng_in_a_filesystem(mounts: Mounts, tmp_path: Path, direct: bool) -> None:
    """It makes files, so it runs in a filesystem on a loop device over the mount."""
    require_root()
    image = make_qcow2(tmp_path / "disk.qcow2", 512 * MIB)
    on = mounts.mount(image)
    device = mounts.loop(on / "disk", *(["--direct-io=on"] if direct else []))
    run_tool("mkfs.ext4", "-q", device)
    files = mounts.mount_filesystem(device, "-o", "discard")
    for stressor, (count, size) in _STRESSORS.items():
        options = [f"--{stressor}", "1", f"--{stressor}-ops", str(count)]
        options += [f"--{stressor}-{'size' if stressor == 'seek' else 'bytes'}", size] if size is not None else []
        options += ["--mmap-file"] if stressor == "mmap" else []
        run_tool("stress-ng", "--seed", "7", "--verify", "--temp-path", files, "--timeout", "60", *options)
    mounts.umount_filesystem(files)
    run_tool("e2fsck", "-fn", device)
    mounts.detach(device)
    mounts.umount(on)
    qemu_img("check", image)
