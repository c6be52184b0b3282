"""Headers: QEMU's come back byte for byte, ours look like QEMU's, hostile ones are refused with a sentence."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.block.model.files import Files
from fusedisk.core.errors import FusediskError, ImageError, UnsupportedFeatureError
from fusedisk.core.progress import no_progress
from fusedisk.drivers.format.qcow2 import header_checks, layout
from fusedisk.drivers.format.qcow2.driver import Qcow2Driver
from fusedisk.drivers.format.qcow2.layout import Extension, Header
from tests.conftest import qemu_img
from tests.support.memory import Store, stores
from tests.support.qcow2 import MEMORY_DRIVERS, create_image, created_in_memory, driver_of, in_memory, opened

SIZE = 1 << 30
CLUSTER = 65536


def parsed(area: bytes) -> Header:
    header = layout.parse_header(area[: layout.V3_HEADER_LENGTH], "x")
    header_checks.refuse(header_checks.field_faults(header, opening=True), "'x'")
    layout.parse_header_area(header, area[: header.cluster_size], "x")
    return header


@pytest.mark.parametrize(
    "options",
    [
        "compat=1.1",
        "compat=0.10",
        "lazy_refcounts=on,refcount_bits=1",
        "compression_type=zstd",
        "cluster_size=512",
        "cluster_size=2M,refcount_bits=64",
        "extended_l2=on",
        "data_file=data.raw",
    ],
)
@pytest.mark.parametrize("backing", ["", "base.qcow2"])
def test_headers_of_qemu_come_back_byte_for_byte(tmp_path: Path, options: str, backing: str) -> None:
    image = tmp_path / "x.qcow2"
    arguments = ["-u", "-b", backing, "-F", "qcow2"] if backing else []
    qemu_img("create", "-f", "qcow2", "-o", options.replace("data.raw", str(tmp_path / "d")), *arguments, image, "1G")
    content = image.read_bytes()
    header = parsed(content)
    encoded = layout.encode_header_area(header, "x")
    assert encoded == content[: len(encoded)]
    assert not any(content[len(encoded) : header.cluster_size])
    assert header.backing_file == backing
    assert header.backing_format == ("qcow2" if backing else None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"lazy_refcounts": True, "refcount_bits": 8},
        {"compression_type": "zstd", "cluster_size": 4096},
        {"cluster_size": 512},
        {"cluster_size": 512, "backing_file": "base.qcow2", "backing_fmt": "qcow2"},
        {"backing_file": "base.raw", "backing_fmt": "raw", "compat": "0.10"},
    ],
)
async def test_our_headers_equal_those_of_qemu(tmp_path: Path, options: dict[str, object]) -> None:
    ours = await create_image(tmp_path / "ours.qcow2", size=1 << 20, **options)
    theirs = tmp_path / "theirs.qcow2"
    given = {key: str(value).lower() for key, value in options.items()}
    name, kind = given.pop("backing_file", None), given.pop("backing_fmt", None)
    backing = ["-u", "-b", name, "-F", kind] if name and kind else []
    flags = [part for key, value in given.items() for part in ("-o", f"{key}={value.replace('true', 'on')}")]
    qemu_img("create", "-f", "qcow2", *flags, *backing, theirs, "1M")
    ours_header, theirs_header = parsed(ours.read_bytes()), parsed(theirs.read_bytes())
    # Where tables lie is each one's own affair.
    for header in (ours_header, theirs_header):
        header.l1_table_offset = header.refcount_table_offset = 0
    assert ours_header == theirs_header


def test_unknown_extensions_and_header_fields_survive_a_rewrite() -> None:
    header = Header(cluster_bits=12, extra=bytes(range(1, 25)), backing_file="b\udcff")
    header.extensions = [Extension(0x12345678, b"odd"), Extension(0x12345678, b""), layout.feature_name_table()]
    again = parsed(layout.encode_header_area(header, "x").ljust(4096, b"\0"))
    assert again == header


def test_a_header_must_fit_into_one_cluster() -> None:
    header = Header(cluster_bits=9, extra=bytes(8), backing_file="n" * 392)
    layout.encode_header_area(header, "x")
    header.extensions = [Extension(0x12345678, b"")]
    with pytest.raises(ImageError, match="one cluster"):
        layout.encode_header_area(header, "x")


def be32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def be64(value: int) -> bytes:
    return value.to_bytes(8, "big")


HOSTILE = [
    (0, b"QFI\xfa", "514649fa"),
    (4, be32(1), "version 1"),
    (4, be32(4), "version 4"),
    (20, be32(8), "cluster bits of 8"),
    (20, be32(22), "cluster bits of 22"),
    (20, be32(0xFFFFFFFF), "cluster bits of 4294967295"),
    (24, be64(1 << 63), "virtual size of 9223372036854775808"),
    (24, be64(1 << 60), "L1 table of 2 entries and needs 2147483648"),
    (24, be64(SIZE + 1), "needs 3"),
    (32, be32(3), "encryption method 3"),
    (36, be32(1), "L1 table of 1 entries"),
    (36, be32(0xFFFFFFFF), "L1 table of 4294967295 entries"),
    (36, be32(100000), "L1 table at .* past the end of the file"),
    (40, be64(0), "L1 table at 0"),
    (40, be64(3 * CLUSTER + 8), "L1 table at 196616"),
    (40, be64(1 << 40), "L1 table at 1099511627776"),
    (40, be64(0xFFFFFFFFFFFF0000), "L1 table at 18446744073709486080"),
    (48, be64(0), "refcount table at 0"),
    (48, be64(1 << 62), "refcount table at"),
    (48, be64(3 * CLUSTER), "over its L1 table"),
    (56, be32(0), "refcount table of 0 clusters"),
    (56, be32(200), "refcount table of 200 clusters"),
    (60, be32(65537), "65537 snapshots"),
    (60, be32(1), "snapshot table at 0"),
    (60, be32(1) + be64(CLUSTER), "over its refcount table"),
    (96, be32(7), "refcount order of 7"),
    (100, be32(103), "header length of 103"),
    (100, be32(0xFFFFFFFF), "header length of 4294967295"),
    (8, be64(64) + be32(10), "backing file name at 64"),
    (8, be64(CLUSTER) + be32(1), "backing file name at 65536"),
    (8, be64(1 << 63) + be32(1), "backing file name at"),
    (8, be64(1000) + be32(1024), "name of 1024 bytes"),
    (112, struct.pack(">II", 1, CLUSTER), "extension 0x00000001 of 65536 bytes"),
    (8, be64(120) + be32(1), "extension 0x6803f857 of 384 bytes"),
    (104, b"\x01", "compression type zstd, but its compression type feature bit is not set"),
    (72, be64(8), "compression type zlib, but its compression type feature bit is set"),
]


@pytest.mark.parametrize(("position", "data", "found"), HOSTILE, ids=[item[2][:40] for item in HOSTILE])
async def test_hostile_headers_are_refused_with_a_sentence(position: int, data: bytes, found: str) -> None:
    store = await created_in_memory(Store(), size=SIZE)
    store.data[position : position + len(data)] = data
    with pytest.raises(ImageError, match=found) as caught:
        async with in_memory(store):
            pass
    message = caught.value.message
    assert "'memory:image'" in message
    assert message.endswith(".")
    assert any(word in message for word in ("must", "expected", "past the end", "needs", "agree"))


PLACES = {
    *("L1 table at .* past the end of the file", "L1 table at 0", "L1 table at 1099511627776", "over its L1 table"),
    *("refcount table at 0", "refcount table at", "refcount table of 0 clusters"),
    *("snapshot table at 0", "over its refcount table", "backing file name at 64"),
}
"""What a check of a hostile header does not refuse, as it can report it."""


async def checked(position: int, data: bytes) -> CheckResult:
    """Check an image whose header has ``data`` at ``position``."""
    store = await created_in_memory(Store(), size=SIZE)
    store.data[position : position + len(data)] = data
    graph = Graph(MEMORY_DRIVERS)
    with stores(image=store):
        try:
            backend = await graph.open_backend({"driver": "memory", "filename": "image"}, writable=False)
            return await Qcow2Driver.check(Files(backend.node), Repair.NOTHING, no_progress)
        finally:
            await graph.close()


@pytest.mark.parametrize(("position", "data", "found"), [item for item in HOSTILE if item[2] not in PLACES])
async def test_a_check_refuses_hostile_headers_in_the_words_of_opening(position: int, data: bytes, found: str) -> None:
    with pytest.raises(ImageError, match=found):
        await checked(position, data)


@pytest.mark.parametrize(("position", "data", "found"), [item for item in HOSTILE if item[2] in PLACES])
async def test_a_check_does_not_refuse_misplaced_tables(position: int, data: bytes, found: str) -> None:
    result = await checked(position, data)
    assert result.corruptions or result.leaks or "backing" in found


@pytest.mark.parametrize("length", [0, 3, 71, 72, 103, 104])
async def test_truncated_headers(length: int) -> None:
    store = await created_in_memory(Store(), size=SIZE)
    del store.data[length:]
    with pytest.raises(ImageError, match=f"'memory:image'.* {length} bytes"):
        async with in_memory(store):
            pass


@pytest.mark.parametrize(
    ("position", "data", "names"),
    [
        (72, be64(1 << 63 | 1 << 40), "features bit 40, bit 63"),
        (104, b"\x07", "compression type 7"),
    ],
)
async def test_features_not_supported_are_named(position: int, data: bytes, names: str) -> None:
    store = await created_in_memory(Store(), size=SIZE)
    store.data[position : position + len(data)] = data
    with pytest.raises(UnsupportedFeatureError, match=names):
        async with in_memory(store, writable=False):
            pass


async def test_the_image_names_its_own_unknown_features() -> None:
    store = await created_in_memory(Store(), size=SIZE)
    store.data[72:80] = be64(1 << 5)
    entry = struct.pack(">BB46s", 0, 5, b"time \x1b[31mtravel")
    store.data[120 : 120 + 48] = entry
    with pytest.raises(UnsupportedFeatureError, match=r"feature time \[31mtravel, which"):
        async with in_memory(store):
            pass


async def test_backing_name_past_the_end_of_a_short_file() -> None:
    store = await created_in_memory(Store(), size=0)
    store.data[8:20] = be64(60000) + be32(10)
    store.data[40:60] = bytes(8) + be64(0) + be32(1)
    del store.data[1000:]
    with pytest.raises(ImageError, match="the name of its backing file ends at 60010"):
        async with in_memory(store):
            pass


@pytest.mark.parametrize(
    ("place", "data", "found"),
    [
        ("header", be64(1 << 50), "snapshot table at 1125899906842624"),
        ("extra size", be32(1025), "1025 bytes of extra data"),
        ("id and name size", b"\xff\xff\xff\xff", "1 snapshots, but their table goes on"),
        ("count", be32(65536), "65536 snapshots, but their table goes on"),
    ],
)
async def test_snapshot_tables_are_bounded(tmp_path: Path, place: str, data: bytes, found: str) -> None:
    image = tmp_path / "x.qcow2"
    qemu_img("create", "-f", "qcow2", image, "1M")
    qemu_img("snapshot", "-c", "one", image)
    content = bytearray(image.read_bytes())
    async with opened(image, writable=False) as backend:
        assert [snapshot.name for snapshot in driver_of(backend).snapshots] == ["one"]
    table = parsed(bytes(content)).snapshots_offset
    position = {"header": 64, "count": 60, "extra size": table + 36, "id and name size": table + 12}[place]
    content[position : position + len(data)] = data
    image.write_bytes(content)
    with pytest.raises(ImageError, match=found):
        async with opened(image, writable=False):
            pass


async def test_mutated_headers_raise_only_our_errors() -> None:
    original = await created_in_memory(Store(), size=SIZE)
    async with in_memory(original) as backend:
        await backend.write(0, b"x" * 100000)
    good = bytes(original.data)
    rng = random.Random(1)
    refused = 0
    for _ in range(600):
        store = Store(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            position = rng.randrange(120) if rng.random() < 0.8 else rng.randrange(512)
            store.data[position] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        store.steps.calls.clear()
        try:
            async with in_memory(store, writable=rng.random() < 0.5, backing=None) as backend:
                await backend.read(0, min(backend.length, 200000))
        except FusediskError:
            refused += 1
        longest = max((call.length for call in store.steps.of("read")), default=0)
        assert longest <= 32 << 20
    assert 200 < refused < 600
