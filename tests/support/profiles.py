"""What the long tests must know of a format: random runs, crashes and damaged images take a profile.

A new format adds its profile to ``PROFILES`` and runs through ``tests/differential``, ``tests/crash`` and
``tests/mutation``. Its judge is not ours: QEMU's tools (:class:`QemuJudge`) or another independent reader.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fusedisk.block.graph.registry import Registry
from fusedisk.block.image.create import create_image
from fusedisk.block.model.driver import Driver
from fusedisk.drivers.format.qcow2.driver import Qcow2Driver
from fusedisk.drivers.format.qcow2.layout import DIRTY
from tests.conftest import qemu_img, require_tool
from tests.support.registry import PROFILE_DRIVERS
from tests.support.tiny_reader import Places, TinyReader

KIB, MIB = 1 << 10, 1 << 20


class Verdict(NamedTuple):
    """What a judge says of an image."""

    corruptions: int
    leaks: int
    text: str = ""


class Judge(Protocol):
    """An independent reader of a format."""

    def check(self, path: Path) -> Verdict:
        """Count what is wrong with an image. Called from threads."""

    def read(self, path: Path, windows: list[tuple[int, int]], scratch: Path) -> tuple[list[bytes], int]:
        """Return the content of parts of the disk, and its length; ``scratch`` is a file that may be made."""


class QemuJudge:
    """QEMU's tools."""

    def __init__(self, format: str) -> None:
        self.format = format

    def check(self, path: Path) -> Verdict:
        command = [require_tool("qemu-img"), "check", "-f", self.format, "--output=json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        try:
            report: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            return Verdict(1, 0, done.stderr)
        corruptions = int(report.get("corruptions", 0)) + int(report.get("check-errors", 0))
        return Verdict(corruptions, int(report.get("leaks", 0)), done.stderr)

    def read(self, path: Path, windows: list[tuple[int, int]], scratch: Path) -> tuple[list[bytes], int]:
        image = {"driver": self.format, "file": {"driver": "file", "filename": str(path)}}
        found = []
        for offset, count in windows:
            part = {"driver": "raw", "offset": offset, "size": count, "file": image}
            qemu_img("convert", "-O", "raw", f"json:{json.dumps(part)}", scratch)
            found.append(scratch.read_bytes().ljust(count, b"\0"))
            scratch.unlink()
        information = json.loads(qemu_img("info", "--output=json", "-f", self.format, path))
        return found, int(information["virtual-size"])


class TinyJudge:
    """A reader that shares no line with the driver."""

    def check(self, path: Path) -> Verdict:
        return Verdict(*TinyReader(path.read_bytes()).check())

    def read(self, path: Path, windows: list[tuple[int, int]], scratch: Path) -> tuple[list[bytes], int]:
        reader = TinyReader(path.read_bytes())
        below = (path.parent / reader.backing).read_bytes() if reader.backing else b""
        disk = reader.disk(below)
        return [disk[offset : offset + count] for offset, count in windows], len(disk)


def _nothing(value: Any) -> dict[str, Any]:
    return {}


def _never(image: bytes) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class FormatProfile:
    """A format, what it can do, and who judges its images."""

    name: str
    judge: Judge
    can: frozenset[str] = frozenset()
    """Of: zeroes (also over a backing file), discard, resize, backing, snapshots, compressed, data-file, encryption.
    Requests that it does not have are not made, except writes of zeroes, which the core then does."""
    block_sizes: tuple[int, ...] = (64 * KIB,)
    block_option: str | None = None
    """The creation option with the size of a block; None if there is none."""
    variants: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})
    """Other creation options of kinds of images that are tested apart, by the name of the kind."""
    open_options: Callable[[random.Random], dict[str, Any]] = _nothing
    """Draws the driver's options, for each time an image is opened."""
    asks_for_repair: Callable[[bytes], bool] = _never
    """Whether an image says that it was not closed properly, so that its next writer repairs it."""
    may_leak: bool = False
    """Closing an image may leave unused space at the end of its file, which a repair takes away."""
    under_pressure: Callable[[Driver], object] = _nothing
    """Makes an open driver write its metadata often."""
    pressure_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of a driver that is to keep little in memory."""
    places: Callable[[bytes], Any] | None = None
    """Finds the metadata of an image that damage aims at."""
    drivers: Registry = PROFILE_DRIVERS

    @property
    def driver(self) -> type[Driver]:
        """The driver."""
        return self.drivers.load(self.name)

    async def create(
        self, path: Path, size: int, options: dict[str, Any], backing: tuple[Path, str] | None = None
    ) -> Path:
        """Make an image: with QEMU's tools if they know the format. ``backing``: a file and its format."""
        if isinstance(self.judge, QemuJudge):
            args = ["-o", ",".join(f"{name}={value}" for name, value in options.items())] if options else []
            below = ["-b", str(backing[0]), "-F", backing[1]] if backing else []
            qemu_img("create", "-q", "-f", self.name, *args, *below, path, str(size))
            return path
        given = {"size": size, **options}
        if backing is not None:
            given |= {"backing_file": backing[0].name, "backing_fmt": backing[1]}
        await create_image(self.drivers, self.name, str(path), given)
        return path

    def block(self, size: int) -> dict[str, Any]:
        """Return the creation option for blocks of this size."""
        return {self.block_option: size} if self.block_option else {}


def _is_dirty(image: bytes) -> bool:
    """Whether the dirty bit of a qcow2 image is set: its refcounts are behind, and say so."""
    return int.from_bytes(image[4:8], "big") >= 3 and bool(int.from_bytes(image[72:80], "big") & DIRTY)


def _commit_often(driver: Driver) -> None:
    assert isinstance(driver, Qcow2Driver)
    driver.committer.max_freed = 3


QCOW2 = FormatProfile(
    "qcow2",
    QemuJudge("qcow2"),
    frozenset(("zeroes", "discard", "resize", "backing", "snapshots", "compressed", "data-file", "encryption")),
    block_sizes=tuple(512 << shift for shift in range(13)),
    block_option="cluster_size",
    asks_for_repair=_is_dirty,
    under_pressure=_commit_often,
    pressure_options={"l2-cache-size": 1024},
)

TINY = FormatProfile(
    "tiny",
    TinyJudge(),
    frozenset(("zeroes", "discard", "resize", "backing")),
    block_sizes=(512, 4 * KIB, 64 * KIB, MIB),
    block_option="block_size",
    variants={"flat": {}, "tree": {"levels": 2}},
    may_leak=True,
    places=Places,
)

PROFILES: dict[str, FormatProfile] = {profile.name: profile for profile in (QCOW2, TINY)}
"""By the name of the format."""
