"""Extended L2 entries: what every bitmap maps to, what writes, zeroes and discards make of it, here and in QEMU."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import fusedisk
from fusedisk.block.graph.backend import Backend
from fusedisk.block.model.extent import DATA, UNALLOCATED, ZERO
from fusedisk.core.errors import CorruptImageError, HostError, ImageError, NotSupportedError, OptionError
from fusedisk.drivers.format.qcow2.entries import ALL_ALLOCATED, ALL_ZEROES, COMPRESSED, COPIED, OFFSET_MASK
from tests.conftest import ToolError, qemu_img, qemu_io
from tests.support.memory import Store
from tests.support.qcow2 import (
    assert_clean,
    check,
    create_image,
    created_in_memory,
    driver_of,
    in_memory,
    opened,
    raw_content,
)

CLUSTER = 64 << 10
SUB = CLUSTER // 32
EXTENDED_SIZES = [16 << 10 << shift for shift in range(8)]


async def new_store(**options: Any) -> Store:
    return await created_in_memory(Store(), size=16 << 20, extended_l2=True, **options)


def words(backend: Backend, index: int) -> tuple[int, int]:
    """Descriptor and bitmap of a guest cluster; of the first L2 table."""
    image = driver_of(backend).image
    table = image.l2.get(image.l1[0] & OFFSET_MASK)
    return (table[2 * index], table[2 * index + 1]) if table is not None else (0, 0)


def subclusters(first: int, end: int) -> int:
    return (1 << end) - (1 << first)


async def chain(tmp_path: Path, length: int = 4 * CLUSTER, size: int = 4 * CLUSTER, **options: Any) -> Path:
    """An overlay with subclusters over a raw file full of ``b``."""
    (tmp_path / "base.raw").write_bytes(b"b" * length)
    return await create_image(
        tmp_path / "top.qcow2", size=size, extended_l2=True, backing_file="base.raw", backing_fmt="raw", **options
    )


async def map_of(image: Path | dict[str, Any]) -> list[dict[str, Any]]:
    """Our map in qemu-img's form."""
    found = []
    async with fusedisk.open(image, format="qcow2") as disk:
        async for entry in disk.extents():
            one: dict[str, Any] = {key: getattr(entry, key) for key in ("start", "length", "depth", "present")}
            one |= {"zero": entry.zero, "data": entry.data}
            found.append(one if entry.offset is None else one | {"offset": entry.offset})
    return found


