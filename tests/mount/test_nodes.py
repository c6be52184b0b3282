"""Loop devices where /dev is a directory of its own, without devtmpfs and udev, as in containers."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from fusedisk.mount import device_nodes, loop_device
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


def _in_own_dev(
    tmp_path: Path, nodes: str, *args: str | Path, before: Sequence[str] = (), then: str = ":"
) -> subprocess.CompletedProcess[str]:
    """Run a command line with these nodes of /dev alone, by the program ``before`` it, and ``then`` more; afterwards
    detach the image that is its last argument."""
    (tmp_path / "old").mkdir(exist_ok=True)
    script = (
        f"mount --bind /dev {tmp_path}/old; mount -t tmpfs none /dev; cd {tmp_path}/old; "
        f'cp -a null zero urandom fuse {nodes} /dev/; "$@"; code=$?; {then}; '
        f"{' '.join(process_command('detach', args[-1]))} 2>&-; exit $code"
    )
    command = [*own_mounts(script), "sh", *before, *process_command(*args)]
    with attachments_below(tmp_path):
        return subprocess.run(command, env=process_environment(), capture_output=True, text=True, timeout=60)


ATTACH = ["attach", "-f", "raw", "--output", "json"]
ALL_LOOPS = "loop-control loop[0-9]*"


def test_partitions_get_nodes_that_go_again(disk: Path, tmp_path: Path) -> None:
    listing = f"ls /dev; {' '.join(process_command('detach', disk))}; ls /dev"
    done = _in_own_dev(tmp_path, ALL_LOOPS, *ATTACH, disk, then=listing)
    assert (done.returncode, done.stderr) == (0, "")
    told, end = json.JSONDecoder().raw_decode(done.stdout)
    device = told["loop-device"]
    assert told["partitions"] == [f"{device}p1", f"{device}p2"]
    names = [os.path.basename(name) for name in told["partitions"]]
    assert [name for name in done.stdout[end:].split() if name in names] == names


def test_partitions_that_get_no_nodes_are_told_and_not_named(disk: Path, tmp_path: Path) -> None:
    without = ["setpriv", "--bounding-set", "-mknod"]
    done = _in_own_dev(tmp_path, ALL_LOOPS, *ATTACH, disk, before=without)
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
    major, minor = map(int, (device_nodes.number_of(name) or "").split(":"))
    node = tmp_path / name
    assert not device_nodes.has_node(str(node))
    assert device_nodes.mknod_command(f"/dev/{name}") == f"mknod /dev/{name} b {major} {minor}"
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(major, minor + 1))
    assert not device_nodes.has_node(str(node))
    assert device_nodes.make_node(str(node))
    assert device_nodes.has_node(str(node))
    device_nodes.remove_dead_nodes([str(node)])
    assert node.exists()


def test_what_is_no_node_stays(tmp_path: Path) -> None:
    file = tmp_path / next(Path("/sys/class/block").iterdir()).name
    file.write_text("mine")
    assert not device_nodes.make_node(str(file))
    device_nodes.remove_dead_nodes([str(file), str(tmp_path / "missing")])
    assert file.read_text() == "mine"
