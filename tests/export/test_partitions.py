"""Partition tables: those of real tools, damaged ones, and hostile ones made by hand."""

from __future__ import annotations

import json
import struct
import subprocess
import uuid
import zlib
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedisk.export.partitions.reading import read_table
from fusedisk.export.partitions.table import Table
from tests.conftest import require_tool, run_tool

MIB = 1 << 20
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


class Disk:
    """Bytes to read a table from, sparse; counts what is read and lets nothing else be."""

    def __init__(self, length: int, parts: dict[int, bytes] | None = None) -> None:
        self.length = length
        self.parts = parts or {}
        self.reads = self.bytes_read = 0

    @classmethod
    def of(cls, path: Path) -> Disk:
        content = path.read_bytes()
        return cls(len(content), {0: content})

    def put(self, offset: int, data: bytes) -> None:
        self.parts[offset] = data

    async def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert offset + length <= self.length
        self.reads += 1
        self.bytes_read += length
        found = bytearray(length)
        for start, data in self.parts.items():
            low, high = max(start, offset), min(start + len(data), offset + length)
            if low < high:
                found[low - offset : high - offset] = data[low - start : high - start]
        return bytes(found)

    def table(self) -> Table | str:
        return trio.run(read_table, self.read, self.length)

    def found(self) -> Table:
        table = self.table()
        assert isinstance(table, Table), table
        return table

    def places(self) -> list[tuple[int, int, int]]:
        """(number, start, length) of each partition."""
        return [(found.number, found.start, found.length) for found in self.found().partitions]


def sector(*entries: tuple[int, int, int] | tuple[int, int, int, int], signature: bytes = b"\x55\xaa") -> bytes:
    """An MBR or a link: (type, start, sectors), and a flag where it is not 0."""
    packed = b"".join(struct.pack("<B3xB3xII", *entry[3:] or (0,), *entry[:3]) for entry in entries)
    return bytes(440) + b"\xef\xbe\xad\xde\0\0" + packed.ljust(64, b"\0") + signature


def gpt_entry(first: int, last: int, name: str = "", kind: uuid.UUID = LINUX) -> bytes:
    identity = uuid.UUID(int=first + 1)
    return struct.pack("<16s16sQQQ72s", kind.bytes_le, identity.bytes_le, first, last, 0, name.encode("utf-16-le"))


