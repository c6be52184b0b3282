"""Loop devices where /dev is a directory of its own, without devtmpfs and udev, as in containers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from fusedisk.mount import loop_device
from tests.conftest import require_root
from tests.support.attachments import attachments_below
from tests.support.commands import fusedisk_process, process_command, process_environment
from tests.support.mounts import own_mounts

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An image with two partitions."""
    require_root()
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    script = "label: gpt\nsize=2M\nsize=3M\n"
    subprocess.run(["sfdisk", "-q", image], input=script, text=True, check=True, capture_output=True)
    return image


def _in_own_dev(tmp_path: Path, nodes: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command line with these nodes of /dev alone; afterwards detach the image that is its last argument."""
    (tmp_path / "old").mkdir(exist_ok=True)
    script = (
        f"mount --bind /dev {tmp_path}/old; mount -t tmpfs none /dev; cd {tmp_path}/old; "
        f'cp -a null zero urandom fuse {nodes} /dev/; "$@"; code=$?; '
        f"{' '.join(process_command('detach', args[-1]))} 2>&-; exit $code"
    )
    command = [*own_mounts(script), "sh", *process_command(*args)]
    return subprocess.run(command, env=process_environment(), capture_output=True, text=True, timeout=60)


def test_partitions_without_nodes_are_told_and_not_named(disk: Path, tmp_path: Path) -> None:
    done = _in_own_dev(tmp_path, "loop-control loop[0-9]*", "attach", "-f", "raw", "--output", "json", disk)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["partitions"] == []
    device = told["loop-device"]
    assert done.stderr.startswith(
        f"fusedisk: this /dev has no nodes for {device}p1 and {device}p2, as in a container without udev or devtmpfs: "
        f"make what you need (such as mknod {device}p1 b "
    )


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        ("loop-control", "but this /dev has no such device, as in a container without udev or devtmpfs: pass it in,"),
        ("loop0", "/dev/loop-control is missing here, though this kernel has loop devices: pass the device into"),
    ],
)
def test_a_missing_device_is_the_reason(disk: Path, tmp_path: Path, nodes: str, sentence: str) -> None:
    done = _in_own_dev(tmp_path, nodes, "attach", "-f", "raw", disk)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert sentence in line


def test_a_partition_stands_for_its_device(disk: Path, tmp_path: Path) -> None:
    with attachments_below(tmp_path) as attached:
        device = attached.attach("-f", "raw", disk)
        assert loop_device.whole(f"{device}p2") == loop_device.whole(device) == device
        done = fusedisk_process("attach", "--output", "json", "--read-only", "--force-share", "-f", "raw", disk)
        assert done.json["partitions"] == [f"{done.json['loop-device']}p{number}" for number in (1, 2)]
        assert all(map(os.path.exists, done.json["partitions"]))
        for found in (device, done.json["loop-device"]):
            attached.detach(f"{found}p2")
            assert loop_device.backing_file(found) is None
        done = fusedisk_process("detach", f"{device}p2")
        assert done.err == f"fusedisk: '{device}p2' is not attached.\n"


def test_a_node_of_another_number_is_none(tmp_path: Path) -> None:
    """The kernel gives numbers of partitions again, and nodes may be left from before."""
    require_root()
    (name,) = [entry.name for entry in Path("/sys/class/block").iterdir()][:1]
    major, minor = map(int, (loop_device.number_of(name) or "").split(":"))
    for number, expected in ((os.makedev(major, minor), True), (os.makedev(major, minor + 1), False)):
        node = tmp_path / str(number) / name
        node.parent.mkdir()
        os.mknod(node, 0o600 | 0o060000, number)
        assert loop_device.has_node(str(node)) == expected
    assert not loop_device.has_node(str(tmp_path / name))
    assert loop_device.mknod_command(f"/dev/{name}") == f"mknod /dev/{name} b {major} {minor}"
