"""What is measured: fio jobs on a flat file, and the images that they run on."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmark.servers import ServerError, run

MIB = 1 << 20
GIB = 1 << 30
RAMP = 0.5
"""Seconds before each measurement, in which tables and caches fill."""

IMAGES = {"raw": "raw", "qcow2": "qcow2", "compressed": "qcow2"}
"""What is served, and the driver that opens it; ``compressed``: zlib in clusters of 64 KiB, about 2:1."""


@dataclass(frozen=True)
class Measurement:
    """What one run of fio found."""

    rate: float
    """In the workload's unit."""
    served: float
    """Bytes moved, those of the ramp included at the rate of the rest."""


@dataclass(frozen=True)
class Workload:
    """One fio job."""

    name: str
    rw: str
    """fio's word: randread, randwrite, read or write."""
    block_size: int
    """In bytes."""
    depth: int
    goal: float | None = None
    """The ratio, ours divided by theirs, that it shall reach; None where nothing is promised."""
    images: tuple[str, ...] = ("raw", "qcow2")
    """The keys of IMAGES that it runs on."""
    options: tuple[str, ...] = ()
    """More of fio's options."""

    @property
    def unit(self) -> str:
        """The unit of its results: requests per second for small blocks, bytes per second for large ones."""
        return "IOPS" if self.block_size < MIB else "B/s"


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("randread-4k-d1", "randread", 4096, 1, goal=2.0),
        Workload("randread-4k-d16", "randread", 4096, 16, goal=1.25),
        Workload("randwrite-4k-d1", "randwrite", 4096, 1, goal=1.5),
        Workload("randwrite-4k-d16", "randwrite", 4096, 16),
        Workload("seqread-1m", "read", MIB, 1, goal=2.5),
        Workload("seqwrite-1m", "write", MIB, 1, goal=1.2),
        Workload("compressed-seqread-1m", "read", MIB, 1, goal=3.0, images=("compressed",)),
        # Zipf with 1.1: most requests go to few clusters, which a cache of inflated ones can hold.
        Workload(
            "compressed-randread-4k-zipf",
            "randread",
            4096,
            1,
            goal=10.0,
            images=("compressed",),
            options=("--random_distribution=zipf:1.1",),
        ),
    )
}


def measure(workload: Workload, path: Path, runtime: float) -> Measurement:
    """Run *workload* on the flat file at *path* for *runtime* seconds.

    Direct I/O, so that each request reaches the daemon. Raises ServerError when fio fails or sees an error.
    """
    command = [
        "fio",
        "--name=bench",
        f"--filename={str(path).replace(':', chr(92) + ':')}",
        "--allow_file_create=0",
        f"--size={path.stat().st_size}",
        f"--rw={workload.rw}",
        f"--bs={workload.block_size}",
        f"--iodepth={workload.depth}",
        f"--ioengine={'libaio' if workload.depth > 1 else 'psync'}",
        "--direct=1",
        "--invalidate=0",
        "--norandommap",
        "--randrepeat=1",
        "--time_based",
        f"--runtime={runtime * 1000:.0f}ms",
        f"--ramp_time={RAMP * 1000:.0f}ms",
        *workload.options,
        "--output-format=json",
    ]
    output = run(command, timeout=runtime + 60)
    job = json.loads(output[output.index("{") :])["jobs"][0]
    side = job["read" if "read" in workload.rw else "write"]
    if job["error"] or not side["total_ios"]:
        raise ServerError(f"fio {workload.name} on {path} failed with error {job['error']}")
    rate = float(side["iops"] if workload.unit == "IOPS" else side["bw_bytes"])
    return Measurement(rate, side["bw_bytes"] * (runtime + RAMP))


def make_images(folder: Path, size: int, formats: tuple[str, ...]) -> dict[str, Path]:
    """Write one fully allocated image of *size* bytes for each format, keys of IMAGES.

    Raw and qcow2 hold the same random content; what ``compressed`` holds says everything twice, half a KiB at a time.
    """
    images = {fmt: folder / f"image.{fmt}" for fmt in formats}
    if {"raw", "qcow2"} & set(formats):
        raw = folder / "image.raw"
        _write(raw, size, 1)
        if "qcow2" in formats:
            _convert(raw, images["qcow2"])
    if "compressed" in formats:
        doubled = folder / "doubled.raw"
        _write(doubled, size, 2)
        _convert(doubled, images["compressed"], "-c")
        doubled.unlink()
    return images


def _write(path: Path, size: int, repeats: int) -> None:
    source = random.Random(size)
    with path.open("wb") as file:
        for _ in range(size // MIB):
            data = source.randbytes(MIB // repeats)
            file.write(b"".join(data[start : start + 512] * repeats for start in range(0, len(data), 512)))


def _convert(raw: Path, image: Path, *options: str) -> None:
    run(["qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", str(raw), str(image)], timeout=600)


def settle(image: Path) -> None:
    """Write dirty pages of *image* to disk and read it whole: runs start with a clean, warm page cache."""
    buffer = bytearray(MIB)
    with image.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        while file.readinto(buffer):
            pass
