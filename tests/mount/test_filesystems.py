"""Real filesystems on loop devices over the mount, filled, unmounted, and read elsewhere."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest

from tests.conftest import qemu_img, require_root, require_tool, run_tool
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts

MIB = 1 << 20
_CHECK = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n", "-f")}
_OPTIONS = {"ext4": (), "xfs": ("-o", "nouuid")}


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize(("filesystem", "size"), [("ext4", 128), ("xfs", 320)])
@pytest.mark.parametrize("format", ["raw", "qcow2", "chain"])
@pytest.mark.slow
def test_a_filesystem_survives(
    mounts: Mounts, tmp_path: Path, format: str, filesystem: str, size: int, direct: bool
) -> None:
    require_root()
    mkfs = require_tool(f"mkfs.{filesystem}")
    image = _make_image(tmp_path, format, size * MIB)
    kind = "raw" if format == "raw" else "qcow2"
    on = mounts.mount("-f", kind, image)
    device = mounts.loop(on / "disk", *(["--direct-io=on"] if direct else []))
    run_tool(mkfs, "-q", device)
    files = mounts.mount_filesystem(device)
    sums = _fill(files, seed=size)
    mounts.umount_filesystem(files)
    files = mounts.mount_filesystem(device)
    assert _sums(files) == sums
    sums |= _fill(files, seed=size + 1)
    mounts.umount_filesystem(files)
    mounts.detach(device)
    content = hashlib.sha256((on / "disk").read_bytes()).digest()
    mounts.umount(on)

    if format != "raw":
        qemu_img("check", image)
    flat = tmp_path / "flat"
    qemu_img("convert", "-f", kind, "-O", "raw", image, flat)
    assert hashlib.sha256(flat.read_bytes()).digest() == content
    run_tool(*_CHECK[filesystem], flat)
    device = mounts.loop(flat, "-r")
    files = mounts.mount_filesystem(device, "-o", "ro", *_OPTIONS[filesystem])
    assert _sums(files) == sums
    mounts.umount_filesystem(files)
    mounts.detach(device)


def test_mount_loop_in_one_step(mounts: Mounts, tmp_path: Path) -> None:
    """``mount -o loop`` on a file of the mount, with a small filesystem made beforehand."""
    require_root()
    source = tmp_path / "source"
    source.mkdir()
    (source / "hello").write_text("from inside")
    image = tmp_path / "small.img"
    image.write_bytes(bytes(8 * MIB))
    run_tool("mkfs.ext4", "-q", "-d", source, image)
    on = mounts.mount("-r", image)
    files = mounts.mount_filesystem(str(on / "small"), "-o", "loop,ro,noload")
    assert (files / "hello").read_text() == "from inside"
    mounts.umount_filesystem(files)
    mounts.umount(on, "--wait", "--timeout", "20")


def _make_image(folder: Path, format: str, size: int) -> Path:
    """An empty disk called ``disk``: raw, qcow2, or a qcow2 overlay with small clusters over one with old garbage."""
    if format == "raw":
        image = folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(size)
        return image
    if format == "qcow2":
        return make_qcow2(folder / "disk.qcow2", size)
    base = make_qcow2(folder / "base.qcow2", size // 2, f"write -P 0xa5 0 {size // 2}")
    return make_qcow2(folder / "disk.qcow2", size, backing=base, cluster_size=4096)


def _fill(folder: Path, seed: int) -> dict[str, bytes]:
    """Make files of many sizes, some sparse, some in pieces out of order; returns their hashes by path."""
    random_ = random.Random(seed)
    for index in range(60):
        path = folder / f"{seed}-{index % 7}" / f"file{index}"
        path.parent.mkdir(exist_ok=True)
        data = random_.randbytes(random_.choice([0, 1, 511, 4096, 70_000, 300_000, MIB]))
        with path.open("wb") as file:
            starts = list(range(0, len(data), 65536))
            random_.shuffle(starts)
            for start in starts:
                file.seek(start)
                file.write(data[start : start + 65536])
            if index % 5 == 0:
                file.truncate(len(data) + 100_000)
            if index % 9 == 0:
                os.fsync(file.fileno())
    return {path: hash_ for path, hash_ in _sums(folder).items() if path.startswith(f"{seed}-")}


def _sums(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("file*")
        if path.is_file()
    }
