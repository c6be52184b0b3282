"""``fusedisk attach``: loop devices with real partition tables and filesystems on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedisk.mount import loop_device
from tests.conftest import qemu_img, qemu_io, require_root, run_tool
from tests.support.attachments import Attachments, attachments_below, traces
from tests.support.commands import fusedisk, fusedisk_process, process_command, process_environment
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, is_mounted, wait_until
from tests.support.thinning import thinned

MIB = 1 << 20


@pytest.fixture
def attached(mounts: Mounts, tmp_path: Path) -> Iterator[Attachments]:
    """Attaches images, and detaches them whatever happens; before what ``mounts`` has on their devices goes."""
    with attachments_below(tmp_path) as found:
        yield found


def _queue(device: str, name: str) -> int:
    return int(Path("/sys/block", os.path.basename(device), name).read_text())


@pytest.mark.parametrize("label", ["gpt", "dos"])
@pytest.mark.parametrize("format", thinned(["qcow2", "raw"]))
def test_a_partition_with_a_filesystem(
    attached: Attachments, mounts: Mounts, tmp_path: Path, format: str, label: str
) -> None:
    image = tmp_path / f"vm.{format}"
    qemu_img("create", "-q", "-f", format, image, "64M")
    device = attached.attach("-f", format, image)
    script = f"label: {label}\nstart=2048, size=32M\nsize=8M\n"
    subprocess.run(["sfdisk", "-q", device], input=script, text=True, check=True, capture_output=True)
    attached.detach(device)
    assert not loop_device.partitions(device)

    device = attached.attach("-f", format, image)
    assert loop_device.partitions(device) == [f"{device}p1", f"{device}p2"]
    assert [loop_device.size_of(part) for part in loop_device.partitions(device)] == [32 * MIB, 8 * MIB]
    run_tool("mkfs.ext4", "-q", f"{device}p1")
    files = mounts.mount_filesystem(f"{device}p1")
    content = os.urandom(3 * MIB)
    (files / "file").write_bytes(content)
    mounts.umount_filesystem(files)
    attached.detach(image)

    flat = tmp_path / "flat"
    qemu_img("convert", "-f", format, "-O", "raw", image, flat)
    run_tool("debugfs", "-R", f"dump /file {tmp_path}/out", f"{flat}?offset={MIB}")
    assert (tmp_path / "out").read_bytes() == content
    run_tool("e2fsck", "-fn", f"{flat}?offset={MIB}")


def test_when_detach_returns_the_image_can_be_copied(attached: Attachments, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", 8 * MIB)
    device = attached.attach(image)
    content = os.urandom(2 * MIB)
    with open(device, "r+b") as file:
        file.write(content)  # nobody syncs
    attached.detach(device)
    qemu_img("check", image)
    qemu_img("convert", "-O", "raw", image, tmp_path / "flat")
    assert (tmp_path / "flat").read_bytes()[: 2 * MIB] == content
    assert attached.records() == []


def test_read_only(attached: Attachments, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB, "write -P 7 0 64k")
    device, other = attached.attach("-r", image), attached.attach("--read-only", image)
    assert device != other
    assert _queue(device, "ro") == 1
    assert Path(device).read_bytes()[:65536] == b"\x07" * 65536
    with pytest.raises(PermissionError), open(device, "r+b", buffering=0) as file:
        file.write(b"no")
    attached.detach(device)
    attached.detach(other)


def test_an_overlay_takes_the_writes(attached: Attachments, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB, "write -P 7 0 64k")
    before = image.read_bytes()
    device = attached.attach("--overlay", image)
    with open(device, "r+b") as file:
        file.write(b"new")
    attached.detach(image)
    assert image.read_bytes() == before


@pytest.mark.parametrize(("choice", "expected"), [("on", 1), ("off", 0), ("auto", 1)])
def test_direct_io(attached: Attachments, tmp_path: Path, choice: str, expected: int) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    device = attached.attach("--direct-io", choice, image)
    assert _queue(device, "loop/dio") == expected
    content = os.urandom(MIB)
    Path(device).write_bytes(content)
    assert Path(device).read_bytes() == content
    attached.detach(device)
    qemu_img("convert", "-O", "raw", image, tmp_path / "flat")
    assert (tmp_path / "flat").read_bytes() == content


@pytest.mark.parametrize("size", [512, 4096])
def test_sector_size(attached: Attachments, tmp_path: Path, size: int) -> None:
    device = attached.attach("--sector-size", str(size), make_qcow2(tmp_path / "vm.qcow2", MIB))
    assert _queue(device, "queue/logical_block_size") == size


def test_what_fills_no_sector_is_told(attached: Attachments, tmp_path: Path) -> None:
    image = tmp_path / "odd.img"
    image.write_bytes(bytes(MIB + 700))
    done = fusedisk_process("attach", "-f", "raw", image)
    device = done.out.strip()
    assert done.err == (
        f"fusedisk: '{image}' is {MIB + 700} bytes long, {device} ends before the last 188, which fill no sector.\n"
    )
    assert loop_device.size_of(device) == MIB + 512


def test_json_is_what_list_tells(attached: Attachments, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    told = fusedisk_process("attach", "--output", "json", image).json
    device = told["loop-device"]
    assert told.pop("partitions") == []
    assert told["exports"][0]["loop-devices"] == [device]
    (listed,) = [entry for entry in fusedisk_process("list", "--output", "json").json if entry["loop-device"] == device]
    assert {**listed, "memory": 0} == {**told, "memory": 0}
    shown = fusedisk_process("list").out
    assert f"  vm     1 MiB  qcow2  {device}" in shown
    assert str(image) in shown


def test_list_shows_loop_devices_that_others_attached(mounts: Mounts, raw: Path) -> None:
    require_root()
    on = mounts.mount(raw)
    device = mounts.loop(on / "disk")
    (listed,) = [entry for entry in fusedisk_process("list", "--output", "json").json if entry["mountpoint"] == str(on)]
    assert (listed["loop-device"], listed["exports"][0]["loop-devices"]) == (None, [device])
    mounts.detach(device)
    mounts.umount(on)


# --- discard --------------------------------------------------------------------------------------------


def test_discard_comes_in_clusters(attached: Attachments, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", 8 * MIB, "write -P 7 0 8M", cluster_size=131072)
    device = attached.attach(image)
    assert _queue(device, "queue/discard_max_bytes") > 0
    assert _queue(device, "queue/discard_granularity") == 131072
    run_tool("blkdiscard", "-o", str(MIB), "-l", str(2 * MIB), device)
    assert Path(device).read_bytes()[MIB : 3 * MIB] == bytes(2 * MIB)
    attached.detach(device)
    qemu_io(image, "read -P 7 0 1M", "read -P 0 1M 2M", "read -P 7 3M 5M")
    data = [entry["length"] for entry in fusedisk_process("map", "--output", "json", image).json if entry["data"]]
    assert sum(data) == 6 * MIB


# --- resizing -------------------------------------------------------------------------------------------


def test_the_device_follows_the_size_of_the_disk(attached: Attachments, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", 4 * MIB)
    device = attached.attach(image)
    for size in (16 * MIB, 5 * MIB, 6 * MIB + 512):
        os.truncate(attached.file(device), size)
        wait_until(lambda size=size: loop_device.size_of(device) == size, f"{device} has {size} bytes")
    with open(device, "r+b") as file:
        file.seek(5 * MIB)
        file.write(b"behind the old end")
    attached.detach(device)
    qemu_img("check", image)
    qemu_img("convert", "-O", "raw", image, tmp_path / "flat")
    assert (tmp_path / "flat").stat().st_size == 6 * MIB + 512
    assert (tmp_path / "flat").read_bytes()[5 * MIB :].startswith(b"behind the old end\0")


def test_devices_of_others_follow_as_well(mounts: Mounts, raw: Path) -> None:
    """One on the whole file, one on its tail, one of a fixed size."""
    require_root()
    on = mounts.mount("--growable", raw)
    whole = mounts.loop(on / "disk")
    tail = mounts.loop(on / "disk", "--offset", str(MIB))
    part = mounts.loop(on / "disk", "--sizelimit", str(2 * MIB))
    with (on / "disk").open("ab") as file:
        file.write(bytes(MIB))
    devices = (whole, tail, part)
    wanted = [5 * MIB, 4 * MIB, 2 * MIB]
    wait_until(lambda: [loop_device.size_of(device) for device in devices] == wanted, "the devices have grown")
    for device in devices:
        mounts.detach(device)
    mounts.umount(on)


# --- what goes wrong ------------------------------------------------------------------------------------


def _run_changed(tmp_path: Path, change: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run fusedisk after a change of its modules, which stands for a kernel that refuses something."""
    script = tmp_path / "changed.py"
    script.write_text(
        "import errno, os\nfrom fusedisk.cli.main import main\nfrom fusedisk.mount import loop_device, runtime\n"
        "def refuse(*args, **keywords):\n    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))\n"
        f"{change}\nmain()\n"
    )
    command = [sys.executable, str(script), *map(str, args)]
    return subprocess.run(command, env=process_environment(), capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("change", "args", "sentence"),
    [
        ("", ["-f", "raw", "missing.img"], "Could not open '{folder}/missing.img': No such file or directory"),
        ("", ["--format", "qcow2", "midway.img"], "expected qcow2's 514649fb."),
        ("loop_device._configure = refuse", ["-f", "raw", "midway.img"], "Could not attach /dev/loop"),
        (
            "loop_device._set_direct_io = refuse",
            ["-f", "raw", "--direct-io=on", "midway.img"],
            "Could not switch direct I/O on for",
        ),
        (
            "loop_device._CONTROL = '/dev/null'",
            ["-f", "raw", "midway.img"],
            "Could not get a free loop device from '/dev/null'",
        ),
        (
            "loop_device._CONTROL = '/dev/none'",
            ["-f", "raw", "midway.img"],
            "/dev/none is missing here, though this kernel has loop devices: pass the device into the container,",
        ),
        (
            "write = runtime.MountRecord.write\n"
            "runtime.MountRecord.write = lambda self: refuse() if self.loop else write(self)",
            ["-f", "raw", "midway.img"],
            "internal error: OSError:",
        ),
    ],
    ids=["no image", "not the format", "not attached", "no direct I/O", "no free device", "no loop devices", "a bug"],
)
def test_a_failure_midway_is_undone(
    attached: Attachments, tmp_path: Path, change: str, args: list[str], sentence: str
) -> None:
    (tmp_path / "midway.img").write_bytes(bytes(MIB))
    before = traces("midway")
    args = [str(tmp_path / arg) if arg.endswith(".img") else arg for arg in args]
    done = _run_changed(tmp_path, change, "attach", *args)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert sentence.format(folder=tmp_path) in line
    wait_until(lambda: traces("midway") <= before, "nothing is left")
    assert attached.records() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_an_end_midway_is_undone(attached: Attachments, tmp_path: Path, number: signal.Signals) -> None:
    """The command ends when its device is there and before it hears of that."""
    (tmp_path / "cut.img").write_bytes(bytes(MIB))
    before = traces("cut")
    script = tmp_path / "slow.py"
    script.write_text(
        "import os, time\nfrom fusedisk.cli import background\nfrom fusedisk.cli.daemon import Daemon\n"
        "tell = Daemon._tell\n"
        "def slowly(self, failure):\n"
        f"    open({str(tmp_path / 'there')!r}, 'w').close()\n"
        "    for _ in range(6000):\n"  # if the test dies, it does not stay
        f"        if os.path.exists({str(tmp_path / 'go')!r}): break\n"
        "        time.sleep(0.01)\n"
        "    tell(self, failure)\n"
        "Daemon._tell = slowly\n"
        "from fusedisk.cli.main import main\nmain()\n"
    )
    command = [sys.executable, str(script), "attach", "-f", "raw", str(tmp_path / "cut.img")]
    process = subprocess.Popen(command, env=process_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until((tmp_path / "there").exists, "the device is there")
    assert traces("cut") > before
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.wait()
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=60)
    told = f"fusedisk: interrupted: '{tmp_path}/cut.img' is not attached.\n" if number == signal.SIGINT else ""
    assert (out, err) == (b"", told.encode())
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    wait_until(lambda: traces("cut") <= before, "nothing is left")
    wait_until(lambda: attached.records() == [], "nothing is served")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_an_end_does_not_wait_for_a_mount_that_never_gets_ready(
    attached: Attachments, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "early.img").write_bytes(bytes(MIB))
    before = traces("early")
    change = (
        "import trio\nfrom fusedisk.mount.session import Session\n"
        "async def wait_for_ever(self, ready):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    await trio.sleep_forever()\n"
        "Session._wait_ready = wait_for_ever"
    )
    done = _run_changed(tmp_path, change, "attach", "-f", "raw", tmp_path / "early.img")
    assert (done.returncode, done.stderr) == (1, "fusedisk: the mount was stopped before it was ready.\n")
    wait_until(lambda: traces("early") <= before, "nothing is left")
    assert attached.records() == []


