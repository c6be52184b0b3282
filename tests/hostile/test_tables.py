"""Tables that lie where they cannot lie, or lead to each other: refused, and what they point at is not overwritten."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import CorruptImageError, FusediskError, ImageError
from tests.hostile.images import Places, places, small_image
from tests.hostile.sentence import assert_sentence
from tests.support.memory import Store, stores
from tests.support.registry import TEST_DRIVERS

OPTIONS = {"driver": "qcow2", "file": {"driver": "memory", "filename": "disk"}, "discard": "unmap"}
COPIED = 1 << 63
CLUSTER = 512
SPAN = CLUSTER * CLUSTER // 8
"""Guest bytes of one L2 table."""
DATA = 7 * CLUSTER
"""A guest offset with data of its own."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_image(tmp_path_factory.mktemp("tables") / "disk.qcow2", snapshot=True)


def _with(image: bytes, at: int, format: str, *values: int) -> bytes:
    damaged = bytearray(image)
    struct.pack_into(format, damaged, at, *values)
    return bytes(damaged)


def _l2_entry_at(image: bytes, guest: int) -> int:
    """Where the L2 entry for a guest offset lies in the file."""
    table = places(image).l2[guest // SPAN][0]
    return table + guest % SPAN // CLUSTER * 8


# --- what the header leads to -------------------------------------------------------------------------------

L1_OFFSET, L1_SIZE, TABLE_OFFSET, TABLE_CLUSTERS, SNAPSHOTS, SNAPSHOTS_OFFSET = 40, 36, 48, 56, 60, 64

HEADER_FIELDS: dict[str, tuple[int, str, Callable[[Places, int], int], str]] = {
    "L1 table unaligned": (L1_OFFSET, ">Q", lambda p, n: p.l1[0] + 8, r"has its L1 table at \d+"),
    "L1 table past the end": (L1_OFFSET, ">Q", lambda p, n: (n | 511) + 1 + 512, r"has its L1 table at \d+"),
    "L1 table far past the end": (L1_OFFSET, ">Q", lambda p, n: 1 << 63, r"has its L1 table at \d+"),
    "L1 table on the header": (L1_OFFSET, ">Q", lambda p, n: 0, "has its L1 table at 0"),
    "L1 table on the refcount table": (L1_OFFSET, ">Q", lambda p, n: p.refcount_table[0], "tables that do not overlap"),
    "L1 table too long": (L1_SIZE, ">I", lambda p, n: 0xFFFFFFFF, "has an L1 table of 4294967295 entries"),
    "L1 table longer than the file": (L1_SIZE, ">I", lambda p, n: 1 << 20, "has its L1 table at"),
    "L1 table too short": (L1_SIZE, ">I", lambda p, n: 1, "has an L1 table of 1 entries"),
    "refcount table unaligned": (TABLE_OFFSET, ">Q", lambda p, n: p.refcount_table[0] + 1, "has its refcount table at"),
    "refcount table past the end": (TABLE_OFFSET, ">Q", lambda p, n: 1 << 40, "has its refcount table at"),
    "refcount table on the header": (TABLE_OFFSET, ">Q", lambda p, n: 0, "has its refcount table at 0"),
    "refcount table on the L1 table": (TABLE_OFFSET, ">Q", lambda p, n: p.l1[0], "tables that do not overlap"),
    "refcount table of no clusters": (TABLE_CLUSTERS, ">I", lambda p, n: 0, "has a refcount table of 0 clusters"),
    "refcount table too long": (TABLE_CLUSTERS, ">I", lambda p, n: 0xFFFFFFFF, "refcount table of 4294967295 clusters"),
    "too many snapshots": (SNAPSHOTS, ">I", lambda p, n: 65537, "has 65537 snapshots"),
    "more snapshots than the table has": (SNAPSHOTS, ">I", lambda p, n: 65536, "has 65536 snapshots"),
    "snapshot table unaligned": (SNAPSHOTS_OFFSET, ">Q", lambda p, n: p.snapshots[0] + 8, "its snapshot table at"),
    "snapshot table past the end": (SNAPSHOTS_OFFSET, ">Q", lambda p, n: 1 << 50, "has its snapshot table at"),
    "snapshot table on the L1 table": (SNAPSHOTS_OFFSET, ">Q", lambda p, n: p.l1[0], "tables that do not overlap"),
}


@pytest.mark.parametrize("case", HEADER_FIELDS)
@pytest.mark.parametrize("writable", [False, True])
async def test_header_fields(image: bytes, case: str, writable: bool) -> None:
    at, format, value, message = HEADER_FIELDS[case]
    damaged = _with(image, at, format, value(places(image), len(image)))
    store = Store(damaged)
    with stores(disk=store):
        graph = Graph(TEST_DRIVERS)
        with pytest.raises(ImageError, match=message) as caught:
            await graph.open_backend(OPTIONS, writable=writable)
        assert_sentence(caught.value, "memory:disk")
        assert not graph.nodes
    assert store.data == damaged


# --- what tables lead to ------------------------------------------------------------------------------------

TARGETS: dict[str, Callable[[Places], int]] = {
    "L1 table": lambda p: p.l1[0],
    "refcount table": lambda p: p.refcount_table[0],
    "refcount block": lambda p: p.refcount_blocks[0][0],
    "snapshot table": lambda p: p.snapshots[0],
}


async def _write_is_refused(damaged: bytes, guest: int, *words: str) -> None:
    """Writes at ``guest`` fail with one sentence, and then nothing but the corrupt bit has changed."""
    for part, length in ((0, CLUSTER), (10, 1)):
        store = Store(damaged)
        with stores(disk=store):
            graph = Graph(TEST_DRIVERS)
            backend = await graph.open_backend(OPTIONS, writable=True)
            with pytest.raises(CorruptImageError) as caught:
                await backend.write(guest + part, b"x" * length)
            assert_sentence(caught.value, "memory:disk", *words)
            with pytest.raises(CorruptImageError, match="accepts no writes since corruption was found"):
                await backend.write(DATA + 8 * CLUSTER, b"y")
            await backend.read(20 * CLUSTER, CLUSTER)
            await backend.close()
            assert not graph.nodes
        expected = bytearray(damaged)
        expected[79] |= 2
        assert store.data == expected


async def _dropping_is_harmless(damaged: bytes, guest: int) -> None:
    """Zeroing or discarding at ``guest`` may work or fail, but neither it nor later writes overwrite metadata."""
    found = places(damaged)
    snapshot_l1 = struct.unpack_from(">QI", damaged, found.snapshots[0])
    for discard in (False, True):
        store = Store(damaged)
        with stores(disk=store):
            graph = Graph(TEST_DRIVERS)
            backend = await graph.open_backend(OPTIONS, writable=True)
            with contextlib.suppress(CorruptImageError):
                if discard:
                    await backend.discard(guest, CLUSTER)
                else:
                    await backend.write_zeroes(guest, CLUSTER, may_unmap=True)
                for cluster in range(20, 60):
                    await backend.write(cluster * CLUSTER, b"x" * CLUSTER)
            await backend.close()
        kept = [found.header, found.l1, found.refcount_table, found.snapshots, (snapshot_l1[0], snapshot_l1[1] * 8)]
        for start, length in kept:
            before, after = bytearray(damaged[start : start + length]), store.data[start : start + length]
            if start == 0:
                before[79] |= after[79] & 2
            if start == found.l1[0]:
                # A table of its own instead of one that was shared is no damage.
                before, after = before[8:16], after[8:16]
            assert before == after, (discard, start)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("copied", [COPIED, 0], ids=["copied", "shared"])
async def test_an_l1_entry_that_leads_to_other_metadata(image: bytes, target: str, copied: int) -> None:
    found = places(image)
    damaged = _with(image, found.l1[0] + 8, ">Q", TARGETS[target](found) | copied)
    await _write_is_refused(damaged, SPAN + 5 * CLUSTER, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("copied", [COPIED, 0], ids=["copied", "shared"])
async def test_an_l2_entry_that_leads_to_metadata(image: bytes, target: str, copied: int) -> None:
    damaged = _with(image, _l2_entry_at(image, DATA), ">Q", TARGETS[target](places(image)) | copied)
    await _write_is_refused(damaged, DATA, target)
    await _dropping_is_harmless(damaged, DATA)


async def test_an_l2_entry_that_leads_to_an_l2_table(image: bytes) -> None:
    damaged = _with(image, _l2_entry_at(image, DATA), ">Q", places(image).l2[1][0] | COPIED)
    await _write_is_refused(damaged, DATA, "L2 table")


async def test_an_l2_entry_that_leads_to_its_own_table(image: bytes) -> None:
    damaged = _with(image, _l2_entry_at(image, DATA), ">Q", places(image).l2[0][0] | COPIED)
    await _write_is_refused(damaged, DATA, "L2 table")


async def test_an_l2_entry_that_leads_to_a_snapshots_l1_table(image: bytes) -> None:
    snapshot_l1 = struct.unpack_from(">Q", image, places(image).snapshots[0])[0]
    damaged = _with(image, _l2_entry_at(image, DATA), ">Q", snapshot_l1 | COPIED)
    await _write_is_refused(damaged, DATA, "L1 table")


@pytest.mark.parametrize(
    ("level", "entry"),
    [(level, entry) for level in ("L1", "L2") for entry in (8, 1 << 56, 520 | COPIED, (1 << 56) - 256)][2:],
)
async def test_unaligned_entries_and_reserved_bits(image: bytes, level: str, entry: int) -> None:
    found = places(image)
    guest = SPAN + 5 * CLUSTER if level == "L1" else DATA
    at = found.l1[0] + 8 if level == "L1" else _l2_entry_at(image, DATA)
    damaged = _with(image, at, ">Q", entry)
    await _write_is_refused(damaged, guest, f"{entry:#018x}")
    store = Store(damaged)
    with stores(disk=store):
        backend = await Graph(TEST_DRIVERS).open_backend(OPTIONS)
        with pytest.raises(CorruptImageError) as caught:
            await backend.read(guest, CLUSTER)
        assert_sentence(caught.value, "memory:disk", f"{entry:#018x}")
        await backend.read(30 * CLUSTER, CLUSTER)
        await backend.close()
    assert store.data == damaged, "opened read-only"


REFCOUNT_ENTRIES: dict[str, Callable[[Places], int]] = {
    "unaligned": lambda p: p.refcount_blocks[0][0] + 8,
    "past the end": lambda p: 1 << 40,
    "header": lambda p: 512 * 0 + 511,
    "L1 table": lambda p: p.l1[0],
    "refcount table": lambda p: p.refcount_table[0],
    "snapshot table": lambda p: p.snapshots[0],
    "the same block twice": lambda p: p.refcount_blocks[0][0],
}


async def _open_and_write(graph: Graph) -> None:
    backend = await graph.open_backend(OPTIONS, writable=True)
    try:
        for cluster in range(40, 60):
            await backend.write(cluster * CLUSTER, b"x" * CLUSTER)
    finally:
        await backend.close()


@pytest.mark.parametrize("case", REFCOUNT_ENTRIES)
async def test_a_refcount_table_entry_that_leads_astray(image: bytes, case: str) -> None:
    """Nothing is allocated by such refcounts: refused before the first write."""
    found = places(image)
    slot = 1 if case == "the same block twice" else 0
    damaged = _with(image, found.refcount_table[0] + 8 * slot, ">Q", REFCOUNT_ENTRIES[case](found))
    store = Store(damaged)
    with stores(disk=store):
        graph = Graph(TEST_DRIVERS)
        with pytest.raises(ImageError) as caught:
            await _open_and_write(graph)
        assert_sentence(caught.value, "memory:disk")
        assert not graph.nodes
    expected = bytearray(damaged)
    expected[79] |= store.data[79] & 2
    assert store.data == expected
    with stores(disk=Store(damaged)):
        backend = await Graph(TEST_DRIVERS).open_backend(OPTIONS)
        await backend.read(0, backend.length)
        await backend.close()


METADATA = ("header", "L1 table", "refcount table", "refcount block", "L2 table", "snapshot table")


@pytest.mark.parametrize("victim", METADATA)
async def test_refcounts_that_say_metadata_is_free(image: bytes, victim: str) -> None:
    """The allocator would hand the metadata out to a guest write."""
    found = places(image)
    place = {"header": 0, "L2 table": found.l2[0][0], **{name: target(found) for name, target in TARGETS.items()}}[
        victim
    ]
    damaged = _with(image, found.refcount_blocks[0][0] + place // CLUSTER * 2, ">H", 0)
    store = Store(damaged)
    with stores(disk=store):
        graph = Graph(TEST_DRIVERS)
        with pytest.raises(CorruptImageError) as caught:
            await _open_and_write(graph)
        assert_sentence(caught.value, "memory:disk", victim)
    expected = image[place : place + CLUSTER]
    if victim == "header":
        expected = expected[:79] + bytes([expected[79] | 2]) + expected[80:]
    changed = victim in ("refcount block", "L2 table")
    assert changed or store.data[place : place + CLUSTER] == expected
    assert store.data[place : place + CLUSTER] != b"x" * CLUSTER


async def test_a_corrupt_image_is_opened_read_only_only(image: bytes) -> None:
    damaged = bytearray(image)
    damaged[79] |= 2
    with stores(disk=Store(bytes(damaged))):
        graph = Graph(TEST_DRIVERS)
        with pytest.raises(FusediskError, match="is marked corrupt") as caught:
            await graph.open_backend(OPTIONS, writable=True)
        assert_sentence(caught.value, "memory:disk")
        backend = await graph.open_backend(OPTIONS)
        assert await backend.read(DATA, CLUSTER) == b"=" * CLUSTER
        await backend.close()
