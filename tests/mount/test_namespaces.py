"""Mounts in mount namespaces of other processes: told as what they are, and never waited for in silence."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fusedisk.mount import namespaces
from tests.conftest import require_root, run_tool
from tests.support.commands import fusedisk_process, process_command, process_environment
from tests.support.mounts import PATIENCE, Mounts, daemon_of, has_ended, is_mounted, own_mounts, wait_until


@contextlib.contextmanager
def _aside(script: str, but: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A shell that has done ``script`` among mounts of its own, and holds those until the block ends."""
    require_root()
    command = own_mounts(f"{script} && echo done && exec sleep 600", but=but)
    with subprocess.Popen(command, env=process_environment(), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"done\n"
            wait_until(lambda: psutil.Process(process.pid).name() == "sleep", "the shell has become sleep")
            yield process
        finally:
            process.kill()


def _listed(daemon: psutil.Process) -> dict[str, Any]:
    (found,) = [entry for entry in fusedisk_process("list", "--output", "json").json if entry["pid"] == daemon.pid]
    return dict(found)


def test_a_mount_in_a_private_namespace_is_told_as_such(mounts: Mounts, raw: Path) -> None:
    on = mounts.directory()
    with _aside(shlex.join(process_command("mount", raw, on))):
        daemon = daemon_of(on)
        namespace = os.readlink(f"/proc/{daemon.pid}/ns/mnt")
        assert not is_mounted(on)
        listed = _listed(daemon)
        assert (listed["state"], listed["mountpoint"], listed["mount-namespace"]) == ("serving", str(on), namespace)
        assert f"pid {daemon.pid}" in fusedisk_process("list").out
        assert "in another mount namespace" in fusedisk_process("list").out
        for args in ((on,), ("--wait", on), (raw,)):
            done = fusedisk_process("umount", *args)
            assert done == (
                1,
                "",
                f"fusedisk: '{on}' is mounted in another mount namespace ({namespace}), that of its daemon (pid "
                f"{daemon.pid}): end it there (nsenter -t {daemon.pid} -m fusedisk umount {on}), or with --force and "
                "lose unwritten data.\n",
            )
        run_tool("nsenter", "-t", str(daemon.pid), "-m", *process_command("umount", on))
        assert has_ended(daemon)


def test_a_mount_in_another_pid_namespace_is_known_by_our_number(mounts: Mounts, raw: Path) -> None:
    on = mounts.directory()
    inside = shlex.join([*process_command("mount", "-f", "raw", raw, on)])
    script = f"unshare --pid --fork --mount-proc sh -c {shlex.quote(f'{inside} && echo done && exec sleep 600')}"
    command = own_mounts(f"exec {script}")
    require_root()
    with subprocess.Popen(command, env=process_environment(), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"done\n"
            daemon = daemon_of(on)
            assert daemon.pid in [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
            assert _listed(daemon)["state"] == "serving"
            assert fusedisk_process("umount", "--force", on) == (0, "", "")
            assert has_ended(daemon)
        finally:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(
                    psutil.NoSuchProcess
                ):  # the first process of the namespace takes the others along
                    child.kill()
            process.kill()


def test_force_flushes_and_ends_a_mount_in_a_private_namespace(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    on = mounts.directory()
    script = tmp_path / "write.py"
    script.write_text(
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "area = mmap.mmap(fd, 4096)\n"
        "area[:6] = b'mapped'\n"
        "os.write(1, b'done\\n')\n"
        "sys.stdin.read()\n"
    )
    command = f"{shlex.join(process_command('mount', raw, on))} && exec python3 {script} {on}/disk"
    require_root()
    with subprocess.Popen(
        own_mounts(command), env=process_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        daemon = daemon_of(on)
        done = fusedisk_process("umount", "--force", "--timeout", "30", on)
        assert (done.code, done.err, has_ended(daemon)) == (0, "", True)
    assert raw.read_bytes().startswith(b"mapped")


def test_a_signal_tells_who_keeps_the_daemon(mounts: Mounts, raw: Path) -> None:
    on = mounts.directory()
    process = mounts.start(raw, on=on)
    assert process.stderr is not None
    with _aside("true", but=on) as holder:
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            assert process.stderr.readline().decode() == (
                f"fusedisk: '{on}' is unmounted, but its daemon (pid {process.pid}) goes on for the mount of sleep "
                f"(pid {holder.pid}) at '{on}', until that ends (nsenter -t {holder.pid} -m umount {on}): "
                "SIGQUIT ends it now.\n"
            )
        assert not is_mounted(on)
        assert process.poll() is None
        process.send_signal(signal.SIGQUIT)
        assert process.wait(PATIENCE) == 0


def test_a_signal_tells_of_files_that_are_open_after_a_lazy_unmount(mounts: Mounts, raw: Path) -> None:
    require_root()
    on = mounts.directory()
    process = mounts.start(raw, on=on)
    assert process.stderr is not None
    with (on / "disk").open("rb"):
        run_tool("umount", "-l", on)
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline().decode() == (
            f"fusedisk: '{on}' is unmounted, but its daemon (pid {process.pid}) goes on for 1 open file, until closed: "
            "SIGQUIT ends it now.\n"
        )
    assert process.wait(PATIENCE) == 0


def test_an_attached_image_in_a_private_namespace_stays_attached(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "device"
    with _aside(f"{shlex.join(process_command('attach', '-f', 'raw', raw))} > {out}"):
        device = out.read_text().strip()
        (listed,) = [
            mount for mount in fusedisk_process("list", "--output", "json").json if mount["loop-device"] == device
        ]
        daemon = psutil.Process(listed["pid"])
        try:
            done = fusedisk_process("detach", raw)
            assert done.code == 1
            assert f"(nsenter -t {daemon.pid} -m fusedisk detach {device})" in done.err
            assert Path("/sys/block", Path(device).name, "loop").exists()
        finally:
            run_tool("nsenter", "-t", str(daemon.pid), "-m", *process_command("detach", device))
        wait_until(lambda: has_ended(daemon), "the daemon has ended")


def _in_a_pid_namespace(
    *args: str | Path, proc: bool = True, but: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command line there, among copies of no other mounts ``but`` one."""
    inside = ["unshare", "-p", "-f", *(["--mount-proc"] if proc else []), *process_command(*args)]
    command = own_mounts(f"exec {shlex.join(inside)}", but=but)
    return subprocess.run(command, env=process_environment(), capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize("proc", [True, False])
def test_a_daemon_outside_of_our_pid_namespace_keeps_its_record(mounts: Mounts, raw: Path, proc: bool) -> None:
    on = mounts.directory()
    with _aside(shlex.join(process_command("mount", raw, on))):
        daemon = daemon_of(on)
        done = _in_a_pid_namespace("list", "--output", "json", proc=proc)
        (found,) = [entry for entry in json.loads(done.stdout) if entry["mountpoint"] == str(on)]
        assert (found["state"], found["pid-namespace"]) == ("serving", os.readlink("/proc/self/ns/pid"))
        assert (found["memory"], found["mount-namespace"]) == (None, None)
        assert _in_a_pid_namespace("umount", "--force", on, proc=proc).stderr == (
            f"fusedisk: the daemon of '{on}' (pid {daemon.pid} in another PID namespace) cannot be ended from here: "
            "run the command where it was mounted.\n"
        )
        listed = _listed(daemon)
        assert (listed["state"], listed["pid-namespace"]) == ("serving", None)


def test_unmounting_waits_for_a_daemon_outside_of_our_pid_namespace(mounts: Mounts, raw: Path) -> None:
    require_root()
    on = mounts.directory()
    process = mounts.start(raw, on=on)
    done = _in_a_pid_namespace("umount", on, but=on)  # there it is a copy, the mount stays
    assert (done.returncode, done.stderr) == (
        1,
        f"fusedisk: '{on}' is unmounted, but its daemon (pid {process.pid}) has not ended yet, in another PID "
        "namespace.\n",
    )
    assert _listed(psutil.Process(process.pid))["state"] == "serving"


@pytest.mark.parametrize("users", [True, False])
def test_the_way_into_a_namespace(users: bool) -> None:
    """A namespace of users has to be entered as well, where it is another one."""
    require_root()
    flags = ["-Ur"] if users else []
    with subprocess.Popen(["unshare", *flags, "-m", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"there\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"there\n"
        way = namespaces.enter(process.pid)
        assert namespaces.is_foreign(process.pid)
        assert way == f"nsenter -t {process.pid} {'-U --preserve-credentials ' if users else ''}-m"
        assert run_tool(*way.split(), "readlink", "/proc/self/ns/mnt").strip() == namespaces.of(process.pid)
    assert not namespaces.is_foreign(os.getpid())
