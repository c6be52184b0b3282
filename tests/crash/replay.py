"""Replaying a write log: the images that a disk may hold after a crash at a given point of it.

Two kinds of crashes:

* the *process dies*: everything that was written so far is in the host's page cache, so the image is a **prefix** of
  the log;
* the *power goes*: what was flushed is there, and of everything written since the last flush any part, down to single
  sectors of 512 bytes, in any order, each sector as the flush left it or as any later write made it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fusedisk.drivers.filter import blklogwrites_layout as layout

SECTOR = 512
"""What a disk writes whole or not at all."""


class Operation(NamedTuple):
    """One entry of a log, in bytes."""

    kind: str
    """write, discard, flush or mark."""
    offset: int = 0
    data: bytes = b""
    """What is written; zeroes for a discard, the text of a mark."""

    @property
    def end(self) -> int:
        """Where the range ends."""
        return self.offset + len(self.data)


def read_log(path: Path) -> list[Operation]:
    """All operations of a log. Raises ImageError where it is none."""
    log = memoryview(path.read_bytes())
    superblock = layout.parse_superblock(log, str(path))
    size = superblock.sector_size
    operations: list[Operation] = []
    sector, sectors = 1, -(-len(log) // size)
    for number in range(superblock.entries):
        start = sector * size
        entry = layout.parse_entry(log[start : start + size], number, sectors - sector - 1, str(path))
        length = entry.data_sectors * size
        data = bytes(log[start + size : start + size + length]).ljust(length, b"\0")
        operations += _operations(entry, data, bytes(log[start + layout.ENTRY_LENGTH :][: entry.mark_length]), size)
        sector += 1 + entry.data_sectors
    return operations


def _operations(entry: layout.Entry, data: bytes, mark: bytes, size: int) -> Iterator[Operation]:
    """What one entry stands for: a write may ask for a flush before it (FLUSH) and one after it (FUA)."""
    if entry.flags & layout.FLUSH:
        yield Operation("flush")
    if entry.flags & layout.MARK:
        yield Operation("mark", 0, mark)
    elif entry.flags & layout.DISCARD:
        yield Operation("discard", entry.sector * size, bytes(entry.sectors * size))
    elif data:
        yield Operation("write", entry.sector * size, data)
    if entry.flags & layout.FUA:
        yield Operation("flush")


def apply(image: bytearray, operation: Operation) -> None:
    """Let ``image`` hold what it holds after a write or discard; the others change nothing."""
    if operation.kind == "discard":
        end = min(operation.end, len(image))
        if end > operation.offset:
            image[operation.offset : end] = bytes(end - operation.offset)
    elif operation.kind == "write":
        if operation.offset > len(image):
            image += bytes(operation.offset - len(image))
        image[operation.offset : operation.end] = operation.data


class Crash(NamedTuple):
    """What is left after a crash behind the first ``cut`` operations of a log."""

    cut: int
    image: bytes
    what: str
    """How it came about, for messages."""


def prefixes(base: bytes, log: Sequence[Operation], every: int = 1) -> Iterator[Crash]:
    """The process dies: the image after each ``every``-th operation that changes it, and the last one."""
    image = bytearray(base)
    changes = 0
    for cut, operation in enumerate(log, 1):
        apply(image, operation)
        if operation.kind in ("write", "discard"):
            changes += 1
            if changes % every == 0:
                yield Crash(cut, bytes(image), "every write so far")
    yield Crash(len(log), bytes(image), "every write of the log")


def power_cuts(
    base: bytes, log: Sequence[Operation], random_: random.Random, tries: int, *, cuts: Sequence[int] | None = None
) -> Iterator[Crash]:
    """The power goes behind each of ``cuts`` (default: each operation that changes the image, and each one in front of
    a flush), ``tries`` random ways each."""
    durable = bytearray(base)
    window: list[Operation] = []
    wanted = set(cuts) if cuts is not None else None
    for cut, operation in enumerate(log, 1):
        if operation.kind == "flush":
            for earlier in window:
                apply(durable, earlier)
            window.clear()
            continue
        if operation.kind not in ("write", "discard"):
            continue
        window.append(operation)
        if wanted is None or cut in wanted:
            for _ in range(tries):
                what, parts = _survivors(window, random_)
                image = bytearray(durable)
                for part in parts:
                    apply(image, part)
                yield Crash(cut, bytes(image), what)


def _survivors(window: list[Operation], random_: random.Random) -> tuple[str, list[Operation]]:
    """What of ``window`` reaches the disk, in the order in which it does."""
    ways = (_all_but_one, _only_one, _some, _some, _late_ones, _torn, _torn)
    return random_.choice(ways)(window, random_)


def _all_but_one(window: list[Operation], random_: random.Random) -> tuple[str, list[Operation]]:
    lost = random_.randrange(len(window))
    return f"write {lost} of {len(window)} lost", window[:lost] + window[lost + 1 :]


def _only_one(window: list[Operation], random_: random.Random) -> tuple[str, list[Operation]]:
    kept = random_.randrange(len(window))
    return f"only write {kept} of {len(window)} kept", [window[kept]]


def _some(window: list[Operation], random_: random.Random) -> tuple[str, list[Operation]]:
    share = random_.choice((0.1, 0.3, 0.5, 0.7, 0.9))
    kept = [index for index in range(len(window)) if random_.random() < share]
    random_.shuffle(kept)
    return f"writes {kept} of {len(window)}, in this order", [window[index] for index in kept]


def _late_ones(window: list[Operation], random_: random.Random) -> tuple[str, list[Operation]]:
    first = random_.randrange(len(window))
    return f"only the writes from {first} of {len(window)} on", window[first:]


def _torn(window: list[Operation], random_: random.Random) -> tuple[str, list[Operation]]:
    """Each sector by itself: which of its writes, if any, is the last to reach the disk."""
    share = random_.choice((0.2, 0.5, 0.8))
    sectors = [part for operation in window for part in _sectors(operation)]
    kept = [part for part in sectors if random_.random() < share]
    random_.shuffle(kept)
    return f"{len(kept)} of {len(sectors)} sectors, in any order", kept


def _sectors(operation: Operation) -> Iterator[Operation]:
    for start in range(0, len(operation.data), SECTOR):
        yield Operation(operation.kind, operation.offset + start, operation.data[start : start + SECTOR])
