"""One disk under load through all of its files: its own, those of its partitions, and a loop device.

Some threads exercise a part of the disk each (:mod:`.fsx`). Another fills the kernel's page cache meanwhile in every
way that does, so that what they change is cached somewhere. Nobody may ever see old bytes.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import struct
import threading
from pathlib import Path
from typing import NamedTuple

from tests.conftest import qemu_img
from tests.support.fsx import CHANNEL_ONLY, RESIZING, Exerciser, FileTarget, send_range
from tests.support.mounts import Mounts

SIZE = 6 << 20
_SECTOR = 512
_PARTITIONS = ((2048, 4096), (6145, SIZE // _SECTOR - 6145))
"""First sector and length. The second begins inside a page, and inside a cluster."""
_BORDERS = (_SECTOR, 1_500_160, 3_146_752, SIZE)
"""Of the parts that are exercised: multiples of a sector, some in the middle of pages. The table stays as it is."""
_LONGEST_FILL = 600_000


class Mode(NamedTuple):
    """How a disk is mounted."""

    format: str
    options: tuple[str, ...]

    @property
    def without(self) -> frozenset[str]:
        """Operations that it does not have."""
        refused = frozenset({"mapped_write"})
        return RESIZING | refused | (CHANNEL_ONLY - {"copy"} if "--channel=off" in self.options else frozenset())


MODES = (
    Mode("qcow2", ()),
    Mode("raw", ("--channel=off",)),
    Mode("raw", ("--passthrough=on",)),
    Mode("qcow2", ("--kernel-cache=off",)),
    Mode("raw", ("--cache=none",)),
    Mode("qcow2", ("--channel=off", "--kernel-cache=off")),
    Mode("qcow2", ("--cache=writethrough",)),
    Mode("raw", ("--passthrough=off", "--cache=unsafe")),
    Mode("qcow2", ("--cache=none", "--detect-zeroes=unmap")),
    Mode("raw", ("--channel=off", "--cache=directsync")),
    Mode("qcow2", ("--overlay",)),
)


def partitioned(path: Path) -> bytes:
    """Make a raw disk with two partitions; returns its content."""
    entries = (struct.pack("<B3xB3xII", 0, 0x83, start, length) for start, length in _PARTITIONS)
    content = bytearray(random.Random(5).randbytes(SIZE // 2) + bytes(SIZE // 2))
    content[446:512] = b"".join(entries).ljust(64, b"\0") + b"\x55\xaa"
    path.write_bytes(content)
    return bytes(content)


def exercise(mounts: Mounts, folder: Path, mode: Mode, seed: int, count: int, *, loop: bool) -> None:
    """Do ``count`` operations in each part; raises AssertionError at the first old byte. ``loop``: also through a loop
    device."""
    raw = folder / f"disk{seed}.img"
    content = partitioned(raw)
    image = raw
    if mode.format == "qcow2":
        image = raw.with_suffix(".qcow2")
        qemu_img("convert", "-O", "qcow2", raw, image)
    on = mounts.mount("--partitions", "--name=disk", "-f", mode.format, *mode.options, image)
    aliases = [
        (on / f"disk.p{number}", start * _SECTOR, (start + length) * _SECTOR)
        for number, (start, length) in enumerate(_PARTITIONS, 1)
    ]
    device = mounts.loop(on / "disk", *(["--direct-io=on"] if seed % 2 else [])) if loop else None
    views = tuple(aliases) + (((Path(device), 0, SIZE),) if device is not None else ())
    parts = []
    for index, (start, stop) in enumerate(itertools.pairwise(_BORDERS)):
        target = FileTarget(on / "disk", views)
        number = seed * 10 + index
        parts.append(Exerciser(target, content[start:stop], number, start=start, without=mode.without))
    try:
        _run(parts, count, [on / "disk", *(path for path, _, _ in aliases)], seed)
    finally:
        for part in parts:
            part.target.close()
    expected = content[: _BORDERS[0]] + b"".join(part.content for part in parts)
    assert (on / "disk").read_bytes() == expected
    for path, start, stop in aliases:
        assert path.read_bytes() == expected[start:stop], path
    if device is not None:
        mounts.detach(device)
    mounts.umount(on)
    if "--overlay" not in mode.options:
        if mode.format == "qcow2":
            qemu_img("check", image)
        flat = raw.with_suffix(".flat")
        qemu_img("convert", "-f", mode.format, "-O", "raw", image, flat)
        assert flat.read_bytes() == expected


def _run(parts: list[Exerciser], count: int, files: list[Path], seed: int) -> None:
    """Exercise all parts at the same time; raises the first failure."""
    failures: list[BaseException] = []
    over = threading.Event()

    def exercise_part(part: Exerciser) -> None:
        try:
            part.run(count)
        except BaseException as exc:
            failures.append(exc)

    def fill() -> None:
        try:
            _fill(files, random.Random(seed), over)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=exercise_part, args=(part,)) for part in parts]
    filler = threading.Thread(target=fill)
    for thread in (filler, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    filler.join()
    if failures:
        raise failures[0]


def _fill(files: list[Path], random_: random.Random, over: threading.Event) -> None:
    """Let the kernel put parts of the files into its page cache, whatever is there, until it is over."""
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    # Mapped once: mapping such a file drops all its pages.
    memories = [mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) for file in descriptors]
    try:
        while not over.is_set():
            file, memory = random_.choice(list(zip(descriptors, memories, strict=True)))
            size = len(memory)
            length = random_.randrange(1, _LONGEST_FILL)
            offset = random_.randrange(max(1, size - length))
            way = random_.randrange(3)
            if way == 0:
                send_range(file, offset, length)
            elif way == 1:
                os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)
            else:
                memory[offset : offset + length].count(0)
    finally:
        for file, memory in zip(descriptors, memories, strict=True):
            memory.close()
            os.close(file)
