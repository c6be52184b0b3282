"""Loop devices over the mount: discarding, zeroing, and filesystems full of small files, read elsewhere afterwards."""

from __future__ import annotations

import hashlib
import os
import random
import tarfile
from pathlib import Path

import pytest

from tests.conftest import qemu_img, qemu_io, require_root, require_tool, run_tool
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts

MIB = 1 << 20
_MKFS = {"ext4": ("-q",), "xfs": ("-q",), "btrfs": ("-q",)}
_CHECK = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n", "-f"), "btrfs": ("btrfs", "check", "--readonly")}
_OPTIONS = {"ext4": ("-o", "ro"), "xfs": ("-o", "ro,nouuid"), "btrfs": ("-o", "ro")}


def _allocated(image: Path) -> int:
    """Bytes that it takes up on its host."""
    return image.stat().st_blocks * 512


def _queue(device: str, name: str) -> int:
    return int(Path("/sys/block", os.path.basename(device), "queue", name).read_text())


@pytest.mark.parametrize("cluster_size", [16384, 65536, 1 << 20])
def test_discarding_shrinks_the_image(mounts: Mounts, tmp_path: Path, cluster_size: int) -> None:
    require_root()
    image = make_qcow2(tmp_path / "disk.qcow2", 64 * MIB, "write -P 5 0 64M", cluster_size=cluster_size)
    on = mounts.mount(image)
    device = mounts.loop(on / "disk")
    assert _queue(device, "discard_granularity") == cluster_size
    assert _queue(device, "discard_max_bytes") > 0
    full = _allocated(image)
    run_tool("blkdiscard", "--offset", str(8 * MIB), "--length", str(32 * MIB), device)
    run_tool("sync", on / "disk")
    assert _allocated(image) <= full - 31 * MIB
    mounts.detach(device)
    mounts.umount(on)
    qemu_img("check", image)
    qemu_io(image, "read -P 5 0 8M", "read -P 0 8M 32M", "read -P 5 40M 24M", fmt="qcow2")


def test_zeroing_a_device_hides_the_backing_file(mounts: Mounts, tmp_path: Path) -> None:
    require_root()
    base = make_qcow2(tmp_path / "base.qcow2", 32 * MIB, "write -P 0xb5 0 32M")
    image = make_qcow2(tmp_path / "disk.qcow2", 32 * MIB, "write -P 5 4M 4M", backing=base)
    on = mounts.mount(image)
    device = mounts.loop(on / "disk")
    run_tool("blkdiscard", "-z", "--offset", str(2 * MIB + 4096), "--length", str(8 * MIB), device)
    run_tool("blkdiscard", "--offset", str(20 * MIB), "--length", str(8 * MIB), device)
    with open(device, "rb") as opened:
        assert opened.read(2 * MIB + 4096) == b"\xb5" * (2 * MIB + 4096)
        assert opened.read(8 * MIB) == bytes(8 * MIB)
        assert opened.read(MIB) == b"\xb5" * MIB
    mounts.detach(device)
    mounts.umount(on)
    qemu_img("check", image)
    start = 2 * MIB + 4096
    qemu_io(image, f"read -P 0xb5 0 {start}", f"read -P 0 {start} 8M", "read -P 0xb5 19M 1M", fmt="qcow2")
    qemu_io(image, "read -P 0 20M 8M", "read -P 0xb5 28M 4M", fmt="qcow2")
    assert _allocated(image) < 6 * MIB


