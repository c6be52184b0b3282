"""Internal snapshots as files: what the disk held then, while it is written to now."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.conftest import qemu_img, qemu_io, run_tool
from tests.crypto.images import PASSPHRASE
from tests.support.commands import fusedisk, fusedisk_process
from tests.support.images import make_qcow2, random_commands
from tests.support.mounts import Mounts

MIB = 1 << 20
SIZE = 8 * MIB


def content_of(image: Path, out: Path, *args: str) -> bytes:
    """What a disk, or with ``-l NAME`` a snapshot, holds by qemu-img."""
    qemu_img("convert", *args, "-O", "raw", image, out)
    return out.read_bytes()


def scribble(file: Path, random_: random.Random, count: int, content: bytearray) -> None:
    """Write and discard all over a file, and do the same to ``content``."""
    with file.open("r+b", buffering=0) as handle:
        for index in range(count):
            offset = random_.randrange(len(content))
            data = random_.randbytes(min(len(content) - offset, random_.choice([1, 512, 4096, 65536, 300_000])))
            assert os.pwrite(handle.fileno(), data, offset) == len(data)
            content[offset : offset + len(data)] = data
            if index % 16 == 0:
                os.fsync(handle.fileno())


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"cluster_size": 4096}, marks=pytest.mark.slow),
        pytest.param({"extended_l2": "on"}, marks=pytest.mark.slow),
        pytest.param({"compat": "0.10"}, marks=pytest.mark.slow),
    ],
)
def test_snapshots_stay_while_the_disk_is_written_to(
    mounts: Mounts, tmp_path: Path, options: dict[str, object]
) -> None:
    random_ = random.Random(3)
    image = make_qcow2(tmp_path / "vm.qcow2", SIZE, **options)
    cluster = int(str(options.get("cluster_size", 65536)))
    expected = {}
    for name in ("first", "second", "third"):
        qemu_io(image, *random_commands(random_, SIZE, cluster, 25), fmt="qcow2", options="-d unmap")
        qemu_img("snapshot", "-c", name, image)
        expected[f"vm@{name}"] = content_of(image, tmp_path / "out")
    qemu_io(image, *random_commands(random_, SIZE, cluster, 5), fmt="qcow2", options="-d unmap")
    content = bytearray(content_of(image, tmp_path / "out"))
    on = mounts.mount("--snapshots", image)
    assert set(os.listdir(on)) == {"vm", *expected}
    for _ in range(3):
        scribble(on / "vm", random_, 60, content)
        run_tool("fallocate", "-p", "-o", str(MIB), "-l", str(MIB), on / "vm", check=False)
        with (on / "vm").open("rb") as file:
            file.seek(MIB)
            content[MIB : 2 * MIB] = file.read(MIB)
        for name, held in expected.items():
            # Without the kernel's page cache: what the driver says now.
            run_tool("dd", f"if={on / name}", f"of={tmp_path / 'out'}", "bs=1M", "iflag=direct", "status=none")
            assert (tmp_path / "out").read_bytes() == held
    assert (on / "vm").read_bytes() == content
    mounts.umount(on)
    qemu_img("check", image)
    assert content_of(image, tmp_path / "out") == content
    for name, held in expected.items():
        assert content_of(image, tmp_path / "out", "-l", name.removeprefix("vm@")) == held


def test_they_are_read_only_and_as_old_and_large_as_the_disk_was(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB, "write -P 1 0 64k")
    qemu_img("snapshot", "-c", "small", image)
    qemu_img("resize", "-q", image, "3M")
    qemu_img("snapshot", "-c", "large", image)
    (small, large) = fusedisk("info", "--output", "json", image).json["snapshots"]
    on = mounts.mount("--snapshots", image)
    for name, size, info in (("small", MIB, small), ("large", 3 * MIB, large)):
        file = on / f"vm@{name}"
        found = file.stat()
        assert (found.st_size, found.st_mode & 0o777) == (size, 0o400)
        assert found.st_mtime_ns == info["date-sec"] * 10**9 + info["date-nsec"]
        assert file.read_bytes() == b"\1" * 65536 + bytes(size - 65536)
        assert os.getxattr(file, "user.fusedisk.snapshot-name") == name.encode()
        assert os.getxattr(file, "user.fusedisk.snapshot-id") == info["id"].encode()
        with pytest.raises(OSError, match=r"Read-only file system|Permission denied"):
            file.open("r+b")
    before = (on / "vm@small").stat()
    with (on / "vm").open("r+b", buffering=0) as file:
        file.write(b"x" * 100_000)
        os.fsync(file.fileno())
    assert (on / "vm@small").stat().st_mtime_ns == before.st_mtime_ns
    exports = [mount["exports"] for mount in fusedisk_process("list", "--output", "json").json]
    (listed,) = [
        export for found in exports for export in found if export["image"] == str(image) and "@small" in export["name"]
    ]
    assert (listed["virtual-size"], listed["read-only"]) == (MIB, True)
    done = fusedisk_process("snapshot", "-d", "small", image)
    assert done.code == 1
    assert "is another process using the image" in done.err


def test_names_of_files(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    names = ["plain", "a/b", "twice", "twice", "9", "new\nline", "n" * 252, "n" * 253, "größer"]
    for index, name in enumerate(names):
        qemu_io(image, f"write -P {index + 1} 0 64k", fmt="qcow2")
        qemu_img("snapshot", "-c", name, image)
    on = mounts.mount("--snapshots", image)
    expected = {"plain": 1, "2": 2, "3": 3, "4": 4, "9": 5, "6": 6, "n" * 252: 7, "8": 8, "größer": 9}
    assert set(os.listdir(on)) == {"vm", *(f"vm@{name}" for name in expected)}
    for name, byte in expected.items():
        assert (on / f"vm@{name}").read_bytes()[:65536] == bytes([byte]) * 65536


def test_an_image_without_snapshots(mounts: Mounts, tmp_path: Path, raw: Path) -> None:
    for options, image in (((), make_qcow2(tmp_path / "disk.qcow2", MIB)), (("-f", "raw"), raw)):
        on = mounts.directory()
        process = mounts.start("--snapshots", *options, image, on=on)
        assert os.listdir(on) == ["disk"]
        mounts.umount(on)
        _, said = process.communicate(timeout=60)
        assert said.decode() == "fusedisk: 'disk' gets no files of snapshots: its image holds none.\n"


@pytest.mark.slow
def test_below_an_overlay_and_above_a_backing_file(mounts: Mounts, tmp_path: Path) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", SIZE, "write -P 9 0 4M")
    image = make_qcow2(tmp_path / "vm.qcow2", None, "write -P 1 1M 64k", backing=base)
    qemu_img("snapshot", "-c", "then", image)
    held = content_of(image, tmp_path / "out", "-l", "then")
    assert held[:MIB] == b"\t" * MIB
    qemu_io(image, "write -P 2 0 8M", fmt="qcow2")
    before = image.read_bytes()
    for options in (("--overlay",), ("--overlay-file", tmp_path / "layer.qcow2")):
        on = mounts.mount("--snapshots", *options, image)
        assert set(os.listdir(on)) == {"vm", "vm@then"}
        (on / "vm").write_bytes(b"x" * SIZE)
        assert (on / "vm@then").read_bytes() == held
        assert (on / "vm").read_bytes() == b"x" * SIZE
        mounts.umount(on)
        assert image.read_bytes() == before
    on = mounts.mount("--snapshots", image)
    (on / "vm").write_bytes(b"y" * SIZE)
    assert (on / "vm@then").read_bytes() == held
    mounts.umount(on)
    qemu_img("check", image)


@pytest.mark.slow
def test_of_an_encrypted_image(mounts: Mounts, tmp_path: Path) -> None:
    key, image = tmp_path / "key", tmp_path / "vm.qcow2"
    key.write_text(PASSPHRASE)
    options = f"encrypt.format=luks,encrypt.iter-time=10,encrypt.key-file={key}"
    assert fusedisk("create", "-f", "qcow2", "-o", options, image, "4M").code == 0
    on = mounts.directory()
    mounts.mount("--key-file", key, image, on=on)
    (on / "vm").write_bytes(b"secret" * 10_000)
    mounts.umount(on)
    assert fusedisk("snapshot", "-c", "then", image).code == 0
    mounts.mount("--key-file", key, "--snapshots", image, on=on)
    key.unlink()  # the snapshot has its key from the disk
    (on / "vm").write_bytes(b"x" * MIB)
    assert (on / "vm@then").read_bytes() == b"secret" * 10_000 + bytes(4 * MIB - 60_000)
    assert (on / "vm").read_bytes() == b"x" * MIB + bytes(3 * MIB)


def test_their_partitions(mounts: Mounts, tmp_path: Path) -> None:
    raw = tmp_path / "vm.raw"
    with raw.open("wb") as file:
        file.truncate(16 * MIB)
    run_tool("sgdisk", "--new=1:0:+2M", "--new=2:0:+3M", raw)
    image = tmp_path / "vm.qcow2"
    qemu_img("convert", "-O", "qcow2", raw, image)
    qemu_io(image, "write -P 1 1M 64k", fmt="qcow2")
    qemu_img("snapshot", "-c", "two", image)
    on = mounts.directory()
    mounts.mount(image, on=on)
    run_tool("sgdisk", "--delete=2", on / "vm")
    mounts.umount(on)
    on = mounts.mount("--partitions", "--snapshots", image)
    assert set(os.listdir(on)) == {"vm", "vm.p1", "vm@two", "vm@two.p1", "vm@two.p2"}
    with (on / "vm.p1").open("r+b", buffering=0) as file:
        file.write(b"\2" * 65536)
    assert (on / "vm@two.p1").read_bytes()[:65536] == b"\1" * 65536
    assert (on / "vm@two.p1").stat().st_mtime_ns == (on / "vm@two").stat().st_mtime_ns
    assert (on / "vm@two.p2").stat().st_size == 3 * MIB
    with (on / "vm").open("rb") as file:
        file.seek(MIB)
        assert file.read(65536) == b"\2" * 65536


def test_a_snapshot_that_cannot_be_read_costs_only_itself(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB, "write -P 1 0 64k")
    for name in ("broken", "sound"):
        qemu_img("snapshot", "-c", name, image)
    content = bytearray(image.read_bytes())
    table = int.from_bytes(content[64:72], "big")
    content[table : table + 8] = (1 << 40).to_bytes(8, "big")  # the first snapshot's L1 table
    image.write_bytes(content)
    on = mounts.directory()
    process = mounts.start("--read-only", "--snapshots", image, on=on)
    assert set(os.listdir(on)) == {"vm", "vm@sound"}
    assert (on / "vm@sound").read_bytes() == b"\1" * 65536 + bytes(MIB - 65536)
    mounts.umount(on)
    _, said = process.communicate(timeout=60)
    assert said.decode().startswith("fusedisk: 'vm' gets no file for snapshot '1': ")
    assert "Traceback" not in said.decode()
