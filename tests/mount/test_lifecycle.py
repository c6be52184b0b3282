"""From the command to a serving daemon and back: readiness, signals, records, ends of all kinds."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path

import psutil
import pytest

from fusedisk.mount import runtime
from tests.conftest import qemu_img, require_root, run_tool
from tests.support.commands import fusedisk_process, process_command, process_environment
from tests.support.images import make_qcow2
from tests.support.mounts import PATIENCE, Covered, Mounts, daemon_of, has_ended, is_mounted, wait_until

MIB = 1 << 20


def test_the_daemon_stands_alone(mounts: Mounts, raw: Path) -> None:
    held, other = os.pipe()
    os.set_inheritable(other, True)
    on = mounts.mount(raw)
    daemon = daemon_of(on)
    assert os.getsid(daemon.pid) == daemon.pid
    assert daemon.cwd() == "/"
    assert {os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    assert os.readlink(f"/proc/self/fd/{held}") not in {
        os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{daemon.pid}/fd")
    }
    os.close(held)
    os.close(other)
    mounts.umount(on)
    assert has_ended(daemon)


def test_umount_returns_when_the_daemon_has_ended(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    daemon = daemon_of(on)
    mounts.umount(on)
    assert has_ended(daemon)
    assert not is_mounted(on)
    assert runtime.find(str(on)) is None
    assert not os.path.exists(runtime.log_path(str(on)))


def test_the_pid_file_is_there_as_long_as_the_mount(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    on = mounts.mount("--pid-file", pid_file, raw)
    assert int(pid_file.read_text()) == daemon_of(on).pid
    mounts.umount(on)
    assert not pid_file.exists()


def test_a_pid_file_replaces_files_alone(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        _, done = mounts.try_mount("--pid-file", tmp_path / name, raw)
        assert (done.code, done.err) == (
            2,
            f"fusedisk: the pid file '{tmp_path / name}' exists and is not a regular file.\n",
        )
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("file")
    on = mounts.mount("--pid-file", tmp_path / "link", raw)
    assert int((tmp_path / "file").read_text()) == daemon_of(on).pid
    mounts.umount(on)
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "file").exists()


def test_a_pid_file_is_not_written_through_the_link_of_another_user(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    require_root()
    conf, sticky = tmp_path / "conf", tmp_path / "sticky"
    conf.write_text("precious")
    sticky.mkdir()
    sticky.chmod(0o1777)
    (sticky / "pid").symlink_to(conf)
    os.lchown(sticky / "pid", 65534, 65534)
    on, done = mounts.try_mount("--pid-file", sticky / "pid", raw)
    assert (done.code, done.err) == (
        1,
        f"fusedisk: the pid file '{sticky}/pid' leads through '{sticky}/pid', a symbolic link of user 65534, "
        "expected one of user 0.\n",
    )
    assert conf.read_text() == "precious"
    assert not is_mounted(on)


def test_a_pid_file_that_cannot_be_written_ends_the_mount(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    on, done = mounts.try_mount("--pid-file", tmp_path / "none" / "pid", raw)
    assert done.code == 1
    assert done.err == f"fusedisk: Could not write the pid file '{tmp_path}/none/pid': No such file or directory\n"
    assert not is_mounted(on)
    assert runtime.find(str(on)) is None


def test_ready_fd_gets_a_line_when_files_can_be_read(mounts: Mounts, raw: Path) -> None:
    on = mounts.directory()
    process = mounts.start(raw, on=on)
    assert (on / "disk").read_bytes() == raw.read_bytes()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert not is_mounted(on)


def test_ready_fd_of_a_daemon(mounts: Mounts, raw: Path) -> None:
    receiving, sending = os.pipe()
    on = mounts.directory()
    command = process_command("mount", "--ready-fd", str(sending), raw, on)
    subprocess.run(command, pass_fds=(sending,), env=process_environment(), timeout=PATIENCE, check=True)
    os.close(sending)
    with open(receiving, "rb") as pipe:
        assert pipe.read() == b"ready\n"
    mounts.umount(on)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_standard_stream_as_ready_fd_of_a_daemon(mounts: Mounts, raw: Path, number: int) -> None:
    receiving, sending = os.pipe()
    on = mounts.directory()
    mounts.adopt(on)
    streams = [subprocess.DEVNULL] * 3
    streams[number] = sending
    subprocess.run(
        process_command("mount", "--ready-fd", str(number), "-f", "raw", raw, on),
        **dict(zip(("stdin", "stdout", "stderr"), streams, strict=True)),
        env=process_environment(),
        timeout=PATIENCE,
        check=True,
    )
    os.close(sending)
    with open(receiving, "rb") as pipe:
        assert pipe.read() == b"ready\n"
    mounts.umount(on)


def test_a_standard_stream_as_ready_fd_stays_open(mounts: Mounts, raw: Path) -> None:
    """The next file that is opened would take its place, and get what is logged."""
    on = mounts.directory()
    mounts.adopt(on)
    command = process_command("mount", "--foreground", "--ready-fd", "2", "-f", "raw", raw, on)
    process = subprocess.Popen(command, env=process_environment(), stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == b"ready\n"
    with (on / "disk").open("rb"):
        process.send_signal(signal.SIGTERM)
        assert b"is in use by" in process.stderr.readline()
    assert process.wait(PATIENCE) == 0
    process.stderr.close()


def test_a_ready_fd_that_is_not_open_is_wrong_usage(mounts: Mounts, raw: Path) -> None:
    _, done = mounts.try_mount("--ready-fd", "987", raw)
    assert done.code == 2
    assert "descriptor 987 is not open" in done.err


def test_the_service_manager_is_told(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        on = mounts.mount(raw, env={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert manager.recv(4096).decode().splitlines()[:2] == ["READY=1", f"MAINPID={daemon_of(on).pid}"]
        mounts.umount(on)
        assert manager.recv(4096) == b"STOPPING=1"


def test_an_image_that_does_not_open_fails_the_command(mounts: Mounts, tmp_path: Path) -> None:
    on, done = mounts.try_mount(tmp_path / "none.qcow2")
    assert (done.code, done.err) == (
        1,
        f"fusedisk: Could not open '{tmp_path}/none.qcow2': No such file or directory\n",
    )
    foreground = fusedisk_process("mount", "--foreground", tmp_path / "none.qcow2", on)
    assert foreground == done


def test_an_interrupted_mount_tells_the_state(mounts: Mounts, raw: Path, tmp_path: Path, program: list[str]) -> None:
    """Here while an image takes its time to open."""
    on = mounts.directory()
    mounts.adopt(on)
    (tmp_path / "broken").write_text("hold preadv 0")
    process = subprocess.Popen(
        [*program, "mount", raw, on], env=process_environment(), stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: _opened_by_children(process.pid, raw), "the daemon has opened the image")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, f"fusedisk: interrupted: nothing is mounted at '{on}'.\n")
    assert not is_mounted(on)
    assert runtime.find(str(on)) is None


def _opened_by_children(pid: int, file: Path) -> bool:
    children = psutil.Process(pid).children()
    return any(opened.path == str(file) for child in children for opened in child.open_files())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unmounts_flushes_and_ends(mounts: Mounts, tmp_path: Path, number: int) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    on = mounts.directory()
    process = mounts.start(image, on=on)
    with (on / "vm").open("r+b") as file:
        file.write(b"x" * MIB)
    process.send_signal(number)
    assert process.wait(PATIENCE) == 0
    assert not is_mounted(on)
    qemu_img("check", image)


def test_a_signal_waits_for_open_files_and_serves_on(mounts: Mounts, raw: Path) -> None:
    on = mounts.directory()
    process = mounts.start(raw, on=on)
    assert process.stderr is not None
    with (on / "disk").open("r+b", buffering=0) as file:
        process.send_signal(signal.SIGTERM)
        line = process.stderr.readline().decode()
        assert f"'{on}' is in use by" in line
        assert f"(pid {os.getpid()}, open file)" in line
        file.write(b"after the signal")
        os.fsync(file.fileno())
        assert process.poll() is None
    assert process.wait(PATIENCE) == 0
    assert raw.read_bytes().startswith(b"after the signal")


def test_a_signal_waits_for_a_working_directory(mounts: Mounts, raw: Path) -> None:
    on = mounts.directory()
    process = mounts.start(raw, on=on)
    assert process.stderr is not None
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=on) as holder:
        process.send_signal(signal.SIGTERM)
        line = process.stderr.readline().decode()
        assert f"cat (pid {holder.pid}, working directory)" in line
    assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("way", ["over it", "moved over it", "over a directory above"])
def test_a_signal_leaves_alone_what_covers_the_mount(mounts: Mounts, raw: Path, covered: Covered, way: str) -> None:
    process = mounts.start(raw, on=covered.place)
    assert process.stderr is not None
    cover = covered.cover(way)
    (cover / "file").write_text("precious")
    process.send_signal(signal.SIGTERM)
    line = process.stderr.readline().decode()
    assert f"'{covered.place}' is covered by {'another mount' if cover != covered.place else 'cover (tmpfs)'}: " in line
    process.send_signal(signal.SIGTERM)
    assert (cover / "file").read_text() == "precious"
    run_tool("umount", cover)
    assert process.wait(PATIENCE) == 0
    assert not is_mounted(covered.place)


def test_an_end_leaves_alone_what_covers_the_mount(mounts: Mounts, raw: Path, covered: Covered) -> None:
    process = mounts.start(raw, on=covered.place)
    cover = covered.cover("moved over it")
    (cover / "file").write_text("precious")
    process.send_signal(signal.SIGQUIT)
    assert process.wait(PATIENCE) == 0
    assert (cover / "file").read_text() == "precious"


@pytest.mark.parametrize("command", [("umount",), ("fusermount3", "-u")])
def test_unmounting_by_other_means_ends_the_daemon(mounts: Mounts, tmp_path: Path, command: tuple[str, ...]) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    on = mounts.mount(image)
    daemon = daemon_of(on)
    with (on / "vm").open("r+b") as file:
        file.write(b"x" * MIB)
    run_tool(*command, on)
    wait_until(lambda: has_ended(daemon), "the daemon has ended")
    assert runtime.find(str(on)) is None
    qemu_img("check", image)


def test_a_lazy_unmount_serves_until_the_last_file_is_closed(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    daemon = daemon_of(on)
    with (on / "disk").open("r+b", buffering=0) as file:
        run_tool("umount", "-l", on)
        file.write(b"still there")
        assert os.pread(file.fileno(), 11, 0) == b"still there"
        assert not has_ended(daemon)
    wait_until(lambda: has_ended(daemon), "the daemon has ended")
    assert raw.read_bytes().startswith(b"still there")


def test_a_mount_of_a_dead_daemon_is_replaced(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    _kill(daemon_of(on))
    assert _listed(on)["state"] == "stale"
    _, done = mounts.try_mount(raw, on=on)
    assert done.code == 0
    assert done.err == f"fusedisk: the mount of a daemon that died was cleaned up at '{on}'.\n"
    assert (on / "disk").read_bytes() == raw.read_bytes()
    assert _listed(on)["state"] == "serving"
    mounts.umount(on)


def test_umount_cleans_up_after_a_dead_daemon(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    held = os.open(on / "disk", os.O_RDONLY)
    _kill(daemon_of(on))
    done = fusedisk_process("umount", on)
    with pytest.raises(OSError, match="not connected"):
        os.close(held)
    assert done.code == 0
    assert done.err == f"fusedisk: the daemon of '{on}' had died, its mount was cleaned up.\n"
    assert not is_mounted(on)
    assert runtime.find(str(on)) is None


def test_list_removes_records_of_mounts_that_are_gone(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    _kill(daemon_of(on))
    run_tool("umount", "-l", on)
    record = runtime.find(str(on))
    assert record is not None
    assert all(mount["mountpoint"] != str(on) for mount in json.loads(fusedisk_process("list", "--output", "json").out))
    assert not os.path.exists(record.path)


def test_list_tells_what_is_mounted(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    other = make_qcow2(tmp_path / "vm.qcow2", 3 * MIB)
    on = mounts.mount("--overlay", raw, f"driver=qcow2,file.filename={other},name=data")
    found = _listed(on)
    assert 10 * MIB < found["memory"] < 100 * MIB
    assert found["pid"] == daemon_of(on).pid
    assert found["exports"] == [
        {
            "name": "disk",
            "path": f"{on}/disk",
            "part-of": None,
            "image": str(raw),
            "changed-files": [],
            "format": "raw",
            "virtual-size": 4 * MIB,
            "read-only": False,
            "overlay": "throw-away",
            "loop-devices": [],
        },
        {
            "name": "data",
            "path": f"{on}/data",
            "part-of": None,
            "image": str(other),
            "changed-files": [],
            "format": "qcow2",
            "virtual-size": 3 * MIB,
            "read-only": False,
            "overlay": "throw-away",
            "loop-devices": [],
        },
    ]
    lines = fusedisk_process("list").out.splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith(f"{on}:"))
    shown = " ".join("\n".join(lines[head:]).split())
    assert re.match(
        rf"{on}: pid {found['pid']} \S+ MiB disk 4 MiB raw, overlay {raw} data 3 MiB qcow2, overlay {other}( |$)", shown
    )


@pytest.mark.slow
def test_ten_mounts_come_and_go_at_once(mounts: Mounts, raw: Path) -> None:
    places = [mounts.directory() for _ in range(10)]
    outcomes: list[int] = []

    def run(*args: str | Path) -> None:
        outcomes.append(fusedisk_process(*args).code)

    for verb in (("mount", "-r", raw), ("umount",)):
        threads = [threading.Thread(target=run, args=(*verb, on)) for on in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outcomes == [0] * 20


@pytest.mark.slow
def test_memory_with_a_terabyte_mounted(mounts: Mounts, tmp_path: Path) -> None:
    """Sequential and scattered load over a large image does not grow the daemon past 100 MiB."""
    image = make_qcow2(tmp_path / "vm.qcow2", 1 << 40)
    on = mounts.mount(image)
    file = on / "vm"
    with file.open("r+b", buffering=0) as handle:
        for index in range(4096):
            os.pwrite(handle.fileno(), b"x" * 4096, index * (1 << 28) + index * 512)
        for index in range(512):
            os.pwrite(handle.fileno(), b"y" * MIB, (1 << 40) - (1 << 30) + index * MIB)
        for index in range(0, 4090, 3):
            assert os.pread(handle.fileno(), 4096, index * (1 << 28) + (1 << 27)) == bytes(4096)
    peak = next(line for line in Path(f"/proc/{daemon_of(on).pid}/status").read_text().splitlines() if "VmHWM" in line)
    assert int(peak.split()[1]) < 100 * 1024, peak
    mounts.umount(on)


def _kill(process: psutil.Process) -> None:
    process.kill()
    wait_until(lambda: has_ended(process), "the daemon is dead")


def _listed(on: Path) -> dict[str, object]:
    found = fusedisk_process("list", "--output", "json").json
    return next(mount for mount in found if mount["mountpoint"] == str(on))


def test_the_mount_that_keeps_others_out_is_named(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    on = mounts.mount(image)
    pid = daemon_of(on).pid
    sentence = (
        f'Failed to get "write" lock: is another process using the image [{image}]? It is in use by the mount at '
        f"'{on}' (pid {pid})."
    )
    for command in (("snapshot", "-c", "x", image), ("mount", image, mounts.directory())):
        done = fusedisk_process(*command)
        assert (done.code, done.err) == (1, f"fusedisk: {sentence}\n")
