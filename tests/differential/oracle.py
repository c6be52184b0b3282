"""The flat model of a disk, and requests on it with what they must do."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import trio

from fusedisk.block.graph.backend import Backend
from tests.differential.scenario import Chain, Window, random_range


@dataclasses.dataclass(frozen=True)
class Request:
    """One request: ``kind`` is read, write, compressed, zeroes, unmap, discard, flush or status."""

    kind: str
    offset: int = 0
    length: int = 0
    content: bytes = b""

    def __str__(self) -> str:
        return f"{self.kind} {self.length} at {self.offset}" + (f" ({self.content[:1].hex()}…)" if self.content else "")

    @property
    def changes(self) -> bool:
        """Whether content may be different afterwards."""
        return self.kind in ("write", "compressed", "zeroes", "unmap", "discard")

    def overlaps(self, other: Request) -> bool:
        """Whether two requests share a byte."""
        return self.offset < other.offset + other.length and other.offset < self.offset + self.length


KINDS = ("read", "read", *["write"] * 4, "compressed", "zeroes", "unmap", "discard", "discard", "flush", "status")


def random_request(rng: random.Random, windows: tuple[Window, ...], unit: int, cluster_size: int) -> Request:
    """Any request inside the windows."""
    kind = rng.choice(KINDS)
    if kind == "flush":
        return Request(kind)
    offset, length = random_range(rng, windows, unit)
    if kind == "compressed":
        start, end = -(-offset // cluster_size) * cluster_size, (offset + length) // cluster_size * cluster_size
        if start < end:
            offset, length = start, end - start
        else:
            kind = "write"
    if kind not in ("write", "compressed"):
        return Request(kind, offset, length)
    pattern = bytes(1) if rng.random() < 0.1 else rng.randbytes(min(length, 257)) or b"x"
    return Request(kind, offset, length, (pattern * (length // len(pattern) + 1))[:length])


class Mismatch(AssertionError):
    """Content is not what it must be."""


class Oracle:
    """The content of the windows of a disk."""

    def __init__(self, windows: tuple[Window, ...], contents: list[bytearray], length: int) -> None:
        self.windows = windows
        self.contents = contents
        self.length = length

    @classmethod
    def of_image(cls, chain: Chain, windows: tuple[Window, ...], scratch: Path, copy: Path | None = None) -> Oracle:
        """What the judge reads from the active image of a chain, or from a copy of it."""
        contents, length = chain.read(windows, scratch, copy)
        return cls(windows, [bytearray(content) for content in contents], length)

    def copy(self) -> Oracle:
        """The same content, to be kept."""
        return Oracle(self.windows, [content[:] for content in self.contents], self.length)

    def become(self, other: Oracle) -> None:
        """Hold what ``other`` holds."""
        self.windows, self.length = other.windows, other.length
        self.contents = [content[:] for content in other.contents]

    def _place(self, offset: int) -> tuple[bytearray, int]:
        for (start, count), content in zip(self.windows, self.contents, strict=True):
            if start <= offset < start + count:
                return content, offset - start
        raise AssertionError(f"offset {offset} is in no window")

    def get(self, request: Request) -> bytes:
        """The content of a request's range."""
        content, start = self._place(request.offset)
        return bytes(content[start : start + request.length])

    def put(self, request: Request, data: bytes | bytearray) -> None:
        """Take ``data`` for the content of a request's range."""
        content, start = self._place(request.offset)
        content[start : start + request.length] = data

    def resize(self, length: int) -> None:
        """The disk is longer, or shorter but not without its last window; if its end was in a window, that window
        reaches to the new end."""
        start, count = self.windows[-1]
        if start + count == self.length:
            self.windows = (*self.windows[:-1], (start, length - start))
            self.contents[-1] = self.contents[-1][: length - start] + bytes(max(0, length - self.length))
        self.length = length

    def compare(self, other: Oracle, what: str) -> None:
        """Raise Mismatch unless ``other`` holds the same."""
        if other.length != self.length:
            raise Mismatch(f"{what} is {other.length} bytes long, {self.length} were expected")
        for (start, _), mine, theirs in zip(self.windows, self.contents, other.contents, strict=True):
            if mine != theirs:
                raise Mismatch(f"{what}: {difference(mine, theirs, start)}")

    async def compare_backend(self, backend: Backend) -> None:
        """Raise Mismatch unless the disk holds the same."""
        if backend.length != self.length:
            raise Mismatch(f"the disk is {backend.length} bytes long, {self.length} were expected")
        for (start, count), content in zip(self.windows, self.contents, strict=True):
            found = await backend.read(start, count)
            if found != content:
                raise Mismatch(f"the disk: {difference(content, found, start)}")

    # --- requests ---------------------------------------------------------------------------------------

    async def run_apart(self, backend: Backend, requests: list[Request]) -> None:
        """Run requests at once of which none overlaps with one that changes content."""
        expected = {request: self.get(request) for request in requests if request.length}

        async def one(request: Request) -> None:
            found = await perform(backend, request)
            if request.kind == "read" and found != expected[request]:
                raise Mismatch(f"{request}: {difference(expected[request], found, request.offset)}")

        async with trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(one, request)
        for request in requests:
            if request.kind == "discard":
                self._take_discarded(request, await backend.read(request.offset, request.length))
            elif request.changes:
                self.put(request, request.content or bytes(request.length))

    def _take_discarded(self, request: Request, found: bytearray) -> None:
        """Each byte reads as before or as zero; what it is from now on was found."""
        before = self.get(request)
        wrong = _unexplained(found, [(0, before), (0, bytes(request.length))])
        if wrong is not None:
            at = request.offset + wrong
            raise Mismatch(f"{request}: byte {at} is {found[wrong]}, was {before[wrong]} before the discard")
        self.put(request, found)

    async def run_overlapping(self, backend: Backend, requests: list[Request]) -> None:
        """Run requests at once that may overlap: each byte must hold what one of them put there."""
        before = {request: self.get(request) for request in requests if request.length}
        async with trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(perform, backend, request)
        changing = [request for request in requests if request.changes]
        for request in changing:
            found = await backend.read(request.offset, request.length)
            left = [each for other in changing if other.overlaps(request) for each in _leaves(other, before[other])]
            wrong = _unexplained(found, [(offset - request.offset, content) for offset, content in left])
            if wrong is not None:
                raise Mismatch(
                    f"{request}: byte {request.offset + wrong} is {found[wrong]}, which nobody wrote there; "
                    f"at the same time: {'; '.join(map(str, requests))}"
                )
            self.put(request, found)


