"""What a guest did to a disk, and what it may find there after a crash.

The guest's steps are numbered. A step is *started* when the request is made, *done* when it is answered, and *durable*
once a flush is answered that began after it was done. After a crash everything durable must be there. Of later steps
that were started any part may be there, sector by sector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.crash.replay import SECTOR, Operation


class Step(NamedTuple):
    """What one request makes of the disk: whole sectors, and the length behind them."""

    offset: int
    content: bytes
    length: int


class View(NamedTuple):
    """The steps that count at one point of a log."""

    must: frozenset[int]
    """Steps that have to be there."""
    may: frozenset[int]
    """Steps that may be there, in any part."""


class Oracle:
    """The history of one disk. Steps that run at the same time touch different sectors."""

    def __init__(self, content: bytes) -> None:
        self.base = content
        self.current = bytearray(content)
        self.length = len(content)
        self.steps: list[Step] = []
        self.snapshots: dict[str, bytes] = {}
        """What each snapshot holds, those deleted included; no name is used twice."""
        self._made: dict[str, int] = {}
        self._deleted: dict[str, int] = {}
        self._floor: tuple[frozenset[int], bytes, int] | None = None

    def begin(self, offset: int, data: bytes, length: int | None = None) -> int:
        """Remember a request that writes ``data``, or makes the disk ``length`` long; returns its number."""
        if length is not None:
            if length < self.length and not data:
                # What is cut off reads as zeroes if the disk grows again.
                offset, data = length, bytes(self.length - length)
            self.length = length
            self.current += bytes(max(0, length - len(self.current)))
        self.current[offset : offset + len(data)] = data
        start = offset // SECTOR * SECTOR
        end = -(-(offset + len(data)) // SECTOR) * SECTOR
        self.steps.append(Step(start, bytes(self.current[start:end]) if data else b"", self.length))
        return len(self.steps) - 1

    def begin_snapshot(self, name: str) -> int:
        """Remember that a snapshot is made; returns the request's number."""
        self.snapshots[name] = bytes(self.current[: self.length])
        self._made[name] = self.begin(0, b"")
        return self._made[name]

    def begin_delete(self, name: str) -> int:
        """Remember that a snapshot is deleted; returns the request's number."""
        self._deleted[name] = self.begin(0, b"")
        return self._deleted[name]

    def begin_apply(self, name: str) -> int:
        """Remember that the disk becomes what a snapshot holds; returns the request's number."""
        content = self.snapshots[name]
        return self.begin(0, content.ljust(self.length, b"\0"), len(content))

    def snapshot_complaints(self, found: dict[str, bytes], view: View) -> Iterator[str]:
        """What is wrong with an image that has the snapshots ``found``."""
        for name, content in found.items():
            if name not in self._made:
                continue  # it was there before
            if self._made[name] not in view.must | view.may or self._deleted.get(name) in view.must:
                yield f"there is a snapshot {name}"
            elif content != self.snapshots[name]:
                yield f"snapshot {name} does not hold what the disk held"
        for name, number in self._made.items():
            if number in view.must and self._deleted.get(name) not in view.must | view.may and name not in found:
                yield f"snapshot {name} is gone"

    def floor(self, must: frozenset[int]) -> tuple[bytes, int]:
        """Content and length after the steps in ``must``."""
        if self._floor is None or self._floor[0] != must:
            content, length = bytearray(self.base), len(self.base)
            for number in sorted(must):
                step = self.steps[number]
                content += bytes(max(0, step.length - len(content)))
                content[step.offset : step.offset + len(step.content)] = step.content
                length = step.length
                content[length:] = bytes(len(content) - length)
            self._floor = must, bytes(content), length
        return self._floor[1:]

    def complaints(self, found: bytes, view: View, *, zeroes_too: bool) -> Iterator[str]:
        """What is wrong with a disk of the content ``found``.

        ``zeroes_too``: sectors that a request wrote which was not yet flushed may also read as zeroes.
        """
        floor, length = self.floor(view.must)
        lengths = {length, *(self.steps[number].length for number in view.may)}
        if len(found) not in lengths:
            yield f"the disk is {len(found)} bytes long, expected one of {sorted(lengths)}"
        floor = floor[: len(found)].ljust(len(found), b"\0")
        if found == floor:
            return
        versions = self._versions(view.may)
        for offset in _differing(found, floor):
            sector = found[offset : offset + SECTOR]
            allowed = versions.get(offset)
            if allowed is None:
                yield f"the sector at {offset} was {_show(floor[offset:])} and nobody wrote it, but is {_show(sector)}"
            elif sector not in allowed and not (zeroes_too and not any(sector)):
                yield f"the sector at {offset} was {_show(floor[offset:])}, then written, but is {_show(sector)}"

    def _versions(self, may: frozenset[int]) -> dict[int, set[bytes]]:
        versions: dict[int, set[bytes]] = {}
        for number in may:
            step = self.steps[number]
            for at in range(0, len(step.content), SECTOR):
                versions.setdefault(step.offset + at, set()).add(step.content[at : at + SECTOR])
        return versions


def _differing(first: bytes, second: bytes) -> Iterator[int]:
    """Offsets of sectors that are not the same."""
    large = SECTOR * 64
    for start in range(0, len(first), large):
        if first[start : start + large] != second[start : start + large]:
            for offset in range(start, min(start + large, len(first)), SECTOR):
                if first[offset : offset + SECTOR] != second[offset : offset + SECTOR]:
                    yield offset


def _show(sector: bytes) -> str:
    return sector[:8].hex()


def views(log: Sequence[Operation]) -> list[View]:
    """For each number of operations, from none to all, the steps that count after a crash there."""
    started: set[int] = set()
    done: set[int] = set()
    durable: frozenset[int] = frozenset()
    covered: dict[int, frozenset[int]] = {}

    def view() -> View:
        return View(durable, frozenset(started) - durable)

    found = [view()]
    for operation in log:
        if operation.kind == "mark":
            what, number = operation.data.decode().split()
            match what:
                case "start":
                    started.add(int(number))
                case "done":
                    done.add(int(number))
                case "flush":
                    covered[int(number)] = frozenset(done)
                case "flushed":
                    durable |= covered[int(number)]
            found.append(view())
        else:
            found.append(found[-1])
    return found
