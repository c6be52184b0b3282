"""What is compared. Each case makes its images, and measures ours and theirs once."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
WRITES = {"pwrite64", "pwritev", "pwritev2", "write"}
FLUSHES = {"fdatasync", "fsync", "io_submit"}
_TRACED = ",".join(sorted(WRITES | FLUSHES))
_CALL = re.compile(r"^\d+\s+(\w+)\((?:\d+|.*IOCB_CMD_FDSYNC, aio_fildes=\d+)<([^>]*)>")


class Failed(Exception):
    """A command did not do what it should."""


class Case(NamedTuple):
    """One row of the result; a measurement takes a folder and returns numbers by their unit."""

    group: str
    name: str
    ours: Callable[[Path], dict[str, float]]
    theirs: Callable[[Path], dict[str, float]]


def run(*command: str | Path, text: str = "") -> str:
    """Run a program with ``text`` on its stdin; returns its stdout."""
    done = subprocess.run([*map(str, command)], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{command[0]} exited {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def make(folder: Path, size: int, *options: str, format: str = "qcow2", over: bool = False) -> Path:
    """A new image, perhaps over a raw file full of data."""
    image = folder / f"disk.{format}"
    image.unlink(missing_ok=True)
    below: list[str | Path] = []
    if over:
        raw = folder / "below.raw"
        if not raw.exists():
            raw.write_bytes(b"\x07" * size)
        below = ["-b", raw, "-F", "raw"]
    run("qemu-img", "create", "-q", "-f", format, *options, *below, image, str(size))
    return image


def offsets(pattern: str, count: int, block: int, size: int) -> list[int]:
    """Where to write: ``sequential`` or ``random``, no place twice."""
    if pattern == "sequential":
        return [number * block for number in range(count)]
    return [place * block for place in random.Random(1).sample(range(size // block), count)]


# --- host calls -----------------------------------------------------------------------------------------


def count_calls(folder: Path, image: Path, command: list[str | Path], text: str) -> dict[str, float]:
    """How often a program writes to an image's file, and flushes it."""
    log = folder / "calls"
    run("strace", "-f", "-y", "-qq", "-e", f"trace={_TRACED}", "-o", log, *command, text=text)
    calls: Counter[str] = Counter()
    for line in log.read_text(errors="replace").splitlines():
        match = _CALL.match(line)
        if match and match[2] == str(image):
            calls["writes" if match[1] in WRITES else "flushes"] += 1
    return {"writes": calls["writes"], "flushes": calls["flushes"]}


def host_calls(format: str, pattern: str, flush_every: int, over: bool, count: int = 512) -> Case:
    """Allocating writes of 4 KiB."""
    block, size = 4 * KIB, 64 * MIB
    places = offsets(pattern, count, block, size)

    def ours(folder: Path) -> dict[str, float]:
        image = make(folder, size, format=format, over=over)
        text = "\n".join(map(str, places))
        return count_calls(folder, image, _writer(image, block, flush_every, format), text)

    def theirs(folder: Path) -> dict[str, float]:
        image = make(folder, size, format=format, over=over)
        return count_calls(
            folder,
            image,
            ["qemu-io", "-t", "writeback", "-f", format, image],
            _qemu_io_text(places, block, flush_every),
        )

    flush = f"flush every {flush_every}" if flush_every else "no flush"
    return Case("host-calls", f"{pattern} 4k, {flush}{', over a backing file' if over else ''}", ours, theirs)


def _writer(image: Path, block: int, flush_every: int, format: str) -> list[str | Path]:
    return [sys.executable, "-m", "scripts.comparison.writer", image, str(block), str(flush_every), format]


def _qemu_io_text(places: list[int], block: int, flush_every: int) -> str:
    lines = []
    for number, offset in enumerate(places, 1):
        lines.append(f"write -q -P 5 {offset} {block}")
        if flush_every and number % flush_every == 0:
            lines.append("flush")
    return "\n".join([*lines, "quit", ""])


# --- speed ----------------------------------------------------------------------------------------------


def speed(format: str, pattern: str, size: int, block: int = 64 * KIB) -> Case:
    """First writes of a whole disk, one at a time, into the page cache."""
    places = offsets(pattern, size // block, block, size)

    def ours(folder: Path) -> dict[str, float]:
        image = make(folder, size, format=format)
        text = "\n".join(map(str, places))
        return {"MiB/s": size / MIB / float(run(*_writer(image, block, 0, format), text=text))}

    def theirs(folder: Path) -> dict[str, float]:
        image = make(folder, size, format=format)
        if pattern == "sequential":
            args = ("-w", "-t", "writeback", "-d", "1", "-c", str(len(places)), "-s", str(block), "-f", format)
            out = run("qemu-img", "bench", *args, image)
            seconds = float(re.findall(r"completed in ([\d.]+) seconds", out)[0])
        else:  # qemu-img bench has no random order; qemu-io reads a line for each write
            start = time.perf_counter()
            run("qemu-io", "-t", "writeback", "-f", format, image, text=_qemu_io_text(places, block, 0))
            seconds = time.perf_counter() - start
        return {"MiB/s": size / MIB / seconds}

    return Case("speed", f"{pattern} first writes, {block // KIB}k", ours, theirs)


# --- metadata -------------------------------------------------------------------------------------------


def check(size: int = 100 * GIB) -> Case:
    """An image of which all metadata is allocated, and no data."""

    def image(folder: Path) -> Path:
        path = folder / "big.qcow2"
        if not path.exists():
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, str(size))
        return path

    def ours(folder: Path) -> dict[str, float]:
        return _seconds("check", *_FUSEDISK, "check", image(folder))

    def theirs(folder: Path) -> dict[str, float]:
        return _seconds("check", "qemu-img", "check", image(folder))

    return Case("check", f"check of {size // GIB} GiB of allocated metadata", ours, theirs)


def snapshot(size: int = 100 * GIB) -> Case:
    """Making a snapshot of such an image."""

    def ours(folder: Path) -> dict[str, float]:
        image = make(folder, size, "-o", "preallocation=metadata")
        return _seconds("snapshot", *_FUSEDISK, "snapshot", "-c", "one", image)

    def theirs(folder: Path) -> dict[str, float]:
        image = make(folder, size, "-o", "preallocation=metadata")
        return _seconds("snapshot", "qemu-img", "snapshot", "-c", "one", image)

    return Case("snapshot", f"snapshot of {size // GIB} GiB of allocated metadata", ours, theirs)


def has_snapshot_command() -> bool:
    """Whether fusedisk has ``snapshot``."""
    from fusedisk.cli.main import COMMANDS

    return "snapshot" in COMMANDS


_FUSEDISK = (sys.executable, "-m", "fusedisk")


def _seconds(what: str, *command: str | Path) -> dict[str, float]:
    start = time.perf_counter()
    run(*command)
    return {f"seconds ({what})": time.perf_counter() - start}