@pytest.mark.parametrize("target", ["full", "closed pipe"])
def test_a_device_that_cannot_be_told_is_detached(attached: Attachments, tmp_path: Path, target: str) -> None:
    (tmp_path / "untold.img").write_bytes(bytes(MIB))
    before = traces("untold")
    if target == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, out = os.pipe()
        os.close(reading)
    try:
        done = subprocess.run(
            process_command("attach", tmp_path / "untold.img"),
            env=process_environment(),
            stdout=out,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(out)
    assert done.returncode == (1 if target == "full" else 141)
    wait_until(lambda: traces("untold") <= before, "nothing is left")
    assert attached.records() == []


def test_direct_io_that_the_kernel_refuses_is_left_off(attached: Attachments, tmp_path: Path) -> None:
    (tmp_path / "vm.img").write_bytes(bytes(MIB))
    done = _run_changed(tmp_path, "loop_device._set_direct_io = refuse", "attach", str(tmp_path / "vm.img"))
    assert done.returncode == 0, done.stderr
    assert _queue(done.stdout.strip(), "loop/dio") == 0
    attached.detach(done.stdout.strip())


@pytest.mark.parametrize("read_only", [False, True])
def test_kernels_without_loop_configure(
    mounts: Mounts, raw: Path, read_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They know the older requests; this kernel does not know the new one under another number."""
    require_root()
    monkeypatch.setattr(loop_device, "_LOOP_CONFIGURE", 0x4CFF)
    settings = loop_device.LoopSettings(sector_size=4096, direct_io="off")
    device = loop_device.attach(str(raw), settings, read_only=read_only)
    try:
        assert _queue(device, "queue/logical_block_size") == 4096
        assert _queue(device, "ro") == read_only
        assert _queue(device, "loop/partscan") == 1
        assert loop_device.attached_to(str(raw)) == [device]
        assert Path(device).read_bytes() == raw.read_bytes()
    finally:
        assert loop_device.detach(device, str(raw))
    assert loop_device.attached_to(str(raw)) == []


def test_without_root(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = fusedisk("attach", raw)
    assert (done.code, done.err) == (
        1,
        "fusedisk: Attaching an image to a loop device needs root: use sudo, or 'fusedisk mount' for a file.\n",
    )


def test_images_below_no_mountpoint(attached: Attachments, tmp_path: Path) -> None:
    """The place is one of its own, so it hides nothing, and goes with the device."""
    device = attached.attach(make_qcow2(tmp_path / "vm.qcow2", MIB))
    place = attached.file(device).parent
    assert is_mounted(place)
    assert place.name.startswith("attached")
    attached.detach(device)
    assert not place.exists()
