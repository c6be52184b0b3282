"""Headers that are cut off, absurd or from the future: refused with one sentence that names file and fault."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import FusediskError, ImageError, UnsupportedFeatureError
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img
from tests.hostile.images import places, small_image
from tests.hostile.sentence import assert_sentence


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small_image(tmp_path_factory.mktemp("headers") / "disk.qcow2")


async def _refused(path: Path, *, writable: bool = False, format: str | None = "qcow2") -> FusediskError:
    graph = Graph(DRIVERS)
    with pytest.raises(FusediskError) as caught:
        await graph.open_backend(str(path), writable=writable, format=format)
    assert not graph.nodes
    assert_sentence(caught.value, path)
    return caught.value


async def test_cut_off_at_every_length(image: bytes, tmp_path: Path) -> None:
    """The header, its extensions, and every table: nothing of an image that ends in them is opened."""
    found = places(image)
    tables_end = max(start + length for start, length in (found.l1, found.refcount_table))
    path = tmp_path / "cut.qcow2"
    path.write_bytes(image)
    for length in range(tables_end - 1, -1, -1):
        if length > 640 and length % 61:
            continue
        with path.open("r+b") as file:
            file.truncate(length)
        error = await _refused(path)
        assert isinstance(error, ImageError)
        assert str(length) in str(error) or "behind the header" in str(error), str(error)


async def test_cut_off_behind_the_tables(image: bytes, tmp_path: Path) -> None:
    """Data that is gone reads as zeroes, as QEMU reads it; the rest is there."""
    path, whole = tmp_path / "cut.qcow2", tmp_path / "whole.raw"
    found = places(image)
    length = max(start + size for start, size in (found.l1, found.refcount_table, *found.l2, *found.refcount_blocks))
    path.write_bytes(image[:length])
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, whole)
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(path))
    readable = whole.read_bytes()
    for offset in range(0, backend.length, 512):
        try:
            assert await backend.read(offset, 512) == readable[offset : offset + 512]
        except FusediskError as exc:
            assert_sentence(exc, path)
    await graph.close()


def _set(at: int, format: str, value: int) -> Callable[[bytearray], None]:
    return lambda image: struct.pack_into(format, image, at, value)


FIELDS: dict[str, tuple[Callable[[bytearray], None], type[FusediskError], str]] = {
    "no magic": (_set(0, ">I", 0), ImageError, "starts with the bytes 00000000, expected qcow2's 514649fb."),
    "version 0": (_set(4, ">I", 0), UnsupportedFeatureError, "is qcow2 of version 0, expected version 2 or 3."),
    "version 1": (_set(4, ">I", 1), UnsupportedFeatureError, "is qcow2 of version 1, expected version 2 or 3."),
    "version 4": (_set(4, ">I", 4), UnsupportedFeatureError, "is qcow2 of version 4, expected version 2 or 3."),
    "cluster bits 0": (_set(20, ">I", 0), ImageError, "has qcow2 cluster bits of 0, expected 9 to 21"),
    "cluster bits 8": (_set(20, ">I", 8), ImageError, "has qcow2 cluster bits of 8, expected 9 to 21"),
    "cluster bits 22": (_set(20, ">I", 22), ImageError, "has qcow2 cluster bits of 22, expected 9 to 21"),
    "cluster bits 63": (_set(20, ">I", 63), ImageError, "has qcow2 cluster bits of 63, expected 9 to 21"),
    "cluster bits 2^32": (_set(20, ">I", 0xFFFFFFFF), ImageError, "has qcow2 cluster bits of 4294967295"),
    "size 2^63": (_set(24, ">Q", 1 << 63), ImageError, "has a virtual size of 9223372036854775808 bytes"),
    "size past the L1": (_set(24, ">Q", 1 << 40), ImageError, "L1 table of"),
    "LUKS without a header": (_set(32, ">I", 2), ImageError, "encryption method 2 and no pointer to a LUKS header"),
    "encryption 3": (_set(32, ">I", 3), ImageError, "has the encryption method 3, expected 0, 1 or 2."),
    "refcount order 7": (_set(96, ">I", 7), ImageError, "has a refcount order of 7, expected at most 6"),
    "refcount order 2^31": (_set(96, ">I", 1 << 31), ImageError, "has a refcount order of 2147483648"),
    "header length 103": (_set(100, ">I", 103), ImageError, "has a header length of 103, expected 104 to 512 bytes"),
    "header length 513": (_set(100, ">I", 513), ImageError, "has a header length of 513, expected 104 to 512 bytes"),
    "extension too long": (
        _set(116, ">I", 0x7FFFFFFF),
        ImageError,
        "has the header extension 0x12345678 of 2147483647",
    ),
    "external data file": (_set(72, ">Q", 4), ImageError, "has an external data file and does not name it"),
    "extended L2": (
        _set(72, ">Q", 16),
        ImageError,
        "extended L2 entries and clusters of 512 bytes, expected at least 16384",
    ),
    "unknown feature": (_set(72, ">Q", 1 << 40), UnsupportedFeatureError, "qcow2 feature bit 40, which is not"),
    "two unknown features": (
        _set(72, ">Q", 5 << 61),
        UnsupportedFeatureError,
        "features bit 61, bit 63, which are not",
    ),
    "compression type 2": (_set(104, ">B", 2), UnsupportedFeatureError, "uses the compression type 2"),
    "zstd without its bit": (_set(104, ">B", 1), ImageError, "the two must agree"),
    "backing name too long": (_set(8, ">QI", 0), ImageError, ""),
    "backing name in the header": (_set(8, ">Q", 0), ImageError, ""),
}
del FIELDS["backing name too long"], FIELDS["backing name in the header"]


@pytest.mark.parametrize("case", FIELDS)
async def test_fields(image: bytes, tmp_path: Path, case: str) -> None:
    change, kind, message = FIELDS[case]
    damaged = bytearray(image)
    if case == "extension too long":
        struct.pack_into(">I", damaged, 112, 0x12345678)
    change(damaged)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(damaged)
    for writable in (False, True):
        error = await _refused(path, writable=writable)
        assert isinstance(error, kind)
        assert str(error).startswith(f"'{path}' ")
        assert message in str(error), str(error)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (0x70, 1024, "has a backing file name of 1024 bytes, expected at most 1023."),
        (0x70, 1000, "has its backing file name at 112 with 1000 bytes"),
        (8, 10, "has its backing file name at 8 with 10 bytes"),
        (1 << 62, 10, "has its backing file name at 4611686018427387904 with 10 bytes"),
    ],
)
async def test_backing_names_in_wrong_places(
    image: bytes, tmp_path: Path, offset: int, size: int, message: str
) -> None:
    damaged = bytearray(image)
    struct.pack_into(">QI", damaged, 8, offset, size)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(damaged)
    assert message in str(await _refused(path))


async def test_unknown_features_by_the_images_own_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    image = bytearray(path.read_bytes())
    at = image.index(b"dirty bit") - 2
    image[at : at + 48] = struct.pack(">BB46s", 0, 55, b"time \x1b[31mtravel\n")
    struct.pack_into(">Q", image, 72, 1 << 55)
    path.write_bytes(image)
    error = await _refused(path)
    assert str(error) == (f"'{path}' uses the incompatible qcow2 feature time [31mtravel, which is not supported.")


async def test_compatible_and_autoclear_bits_from_the_future(image: bytes, tmp_path: Path) -> None:
    """Compatible ones are kept, autoclear ones are cleared by the first writer and by nobody else."""
    path = tmp_path / "disk.qcow2"
    future = bytearray(image)
    struct.pack_into(">QQ", future, 80, 1 << 44, 1 << 33)
    path.write_bytes(future)
    graph = Graph(DRIVERS)
    reader = await graph.open_backend(str(path))
    await reader.read(0, 512)
    await reader.close()
    assert path.read_bytes() == future
    writer = await graph.open_backend(str(path), writable=True)
    await writer.write(0, b"x" * 512)
    await writer.close()
    assert struct.unpack_from(">QQ", path.read_bytes(), 80) == (1 << 44, 0)


async def test_dirty_refcounts_are_left_alone_by_readers(image: bytes, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    dirty = bytearray(image)
    dirty[79] |= 1
    path.write_bytes(dirty)
    graph = Graph(DRIVERS)
    reader = await graph.open_backend(str(path))
    await reader.read(0, reader.length)
    await reader.close()
    assert path.read_bytes() == dirty
    writer = await Graph(DRIVERS).open_backend(str(path), writable=True)
    await writer.close()
    assert not path.read_bytes()[79] & 1


@pytest.mark.parametrize("size", [0, 1, 3, 4, 71, 511])
async def test_short_files_are_raw_unless_named(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"QFI\xfb"[:size].ljust(size, b"\0"))
    error = await _refused(path)
    assert f"is {size} bytes long, expected a qcow2 header of at least 72 bytes." in str(error) or size >= 72
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(path))
    assert backend.node.driver.name == "raw"
    assert backend.length == size
    await backend.close()
