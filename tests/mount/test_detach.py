"""``fusedisk detach`` and every other end of an attached image: never under somebody who uses it, unless told to."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fusedisk.mount import loop_device
from tests.conftest import qemu_img, require_root, run_tool
from tests.support.attachments import Attachments, attachments_below
from tests.support.commands import fusedisk_process, process_command, process_environment
from tests.support.files import mounted_tmpfs
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, has_ended, wait_until

MIB = 1 << 20
UNLESS = "end that first, wait with --wait, or lose unwritten data with --force."


@pytest.fixture
def attached(mounts: Mounts, tmp_path: Path) -> Iterator[Attachments]:
    """Attaches images, and detaches them whatever happens; before what ``mounts`` has on their devices goes."""
    with attachments_below(tmp_path) as found:
        yield found


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    """A qcow2 image with an ext4 filesystem and no partitions."""
    flat = tmp_path / "flat"
    flat.write_bytes(bytes(16 * MIB))
    run_tool("mkfs.ext4", "-q", flat)
    image = tmp_path / "vm.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", flat, image)
    flat.unlink()
    return image


def _content_of(image: Path, name: str) -> bytes:
    """A file inside the ext4 filesystem of an image, which nobody has open."""
    flat, out = image.with_name("flat"), image.with_name("out")
    qemu_img("check", image)
    qemu_img("convert", "-O", "raw", image, flat)
    run_tool("e2fsck", "-fy", flat, check=False)  # replays its journal, if need be
    run_tool("debugfs", "-R", f"dump /{name} {out}", flat)
    return out.read_bytes()


def _refusal(*args: str | Path) -> str:
    done = fusedisk_process("detach", *args)
    assert (done.code, done.out) == (1, "")
    (line,) = done.err.splitlines()
    return line.removeprefix("fusedisk: ")


# --- who uses it ----------------------------------------------------------------------------------------


def test_a_filesystem_is_named_and_kept(attached: Attachments, mounts: Mounts, ext4: Path) -> None:
    device = attached.attach(ext4)
    files = mounts.mount_filesystem(device)
    assert _refusal(device) == f"'{device}' is mounted at '{files}': {UNLESS}"
    (files / "file").write_bytes(b"untroubled")
    mounts.umount_filesystem(files)
    attached.detach(device)
    assert _content_of(ext4, "file") == b"untroubled"


def test_a_filesystem_mounted_under_another_name_is_found(
    attached: Attachments, mounts: Mounts, ext4: Path, tmp_path: Path
) -> None:
    """Devices are told apart by their numbers."""
    device = attached.attach(ext4)
    other = tmp_path / "node"
    os.mknod(other, 0o600 | 0o060000, os.stat(device).st_rdev)
    files = mounts.mount_filesystem(str(other))
    assert f"mounted at '{files}'" in _refusal(device)
    mounts.umount_filesystem(files)


def test_processes_are_named_and_the_device_works_on(attached: Attachments, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    device = attached.attach(image)
    with open(device, "r+b", buffering=0) as file:
        assert re.fullmatch(rf"'{device}' is opened by \S+ \(pid {os.getpid()}\): {re.escape(UNLESS)}", _refusal(image))
        file.write(b"x" * 512)
    assert Path(device).read_bytes()[:512] == b"x" * 512
    attached.detach(image)


def test_an_interrupted_wait_tells_the_state(attached: Attachments, tmp_path: Path) -> None:
    device = attached.attach(make_qcow2(tmp_path / "vm.qcow2", MIB))
    with open(device, "rb"):
        process = subprocess.Popen(
            process_command("detach", "--wait", device), env=process_environment(), stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.endswith(f"(pid {os.getpid()}): waiting until that is over.\n")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, f"fusedisk: interrupted: '{device}' is still attached.\n")
    attached.detach(device)


def test_a_full_host_is_the_reason(attached: Attachments, tmp_path: Path) -> None:
    """The kernel tells of an input/output error whatever a loop device's file fails with."""
    with mounted_tmpfs(tmp_path / "small", "size=2M") as small:
        image = make_qcow2(small / "vm.qcow2", 8 * MIB)
        l1_table = int.from_bytes(image.read_bytes()[40:48], "big")
        run_tool("fallocate", "-p", "-o", str(l1_table), "-l", "64K", image)  # its place is taken at the flush
        device = attached.attach(image)
        run_tool("dd", "if=/dev/urandom", f"of={device}", "bs=64k", "count=4", "oflag=direct", "status=none")
        run_tool("dd", "if=/dev/zero", f"of={small / 'fill'}", "bs=4k", "status=none", check=False)
        assert _refusal(device).startswith(
            f"'{device}' could not be flushed (No space left on device) and stays attached: put that right and try "
        )
        (small / "fill").unlink()
        attached.detach(device)
        qemu_img("check", image)


