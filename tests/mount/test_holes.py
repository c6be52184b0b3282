"""Holes, allocation and copies over the mount, as other programs see and make them."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import qemu_img, qemu_io, require_tool, run_tool
from tests.support.files import mounted_tmpfs
from tests.support.fsx import (
    COLLAPSE_RANGE,
    INSERT_RANGE,
    KEEP_SIZE,
    PUNCH_HOLE,
    UNSHARE_RANGE,
    ZERO_RANGE,
    copy_range,
    fallocate,
    map_of,
)
from tests.support.images import make_qcow2, make_sparse_raw
from tests.support.mounts import Mounts, wait_until
from tests.support.thinning import thinned

MIB = 1 << 20
TIB = 1 << 40
_SCATTERED = [0, 3 * MIB, 700 << 30, (700 << 30) + 65536, TIB - MIB]


def _raw(folder: Path) -> Path:
    return make_sparse_raw(folder / "disk.img", TIB, *((at, 300_000) for at in _SCATTERED))


def _qcow2(folder: Path) -> Path:
    writes = [f"write -P {index + 1} {at} 192k" for index, at in enumerate(_SCATTERED)]
    return make_qcow2(folder / "disk.qcow2", TIB, *writes[::-1], "write -z 1G 3M", "write -z -u 2G 3M")


def _overlay(folder: Path) -> Path:
    below = [f"write -P 9 {at} 300k" for at in (0, 5 * MIB, 600 << 30, TIB // 2 - MIB)]
    base = make_qcow2(folder / "base.qcow2", TIB - (1 << 30), *below, "write -z 9M 2M")
    above = [f"write -P {index + 1} {at + 4096} 64k" for index, at in enumerate(_SCATTERED)]
    return make_qcow2(folder / "disk.qcow2", TIB, *above, "write -z 5M 128k", backing=base)


def _preallocated(folder: Path) -> Path:
    image = make_qcow2(folder / "disk.qcow2", 64 * MIB, preallocation="metadata")
    qemu_io(image, "write -P 5 1M 200k", "write -z 30M 8M", fmt="qcow2")
    qemu_img("resize", "-q", image, str(TIB))
    qemu_io(image, f"write -P 6 {TIB - MIB} 1M", fmt="qcow2")
    return image


def _subclusters(folder: Path) -> Path:
    base = make_qcow2(folder / "base.qcow2", TIB, "write -P 9 0 4M")
    writes = [f"write -P 7 {at + 8192} 4k" for at in _SCATTERED]
    options = {"extended_l2": "on", "cluster_size": "64k"}
    return make_qcow2(folder / "disk.qcow2", TIB, *writes, "write -z 1026k 6k", backing=base, **options)


_KINDS: dict[str, Callable[[Path], Path]] = {
    "raw": _raw,
    "qcow2": _qcow2,
    "overlay": _overlay,
    "preallocated": _preallocated,
    "subclusters": _subclusters,
}


@pytest.fixture(params=list(_KINDS))
def sparse(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image of 1 TiB with little in it, called ``disk``."""
    return _KINDS[request.param](tmp_path)


def _format(image: Path) -> str:
    return "qcow2" if image.suffix == ".qcow2" else "raw"


def _map(image: Path, format: str) -> list[tuple[bool, int, int]]:
    """Where it reads as zeroes and where not, as qemu-img knows it: ``(is data, begin, end)``."""
    found: list[tuple[bool, int, int]] = []
    for entry in json.loads(qemu_img("map", "--output=json", "-f", format, image)):
        data, begin, end = not entry["zero"], entry["start"], entry["start"] + entry["length"]
        if found and found[-1][0] == data:
            found[-1] = (data, found[-1][1], end)
        else:
            found.append((data, begin, end))
    return found


def _data(found: list[tuple[bool, int, int]]) -> int:
    return sum(end - begin for data, begin, end in found if data)


def _seen(file: Path) -> list[tuple[bool, int, int]]:
    with file.open("rb") as opened:
        return map_of(opened.fileno(), 0, os.fstat(opened.fileno()).st_size)


def _same(one: Path, other: Path, ranges: list[tuple[bool, int, int]]) -> bool:
    """Whether both hold the same, where there is data."""
    with one.open("rb") as left, other.open("rb") as right:
        for data, begin, end in ranges:
            length = end - begin
            if data and os.pread(left.fileno(), length, begin) != os.pread(right.fileno(), length, begin):
                return False
    return True