def gpt(
    disk: Disk,
    entries: bytes,
    *,
    size: int = 512,
    lba: int = 1,
    array_lba: int = 2,
    count: int | None = None,
    entry_size: int = 128,
    header_size: int = 92,
    my_lba: int | None = None,
    array_crc: int | None = None,
) -> None:
    """Put one copy of a GPT on the disk, with sound checksums unless they are given, and a protective MBR."""
    disk.put(0, sector((0xEE, 1, 0xFFFFFFFF)))
    fields = [0x10000, header_size, 0, 0, lba if my_lba is None else my_lba, 0, 34, 99, bytes(16), array_lba]
    fields += [len(entries) // 128 if count is None else count, entry_size]
    fields += [zlib.crc32(entries) if array_crc is None else array_crc]
    header = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", *fields).ljust(min(header_size, size), b"\0")
    crc = zlib.crc32(header[:header_size])
    disk.put(lba * size, header[:16] + struct.pack("<I", crc) + header[20:])
    if array_lba * size < disk.length:
        disk.put(array_lba * size, entries)


# --- real tools -----------------------------------------------------------------------------------------


def partitioned(path: Path, script: str, size: int = 64 * MIB) -> Path:
    """A raw disk partitioned by sfdisk."""
    with path.open("wb") as file:
        file.truncate(size)
    command = [require_tool("sfdisk"), "-q", "--no-tell-kernel", str(path)]
    subprocess.run(command, input=script, text=True, check=True, timeout=60)
    return path


@pytest.mark.parametrize(
    "script",
    [
        "label: dos\n,8M\n,4M,S\n,30M,E\n,\n,5M\n,6M\n,1M,S\n",
        "label: dos\n,8M\n",
        'label: gpt\nsize=8M, name=root\nsize=4M, type=S\ntype=U, name="what is left"\n',
        "label: gpt\ntable-length: 256\n200: size=8M\n3: size=4M\n",
    ],
)
def test_what_sfdisk_makes(tmp_path: Path, script: str) -> None:
    image = partitioned(tmp_path / "disk.raw", script)
    said = json.loads(run_tool("sfdisk", "--json", image))["partitiontable"]
    table = Disk.of(image).found()
    assert table.kind == said["label"]
    assert table.remarks == []
    expected = [
        (int(entry["node"].removeprefix(str(image))), entry["start"] * 512, entry["size"] * 512, entry.get("uuid"))
        for entry in said["partitions"]
        if entry["type"] != "5"
    ]
    found = [(part.number, part.start, part.length, part.uuid) for part in table.partitions]
    if table.kind == "dos":
        disk_id = int(said["id"], 16)
        expected = [(number, start, length, f"{disk_id:08x}-{number:02x}") for number, start, length, _ in expected]
        assert [int(part.type, 16) for part in table.partitions] == [
            int(entry["type"], 16) for entry in said["partitions"] if entry["type"] != "5"
        ]
    else:
        expected = [(number, start, length, identity.lower()) for number, start, length, identity in expected]
        assert [(part.type, part.name) for part in table.partitions] == [
            (entry["type"].lower(), entry.get("name", "")) for entry in said["partitions"]
        ]
    assert found == sorted(expected)


def test_sectors_of_4096_bytes() -> None:
    disk = Disk(MIB)
    entries = gpt_entry(8, 9, "first") + gpt_entry(10, 249)
    gpt(disk, entries, size=4096)
    assert disk.found().sector_size == 4096
    assert disk.places() == [(1, 8 * 4096, 2 * 4096), (2, 10 * 4096, 240 * 4096)]
    gpt(disk, entries, size=4096, lba=255, array_lba=251)
    disk.put(4096, b"EFI PARK")
    assert disk.places() == [(1, 8 * 4096, 2 * 4096), (2, 10 * 4096, 240 * 4096)]
    assert disk.found().remarks == [
        "its GPT is damaged (sector 1 has not the signature of a header), so the backup in sector 255 is taken"
    ]


@pytest.mark.parametrize(
    ("offset", "why"),
    [
        (512, "sector 1 has not the signature of a header"),
        (512 + 50, "the header's checksum is"),
        (1024 + 60, "the entries' checksum is"),
    ],
)
def test_a_damaged_gpt_has_a_backup(tmp_path: Path, offset: int, why: str) -> None:
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    run_tool("sgdisk", "--new=1:0:+2M", "--new=5:0:+3M", "--change-name=5:data", image)
    sound = Disk.of(image)
    before = sound.found()
    assert before.remarks == []
    assert [(part.number, part.name, part.length) for part in before.partitions] == [
        (1, "", 2 * MIB),
        (5, "data", 3 * MIB),
    ]
    content = bytearray(image.read_bytes())
    content[offset] ^= 0xFF
    damaged = Disk(len(content), {0: bytes(content)})
    assert damaged.found().partitions == before.partitions
    (remark,) = damaged.found().remarks
    assert remark.startswith(f"its GPT is damaged ({why}")
    # Without the backup there is nothing.
    content[-512:] = bytes(512)
    said = Disk(len(content), {0: bytes(content)}).table()
    assert isinstance(said, str)
    assert said.startswith(f"its MBR says that there is a GPT, but that is damaged ({why}")
    # On a disk that was made longer the backup is where the disk had ended.
    content = bytearray(image.read_bytes())
    content[offset] ^= 0xFF
    assert Disk(32 * MIB, {0: bytes(content)}).found().partitions == before.partitions


def test_a_hybrid_mbr_counts_for_nothing(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    run_tool("sgdisk", "--new=1:0:+2M", "--new=2:0:+3M", "--hybrid=2", image)
    disk = Disk.of(image)
    kinds = sorted(kind for _, kind, _, _ in struct.iter_unpack("<B3xB3xII", disk.parts[0][446:510]))
    assert kinds == [0, 0, 0x83, 0xEE]
    assert disk.found().kind == "gpt"
    assert [part.number for part in disk.found().partitions] == [1, 2]


# --- no table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "length", "why"),
    [
        ({}, 0, "a disk of 0 bytes has no room for a partition table"),
        ({}, 511, "a disk of 511 bytes has no room for a partition table"),
        ({}, 512, "there is no partition table"),
        ({}, MIB, "there is no partition table"),
        ({0: sector()}, MIB, "its MBR has no partitions"),
        ({0: sector((0x83, 1, 9, 0x7F))}, MIB, "there is no partition table"),
        ({0: sector((0x83, 1, 9), signature=b"\xaa\x55")}, MIB, "there is no partition table"),
        ({0: sector((0xEE, 2, 9), (0x83, 1, 9))}, MIB, "its MBR says that there is a GPT, but not in sector 1"),
        (
            {512: b"EFI PART"},
            MIB,
            "there is a GPT but no protective MBR before it, without which Linux does not look at it either",
        ),
        (
            {0: sector((0xEE, 1, 9))},
            512,
            "its MBR says that there is a GPT, but that is damaged (the disk of 512 bytes has no sector 1) and there "
            "is no sound backup of it",
        ),
    ],
)
def test_no_table(parts: dict[int, bytes], length: int, why: str) -> None:
    assert Disk(length, dict(parts)).table() == why


# --- hostile MBRs ---------------------------------------------------------------------------------------


def test_entries_that_are_none() -> None:
    end = MIB // 512
    disk = Disk(MIB, {0: sector((0x83, 1, end - 1), (0x83, 2, end - 1), (0x83, 0, 9), (0x83, 0xFFFFFFFF, 0xFFFFFFFF))})
    assert disk.places() == [(1, 512, MIB - 512), (2, 1024, MIB - 1024), (3, 0, 9 * 512)]
    assert disk.found().remarks == [
        "partition 4 is left out, beginning past the disk's end at 1048576",
        "partition 2 is cut at the disk's end at 1048576",
        "partitions 1, 2 are overlapping others",
    ]


def test_the_end_of_a_disk_cuts_as_linux_cuts() -> None:
    """Logical partitions too, and by whole sectors."""
    end = MIB // 512
    disk = Disk(MIB + 100, {0: sector((0x83, end, 5), (0x83, end - 1, 5))})
    assert disk.places() == [(2, MIB - 512, 512)]
    link = sector((0x83, 1, 9), (0x05, 50, 100))
    disk = Disk(MIB, {0: sector((0x05, 100, 5000)), 51200: link, 150 * 512: sector((0x83, 1, 90_000))})
    assert disk.places() == [(5, 101 * 512, 9 * 512), (6, 151 * 512, MIB - 151 * 512)]
    assert disk.found().remarks == ["partition 6 is cut at the disk's end at 1048576"]


@pytest.mark.parametrize("kind", [0x00, 0x17])
def test_a_bootable_iso_image(kind: int) -> None:
    """Its first entry spans the whole image, the table included; types count for nothing."""
    disk = Disk(MIB, {0: sector((kind, 0, MIB // 512, 0x80), (0xEF, 40, 100))})
    assert disk.places() == [(1, 0, MIB), (2, 40 * 512, 100 * 512)]
    assert disk.found().remarks == ["partition 2 is overlapping others"]


def test_partitions_that_overlap_are_shown_and_remarked_on() -> None:
    disk = Disk(MIB, {0: sector((0x83, 10, 90), (0x83, 20, 10), (0x83, 100, 5), (0x83, 99, 2))})
    assert [number for number, _, _ in disk.places()] == [1, 2, 3, 4]
    assert disk.found().remarks == ["partitions 2, 3, 4 are overlapping others"]


def test_a_chain_that_comes_back_ends() -> None:
    for back in (0, 50):
        disk = Disk(
            MIB,
            {
                0: sector((0x05, 100, 1000)),
                100 * 512: sector((0x83, 1, 9), (0x05, 50, 100)),
                150 * 512: sector((0x83, 1, 9), (0x05, back, 100)),
            },
        )
        assert disk.places() == [(5, 101 * 512, 9 * 512), (6, 151 * 512, 9 * 512)]
        assert disk.found().remarks == [
            f"the logical partitions from number 7 on are left out, as their chain comes back to sector {100 + back}"
        ]


def test_a_chain_that_leaves_the_disk_ends() -> None:
    disk = Disk(MIB, {0: sector((0x0F, 100, 1000)), 51200: sector((0x83, 1, 9), (0x05, 0xFFFFFFFF, 1))})
    assert disk.places() == [(5, 101 * 512, 9 * 512)]
    assert disk.found().remarks == [
        "the logical partitions from number 6 on are left out, as their chain goes on in sector 4294967395, past the "
        "disk's end at 1048576"
    ]


def test_a_chain_that_ends_in_garbage() -> None:
    disk = Disk(MIB, {0: sector((0x85, 100, 1000)), 51200: sector((0x83, 1, 9), (0x05, 50, 1)), 150 * 512: b"x" * 512})
    assert disk.places() == [(5, 101 * 512, 9 * 512)]
    assert disk.found().remarks == [
        "the logical partitions from number 6 on are lost, as sector 150 of their chain is no partition table"
    ]


def test_unused_entries_of_a_link_count_only_if_they_make_sense() -> None:
    link = sector((0x83, 1, 9), (0, 0, 0), (0x83, 20, 30), (0x83, 20, 1000))
    disk = Disk(MIB, {0: sector((0x05, 100, 1000)), 51200: link})
    assert disk.places() == [(5, 101 * 512, 9 * 512), (6, 120 * 512, 30 * 512)]


def test_two_extended_partitions() -> None:
    disk = Disk(
        MIB,
        {
            0: sector((0x05, 100, 100), (0x83, 1, 9), (0x0F, 300, 100)),
            51200: sector((0x83, 1, 9)),
            300 * 512: sector((0x83, 2, 9)),
        },
    )
    assert disk.places() == [(2, 512, 9 * 512), (5, 101 * 512, 9 * 512), (6, 302 * 512, 9 * 512)]


@pytest.mark.parametrize("partition", [True, False])
def test_thousands_of_logical_partitions_are_too_many(partition: bool) -> None:
    disk = Disk(64 * MIB, {0: sector((0x05, 8, 100_000))})
    entry = (0x83, 1, 1) if partition else (0, 0, 0)
    for index in range(5000):
        disk.put((8 + index * 4) * 512, sector(entry, (0x05, index * 4 + 4, 4)))
    table = disk.table()
    assert isinstance(table, Table)
    assert [part.number for part in table.partitions] == (list(range(5, 256)) if partition else [])
    assert disk.reads < 600
    number, why = (256, "Linux has no numbers above 255") if partition else (5, "512 links of their chain were enough")
    assert table.remarks == [f"the logical partitions from number {number} on are left out, as {why}"]


# --- hostile GPTs ---------------------------------------------------------------------------------------


def test_entries_of_a_gpt_that_are_none() -> None:
    disk = Disk(MIB)
    entries = [
        gpt_entry(40, 49, "fine"),
        gpt_entry(60, 59),
        gpt_entry(60, 58),
        gpt_entry(0, (1 << 64) - 1),
        gpt_entry(2040, 2047),
        gpt_entry(2040, 2048),
        gpt_entry((1 << 64) - 1, (1 << 64) - 1),
        gpt_entry(0, 99),
        bytes(16) + gpt_entry(70, 80)[16:],
        gpt_entry(41, 41),
    ]
    gpt(disk, b"".join(entries))
    assert disk.places() == [(1, 40 * 512, 5120), (5, 2040 * 512, 4096), (8, 0, 51200), (10, 41 * 512, 512)]
    assert disk.found().remarks == [
        "partitions 2, 3 are left out, of no length",
        "partitions 4, 6, 7 are left out, reaching past the disk's end at 1048576",
        "partitions 1, 10 are overlapping others",
    ]


def test_more_entries_than_linux_has_numbers_for() -> None:
    disk = Disk(64 * MIB)
    gpt(disk, b"".join(gpt_entry(3000 + index, 3000 + index) for index in range(2000)))
    assert [number for number, _, _ in disk.places()] == list(range(1, 256))
    assert disk.found().remarks == [
        "partitions 256, 257, 258, 259, 260, 261, 262, 263 and 1737 more are left out, numbered above 255"
    ]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"count": 1 << 31}, "it has 2147483648 entries of 128 bytes"),
        ({"count": 0}, "it has 0 entries of 128 bytes"),
        ({"entry_size": 127}, "its entries have 127 bytes"),
        ({"entry_size": 384}, "its entries have 384 bytes"),
        ({"entry_size": 1 << 31}, "its entries have 2147483648 bytes"),
        ({"header_size": 513}, "a header of 513 bytes in a sector of 512"),
        ({"header_size": 91}, "a header of 91 bytes in a sector of 512"),
        ({"my_lba": 7}, "the header in sector 1 says that it is in sector 7"),
        ({"array_lba": 1 << 60}, "its entries in sector 1152921504606846976 lie past the disk's end"),
        ({"array_crc": 5}, "the entries' checksum is"),
    ],
)
def test_headers_that_are_none(wrong: dict[str, int], why: str) -> None:
    disk = Disk(MIB)
    gpt(disk, gpt_entry(40, 49), **wrong)
    said = disk.table()
    assert isinstance(said, str)
    assert said.startswith(f"its MBR says that there is a GPT, but that is damaged ({why}")
    assert disk.bytes_read < 65536


def test_entries_larger_than_usual() -> None:
    disk = Disk(MIB)
    entries = gpt_entry(40, 49).ljust(256, b"x") + gpt_entry(50, 59, "\ud800x"[1:]).ljust(256, b"x")
    gpt(disk, entries, count=2, entry_size=256)
    assert [(part.number, part.name) for part in disk.found().partitions] == [(1, ""), (2, "x")]


def test_names_that_are_no_text() -> None:
    disk = Disk(MIB)
    gpt(disk, gpt_entry(40, 49)[:56] + b"\x00\xd8" * 36)
    (partition,) = disk.found().partitions
    assert partition.name == "\ufffd" * len(partition.name)
    partition.name.encode()


# --- anything -------------------------------------------------------------------------------------------


def _anything() -> st.SearchStrategy[Disk]:
    """64 KiB with what may look like tables in them."""
    number = st.integers(0, 140) | st.sampled_from([0xFFFFFFFF, 0x80000000])
    entry = st.tuples(st.sampled_from([0, 5, 15, 0x83, 0x85, 0xEE]), number, number)
    tables = st.lists(entry, max_size=4).map(lambda entries: sector(*entries))
    pieces = st.lists(st.tuples(st.integers(0, 127), tables | st.binary(min_size=512, max_size=512)), max_size=12)
    return st.tuples(tables | st.binary(min_size=512, max_size=512), pieces).map(
        lambda drawn: Disk(65536, {0: drawn[0], **{(at or 1) * 512: data for at, data in drawn[1]}})
    )


@settings(max_examples=400)
@given(disk=_anything())
def test_anything_is_read_in_bounds(disk: Disk) -> None:
    _check(disk, disk.table())


@settings(max_examples=300)
@given(
    fields=st.tuples(*[st.integers(0, 200) | st.integers(0, (1 << 32) - 1)] * 4),
    entries=st.lists(
        st.tuples(st.integers(0, 200) | st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1)), max_size=6
    ),
    size=st.sampled_from([512, 4096]),
    tail=st.binary(max_size=200),
)
def test_any_gpt_with_sound_checksums(
    fields: tuple[int, ...], entries: list[tuple[int, int]], size: int, tail: bytes
) -> None:
    disk = Disk(65536)
    array_lba, count, entry_size, header_size = fields
    array = b"".join(gpt_entry(first, last) for first, last in entries) + tail
    if header_size > 200:
        gpt(disk, array, size=size, count=len(array) // 128)
    else:
        gpt(disk, array, size=size, array_lba=array_lba, count=count, entry_size=entry_size, header_size=header_size)
    _check(disk, disk.table())


def _check(disk: Disk, table: Table | str) -> None:
    assert disk.reads < 1000
    assert disk.bytes_read < 32 * MIB
    if isinstance(table, str):
        assert table
        return
    numbers = [part.number for part in table.partitions]
    assert numbers == sorted(set(numbers))
    assert all(1 <= number <= 255 for number in numbers)
    for part in table.partitions:
        assert 0 <= part.start < part.end <= disk.length
