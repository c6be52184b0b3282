"""Partitions as files: real tables and filesystems, and two files over the same bytes."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import struct
import subprocess
from pathlib import Path

import pytest

from tests.conftest import qemu_img, require_root, require_tool, run_tool
from tests.support.commands import fusedisk_process
from tests.support.fsx import KEEP_SIZE, PUNCH_HOLE, fallocate
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, wait_until

MIB = 1 << 20
LOGICAL = "label: dos\n,8M\n,4M\n,16M,E\n,,S\n,5M\n,6M\n"


def partitioned(path: Path, script: str, size: int) -> Path:
    """A raw disk of ``size`` bytes that sfdisk has partitioned."""
    with path.open("wb") as file:
        file.truncate(size)
    command = [require_tool("sfdisk"), "-q", "--no-tell-kernel", str(path)]
    subprocess.run(command, input=script, text=True, check=True, timeout=60)
    return path


def places(disk: Path) -> dict[int, tuple[int, int]]:
    """Start and length in bytes of each partition by its number, as sfdisk tells them."""
    said = json.loads(run_tool("sfdisk", "--json", disk))["partitiontable"]
    unit = said.get("sectorsize", 512)
    return {
        int(entry["node"].removeprefix(str(disk)).removeprefix("p")): (entry["start"] * unit, entry["size"] * unit)
        for entry in said["partitions"]
        if entry["type"] not in ("5", "f")
    }


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 image of 48 MiB with primary and logical partitions, and random bytes all over."""
    raw = partitioned(tmp_path / "vm.raw", LOGICAL, 48 * MIB)
    with raw.open("r+b") as file:
        random_ = random.Random(4)
        for start, length in places(raw).values():
            for offset in (start, start + length - 70_000, start + random_.randrange(length - 70_000)):
                file.seek(offset)
                file.write(random_.randbytes(70_000))
    qemu_img("convert", "-O", "qcow2", raw, tmp_path / "vm.qcow2")
    return tmp_path / "vm.qcow2"


