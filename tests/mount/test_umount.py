"""``fusedisk umount`` never pulls a disk from under somebody who uses it, unless it is told to."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fusedisk.mount import loop_device, mountinfo, runtime
from tests.conftest import qemu_img, qemu_io, require_root, run_tool
from tests.support.attachments import attachments_below
from tests.support.commands import fusedisk_process, process_command, process_environment
from tests.support.files import mounted_tmpfs
from tests.support.images import make_qcow2
from tests.support.mounts import PATIENCE, Covered, Mounts, daemon_of, has_ended, is_mounted, own_mounts, wait_until

MIB = 1 << 20


def test_an_open_file_is_named_and_kept(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    with (on / "disk").open("r+b", buffering=0) as file:
        done = fusedisk_process("umount", on)
        assert done.code == 1
        assert re.fullmatch(
            rf"fusedisk: '{on}' is in use by \S+ \(pid {os.getpid()}, open file\): end that first, wait with --wait, "
            rf"or lose unwritten data with --force\.\n",
            done.err,
        )
        file.write(b"untroubled")
    mounts.umount(on)
    assert raw.read_bytes().startswith(b"untroubled")


def test_a_mapping_keeps_a_disk_and_loses_nothing(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    with _mapped(on / "disk") as place:
        ctypes.memmove(place, b"mapped", 6)
        done = fusedisk_process("umount", on)
        assert f"(pid {os.getpid()}, mapped file)" in done.err
    mounts.umount(on)
    assert raw.read_bytes().startswith(b"mapped")


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[int]:
    """Where the beginning of a file is in memory, shared; without a descriptor, which Python's mmap would keep."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    with path.open("r+b") as file:
        place = libc.mmap(None, MIB, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, file.fileno(), 0)
    try:
        yield place
    finally:
        assert libc.munmap(ctypes.c_void_p(place), MIB) == 0


def test_a_loop_device_and_what_is_mounted_from_it_are_named(mounts: Mounts, tmp_path: Path) -> None:
    require_root()
    image = tmp_path / "fs.img"
    image.write_bytes(bytes(16 * MIB))
    run_tool("mkfs.ext4", "-q", image)
    on = mounts.mount("-f", "raw", image)
    device = mounts.loop(on / "fs")
    assert f"'{on}' is in use by {device}" in fusedisk_process("umount", on).err
    filesystem = mounts.mount_filesystem(device)
    done = fusedisk_process("umount", on)
    assert (done.code, f"in use by {device} (mounted at '{filesystem}')" in done.err) == (1, True)
    (filesystem / "file").write_bytes(b"content")
    mounts.umount_filesystem(filesystem)
    mounts.detach(device)
    mounts.umount(on)
    run_tool("e2fsck", "-fn", image)


def test_a_mount_below_is_named(mounts: Mounts, raw: Path) -> None:
    require_root()
    on = mounts.mount("-r", raw)
    flat = mounts.mount(raw, "-r", on=on / "disk")
    done = fusedisk_process("umount", on)
    assert f"in use by the mount at '{flat}'" in done.err
    mounts.umount(flat)
    mounts.umount(on)