def _leaves(request: Request, before: bytes) -> list[tuple[int, bytes]]:
    """The contents, with their offset, that a request may leave in its range if it comes last."""
    if request.kind == "discard":
        # Or what another one left: then that one vouches for it.
        return [(request.offset, bytes(request.length)), (request.offset, before)]
    return [(request.offset, request.content or bytes(request.length))]


_NOT_ZERO = bytes((0, *[255] * 255))


def _unexplained(found: bytes | bytearray, candidates: list[tuple[int, bytes]]) -> int | None:
    """Position of the first byte of ``found`` that equals no candidate's; those lie at (maybe negative) offsets."""
    left = bytes([255]) * len(found)
    for offset, content in candidates:
        start, end = max(0, offset), min(len(found), offset + len(content))
        mine = int.from_bytes(found[start:end], "little")
        theirs = int.from_bytes(content[start - offset : end - offset], "little")
        differing = (mine ^ theirs).to_bytes(end - start, "little").translate(_NOT_ZERO)
        both = int.from_bytes(differing, "little") & int.from_bytes(left[start:end], "little")
        left = left[:start] + both.to_bytes(end - start, "little") + left[end:]
    wrong = left.find(255)
    return None if wrong < 0 else wrong


async def perform(backend: Backend, request: Request) -> bytes:
    """Send a request; returns what a read found."""
    kind, offset, length = request.kind, request.offset, request.length
    if kind == "read":
        return bytes(await backend.read(offset, length))
    if kind == "write":
        if not backend.write_now(offset, memoryview(request.content)):
            await backend.write(offset, request.content)
    elif kind == "compressed":
        await backend.write_compressed(offset, request.content)
    elif kind == "discard":
        await backend.discard(offset, length)
    elif kind == "flush":
        await backend.flush()
    elif kind == "status":
        await _check_status(backend, offset, length)
    else:
        await backend.write_zeroes(offset, length, may_unmap=kind == "unmap")
    return b""


async def _check_status(backend: Backend, offset: int, length: int) -> None:
    """Status answers cover the range, in order."""
    end = offset + length
    while offset < end:
        status = await backend.block_status(offset, end - offset)
        assert 0 < status.length <= end - offset, status
        offset += status.length


def difference(expected: bytes | bytearray, found: bytes | bytearray, start: int) -> str:
    """Where two contents differ first, and what each has there."""
    position = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
    wrong = sum(a != b for a, b in zip(expected, found, strict=False))
    return (
        f"at {start + position} there is {bytes(found[position : position + 16]).hex()}, expected was "
        f"{bytes(expected[position : position + 16]).hex()} ({wrong} bytes differ)"
    )
