"""How long commands take next to qemu-img: ``python -m scripts.benchmark.commands [--before CHECKOUT] [--runs N]``.

All sides take turns on copies of the same image. A table shows medians in seconds, elapsed and of the processor, with
Python's start included. ``--before`` adds another checkout of fusedisk, run by the same Python.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent

IMAGES = {
    "64 KiB clusters, 100 GiB": ("64k", "100G"),
    "4 KiB clusters, 8 GiB": ("4k", "8G"),
    "512 byte clusters, 512 MiB": ("512", "512M"),
}
"""Cluster size and disk size; all metadata is allocated."""

OPERATIONS = {
    "info": ("info",),
    "check": ("check",),
    "make a snapshot": ("snapshot", "-c", "new"),
    "apply one": ("snapshot", "-a", "old"),
    "delete one": ("snapshot", "-d", "old"),
}
"""The arguments in front of the image, which fusedisk and qemu-img have in common."""


class Took(NamedTuple):
    """Seconds that a command took."""

    elapsed: float
    processor: float


def run(command: list[str], environment: dict[str, str]) -> Took:
    """Run a command, which must succeed, in a directory that holds no checkout: that would be imported first."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=os.environ | environment, cwd="/", stdout=subprocess.DEVNULL, check=True)
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(elapsed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


@contextlib.contextmanager
def mounted_by(command: list[str], environment: dict[str, str], image: Path) -> Iterator[Took]:
    """Mount an image; the mount goes when the block ends."""
    place = image.parent / "mnt"
    place.mkdir(exist_ok=True)
    took = run([*command, "mount", str(image), str(place)], environment)
    try:
        yield took
    finally:
        run([*command, "umount", str(place)], environment)


def compare(folder: Path, cluster: str, size: str, sides: dict[str, Path | None], runs: int) -> Iterator[str]:
    """Rows of the table for one kind of image. A side is a checkout; None stands for qemu-img."""
    plain, kept, work = (folder / f"{name}.qcow2" for name in ("plain", "kept", "work"))
    options = f"cluster_size={cluster},preallocation=metadata"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, plain, size], check=True)
    _copy(plain, kept)
    subprocess.run(["qemu-img", "snapshot", "-c", "old", kept], check=True)
    for operation, arguments in OPERATIONS.items():
        took: dict[str, list[Took]] = {side: [] for side in sides}
        for _ in range(runs):
            for side, checkout in sides.items():
                _copy(kept if "old" in arguments else plain, work)
                command, environment = _program(checkout)
                took[side].append(run([*command, *arguments, str(work)], environment))
        yield row(operation, took)
    took = {side: [] for side in sides}
    for _ in range(runs):
        for side, checkout in sides.items():
            if checkout is not None:
                with mounted_by(*_program(checkout), plain) as ready:
                    took[side].append(ready)
    yield row("mount, until it is ready", took)


def row(name: str, took: dict[str, list[Took]]) -> str:
    """A line of the table: for each side the median of the time that elapsed and, in brackets, of the processor's."""
    cells = [f"{_median(each, 0)} ({_median(each, 1)})" if each else "–" for each in took.values()]
    return f"| {name} | {' | '.join(cells)} |"


def _median(took: list[Took], field: int) -> str:
    return f"{statistics.median(each[field] for each in took):.2f}"


def _program(checkout: Path | None) -> tuple[list[str], dict[str, str]]:
    if checkout is None:
        return ["qemu-img"], {}
    return [sys.executable, "-m", "fusedisk"], {"PYTHONPATH": str(checkout)}


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="another checkout of fusedisk to compare with")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    sides: dict[str, Path | None] = {"before": given.before.resolve()} if given.before else {}
    sides |= {"fusedisk": ROOT, "qemu-img": None}
    for checkout in filter(None, sides.values()):  # as an installation would be
        subprocess.run([sys.executable, "-m", "compileall", "-q", checkout / "fusedisk"], check=True)
    for name, (cluster, size) in IMAGES.items():
        print(f"\n| {name} | {' | '.join(sides)} |\n|{' --- |' * (len(sides) + 1)}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for line in compare(Path(folder), cluster, size, sides, given.runs):
                print(line, flush=True)


if __name__ == "__main__":
    main()