def test_wait_returns_when_the_last_user_is_done(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    with (on / "disk").open("rb") as file:
        holder = subprocess.Popen(["sleep", "60"], stdin=file)
    found = []
    waiter = threading.Thread(target=lambda: found.append(fusedisk_process("umount", "--wait", on)))
    waiter.start()
    assert fusedisk_process("umount", on).code == 1
    assert waiter.is_alive()
    holder.kill()
    holder.wait()
    waiter.join()
    assert found[0].code == 0, found[0].err
    assert not is_mounted(on)


@pytest.mark.slow
def test_wait_ends_at_the_timeout(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    with (on / "disk").open("rb"):
        start = time.monotonic()
        done = fusedisk_process("umount", "--wait", "--timeout", "1", on)
        assert time.monotonic() - start >= 1
    assert done.code == 1
    assert f"(pid {os.getpid()}, open file)" in done.err
    assert is_mounted(on)


def test_no_time_for_users_is_a_moment_for_the_daemon(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    with (on / "disk").open("rb"):
        assert "(pid" in fusedisk_process("umount", "--timeout", "0", on).err
    assert fusedisk_process("umount", "--timeout", "0", on) == (0, "", "")
    assert not is_mounted(on)


def test_force_flushes_and_ends_open_handles(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    on = mounts.mount(image)
    daemon = daemon_of(on)
    file = os.open(on / "vm", os.O_RDWR)
    os.write(file, b"kept" * 1000)
    mounts.umount(on, "--force")
    assert not is_mounted(on)
    assert has_ended(daemon)
    with pytest.raises(OSError) as caught:
        os.write(file, b"lost")
    assert caught.value.errno in (errno.EIO, errno.ENOTCONN)
    with pytest.raises(OSError, match="not connected"):
        os.close(file)
    qemu_img("check", image)
    qemu_img("convert", "-O", "raw", image, tmp_path / "out")
    assert (tmp_path / "out").read_bytes().startswith(b"kept" * 1000)


def test_force_ends_a_disk_under_a_loop_device(mounts: Mounts, tmp_path: Path) -> None:
    require_root()
    image = tmp_path / "fs.img"
    image.write_bytes(bytes(4 * MIB))
    on = mounts.mount("-f", "raw", image)
    device = mounts.loop(on / "fs")
    run_tool("dd", "if=/dev/urandom", f"of={device}", "bs=64k", "count=1", "conv=fsync", "status=none")
    content = Path(device).read_bytes()[:65536]
    mounts.umount(on, "--force")
    done = subprocess.run(
        ["dd", "if=/dev/zero", f"of={device}", "bs=4k", "count=1", "oflag=direct"], capture_output=True
    )
    assert b"Input/output error" in done.stderr
    assert image.read_bytes()[:65536] == content


def test_force_flushes_what_was_written_into_a_mapping(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    with _mapped(on / "disk") as place:
        ctypes.memmove(place, b"mapped", 6)
        mounts.umount(on, "--force")
        assert raw.read_bytes().startswith(b"mapped")


def test_force_flushes_filesystems_on_loop_devices_of_a_mount(mounts: Mounts, tmp_path: Path) -> None:
    require_root()
    image, out = tmp_path / "fs.img", tmp_path / "out"
    image.write_bytes(bytes(16 * MIB))
    run_tool("mkfs.ext4", "-q", image)
    on = mounts.mount("-f", "raw", image)
    filesystem = mounts.mount_filesystem(mounts.loop(on / "fs"))
    (filesystem / "file").write_bytes(b"kept" * 1000)
    mounts.umount(on, "--force")
    run_tool("e2fsck", "-fy", image, check=False)  # replays its journal
    run_tool("debugfs", "-R", f"dump /file {out}", image)
    assert out.read_bytes() == b"kept" * 1000


def test_force_ends_a_mount_that_cannot_be_flushed_in_time(
    mounts: Mounts, raw: Path, tmp_path: Path, program: list[str]
) -> None:
    on = mounts.directory()
    process = mounts.start("-f", "raw", raw, on=on, program=program)
    (tmp_path / "broken").write_text("hold pwritev 0")
    with _mapped(on / "disk") as place:
        ctypes.memmove(place, b"mapped", 6)
        done = fusedisk_process("umount", "--force", "--timeout", "2", on)
    assert (done.code, done.err) == (
        1,
        f"fusedisk: flushing '{on}' took too long, so it was ended early: data not written yet may be lost.\n",
    )
    assert process.wait(PATIENCE) == 0
    assert not is_mounted(on)


def test_force_tells_what_could_not_be_flushed(mounts: Mounts, raw: Path, tmp_path: Path, program: list[str]) -> None:
    """The daemon has nothing left to flush then, and ends well."""
    on = mounts.directory()
    process = mounts.start("-f", "raw", raw, on=on, program=program)
    with _mapped(on / "disk") as place:
        ctypes.memmove(place, b"mapped", 6)
        (tmp_path / "broken").write_text("error pwritev")
        done = fusedisk_process("umount", "--force", on)
    assert (done.code, done.err) == (
        1,
        f"fusedisk: '{on}/disk' could not be flushed (Input/output error) before it was ended: data not written yet "
        "is lost.\n",
    )
    assert process.wait(PATIENCE) == 0


def test_a_failed_flush_at_the_end_is_told(mounts: Mounts, tmp_path: Path, program: list[str]) -> None:
    """The disk under the image fails when it is flushed for the last time."""
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    on = mounts.directory()
    process = mounts.start(image, on=on, program=program)
    run_tool("dd", "if=/dev/zero", f"of={on / 'vm'}", "bs=64k", "count=2", "conv=notrunc", "status=none")
    (tmp_path / "broken").write_text("error flush_to_disk")
    with (on / "vm").open("r+b", buffering=0) as file:
        file.write(b"x")
        with pytest.raises(OSError, match="Input/output error"):
            os.fsync(file.fileno())
        held = os.dup(file.fileno())
        with pytest.raises(OSError, match="Input/output error"):
            file.close()
    with pytest.raises(OSError, match="Input/output error"):
        os.close(held)
    done = fusedisk_process("umount", on)
    assert done.code == 1
    assert done.err == (
        f"fusedisk: '{on}/vm' could not be flushed (Input/output error) and stays mounted: put that right and try "
        "again, or lose unwritten data with --force.\n"
    )
    assert is_mounted(on)
    done = fusedisk_process("umount", "--force", on)
    assert done.code == 1
    assert done.err == (
        f"fusedisk: flushing 'vm' failed: the disk is broken; closing the images of '{on}' failed: the disk is broken\n"
    )
    assert process.wait(10) == 1
    assert runtime.find(str(on)) is None


def test_nothing_is_lost_where_the_host_has_no_room(mounts: Mounts, tmp_path: Path) -> None:
    """What was written is still to be flushed, so the mount stays until there is room for that: here for the L1 table,
    which in copies that are as sparse as can be has no place until then."""
    with mounted_tmpfs(tmp_path / "small", "size=2M") as small:
        image = make_qcow2(small / "vm.qcow2", 8 * MIB)
        l1_table = int.from_bytes(image.read_bytes()[40:48], "big")
        run_tool("fallocate", "-p", "-o", str(l1_table), "-l", "64K", image)
        on = mounts.mount(image)
        file = os.open(on / "vm", os.O_RDWR)
        written = 0
        with contextlib.suppress(OSError):
            while os.pwrite(file, bytes([written + 1]) * 65536, written * 65536):
                written += 1
        with contextlib.suppress(OSError):
            os.close(file)
        done = fusedisk_process("umount", on)
        assert done.code == 1
        assert "could not be flushed (No space left on device) and stays mounted" in done.err
        run_tool("mount", "-o", "remount,size=8M", small)
        mounts.umount(on)
        qemu_img("check", small / "vm.qcow2")
        for number in range(written):
            qemu_io(small / "vm.qcow2", f"read -P {number + 1} {number * 65536} 65536")
    assert written > 16


@pytest.mark.parametrize("way", ["bind", "namespace"])
def test_a_filesystem_that_is_mounted_elsewhere_is_told_and_forced(
    mounts: Mounts, raw: Path, tmp_path: Path, way: str
) -> None:
    require_root()
    on = mounts.mount(raw)
    daemon = daemon_of(on)
    other = tmp_path / "other"
    other.mkdir()
    sleeper = None
    try:
        if way == "bind":
            run_tool("mount", "--bind", on, other)
        else:
            command = own_mounts("echo; exec sleep 600", but=on)
            sleeper = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert sleeper.stdout is not None
            assert sleeper.stdout.readline()
        done = fusedisk_process("umount", on)
        assert done.code == 1
        name, way = f"the mount at '{other}'", f"umount {other}"
        if sleeper is not None:
            name = f"the mount of sleep (pid {sleeper.pid}) at '{on}'"
            way = f"nsenter -t {sleeper.pid} -m umount {on}"
        said = f"fusedisk: '{on}' is unmounted, but its daemon (pid {daemon.pid}) goes on for {name}"
        assert done.err == f"{said}: end that ({way}), or lose unwritten data with --force.\n"
        done = fusedisk_process("umount", "--timeout", "1.1", on)
        (listed,) = [entry for entry in fusedisk_process("list", "--output", "json").json if entry["pid"] == daemon.pid]
        if sleeper is None:
            assert "nothing is mounted at" in done.err
            assert (listed["state"], listed["mountpoint"], listed["held-by"]) == ("serving", str(other), [])
        else:
            assert (done.code, done.err) == (1, f"{said}: waiting until that ends.\n{said}.\n")
            assert (listed["state"], listed["held-by"], listed["mount-namespace"]) == ("ending", [name], None)
            assert f"    goes on for {name}\n" in fusedisk_process("list").out
        done = fusedisk_process("umount", "--force", "--timeout", "30", on)
        assert (done.code, done.err) == (0, "")
        assert has_ended(daemon)
    finally:
        if sleeper is not None:
            sleeper.kill()
            sleeper.communicate()
        subprocess.run(["umount", "-l", other], capture_output=True, check=False)


def test_other_mounts_and_no_mounts_are_told_apart(mounts: Mounts, tmp_path: Path) -> None:
    require_root()
    done = fusedisk_process("umount", tmp_path / "none")
    assert (done.code, done.err) == (1, f"fusedisk: nothing is mounted at '{tmp_path}/none'.\n")
    done = fusedisk_process("umount", "/proc")
    assert (done.code, done.err) == (1, "fusedisk: '/proc' is a mount of proc (proc), not of fusedisk: use umount.\n")


def test_what_was_moved_over_a_mount_is_left_alone(mounts: Mounts, raw: Path, covered: Covered) -> None:
    mounts.mount(raw, on=covered.place)
    cover = covered.cover("moved over it")
    (cover / "file").write_text("precious")
    done = fusedisk_process("umount", covered.place)
    assert done.code == 1
    assert f"'{covered.place}' is covered by cover (tmpfs): end that first, wait with --wait" in done.err
    assert (cover / "file").read_text() == "precious"
    run_tool("umount", cover)
    mounts.umount(covered.place)


def test_by_another_path(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    on = mounts.mount(raw)
    (tmp_path / "link").symlink_to(on)
    done = fusedisk_process("umount", "link/", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert not is_mounted(on)


def test_a_stopped_daemon_does_not_hang_those_who_ask(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    daemon = daemon_of(on)
    daemon.suspend()
    try:
        assert fusedisk_process("list").code == 0
        _, done = mounts.try_mount(raw, on=on)
        assert "is busy" in done.err
        for force in ([], ["--force"]):
            done = fusedisk_process("umount", "--timeout", "0.5", *force, on)
            assert done.code == 1
            assert f"(pid {daemon.pid})" in done.err
    finally:
        daemon.resume()
    wait_until(lambda: has_ended(daemon), "the daemon has ended")
    assert not is_mounted(on)


# --- several, images, all ---------------------------------------------------------------------------------


def test_several_and_by_their_images(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    """One that is in use does not keep the others."""
    other = make_qcow2(tmp_path / "vm.qcow2", MIB)
    first, second, third = mounts.mount("-r", raw), mounts.mount(other), mounts.mount("--overlay", raw)
    done = fusedisk_process("umount", raw)
    assert (done.code, done.err) == (
        1,
        f"fusedisk: '{raw}' is mounted more than once, at '{first}' and '{third}': say which one.\n",
    )
    with (first / "disk").open("rb"):
        done = fusedisk_process("umount", first, tmp_path / "none", other, third)
        assert done.code == 1
        in_use, nothing = done.err.splitlines()
        assert f"'{first}' is in use by " in in_use
        assert nothing == f"fusedisk: nothing is mounted at '{tmp_path}/none'."
    assert [is_mounted(on) for on in (first, second, third)] == [True, False, False]
    done = fusedisk_process("umount", raw.name, cwd=tmp_path)
    assert (done, is_mounted(first)) == ((0, "", ""), False)


def test_an_image_that_is_attached_is_not_unmounted(tmp_path: Path) -> None:
    with attachments_below(tmp_path) as attached:
        image = make_qcow2(tmp_path / "vm.qcow2", MIB)
        device = attached.attach(image)
        done = fusedisk_process("umount", image)
        assert (done.code, done.err) == (
            1,
            f"fusedisk: '{image}' is not mounted but attached: use 'fusedisk detach {device}'.\n",
        )
        attached.detach(device)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ((), "name what to unmount, or use --all."),
        (("--all", "mnt"), "--all takes no names."),
        (("--timeout", "nan", "mnt"), "Invalid value for '--timeout': it is 'nan', but must be a number of seconds,"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], sentence: str) -> None:
    done = fusedisk_process("umount", *args)
    assert (done.code, done.err.startswith(f"fusedisk: {sentence}")) == (2, True), done.err


def test_all(raw: Path, tmp_path: Path) -> None:
    """Those that are left are told; what is attached stays. Among mounts and records of its own."""
    require_root()
    names = ("outer", "inner", "busy")
    for name in names:
        (tmp_path / name).mkdir()
    fusedisk = shlex.join(process_command())
    script = (
        "mkdir -p /run/fusedisk; mount -t tmpfs -o mode=700 records /run/fusedisk || exit 2; "
        f"{fusedisk} umount --all || exit 3; "  # there are none
        f"cd {tmp_path}; for d in outer busy; do {fusedisk} mount -r -f raw {raw} $d || exit 4; done; "
        f"{fusedisk} mount -r -f raw outer/disk inner || exit 5; "
        f"device=$({fusedisk} attach -r -f raw {raw}); "
        f"exec 7< busy/disk; {fusedisk} umount --all; echo $?; exec 7<&-; "
        "grep -c fuse.fusedisk /proc/self/mounts; "
        f"{fusedisk} umount --all; echo $?; grep -c fuse.fusedisk /proc/self/mounts; {fusedisk} detach $device; echo $?"
    )
    done = subprocess.run(own_mounts(script), env=process_environment(), capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1", "2", "0", "1", "0"], done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fusedisk: '{tmp_path}/busy' is in use by ")


# --- waiting ----------------------------------------------------------------------------------------------


def test_an_interrupted_wait_tells_the_state(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    with (on / "disk").open("rb"):
        process = subprocess.Popen(
            process_command("umount", "--wait", on), env=process_environment(), stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        line = process.stderr.readline()
        assert f"'{on}' is in use by " in line
        assert line.endswith(": waiting until that is over.\n")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, f"fusedisk: interrupted: '{on}' is still mounted.\n")


def test_a_throw_away_layer_that_cannot_be_written_ends(mounts: Mounts, raw: Path, program: list[str]) -> None:
    """What is to be lost needs no room."""
    on = mounts.directory()
    process = mounts.start("--overlay", "-f", "raw", raw, on=on, program=program)
    with _mapped(on / "disk") as place:
        ctypes.memmove(place, b"mapped", 6)
        (raw.parent / "broken").write_text("error pwritev")
    mounts.umount(on)
    assert process.wait(PATIENCE) == 0


# --- after its directory was renamed ---------------------------------------------------------------------


@pytest.fixture
def renamed(mounts: Mounts, raw: Path, tmp_path: Path) -> tuple[Path, Path, psutil.Process]:
    """Where a mount was made, where it is, since a directory above was renamed, and its daemon."""
    old, new = tmp_path / "old" / "mnt", tmp_path / "new" / "mnt"
    old.mkdir(parents=True)
    mounts.adopt(new)
    mounts.mount(raw, on=old)
    daemon = daemon_of(old)
    os.rename(tmp_path / "old", tmp_path / "new")
    return old, new, daemon


def test_a_renamed_mount_is_listed_where_it_is(renamed: tuple[Path, Path, psutil.Process], mounts: Mounts) -> None:
    _, new, daemon = renamed
    device = mounts.loop(new / "disk")
    (found,) = [entry for entry in fusedisk_process("list", "--output", "json").json if entry["pid"] == daemon.pid]
    assert (found["mountpoint"], found["state"]) == (str(new), "serving")
    assert found["exports"][0]["loop-devices"] == [device]
    mounts.detach(device)


def test_a_renamed_mount_is_flushed_and_ended_when_umount_returns(
    renamed: tuple[Path, Path, psutil.Process], raw: Path
) -> None:
    old, new, daemon = renamed
    with (new / "disk").open("r+b", buffering=0) as file:
        file.write(b"after the move")
    done = fusedisk_process("umount", old)
    assert done == (1, "", f"fusedisk: nothing is mounted at '{old}' any more, but at '{new}': unmount that.\n")
    done = fusedisk_process("umount", new)
    assert done == (0, "", "")
    assert has_ended(daemon)
    assert raw.read_bytes().startswith(b"after the move")
    assert runtime.find(str(new)) is runtime.find(str(old)) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_signal_ends_a_renamed_mount(renamed: tuple[Path, Path, psutil.Process], number: signal.Signals) -> None:
    _, new, daemon = renamed
    daemon.send_signal(number)
    wait_until(lambda: has_ended(daemon), "the daemon has ended")
    assert mountinfo.mount_at(str(new)) is None


def test_loop_devices_on_a_renamed_mount_follow_its_size(
    renamed: tuple[Path, Path, psutil.Process], mounts: Mounts, raw: Path
) -> None:
    _, new, _ = renamed
    device = mounts.loop(new / "disk")
    os.truncate(new / "disk", 8 * MIB)
    wait_until(lambda: loop_device.size_of(device) == 8 * MIB, "the device has the size of the disk")
    mounts.detach(device)


def test_another_mount_takes_the_place_of_a_renamed_one(
    renamed: tuple[Path, Path, psutil.Process], mounts: Mounts, tmp_path: Path
) -> None:
    old, new, daemon = renamed
    old.mkdir(parents=True)
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    mounts.mount(other, on=old)
    entries = {entry["mountpoint"]: entry for entry in fusedisk_process("list", "--output", "json").json}
    assert entries[str(new)]["pid"] == daemon.pid != entries[str(old)]["pid"]
    assert entries[str(old)]["state"] == entries[str(new)]["state"] == "serving"
    for place, process in ((new, daemon), (old, daemon_of(old))):
        mounts.umount(place)
        assert has_ended(process)