def test_each_partition_is_its_range_of_the_disk(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    raw = tmp_path / "vm.raw"
    content = raw.read_bytes()
    for options in ((), ("--read-only",), ("--overlay",)):
        on = mounts.mount("--partitions", *options, image)
        assert sorted(os.listdir(on)) == ["vm", "vm.p1", "vm.p2", "vm.p4", "vm.p5", "vm.p6"]
        inodes = set()
        for number, (start, length) in places(raw).items():
            part = on / f"vm.p{number}"
            assert part.read_bytes() == content[start : start + length]
            assert part.stat().st_mode & 0o777 == (0o400 if "--read-only" in options else 0o600)
            assert part.stat().st_blocks * 512 <= length
            inodes.add(part.stat().st_ino)
            assert os.getxattr(part, "user.fusedisk.partition-start") == str(start).encode()
            assert os.getxattr(part, "user.fusedisk.virtual-size") == str(length).encode()
            assert os.getxattr(part, "user.fusedisk.partition-type") == (b"0x82" if number == 4 else b"0x83")
            assert os.getxattr(part, "user.fusedisk.format") == b"qcow2"
        assert len(inodes) == 5
        listed = {
            export["name"]: export
            for mount in fusedisk_process("list", "--output", "json").json
            if mount["mountpoint"] == str(on)
            for export in mount["exports"]
        }
        assert listed["vm.p5"]["image"] == str(image)
        assert listed["vm.p5"]["virtual-size"] == 5 * MIB
        assert listed["vm.p5"]["read-only"] == ("--read-only" in options)
        mounts.umount(on)


@pytest.mark.slow
def test_random_writes_through_all_files(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    """What was written where, through whichever file, is what every file and the image have in the end."""
    raw = tmp_path / "vm.raw"
    content = bytearray(raw.read_bytes())
    on = mounts.mount("--partitions", image)
    files = {on / "vm": (0, len(content))} | {on / f"vm.p{number}": place for number, place in places(raw).items()}
    opened = {path: os.open(path, os.O_RDWR) for path in files}
    random_ = random.Random(9)
    try:
        for _ in range(300):
            path, (start, length) = random_.choice(list(files.items()))
            offset = random_.randrange(MIB if path.name == "vm" else 0, length)
            data = random_.randbytes(min(length - offset, random_.randrange(1, 100_000)))
            assert os.pwrite(opened[path], data, offset) == len(data)
            content[start + offset : start + offset + len(data)] = data
            path, (start, length) = random_.choice(list(files.items()))
            offset = random_.randrange(length)
            count = min(length - offset, random_.randrange(1, 100_000))
            assert os.pread(opened[path], count, offset) == content[start + offset : start + offset + count]
    finally:
        for handle in opened.values():
            os.close(handle)
    for path, (start, length) in files.items():
        assert path.read_bytes() == content[start : start + length]
    mounts.umount(on)
    qemu_img("check", image)
    qemu_img("convert", "-O", "raw", image, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content


@pytest.mark.parametrize("reading", [0, os.O_DIRECT], ids=["reads-buffered", "reads-direct"])
@pytest.mark.parametrize("writing", [0, os.O_DIRECT], ids=["writes-buffered", "writes-direct"])
@pytest.mark.parametrize("writer", ["vm", "vm.p2"])
def test_a_write_is_seen_at_once_through_the_other_file(
    mounts: Mounts, image: Path, tmp_path: Path, writer: str, writing: int, reading: int
) -> None:
    """Also by who has read the same place before and keeps the file open, and past what readahead took."""
    start, _ = places(tmp_path / "vm.raw")[2]
    on = mounts.mount("--partitions", image)
    reader = "vm" if writer == "vm.p2" else "vm.p2"
    shift = {"vm": start, "vm.p2": 0}
    output = os.open(on / writer, os.O_RDWR | writing)
    input = os.open(on / reader, os.O_RDONLY | reading)
    page = mmap.mmap(-1, 65536)  # aligned, as O_DIRECT wants it
    try:
        for step in range(20):
            offset = step * 8192
            assert os.preadv(input, [page], offset + shift[reader]) == 65536
            before = page[:]
            page[:4096] = bytes([step + 1]) * 4096
            assert os.pwritev(output, [memoryview(page)[:4096]], offset + shift[writer]) == 4096
            page[:] = bytes(65536)
            assert os.preadv(input, [page], offset + shift[reader]) == 65536
            assert page[:] == bytes([step + 1]) * 4096 + before[4096:]
    finally:
        os.close(output)
        os.close(input)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_partition_takes_the_space_of_its_own_data(mounts: Mounts, tmp_path: Path, format: str) -> None:
    """Not that of the disk, which tells tools nothing about holes in a small partition."""
    raw = partitioned(tmp_path / "vm.raw", "label: gpt\nsize=8M\nsize=8M\nsize=8M\n", 32 * MIB)
    with raw.open("r+b") as file:
        file.seek(MIB)
        file.write(b"x" * 8 * MIB)
        file.seek(10 * MIB)
        file.write(b"y" * MIB)
    image = raw
    if format == "qcow2":
        image = tmp_path / "vm.qcow2"
        qemu_img("convert", "-O", "qcow2", raw, image)
    on = mounts.mount("--partitions", "--name=vm", "-f", format, image)

    def space(number: int) -> int:
        return (on / f"vm.p{number}").stat().st_blocks * 512

    assert [space(number) for number in (1, 2, 3)] == [8 * MIB, MIB, 0]
    with (on / "vm.p3").open("r+b", buffering=0) as part, (on / "vm").open("r+b", buffering=0) as disk:
        part.write(b"z" * MIB)
        wait_until(lambda: [space(number) for number in (1, 2, 3)] == [8 * MIB, MIB, MIB], "p3 has grown")
        fallocate(disk.fileno(), PUNCH_HOLE | KEEP_SIZE, MIB, 4 * MIB)
        wait_until(lambda: [space(number) for number in (1, 2, 3)] == [4 * MIB, MIB, MIB], "p1 has shrunk")
        os.truncate(on / "vm", 18 * MIB)
        wait_until(lambda: space(3) == MIB, "p3 holds what is left of it")
        os.truncate(on / "vm", 17 * MIB)
        wait_until(lambda: space(3) == 0, "p3 is gone")


def test_a_partition_in_many_pieces_is_looked_at_in_part(mounts: Mounts, tmp_path: Path) -> None:
    raw = partitioned(tmp_path / "vm.raw", "label: dos\n2048,65536\n", 64 * MIB)
    with raw.open("r+b") as file:
        for index in range(2048):  # every other 8 KiB
            file.seek(MIB + index * 16384)
            file.write(b"d" * 8192)
    on = mounts.mount("--partitions", "--name=vm", "-f", "raw", raw)
    assert (on / "vm.p1").stat().st_blocks * 512 == 16 * MIB


def test_times_and_sizes_are_those_of_the_disk(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    """A write through one file changes the times that the kernel remembers of the others."""
    os.utime(image, ns=(10**18, 10**18))
    on = mounts.mount("--partitions", image)
    disk, first, second = on / "vm", on / "vm.p1", on / "vm.p2"
    assert {path.stat().st_mtime_ns for path in (disk, first, second)} == {10**18}
    for writer in (first, disk):
        before = {path: path.stat().st_mtime_ns for path in (disk, first, second)}
        with writer.open("r+b", buffering=0) as handle:
            handle.write(b"new")
            os.fsync(handle.fileno())
            after = {path: path.stat().st_mtime_ns for path in (disk, first, second)}
            assert all(after[path] > before[path] for path in before)
            assert len(set(after.values())) == 1
    mounts.umount(on)
    assert image.stat().st_mtime_ns > 10**18


def test_a_filesystem_in_a_partition(mounts: Mounts, tmp_path: Path) -> None:
    require_root()
    raw = partitioned(tmp_path / "new.raw", "label: gpt\nsize=4M\nsize=40M, name=files\n", 64 * MIB)
    image = tmp_path / "vm.qcow2"
    qemu_img("convert", "-O", "qcow2", raw, image)
    on = mounts.mount("--partitions", image)
    part = on / "vm.p2"
    assert os.getxattr(part, "user.fusedisk.partition-name") == b"files"
    run_tool("mkfs.ext4", "-q", part)
    device = mounts.loop(part)
    files = mounts.mount_filesystem(device)
    (files / "note").write_bytes(b"written in a partition\n" * 1000)
    mounts.umount_filesystem(files)
    mounts.detach(device)
    run_tool("e2fsck", "-fn", part)
    mounts.umount(on)
    qemu_img("check", image)
    flat = tmp_path / "flat"
    qemu_img("convert", "-O", "raw", image, flat)
    start, length = places(flat)[2]
    device = mounts.loop(flat, "-r", "-o", str(start), "--sizelimit", str(length))
    files = mounts.mount_filesystem(device, "-o", "ro")
    assert (files / "note").read_bytes() == b"written in a partition\n" * 1000
    mounts.umount_filesystem(files)
    mounts.detach(device)


def test_a_damaged_gpt_and_its_backup(mounts: Mounts, tmp_path: Path) -> None:
    raw = tmp_path / "vm.raw"
    with raw.open("wb") as file:
        file.truncate(32 * MIB)
    run_tool("sgdisk", "--new=1:0:+2M", "--new=7:0:+3M", raw)
    expected = places(raw)
    run_tool("dd", "if=/dev/urandom", f"of={raw}", "bs=512", "seek=1", "count=20", "conv=notrunc", "status=none")
    on = mounts.directory()
    process = mounts.start("-f", "raw", "--partitions", raw, on=on)
    assert set(os.listdir(on)) == {"vm", "vm.p1", "vm.p7"}
    for number, (start, length) in expected.items():
        with (on / f"vm.p{number}").open("r+b", buffering=0) as part:
            part.write(b"partition %d" % number)
            assert os.fstat(part.fileno()).st_size == length
            with (on / "vm").open("rb", buffering=0) as disk:
                assert os.pread(disk.fileno(), 11, start) == b"partition %d" % number
    mounts.umount(on)
    _, said = process.communicate(timeout=60)
    assert said.decode() == (
        "fusedisk: 'vm': its GPT is damaged (sector 1 has not the signature of a header), so the backup in sector "
        "65535 is taken.\n"
    )


def test_a_gpt_of_a_disk_with_large_sectors(mounts: Mounts, tmp_path: Path) -> None:
    require_root()
    raw = tmp_path / "vm.raw"
    with raw.open("wb") as file:
        file.truncate(64 * MIB)
    device = mounts.loop(raw, "--sector-size", "4096")
    run_tool("sgdisk", "--new=1:0:+8M", "--new=2:0:+16M", "--typecode=2:8200", device)
    expected = places(Path(device))
    mounts.detach(device)
    on = mounts.mount("-f", "raw", "--partitions", raw)
    assert sorted(os.listdir(on)) == ["vm", "vm.p1", "vm.p2"]
    for number, (start, length) in expected.items():
        part = on / f"vm.p{number}"
        assert part.stat().st_size == length
        assert os.getxattr(part, "user.fusedisk.partition-start") == str(start).encode()


def test_a_bootable_iso_image_that_was_cut(mounts: Mounts, tmp_path: Path) -> None:
    """Its first partition begins with the table, its second does not end on the image any more."""
    image = tmp_path / "live.iso"
    content = bytearray(random.Random(3).randbytes(2 * MIB))
    entries = struct.pack("<B3xB3xIIB3xB3xII", 0x80, 0x17, 0, 9000, 0, 0xEF, 1000, 5000)
    content[446:512] = entries.ljust(64, b"\0") + b"\x55\xaa"
    image.write_bytes(content)
    on, done = mounts.try_mount("-r", "-f", "raw", "--name=live", "--partitions", image)
    assert done.code == 0
    assert done.err == (
        f"fusedisk: 'live': partitions 1, 2 are cut at the disk's end at {2 * MIB}.\n"
        "fusedisk: 'live': partition 2 is overlapping others.\n"
    )
    assert sorted(os.listdir(on)) == ["live", "live.p1", "live.p2"]
    assert (on / "live.p1").read_bytes() == content
    assert (on / "live.p2").read_bytes() == content[1000 * 512 :]
    assert (on / "live.p1").stat().st_blksize == (on / "live").stat().st_blksize


@pytest.mark.parametrize("more", [0, 4096], ids=["between-clusters", "inside-a-cluster"])
def test_a_disk_that_becomes_shorter(mounts: Mounts, image: Path, tmp_path: Path, more: int) -> None:
    expected = places(tmp_path / "vm.raw")
    on = mounts.mount("--partitions", image)
    start, length = expected[2]
    with (on / "vm.p2").open("r+b", buffering=0) as part:
        handle = part.fileno()
        os.pwrite(handle, bytes(65536), MIB)
        os.pread(handle, 65536, MIB)
        os.truncate(on / "vm", start + MIB + more)
        assert os.fstat(handle).st_size == length
        os.pwrite(handle, b"x" * 4096, MIB - 4096)
        assert os.pread(handle, 4096, MIB - 4096) == b"x" * 4096
        for offset in (MIB + more, MIB + more + 8192, length - 4096):
            with pytest.raises(OSError, match="Input/output error") as caught:
                os.pread(handle, 4096, offset)
            assert caught.value.errno == errno.EIO
            with pytest.raises(OSError, match="No space left") as caught:
                os.pwrite(handle, b"y" * 4096, offset)
            assert caught.value.errno == errno.ENOSPC
            with pytest.raises(OSError, match="Input/output error") as caught:
                os.copy_file_range(handle, handle, 4096, offset, 0)
            assert caught.value.errno == errno.EIO
            for mode in (0, 1, 2, 3, 16, 17):
                _fallocate(handle, mode, offset, 4096)
        assert os.lseek(handle, MIB + 8192, os.SEEK_HOLE) == MIB + 8192
        os.fsync(handle)
        with pytest.raises(OSError, match="Operation not supported"):
            os.truncate(on / "vm.p2", MIB)
    for number in (4, 5, 6):
        with pytest.raises(OSError, match="Input/output error"):
            (on / f"vm.p{number}").read_bytes()
    os.truncate(on / "vm", 48 * MIB)
    content = (on / "vm.p2").read_bytes()
    assert content[MIB - 4096 :] == b"x" * 4096 + bytes(length - MIB)
    mounts.umount(on)
    qemu_img("check", image)
    assert not _log_of(on).exists() or "Traceback" not in _log_of(on).read_text()


def test_what_a_shorter_disk_has_no_longer_is_not_read_from_below(mounts: Mounts, tmp_path: Path) -> None:
    """Nor in requests so large that they are answered out of the page cache."""
    base = partitioned(tmp_path / "base.raw", "label: dos\n1M,8M\n", 16 * MIB)
    with base.open("r+b") as file:
        file.seek(MIB)
        file.write(b"b" * 8 * MIB)
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tmp_path / "vm.qcow2")
    on = mounts.mount("--partitions", tmp_path / "vm.qcow2")
    handle, buffer = os.open(on / "vm.p1", os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, MIB)
    try:
        assert os.preadv(handle, [buffer], 0) == MIB
        os.truncate(on / "vm", 5 * MIB)
        assert os.preadv(handle, [buffer], 3 * MIB) == MIB
        assert buffer[:] == b"b" * MIB
        for offset in (4 * MIB - 4096, 4 * MIB, 6 * MIB):
            with pytest.raises(OSError, match="Input/output error"):
                os.preadv(handle, [buffer], offset)
    finally:
        os.close(handle)


def _fallocate(handle: int, mode: int, offset: int, length: int) -> None:
    """Whatever comes of it; it must be told apart from a bug by the log alone."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate64(handle, mode, ctypes.c_int64(offset), ctypes.c_int64(length))


def _log_of(mountpoint: Path) -> Path:
    from fusedisk.mount import runtime

    return Path(runtime.log_path(str(mountpoint)))


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (MIB, "'vm' gets no files of partitions: there is no partition table."),
        (0, "'vm' gets no files of partitions: a disk of 0 bytes has no room for a partition table."),
    ],
)
def test_a_disk_without_a_table(mounts: Mounts, tmp_path: Path, size: int, sentence: str) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", size)
    on = mounts.directory()
    process = mounts.start("--partitions", image, on=on)
    assert os.listdir(on) == ["vm"]
    assert (on / "vm").read_bytes() == bytes(size)
    mounts.umount(on)
    _, said = process.communicate(timeout=60)
    assert said.decode() == f"fusedisk: {sentence}\n"


def test_names_are_unique(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    other = make_qcow2(tmp_path / "vm.p1.qcow2", MIB)
    _, done = mounts.try_mount("--partitions", image, other)
    assert done.code == 2
    assert done.err.endswith(
        f"fusedisk: '{image} (partition 1)' and '{other}' would both be the file 'vm.p1', give one of them another "
        "name with name=.\n"
    )


def test_a_regular_file_has_no_room_for_them(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    for option in ("--partitions", "--snapshots"):
        on = tmp_path / "place"
        on.touch()
        _, done = mounts.try_mount(option, image, on=on)
        assert done.code == 2
        assert f"but the mountpoint '{on}' is a regular file: use a directory." in done.err