def test_holes_are_where_the_image_has_them(mounts: Mounts, sparse: Path) -> None:
    wanted = _map(sparse, _format(sparse))
    on = mounts.mount("-r", "-f", _format(sparse), sparse)
    assert _seen(on / "disk") == wanted
    assert _map(on / "disk", "raw") == wanted
    assert len(wanted) >= 4
    assert wanted[-1][2] == TIB


def test_copies_stay_sparse(mounts: Mounts, sparse: Path, tmp_path: Path) -> None:
    wanted = _map(sparse, _format(sparse))
    on = mounts.mount("-r", "-f", _format(sparse), sparse)
    copies = tmp_path / "copies"
    copies.mkdir()
    for command in (("cp", "--sparse=always"), ("cp", "--sparse=auto"), ("tar",)):
        copy = copies / "disk"
        if command[0] == "tar":
            archive = copies / "archive"
            run_tool("tar", "-C", on, "-S", "-cf", archive, "disk")
            run_tool("tar", "-C", copies, "-xSf", archive)
            archive.unlink()
        else:
            run_tool(*command, on / "disk", copy)
        assert copy.stat().st_size == TIB
        assert copy.stat().st_blocks * 512 <= _data(wanted) + 2 * 4096 * len(wanted), command
        assert _same(copy, on / "disk", wanted), command
        assert _same(on / "disk", copy, _seen(copy)), command
        copy.unlink()


