"""What is measured: fio jobs on a flat file, and the images that they run on."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmark.servers import ServerError, run

MIB = 1 << 20


@dataclass(frozen=True)
class Workload:
    """One fio job."""

    name: str
    rw: str
    """fio's word: randread, randwrite, read or write."""
    block_size: int
    """In bytes."""
    depth: int

    @property
    def unit(self) -> str:
        """The unit of its results: requests per second for small blocks, bytes per second for large ones."""
        return "IOPS" if self.block_size < MIB else "B/s"


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("randread-4k-d1", "randread", 4096, 1),
        Workload("randread-4k-d16", "randread", 4096, 16),
        Workload("randwrite-4k-d1", "randwrite", 4096, 1),
        Workload("randwrite-4k-d16", "randwrite", 4096, 16),
        Workload("seqread-1m", "read", MIB, 1),
        Workload("seqwrite-1m", "write", MIB, 1),
    )
}


def measure(workload: Workload, path: Path, runtime: float) -> float:
    """Run *workload* on the flat file at *path* for *runtime* seconds; return its rate in its unit.

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
        "--ramp_time=500ms",
        "--output-format=json",
    ]
    output = run(command, timeout=runtime + 60)
    job = json.loads(output[output.index("{") :])["jobs"][0]
    side = job["read" if "read" in workload.rw else "write"]
    if job["error"] or not side["total_ios"]:
        raise ServerError(f"fio {workload.name} on {path} failed with error {job['error']}")
    return float(side["iops"] if workload.unit == "IOPS" else side["bw_bytes"])


def make_images(folder: Path, size: int, formats: tuple[str, ...]) -> dict[str, Path]:
    """Write one fully allocated image of *size* bytes for each format, all with the same random content."""
    raw = folder / "image.raw"
    source = random.Random(size)
    with raw.open("wb") as file:
        for _ in range(size // MIB):
            file.write(source.randbytes(MIB))
    images = {"raw": raw}
    for fmt in formats:
        if fmt != "raw":
            images[fmt] = folder / f"image.{fmt}"
            run(["qemu-img", "convert", "-f", "raw", "-O", fmt, str(raw), str(images[fmt])], timeout=600)
    return {fmt: images[fmt] for fmt in formats}


def settle(image: Path) -> None:
    """Write dirty pages of *image* to disk and read it whole: runs start with a clean, warm page cache."""
    buffer = bytearray(MIB)
    with image.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        while file.readinto(buffer):
            pass