def qemu_map(image: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(qemu_img("map", "--output=json", "-f", "qcow2", image))
    return found


# --- creating and opening -------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", EXTENDED_SIZES)
async def test_qemu_takes_new_images(cluster_size: int, tmp_path: Path) -> None:
    image = await create_image(
        tmp_path / "x.qcow2", size=3 * cluster_size + 512, cluster_size=cluster_size, extended_l2=True
    )
    report = json.loads(qemu_img("info", "--output=json", image))
    assert report["format-specific"]["data"]["extended-l2"] is True
    async with opened(image) as backend:
        information = driver_of(backend).specific_information()
        assert information is not None
        assert information["extended-l2"] is True
        limits = backend.node.limits
        assert (limits.zeroes_alignment, limits.discard_alignment) == (cluster_size // 32, cluster_size)
    assert_clean(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster_size": 8192}, "cluster_size is 8192, expected at least 16384 with extended_l2"),
        ({"compat": "0.10"}, "extended_l2 is 'True', which needs compat=1.1"),
    ],
)
async def test_images_that_cannot_have_subclusters(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        await create_image(tmp_path / "x.qcow2", size=1 << 20, extended_l2=True, **options)
    given = ",".join(f"{key}={value}" for key, value in options.items())
    with pytest.raises(ToolError):
        qemu_img("create", "-f", "qcow2", "-o", f"extended_l2=on,{given}", tmp_path / "y.qcow2", "1M")


async def test_small_clusters_with_the_feature_bit_are_refused() -> None:
    store = await created_in_memory(Store(), size=1 << 20, cluster_size=8192)
    store.data[79] |= 1 << 4
    with pytest.raises(ImageError, match="extended L2 entries and clusters of 8192 bytes, expected at least 16384"):
        async with in_memory(store):
            pass


async def test_preallocated_clusters_let_the_backing_file_show_through(tmp_path: Path) -> None:
    top = await chain(tmp_path, preallocation="metadata")
    async with opened(top) as backend:
        assert words(backend, 0) == (0, 0), "the table is not loaded yet"
        assert await backend.read(0, 4 * CLUSTER) == b"b" * 4 * CLUSTER
        place, bitmap = words(backend, 1)
        assert (place & COPIED, bitmap) == (COPIED, 0)
        await backend.write(CLUSTER + SUB, b"n" * SUB)
        assert words(backend, 1) == (place, 1 << 1), "the space that was reserved is used"
    assert_clean(top)
    assert raw_content(top, tmp_path) == (b"b" * (CLUSTER + SUB) + b"n" * SUB + b"b" * (3 * CLUSTER - 2 * SUB))


# --- reading --------------------------------------------------------------------------------------------


def random_bitmap(rng: random.Random) -> int:
    """No subcluster of it is both data and zeroes."""
    data = rng.choice((0, ALL_ALLOCATED, rng.getrandbits(32), subclusters(*sorted(rng.sample(range(33), 2)))))
    zero = rng.choice((0, ALL_ALLOCATED, rng.getrandbits(32))) & ~data
    return zero << 32 | data


@pytest.mark.parametrize("seed", range(8))
async def test_every_bitmap_reads_and_maps_as_in_qemu(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    count, cluster_size = 24, rng.choice(EXTENDED_SIZES[:4])
    (tmp_path / "base.raw").write_bytes(rng.randbytes(1024) * (count * cluster_size * 2 // 3 // 1024))
    top = tmp_path / "top.qcow2"
    backed = ("-b", "base.raw", "-F", "raw") if rng.random() < 0.7 else ()
    options = f"extended_l2=on,cluster_size={cluster_size},preallocation=metadata"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *backed, top, str(count * cluster_size))
    qemu_io(top, f"write -q -P 5 0 {count * cluster_size}", fmt="qcow2")
    content = bytearray(top.read_bytes())
    l2 = int.from_bytes(content[int.from_bytes(content[40:48], "big") :][:8], "big") & OFFSET_MASK
    bitmaps = [random_bitmap(rng) for _ in range(count)]
    for index, bitmap in enumerate(bitmaps):
        content[l2 + 16 * index + 8 : l2 + 16 * index + 16] = bitmap.to_bytes(8, "big")
    top.write_bytes(content)
    assert_clean(top)
    expected = raw_content(top, tmp_path)
    async with opened(top, writable=False) as backend:
        assert await backend.read(0, backend.length) == expected
        for index in rng.sample(range(count), 8):
            for number in range(32):
                extent = await driver_of(backend).map(index * cluster_size + number * cluster_size // 32, 1)
                bit = bitmaps[index] >> number
                assert extent.status == (DATA if bit & 1 else ZERO if bit >> 32 & 1 else UNALLOCATED)
    assert await map_of(top) == qemu_map(top)


REQUESTS: dict[str, Callable[[Backend], Awaitable[Any]]] = {
    "read": lambda backend: backend.read(0, 1),
    "write": lambda backend: backend.write(100, b"n"),
    "write-zeroes": lambda backend: backend.write_zeroes(0, 2 * CLUSTER),
    "write-zeroes to a part": lambda backend: backend.write_zeroes(2 * SUB, SUB),
    "discard": lambda backend: backend.discard(0, CLUSTER),
    "write-compressed": lambda backend: backend.write_compressed(0, b"c" * CLUSTER),
}


@pytest.mark.parametrize(
    ("place", "bitmap", "message"),
    [
        (None, 1 << 32 | 1, "both data and zeroes"),
        (None, 1 << 63 | 1 << 31, "both data and zeroes"),
        (0, 1 << 31, "no subclusters with data"),
        (COMPRESSED | 5 << 16, 1 << 40, "no bitmap, as the cluster is compressed"),
        (COPIED | 7 << 16 | 1 << 9, 1, "a multiple of 65536"),
    ],
)
@pytest.mark.parametrize("request_", REQUESTS)
async def test_entries_that_cannot_be_fence_the_image(
    place: int | None, bitmap: int, message: str, request_: str
) -> None:
    store = await new_store()
    async with in_memory(store) as backend:
        await backend.write(0, b"x" * 2 * CLUSTER)
        at = words(backend, 0)[0]
        l2 = driver_of(backend).image.l1[0] & OFFSET_MASK
    entry = at if place is None else place
    store.data[l2 : l2 + 16] = entry.to_bytes(8, "big") + bitmap.to_bytes(8, "big")
    async with in_memory(store, discard="unmap") as backend:
        await backend.write(CLUSTER, b"x")
        with pytest.raises(CorruptImageError, match=message):
            await REQUESTS[request_](backend)
        assert backend.node.fenced is not None
    assert store.data[79] & 2, "marked corrupt"


# --- writing --------------------------------------------------------------------------------------------


async def test_a_write_copies_only_the_subclusters_that_it_touches(tmp_path: Path) -> None:
    top = await chain(tmp_path)
    async with opened(top) as backend:
        await backend.write(3 * SUB + 100, b"n" * (2 * SUB))
        place, bitmap = words(backend, 0)
        assert bitmap == subclusters(3, 6)
        assert await backend.read(0, CLUSTER) == (
            b"b" * (3 * SUB + 100) + b"n" * 2 * SUB + b"b" * (CLUSTER - 5 * SUB - 100)
        )
        # In front of data and behind it, in the same host cluster; the data between stays.
        await backend.write(0, b"m" * (4 * SUB))
        await backend.write(31 * SUB + 5, b"m" * (CLUSTER + SUB))
        assert words(backend, 0) == (place, subclusters(0, 6) | 1 << 31)
        assert words(backend, 1)[1] == ALL_ALLOCATED
        assert words(backend, 2)[1] == 1
        expected = b"m" * 4 * SUB + b"n" * (SUB + 100) + b"b" * (26 * SUB - 95) + b"m" * (CLUSTER + SUB)
        expected += b"b" * (4 * CLUSTER - len(expected))
        assert await backend.read(0, 4 * CLUSTER) == expected
    assert_clean(top)
    assert raw_content(top, tmp_path) == expected


async def test_zero_subclusters_are_overwritten_and_the_others_stay(tmp_path: Path) -> None:
    top = await chain(tmp_path)
    async with opened(top) as backend:
        await backend.write_zeroes(0, CLUSTER)
        assert words(backend, 0) == (0, ALL_ZEROES)
        await backend.write(SUB + 1, b"n")
        assert words(backend, 0)[1] == ALL_ZEROES & ~(1 << 33) | 1 << 1
        assert await backend.read(0, CLUSTER) == bytes(SUB + 1) + b"n" + bytes(CLUSTER - SUB - 2)
    assert_clean(top)


async def test_a_shared_cluster_is_copied_from_its_first_data_to_its_last(tmp_path: Path) -> None:
    top = await chain(tmp_path)
    async with opened(top) as backend:
        await backend.write(4 * SUB, b"x" * SUB)
        await backend.write(9 * SUB, b"x" * SUB)
        await backend.write_zeroes(31 * SUB, SUB)
        await backend.write_zeroes(6 * SUB, SUB)
        bitmap = 1 << 4 | 1 << 9 | 1 << 63 | 1 << 38
        assert words(backend, 0)[1] == bitmap
    before = raw_content(top, tmp_path)
    qemu_img("snapshot", "-c", "one", top)
    async with opened(top, discard="unmap") as backend:
        await backend.read(0, 1)
        old = words(backend, 0)[0]
        await backend.write(12 * SUB, b"n" * SUB)
        place, bitmap = words(backend, 0)
        # The zeroes and the backing file's data between were copied, those behind were not.
        assert bitmap == subclusters(4, 13) | 1 << 63
        assert place & OFFSET_MASK != old & OFFSET_MASK
        await backend.write_zeroes(4 * SUB, SUB)
        await backend.discard(CLUSTER, CLUSTER)
        expected = bytearray(before)
        expected[12 * SUB : 13 * SUB] = b"n" * SUB
        expected[4 * SUB : 5 * SUB] = bytes(SUB)
        expected[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
        assert await backend.read(0, 4 * CLUSTER) == expected
    assert_clean(top)
    assert raw_content(top, tmp_path) == expected
    qemu_img("snapshot", "-a", "one", top)
    assert raw_content(top, tmp_path) == before
    assert_clean(top)


async def test_a_compressed_cluster_becomes_one_with_all_subclusters(tmp_path: Path) -> None:
    image = await create_image(tmp_path / "x.qcow2", size=4 * CLUSTER, extended_l2=True)
    qemu_io(image, "write -c -P 5 0 64k", "write -c -P 6 64k 64k", fmt="qcow2")
    async with opened(image, discard="unmap") as backend:
        await backend.write(3 * SUB, b"n")
        assert words(backend, 0)[1] == ALL_ALLOCATED
        # A part of a compressed cluster cannot be zeroes: it is written out, the rest of the request is not.
        await backend.write_zeroes(CLUSTER + 4 * SUB, 2 * CLUSTER)
        assert words(backend, 1)[1] == ALL_ALLOCATED
        # What read as zeroes anyway stays as it is.
        assert words(backend, 2) == words(backend, 3) == (0, 0)
        expected = b"\5" * 3 * SUB + b"n" + b"\5" * (CLUSTER - 3 * SUB - 1) + b"\6" * 4 * SUB
        expected += bytes(4 * CLUSTER - len(expected))
        assert await backend.read(0, 4 * CLUSTER) == expected
    assert_clean(image)
    assert raw_content(image, tmp_path) == expected


async def test_writers_of_one_cluster_do_not_lose_each_others_bits() -> None:
    async with in_memory(await new_store()) as backend:
        async with trio.open_nursery() as nursery:
            for number in range(32):
                nursery.start_soon(backend.write, number * SUB, bytes([number + 1]) * SUB)
        assert words(backend, 0)[1] == ALL_ALLOCATED
        assert await backend.read(0, CLUSTER) == b"".join(bytes([number + 1]) * SUB for number in range(32))


async def test_a_failed_write_leaves_the_bitmap_as_it_was(tmp_path: Path) -> None:
    store = await new_store()
    async with in_memory(store) as backend:
        await backend.write(0, b"x" * SUB)
        before = words(backend, 0)
        store.steps.fail("write", HostError("no", errno=5))
        with pytest.raises(HostError):
            await backend.write(5 * SUB, b"n" * SUB)
        store.steps.heal()
        assert words(backend, 0) == before
        await backend.write(6 * SUB, b"m" * SUB)
        assert words(backend, 0)[1] == 1 << 0 | 1 << 6
        assert await backend.read(0, 8 * SUB) == b"x" * SUB + bytes(5 * SUB) + b"m" * SUB + bytes(SUB)
    (tmp_path / "x.qcow2").write_bytes(store.data)
    assert_clean(tmp_path / "x.qcow2")


# --- zeroes, discard, resize ----------------------------------------------------------------------------


async def test_zeroes_by_subclusters_and_the_space_they_leave() -> None:
    async with in_memory(await new_store(), discard="unmap") as backend:
        await backend.write(0, b"x" * CLUSTER)
        place = words(backend, 0)[0]
        await backend.write_zeroes(SUB + 7, 3 * SUB)
        # Whole subclusters are zeroes, what is left at the edges was written.
        assert words(backend, 0) == (place, ALL_ALLOCATED & ~subclusters(2, 4) | subclusters(2, 4) << 32)
        assert await backend.read(0, 5 * SUB) == b"x" * (SUB + 7) + bytes(3 * SUB) + b"x" * (SUB - 7)
        await backend.write_zeroes(0, 31 * SUB)
        assert words(backend, 0) == (place, subclusters(0, 31) << 32 | 1 << 31), "kept: it must not be unmapped"
        await backend.write_zeroes(31 * SUB, SUB, may_unmap=True)
        assert words(backend, 0) == (0, ALL_ZEROES), "with its last data the cluster goes"
        await backend.flush()
        await backend.write(5 * CLUSTER, b"n")
        assert words(backend, 5)[0] == place, "and may be used again"


@pytest.mark.parametrize("longer", [False, True])
async def test_growing_shows_nothing_that_lay_behind_the_end(longer: bool, tmp_path: Path) -> None:
    size = CLUSTER + 5 * SUB + 512
    top = await chain(tmp_path, length=4 * CLUSTER if longer else size, size=size)
    async with opened(top) as backend:
        await backend.write(size - 10, b"n" * 10)
    qemu_io(top, f"write -P 7 {size - 512} 512", fmt="qcow2")
    async with opened(top) as backend:
        await backend.truncate(4 * CLUSTER)
        expected = b"b" * (size - 512) + b"\7" * 512 + bytes(4 * CLUSTER - size)
        assert await backend.read(0, 4 * CLUSTER) == expected
    assert_clean(top)
    assert raw_content(top, tmp_path) == expected


@pytest.mark.slow
async def test_encrypted_subclusters(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * 4 * CLUSTER)
    (tmp_path / "key").write_text("secret")
    image = tmp_path / "x.qcow2"
    encryption = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    secret = ("--object", f"secret,id=s,file={tmp_path / 'key'}")
    options = f"extended_l2=on,{encryption},backing_file=base.raw,backing_fmt=raw"
    qemu_img("create", "-q", "-f", "qcow2", *secret, "-o", options, image, str(4 * CLUSTER))
    spec = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": str(image)},
        "encrypt": {"key-file": str(tmp_path / "key")},
    }
    async with fusedisk.open(spec, writable=True) as disk:
        await disk.write(2 * SUB + 10, b"n" * 3 * SUB)
        await disk.write(CLUSTER, b"m" * (CLUSTER + SUB))
        await disk.write_zeroes(3 * SUB, SUB, may_unmap=False)
        await disk.write_zeroes(CLUSTER, CLUSTER, may_unmap=False)
        expected = await disk.read(0, 4 * CLUSTER)
        written = b"b" * (2 * SUB + 10) + b"n" * (SUB - 10) + bytes(SUB) + b"n" * (SUB + 10)
        written += b"b" * (CLUSTER - len(written)) + bytes(CLUSTER) + b"m" * SUB
        assert expected == written + b"b" * (4 * CLUSTER - len(written))
        with pytest.raises(NotSupportedError, match="is encrypted, so nothing in it can be compressed"):
            await disk.write_compressed(0, b"c" * CLUSTER)
    place = f"driver=qcow2,encrypt.key-secret=s,file.filename={image}"
    qemu_img("convert", *secret, "--image-opts", "-O", "raw", place, tmp_path / "content.raw")
    assert (tmp_path / "content.raw").read_bytes() == expected
    theirs = json.loads(qemu_img("map", "--output=json", *secret, "--image-opts", place))
    assert await map_of(spec) == theirs


# --- both ways ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", EXTENDED_SIZES)
async def test_we_and_qemu_take_turns(cluster_size: int, tmp_path: Path) -> None:
    rng = random.Random(cluster_size)
    sub, size = cluster_size // 32, 6 * cluster_size + 3 * 512
    half = size // 1024 * 512
    expected = bytearray((rng.randbytes(500) * (size // 500))[:half].ljust(size, b"\0"))
    (tmp_path / "base.raw").write_bytes(expected[:half])
    top = await create_image(
        tmp_path / "top.qcow2",
        size=size,
        cluster_size=cluster_size,
        extended_l2=True,
        backing_file="base.raw",
        backing_fmt="raw",
    )
    for round_ in range(6):
        commands = []
        async with opened(top, discard="unmap") as backend:
            for _ in range(12):
                offset = rng.randrange(size // 512) * 512
                length = min(rng.choice((512, sub, 3 * sub, cluster_size, 2 * cluster_size)), size - offset)
                content = bytes([rng.randrange(1, 256)]) * length
                kind = rng.choice(("write", "write", "zero", "unmap"))
                expected[offset : offset + length] = content if kind == "write" else bytes(length)
                if round_ % 2:
                    flag = f"-P {content[0]}" if kind == "write" else "-z" if kind == "zero" else "-z -u"
                    commands.append(f"write -q {flag} {offset} {length}")
                elif kind == "write":
                    await backend.write(offset, content)
                else:
                    await backend.write_zeroes(offset, length, may_unmap=kind == "unmap")
        if commands:
            qemu_io(top, *commands, fmt="qcow2", options="-d unmap")
        if round_ in (1, 2):
            qemu_img("snapshot", "-c", f"s{round_}", top)
        assert_clean(top)
        assert await map_of(top) == qemu_map(top)
        assert raw_content(top, tmp_path) == expected
        async with opened(top) as backend:
            assert await backend.read(0, size) == expected
    assert check(top)["allocated-clusters"] > 0