def test_rsync_keeps_holes(mounts: Mounts, tmp_path: Path) -> None:
    """It reads all there is, so this one is smaller."""
    image = make_qcow2(tmp_path / "disk.qcow2", 256 * MIB, "write -P 3 5M 300k", "write -P 4 200M 64k")
    on = mounts.mount("-r", image)
    run_tool("rsync", "-S", on / "disk", tmp_path / "copy")
    run_tool("cmp", on / "disk", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_blocks * 512 <= 364 * 1024 + 4 * 4096


_SIZE = 4 * MIB
_ALLOWED = (0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE)
_REFUSED = (
    PUNCH_HOLE,
    COLLAPSE_RANGE,
    INSERT_RANGE,
    UNSHARE_RANGE,
    PUNCH_HOLE | ZERO_RANGE | KEEP_SIZE,
    0x100,
)


def _on_backing(folder: Path, size: int = _SIZE) -> Path:
    base = make_qcow2(folder / "base.qcow2", size, f"write -P 0xb5 0 {size}")
    return make_qcow2(folder / "disk.qcow2", size, "write -P 7 1M 1M", backing=base)


def _flat(image: Path) -> bytes:
    flat = image.with_name("flat")
    qemu_img("check", image)
    qemu_img("convert", "-O", "raw", image, flat)
    return flat.read_bytes()


@pytest.mark.parametrize(
    ("mode", "options"), [(0, ["--growable"]), (ZERO_RANGE, ["--growable"]), (0, []), (ZERO_RANGE, [])]
)
def test_what_could_not_be_allocated_leaves_the_file_as_long_as_it_was(
    mounts: Mounts, tmp_path: Path, mode: int, options: list[str]
) -> None:
    with mounted_tmpfs(tmp_path / "small", "size=8M") as small:
        image = small / "disk.img"
        image.write_bytes(b"i" * MIB)
        on = mounts.mount("-f", "raw", *options, "--passthrough", "off", image)
        with (on / "disk").open("r+b") as file:
            assert os.fstat(file.fileno()).st_size == MIB
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                fallocate(file.fileno(), mode, MIB // 2, 64 * MIB)
            assert os.fstat(file.fileno()).st_size == image.stat().st_size == MIB
            fallocate(file.fileno(), mode, MIB // 2, MIB)
            assert os.fstat(file.fileno()).st_size == image.stat().st_size == MIB + MIB // 2
        mounts.umount(on)


@pytest.mark.parametrize("growable", thinned([False, True], 2))
@pytest.mark.parametrize("mode", _ALLOWED)
def test_every_mode_of_fallocate(mounts: Mounts, tmp_path: Path, mode: int, growable: bool) -> None:
    """Over a backing file, at odd places, and around the end: past it the disk gets longer, as with truncate."""
    image = _on_backing(tmp_path)
    content = bytearray(_flat(image))
    on = mounts.mount(*(["--growable"] if growable else []), image)
    places = [(0, 1), (65535, 2), (65536, 65536), (MIB - 3, 200_001), (3 * MIB, 65536), (3 * MIB + 100_000, 70_000)]
    places += [(_SIZE - 5, 5), (_SIZE - 4096, 8192), (_SIZE + MIB, 4096)]
    with (on / "disk").open("r+b", buffering=0) as file:
        for offset, length in places:
            os.pread(file.fileno(), len(content), 0)  # into the cache, which must not keep what has changed
            end = offset + length
            fallocate(file.fileno(), mode, offset, length)
            if end > len(content) and not mode & KEEP_SIZE:
                content.extend(bytes(end - len(content)))
            if mode & (PUNCH_HOLE | ZERO_RANGE):
                stop = min(end, len(content))
                content[offset:stop] = bytes(max(0, stop - offset))
            assert os.fstat(file.fileno()).st_size == len(content)
            assert os.pread(file.fileno(), len(content) + 1, 0) == content, (offset, length)
    mounts.umount(on)
    assert _flat(image) == content
    if not mode & (PUNCH_HOLE | ZERO_RANGE):
        entries = json.loads(qemu_img("map", "--output=json", image))
        assert all(entry["depth"] == 0 for entry in entries if 3 * MIB <= entry["start"] < 3 * MIB + 65536)


def test_a_hole_gives_its_space_back_and_a_zeroed_range_keeps_it(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", 32 * MIB, "write -P 3 0 32M")
    on = mounts.mount(image)
    file = on / "disk"
    before = image.stat().st_blocks
    run_tool("fallocate", "--zero-range", "-o", "0", "-l", str(8 * MIB), file)
    run_tool("sync", file)
    assert image.stat().st_blocks >= before - 8 * 128
    run_tool("fallocate", "--punch-hole", "-o", str(8 * MIB), "-l", str(16 * MIB), file)
    run_tool("sync", file)
    assert image.stat().st_blocks <= before - 15 * MIB // 512
    run_tool("fallocate", "-o", str(8 * MIB), "-l", str(16 * MIB), file)
    mounts.umount(on)
    qemu_io(image, "read -P 0 0 24M", "read -P 3 24M 8M", fmt="qcow2")
    entries = json.loads(qemu_img("map", "--output=json", image))
    assert all("offset" in entry for entry in entries if 8 * MIB <= entry["start"] < 24 * MIB)


@pytest.mark.parametrize("mode", thinned(_REFUSED))
def test_other_modes_are_not_there(mounts: Mounts, tmp_path: Path, mode: int) -> None:
    image = _on_backing(tmp_path)
    content = _flat(image)
    on = mounts.mount(image)
    with (on / "disk").open("r+b", buffering=0) as file:
        with pytest.raises(OSError) as caught:
            fallocate(file.fileno(), mode, 0, 65536)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert os.pread(file.fileno(), _SIZE, 0) == content


def test_nothing_is_punched_in_a_read_only_disk(mounts: Mounts, tmp_path: Path) -> None:
    image = _on_backing(tmp_path)
    on = mounts.mount("-r", image)
    with (on / "disk").open("rb", buffering=0) as file:
        for mode in _ALLOWED:
            with pytest.raises(OSError) as caught:
                fallocate(file.fileno(), mode, 0, 65536)
            assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError) as caught:
        os.open(on / "disk", os.O_RDWR)
    assert caught.value.errno == errno.EROFS


@pytest.mark.slow
def test_a_range_that_is_zeroed_in_part_is_not_shown_from_the_cache(mounts: Mounts, tmp_path: Path) -> None:
    """Whoever interrupts a long request gets it undone from some place on, and everybody sees the same."""
    image = make_qcow2(tmp_path / "disk.qcow2", 8 * TIB, "write -P 5 0 1M", cluster_size=512 * 1024)
    # What is below has data all over, so each cluster has to hide it.
    on = mounts.mount(f"driver=qcow2,file.filename={image},backing.driver=null-co,backing.size={8 * TIB},name=disk")
    with (on / "disk").open("r+b", buffering=0) as file:
        assert os.pread(file.fileno(), MIB, 0) == b"\5" * MIB
        command = [require_tool("fallocate"), "--zero-range", "-o", "0", "-l", str(8 * TIB), str(on / "disk")]
        zeroing = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        with (on / "disk").open("rb", buffering=0) as direct:
            other = os.open(on / "disk", os.O_RDONLY | os.O_DIRECT)
            try:
                _wait_for_zeroes(other)
            finally:
                os.close(other)
            zeroing.send_signal(signal.SIGINT)
            assert zeroing.wait(60) != 0
            _wait(lambda: os.pread(direct.fileno(), MIB, 0) == bytes(MIB))


def _wait_for_zeroes(descriptor: int) -> None:
    with mmap.mmap(-1, 4096) as buffer:

        def zeroed() -> bool:
            os.preadv(descriptor, [buffer], 0)
            return not any(buffer[:])

        _wait(zeroed)


def _wait(condition: Callable[[], bool]) -> None:
    wait_until(condition, "the range reads as zeroes", 30)


@pytest.fixture
def two(mounts: Mounts, tmp_path: Path) -> tuple[Path, Path, Path, bytes]:
    """Two disks in one mount, the second one's image, and what the first holds: data with a hole in the middle."""
    content = random.Random(8).randbytes(2 * MIB)
    raw = tmp_path / "one.img"
    with raw.open("wb") as file:
        file.write(content[:MIB])
        file.seek(3 * MIB)
        file.write(content[MIB:])
    other = make_qcow2(tmp_path / "two.qcow2", 8 * MIB, "write -P 6 0 8M")
    on = mounts.mount("-f", "raw", raw, f"driver=qcow2,file.filename={other},name=two")
    return on / "one", on / "two", other, content[:MIB] + bytes(2 * MIB) + content[MIB:]


def test_copies_between_files_of_a_mount(two: tuple[Path, Path, Path, bytes]) -> None:
    one, other, _, content = two
    with one.open("rb", buffering=0) as source, other.open("r+b", buffering=0) as target:
        os.pread(target.fileno(), 8 * MIB, 0)
        assert copy_range(source.fileno(), 0, target.fileno(), 0, 16 * MIB) == 4 * MIB
        assert os.pread(target.fileno(), 8 * MIB, 0) == content + b"\6" * 4 * MIB
        assert map_of(target.fileno(), 0, 8 * MIB) == [(True, 0, MIB), (False, MIB, 3 * MIB), (True, 3 * MIB, 8 * MIB)]
        assert copy_range(source.fileno(), 4 * MIB, target.fileno(), 0, MIB) == 0
        # The target ends: what fits is copied and seen.
        assert os.copy_file_range(source.fileno(), target.fileno(), MIB, 100, 8 * MIB - 70_000) == 70_000
        assert os.pread(target.fileno(), MIB, 8 * MIB - 70_000) == content[100:70_100]
        with pytest.raises(OSError) as caught:
            os.copy_file_range(source.fileno(), target.fileno(), MIB, 0, 8 * MIB)
        assert caught.value.errno == errno.ENOSPC


def test_a_small_hole_behind_data_is_copied_as_a_hole(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", 8 * MIB, "write -P 6 0 64k", "write -P 7 128k 64k", "write -P 8 4M 1M")
    on = mounts.mount(image)
    with (on / "disk").open("r+b", buffering=0) as file:
        assert copy_range(file.fileno(), 0, file.fileno(), 4 * MIB, MIB) == MIB
        copied = map_of(file.fileno(), 4 * MIB, 5 * MIB)
        assert [(data, begin - 4 * MIB, end - 4 * MIB) for data, begin, end in copied] == [
            (True, 0, 65536),
            (False, 65536, 131072),
            (True, 131072, 196608),
            (False, 196608, MIB),
        ]
    mounts.umount(on)
    qemu_io(
        image, "read -P 6 4M 64k", "read -P 0 4160k 64k", "read -P 7 4224k 64k", "read -P 0 4288k 832k", fmt="qcow2"
    )


def test_cp_between_files_of_a_mount(two: tuple[Path, Path, Path, bytes], mounts: Mounts) -> None:
    one, other, image, content = two
    run_tool(
        "fallocate", "--punch-hole", "-l", str(8 * MIB), other
    )  # cp leaves out holes, as if it had emptied the disk
    for option in ("--reflink=auto", "--reflink=never"):
        run_tool("cp", option, one, other)
        assert other.read_bytes()[: 4 * MIB] == content
    mounts.umount(one.parent)
    qemu_img("check", image)
    qemu_img("convert", "-O", "raw", image, image.with_name("flat"))
    assert image.with_name("flat").read_bytes() == content + bytes(4 * MIB)