def test_a_throw_away_layer_that_cannot_be_written_ends(
    attached: Attachments, tmp_path: Path, program: list[str]
) -> None:
    (tmp_path / "vm.img").write_bytes(bytes(MIB))
    command = [*program, "attach", "--overlay", "--direct-io=off", "-f", "raw", str(tmp_path / "vm.img")]
    device = subprocess.run(
        command, env=process_environment(), stdout=subprocess.PIPE, check=True, text=True
    ).stdout.strip()
    with open(device, "r+b", buffering=0) as file:
        file.write(b"lost" * 1024)
        (tmp_path / "broken").write_text("error pwritev")
    attached.detach(device)


@pytest.mark.slow
def test_who_cannot_be_seen_keeps_the_device(attached: Attachments, tmp_path: Path) -> None:
    """A descriptor on its way between processes is in none of them. The device stays, also after the refusal."""
    device = attached.attach(make_qcow2(tmp_path / "vm.qcow2", MIB))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = os.open(device, os.O_RDONLY)
        socket.send_fds(ours, [b"x"], [fd])
        os.close(fd)
        assert _refusal(device) == f"'{device}' is in use by something that cannot be seen from here: {UNLESS}"
        _, (fd,), *_ = socket.recv_fds(theirs, 1, 1)
        os.close(fd)
    assert loop_device.backing_file(device) is not None
    attached.detach(device)


def test_swap_and_devices_above_are_named(attached: Attachments, tmp_path: Path) -> None:
    device = attached.attach(make_qcow2(tmp_path / "vm.qcow2", 16 * MIB))
    run_tool("mkswap", device)
    if subprocess.run(["swapon", device], capture_output=True, check=False).returncode:
        pytest.skip("this kernel has no swap")
    try:
        assert f"'{device}' is used as swap ({device})" in _refusal(device)
    finally:
        run_tool("swapoff", device)
    attached.detach(device)


# --- waiting and force ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_wait_returns_when_the_last_user_is_done(attached: Attachments, mounts: Mounts, ext4: Path) -> None:
    device = attached.attach(ext4)
    files = mounts.mount_filesystem(device)
    found = []
    waiter = threading.Thread(target=lambda: found.append(fusedisk_process("detach", "--wait", device)))
    waiter.start()
    done = fusedisk_process("detach", "--timeout", "0.5", device)
    assert (done.code, f"'{device}' is mounted at '{files}': {UNLESS}" in done.err) == (1, True)
    assert waiter.is_alive()
    (files / "file").write_bytes(b"kept")
    mounts.umount_filesystem(files)
    waiter.join()
    assert found[0].code == 0
    assert found[0].err == f"fusedisk: '{device}' is mounted at '{files}': waiting until that is over.\n"
    assert _content_of(ext4, "file") == b"kept"


def test_force_flushes_what_a_filesystem_holds_back(attached: Attachments, mounts: Mounts, ext4: Path) -> None:
    device = attached.attach(ext4)
    daemon = psutil.Process(attached.record(device).pid)
    files = mounts.mount_filesystem(device)
    (files / "file").write_bytes(b"kept" * 1000)
    attached.detach("--force", device)
    assert has_ended(daemon)
    assert attached.records() == []
    with pytest.raises(OSError):
        _append(files / "file")
    mounts.umount_filesystem(files)
    wait_until(lambda: loop_device.backing_file(device) is None, "the device is free")
    assert _content_of(ext4, "file") == b"kept" * 1000


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"lost")
        file.flush()
        os.fsync(file.fileno())


def test_a_flush_that_fails_keeps_the_device(attached: Attachments, tmp_path: Path, program: list[str]) -> None:
    image = tmp_path / "vm.img"
    image.write_bytes(bytes(MIB))
    command = [*program, "attach", "--direct-io=off", "-f", "raw", str(image)]
    device = subprocess.run(
        command, env=process_environment(), stdout=subprocess.PIPE, check=True, text=True
    ).stdout.strip()
    fd = os.open(device, os.O_RDWR)
    os.write(fd, b"kept" * 1024)
    (tmp_path / "broken").write_text("error flush_to_disk")
    os.close(fd)
    sentence = _refusal(device)
    assert sentence == (
        f"'{device}' could not be flushed (Input/output error) and stays attached: put that right and try again, or "
        "lose unwritten data with --force."
    )
    (tmp_path / "broken").unlink()
    attached.detach(device)
    assert image.read_bytes().startswith(b"kept" * 1024)


# --- other ends -----------------------------------------------------------------------------------------


def test_umount_says_how_to_detach_and_force_ends_both(attached: Attachments, tmp_path: Path) -> None:
    device = attached.attach(make_qcow2(tmp_path / "vm.qcow2", MIB))
    place = attached.record(device).mountpoint
    done = fusedisk_process("umount", place)
    assert done.code == 1
    assert f"'{place}' is in use by {device}: detach it (fusedisk detach {device}) first" in done.err
    done = fusedisk_process("umount", "--force", place)
    assert (done.code, done.err) == (0, "")
    assert loop_device.backing_file(device) is None
    assert not os.path.exists(place)