@pytest.mark.parametrize("filesystem", ["ext4", pytest.param("btrfs", marks=pytest.mark.slow)])
def test_fstrim_shrinks_the_image(mounts: Mounts, tmp_path: Path, filesystem: str) -> None:
    require_root()
    image = make_qcow2(tmp_path / "disk.qcow2", 256 * MIB)
    on = mounts.mount(image)
    device = mounts.loop(on / "disk")
    run_tool(require_tool(f"mkfs.{filesystem}"), *_MKFS[filesystem], device)
    files = mounts.mount_filesystem(device)
    kept = random.Random(3).randbytes(3 * MIB)
    (files / "kept").write_bytes(kept)
    (files / "large").write_bytes(random.Random(4).randbytes(64 * MIB))
    run_tool("sync", "-f", files)
    run_tool("sync", on / "disk")
    full = _allocated(image)
    assert full > 66 * MIB
    (files / "large").unlink()
    run_tool("sync", "-f", files)
    run_tool("fstrim", files)
    run_tool("sync", on / "disk")
    assert _allocated(image) <= full - 60 * MIB
    assert (files / "kept").read_bytes() == kept
    mounts.umount_filesystem(files)
    run_tool(*_CHECK[filesystem], device)
    mounts.detach(device)
    mounts.umount(on)
    qemu_img("check", image)


def _tree(archive: Path, count: int) -> dict[str, bytes]:
    """A tar file like that of a kernel's source: many small files in many folders; hashes of its files by name."""
    random_ = random.Random(count)
    text = random_.randbytes(1 << 17).hex().encode()
    sums = {}
    folder = archive.with_name("tree")
    for index in range(count):
        name = f"{random_.randrange(12)}/{random_.randrange(20)}/file{index}.c"
        start = random_.randrange(len(text))
        content = text[start : start + int(random_.paretovariate(0.9) * 700) % 115_000] + b"%d" % index
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sums[name] = hashlib.sha256(content).digest()
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, ".")
    run_tool("rm", "-r", folder)
    return sums


def _sums(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("file*.c")
    }


@pytest.mark.parametrize(
    ("filesystem", "kind", "count"),
    [
        ("ext4", "qcow2", 1500),
        pytest.param("xfs", "qcow2", 1500, marks=pytest.mark.slow),
        pytest.param("btrfs", "qcow2", 1500, marks=pytest.mark.slow),
        *(pytest.param(filesystem, "subclusters", 15_000, marks=pytest.mark.slow) for filesystem in _MKFS),
        *(pytest.param(filesystem, "overlay", 15_000, marks=pytest.mark.slow) for filesystem in _MKFS),
        # As many as Linux has.
        pytest.param("ext4", "qcow2", 80_000, marks=pytest.mark.slow),
    ],
)
def test_a_tree_of_small_files(mounts: Mounts, tmp_path: Path, filesystem: str, kind: str, count: int) -> None:
    require_root()
    size = (4096 if count > 50_000 else 1024) * MIB
    if kind == "qcow2":
        image = make_qcow2(tmp_path / "disk.qcow2", size)
    else:
        base = make_qcow2(tmp_path / "base.qcow2", size // 2, "write -P 0xb5 0 40M")
        options = {"extended_l2": "on", "cluster_size": "128k"} if kind == "subclusters" else {}
        image = make_qcow2(tmp_path / "disk.qcow2", size, backing=base, **options)
    sums = _tree(tmp_path / "tree.tar", count)
    on = mounts.mount(image)
    device = mounts.loop(on / "disk")
    run_tool(require_tool(f"mkfs.{filesystem}"), *_MKFS[filesystem], device)
    files = mounts.mount_filesystem(device)
    run_tool("tar", "-C", files, "-xf", tmp_path / "tree.tar")
    mounts.umount_filesystem(files)
    files = mounts.mount_filesystem(device)
    assert _sums(files) == sums
    mounts.umount_filesystem(files)
    run_tool(*_CHECK[filesystem], device)
    mounts.detach(device)
    mounts.umount(on)

    qemu_img("check", image)
    flat = tmp_path / "flat"
    qemu_img("convert", "-O", "raw", image, flat)
    run_tool(*_CHECK[filesystem], flat)
    device = mounts.loop(flat, "-r")
    files = mounts.mount_filesystem(device, *_OPTIONS[filesystem])
    assert _sums(files) == sums
    mounts.umount_filesystem(files)
    mounts.detach(device)
