"""Settings of damaged images: they change, or one sentence says why not; and refused beforehand means untouched."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.block.image.amend import amend_node
from fusedisk.core.errors import CorruptImageError, FusediskError
from tests.drivers.test_qcow2_amend import make
from tests.support.memory import Store, stores
from tests.support.qcow2 import MEMORY_DRIVERS

CHANGES: list[dict[str, Any]] = [
    {"compat": "0.10"},
    {"refcount_bits": 64},
    {"refcount_bits": 2},
    {"lazy_refcounts": True, "refcount_bits": 32},
    {"backing_file": "x" * 600, "backing_fmt": "raw"},
]


async def _amend(image: bytes, change: dict[str, Any]) -> tuple[str | None, bytes]:
    """What the refusal says, and what the file holds then."""
    graph = Graph(MEMORY_DRIVERS, follow_backing=False)
    store = Store(0)
    store.data = bytearray(image)
    store.capacity = 64 << 20
    refusal = None
    with stores(image=store), trio.fail_after(60):
        try:
            spec = {"driver": "qcow2", "file": {"driver": "memory", "filename": "image"}}
            disk = await graph.open_backend(spec, writable=True)
            await amend_node(disk.node, change, force=True)
        except FusediskError as exc:
            refusal = str(exc)
        finally:
            with contextlib.suppress(CorruptImageError):
                await graph.close()
    return refusal, bytes(store.data)


def _tables(image: bytes) -> list[tuple[int, int]]:
    """Where header, L1, refcount and snapshot tables lie, and what these lead to; offset and length."""
    unit = 1 << struct.unpack_from(">I", image, 20)[0]
    l1_size, l1, refcounts = struct.unpack_from(">IQQ", image, 36)
    snapshots = struct.unpack_from(">Q", image, 64)[0]
    places = [(4, 140), (l1, 8 * l1_size), (refcounts, 16), (snapshots, 200)]
    for table, entries in ((l1, l1_size), (refcounts, 1)):
        for index in range(entries):
            below = struct.unpack_from(">Q", image, table + 8 * index)[0] & 0x00FF_FFFF_FFFF_FE00
            places += [(below, unit)] * bool(below)
    return places


@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=4096"])
@pytest.mark.parametrize("backing", [False, True])
async def test_damage_at_random(tmp_path: Path, options: str, backing: bool) -> None:
    image = make(tmp_path / "disk.qcow2", options, backing=backing).read_bytes()
    places = _tables(image)
    rng = random.Random(options)
    refused = changed = 0
    for _ in range(150):
        damaged = bytearray(image)
        for _ in range(rng.randrange(1, 4)):
            start, length = rng.choice(places)
            at = start + rng.randrange(length)
            damaged[at] = rng.choice((damaged[at] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)))
        refusal, _ = await _amend(bytes(damaged), rng.choice(CHANGES))
        if refusal is None:
            changed += 1
        else:
            refused += 1
            assert "\n" not in refusal
            assert refusal.endswith(".")
    assert refused > 20
    assert changed > 20


async def test_snapshots_that_share_one_large_l1_table(tmp_path: Path) -> None:
    """Thousands of overlapping tables are not read one after the other."""
    image = bytearray(make(tmp_path / "disk.qcow2", "cluster_size=65536", backing=True).read_bytes())
    table = len(image) + -len(image) % 65536
    image += bytes(table - len(image))
    entries, size = 5000, 1 << 20
    for number in range(entries):
        name = b"%d" % number
        extra = struct.pack(">QQ", 0, size)
        entry = struct.pack(">QIHHIIQII", 65536 * (number % 40 + 1), 4 << 13, len(name), 0, 0, 0, 0, 0, len(extra))
        entry += extra + name
        image += entry + bytes(-len(entry) % 8)
    image += bytes(-len(image) % 65536 + 65536 * 40)
    struct.pack_into(">IQ", image, 60, entries, table)
    before = bytes(image)
    refusal, after = await _amend(before, {"compat": "0.10"})
    assert refusal is not None
    assert "L1 tables of its 5000 snapshots are longer than the file" in refusal
    assert after == before


async def test_a_refcount_table_that_reaches_far(tmp_path: Path) -> None:
    """A block for clusters far behind the end of the file: a table of the new width would be too long."""
    path = tmp_path / "disk.qcow2"
    image = bytearray(make(path, "cluster_size=512,refcount_bits=1", snapshots=False, backing=False).read_bytes())
    table, clusters = struct.unpack_from(">QI", image, 48)
    assert clusters >= 1
    place = len(image) + -len(image) % 512
    entries = (8 << 20) // 8
    image += bytes(place - len(image)) + bytes(8 << 20) + b"\xff" * 512
    image[place : place + 512 * clusters] = image[table : table + 512 * clusters]
    struct.pack_into(">Q", image, place + 8 * (entries - 1), place + (8 << 20))
    struct.pack_into(">QI", image, 48, place, (8 << 20) // 512)
    before = bytes(image)
    refusal, after = await _amend(before, {"refcount_bits": 64})
    assert refusal is not None
    assert "would need a refcount table of" in refusal
    assert after == before