def test_umount_by_force_flushes_partitions(attached: Attachments, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    entry = struct.pack("<B3xB3xII", 0, 0x83, 2048, 2048)
    image.write_bytes((bytes(446) + entry).ljust(510, b"\0") + b"\x55\xaa" + bytes(4 * MIB))
    device = attached.attach("-f", "raw", image)
    with open(f"{device}p1", "r+b", buffering=0) as file:
        file.write(b"kept" * 1024)
        done = fusedisk_process("umount", "--force", attached.record(device).mountpoint)
        assert (done.code, done.err) == (0, "")
        assert image.read_bytes()[MIB : MIB + 4096] == b"kept" * 1024


def test_sigterm_ends_it_when_the_last_user_is_done(attached: Attachments, mounts: Mounts, ext4: Path) -> None:
    device = attached.attach(ext4)
    record = attached.record(device)
    files = mounts.mount_filesystem(device)
    daemon = psutil.Process(record.pid)
    daemon.send_signal(signal.SIGTERM)
    log = Path(record.path.removesuffix(".json") + ".log")
    wait_until(lambda: log.exists() and device in log.read_text(), "the daemon says who it waits for")
    (files / "file").write_bytes(b"kept")
    mounts.umount_filesystem(files)
    wait_until(lambda: has_ended(daemon), "the daemon has ended")
    log.unlink()
    assert loop_device.backing_file(device) is None
    assert attached.records() == []
    assert _content_of(ext4, "file") == b"kept"


def test_a_daemon_that_died_is_cleaned_up(attached: Attachments, tmp_path: Path) -> None:
    device = attached.attach(make_qcow2(tmp_path / "vm.qcow2", MIB))
    record = attached.record(device)
    daemon = psutil.Process(record.pid)
    daemon.kill()
    wait_until(lambda: has_ended(daemon), "the daemon is dead")
    row = next(line for line in fusedisk_process("list").out.splitlines() if record.mountpoint in line)
    assert row == f"{record.mountpoint}:  pid {record.pid} (stale)"
    done = fusedisk_process("detach", device)
    assert (done.code, done.err) == (
        0,
        f"fusedisk: the daemon of '{record.mountpoint}' had died, its mount was cleaned up.\n",
    )
    assert loop_device.backing_file(device) is None
    assert not os.path.exists(record.mountpoint)


def test_after_losetup_d_the_image_is_still_there_to_detach(attached: Attachments, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    device = attached.attach(image)
    run_tool("losetup", "-d", device)
    wait_until(lambda: loop_device.backing_file(device) is None, "the device is free")
    attached.detach(image)
    assert attached.records() == []


# --- what is not attached -------------------------------------------------------------------------------


def test_several_devices_of_one_image(attached: Attachments, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    devices = [attached.attach("-r", image) for _ in range(2)]
    assert re.fullmatch(
        rf"'{image}' is attached more than once, as /dev/loop\d+ and /dev/loop\d+: say which one\.", _refusal(image)
    )
    attached.detach(devices[1])
    attached.detach(image)


def test_what_was_not_attached_is_told_apart(mounts: Mounts, raw: Path) -> None:
    require_root()
    assert _refusal(raw) == f"'{raw}' is not attached."
    on = mounts.mount(raw)
    assert _refusal(raw) == f"'{raw}' is not attached but mounted: use 'fusedisk umount {on}'."
    device = mounts.loop(on / "disk")
    assert _refusal(device) == f"'{device}' is on '{on}/disk', and not by 'fusedisk attach': use 'losetup -d {device}'."
    mounts.detach(device)
    mounts.umount(on)


# --- by the image ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["relative", "symlink", "hard link", "renamed", "parent renamed"])
def test_an_image_is_found_under_every_name(attached: Attachments, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    image = make_qcow2(folder / "vm.qcow2", MIB)
    attached.attach(image)
    other = tmp_path / "other.qcow2"
    if way == "relative":
        other = Path("folder/../folder/vm.qcow2")
    elif way == "symlink":
        other.symlink_to(image)
    elif way == "hard link":
        other.hardlink_to(image)
    elif way == "renamed":
        image.rename(other)
    else:
        folder.rename(tmp_path / "moved")
        other = tmp_path / "moved/vm.qcow2"
    assert fusedisk_process("detach", other, cwd=tmp_path) == (0, "", "")
    assert str(tmp_path) not in fusedisk_process("list", "--output", "json").out


def test_an_image_that_has_anothers_name_is_not_it(attached: Attachments, tmp_path: Path) -> None:
    first, second = make_qcow2(tmp_path / "a.qcow2", MIB), make_qcow2(tmp_path / "b.qcow2", MIB)
    devices = [attached.attach(first), attached.attach(second)]
    first.rename(tmp_path / "c.qcow2")
    second.rename(first)
    assert fusedisk_process("detach", first) == (0, "", "")
    assert [loop_device.backing_file(device) is None for device in devices] == [False, True]
    done = fusedisk_process("detach", devices[0])
    assert done.code == 0
    assert done.err.endswith(f"what was written to the mount is in '{tmp_path}/c.qcow2'.\n")
