"""Random damage to real qcow2 metadata: opening, reading and writing raise our errors or work, soon, and nothing else.

What is detected costs no metadata: whatever the driver refused to follow is as it was.
"""

from __future__ import annotations

import random
import resource
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import FusediskError
from tests.hostile.images import Places, places, small_image
from tests.hostile.sentence import assert_sentence
from tests.support.memory import Store, stores
from tests.support.registry import TEST_DRIVERS

OPTIONS = {"driver": "qcow2", "file": {"driver": "memory", "filename": "disk"}, "discard": "unmap"}
PATIENCE = 20.0
"""Seconds after which a request counts as hung; they take milliseconds."""
MEMORY = 400 << 20
"""Bytes by which the process may grow."""

INTERESTING = (0, 1, 511, 512, 513, 1024, 4096, 1 << 31, 1 << 32, (1 << 56) - 512, 1 << 62, 1 << 63, (1 << 64) - 1)

KINDS = {
    "v2": {"version": "0.10"},
    "v3": {},
    "v3-4k": {"cluster_size": 4096},
    "v3-snapshot": {"snapshot": True},
}


def _mutate(rng: random.Random, image: bytes, found: Places) -> bytearray:
    """Damage one to four places in the metadata."""
    damaged = bytearray(image)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start, length = rng.choice(found.all())
        if start == 0:
            length = min(length, 160)
        at = start + rng.randrange(length)
        kind = rng.choice(("bit", "byte", "field", "entry", "copy"))
        if kind == "bit":
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            damaged[at] = rng.randrange(256)
        elif kind == "field":
            at = at & ~3
            damaged[at : at + 4] = struct.pack(">I", rng.choice(INTERESTING) & 0xFFFFFFFF)
        elif kind == "entry":
            at = at & ~7
            value = rng.choice((*INTERESTING, *(place[0] for place in found.all()), rng.randrange(len(image))))
            damaged[at : at + 8] = struct.pack(">Q", (value | rng.choice((0, 1 << 63, 1 << 62, 1))) & (1 << 64) - 1)
        else:
            other = rng.choice(found.all())[0]
            damaged[at & ~7 : (at & ~7) + 8] = damaged[other : other + 8]
    return damaged[: len(image)] if rng.random() < 0.9 else damaged[: rng.randrange(len(image))]


async def _exercise(backend: Backend, rng: random.Random) -> list[FusediskError]:
    """Requests of all kinds all over the disk; returns the errors."""
    errors: list[FusediskError] = []
    length = backend.length
    step = max(512, length // 48 // 512 * 512)

    async def attempt(request: Callable[[], Awaitable[object]]) -> None:
        try:
            await request()
        except FusediskError as exc:
            errors.append(exc)

    for offset in range(0, min(length, 64 * step), step):
        size = min(step, length - offset)
        await attempt(lambda: backend.read(offset, size))  # noqa: B023 - awaited at once
        await attempt(lambda: backend.block_status(offset, size))  # noqa: B023
        if backend.writable:
            kind = rng.randrange(4)
            if kind == 0:
                await attempt(lambda: backend.write(offset, b"m" * size))  # noqa: B023
            elif kind == 1:
                await attempt(lambda: backend.write_zeroes(offset, size, may_unmap=True))  # noqa: B023
            elif kind == 2:
                await attempt(lambda: backend.discard(offset, size))  # noqa: B023
    if backend.writable:
        await attempt(lambda: backend.truncate(length + 64 * 1024))
        await attempt(backend.flush)
    return errors


async def _survive(damaged: bytearray, seed: int, *, writable: bool) -> tuple[Store, list[FusediskError]]:
    """Open a damaged image and work on it."""
    store = Store(bytes(damaged))
    store.capacity = len(damaged) + (8 << 20)
    errors: list[FusediskError] = []
    with stores(disk=store):
        graph = Graph(TEST_DRIVERS)
        with trio.fail_after(PATIENCE):
            try:
                backend = await graph.open_backend(OPTIONS, writable=writable)
            except FusediskError as exc:
                errors.append(exc)
            else:
                errors += await _exercise(backend, random.Random(seed))
                try:
                    await backend.close()
                except FusediskError as exc:
                    errors.append(exc)
        assert not graph.nodes
        assert store.opened == 0
    if not writable:
        assert store.data == damaged, "an image opened read-only was changed"
    return store, errors


async def _run(image: bytes, seeds: range) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = places(image)
    for seed in seeds:
        rng = random.Random(seed)
        damaged = _mutate(rng, image, found)
        try:
            for writable in (False, True):
                _, errors = await _survive(damaged, seed, writable=writable)
                for error in errors:
                    assert_sentence(error)
        except Exception as exc:
            raise AssertionError(f"mutation {seed}: {exc!r}") from exc
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MEMORY, f"{grown} bytes more"


@pytest.mark.parametrize("kind", KINDS)
async def test_damaged_metadata(kind: str, tmp_path: Path) -> None:
    await _run(small_image(tmp_path / "disk.qcow2", **KINDS[kind]), range(150))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_much_damaged_metadata(kind: str, tmp_path: Path) -> None:
    await _run(small_image(tmp_path / "disk.qcow2", **KINDS[kind]), range(1000, 3500))  # type: ignore[arg-type]
