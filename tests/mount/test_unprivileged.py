"""Mounting without root."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedisk import list_sync
from tests.conftest import require_fuse, require_root, require_tool
from tests.support.commands import fusedisk_process, process_environment
from tests.support.mounts import is_mounted, own_mounts
from tests.support.users import User

MIB = 1 << 20


@pytest.fixture
def user() -> Iterator[User]:
    """``nobody``, who can reach this Python and /dev/fuse."""
    require_root()
    require_fuse()
    require_tool("fusermount3")
    require_tool("setpriv")
    home = Path(tempfile.mkdtemp(prefix="fusedisk-test-"))
    try:
        yield User(home)
    finally:
        for on in (home / "mnt", home / "other"):
            if is_mounted(on):
                fusedisk_process("umount", "--force", on)
        shutil.rmtree(home)


@pytest.fixture
def image(user: User) -> Path:
    path = user.home / "disk.img"
    path.write_bytes(os.urandom(MIB))
    os.chown(path, user.entry.pw_uid, user.entry.pw_gid)
    user.run("mkdir", "mnt", "other")
    return path


def test_mount_use_list_and_unmount(user: User, image: Path) -> None:
    user.fusedisk("mount", "-f", "raw", "disk.img", "mnt")
    user.run("dd", "if=/dev/zero", "of=mnt/disk", "bs=4096", "count=2", "conv=notrunc")
    assert user.run("stat", "-c", "%U %a", "mnt/disk").stdout == "nobody 600\n"
    assert str(image) in user.fusedisk("list").stdout
    assert str(image) in fusedisk_process("list").out
    with pytest.raises(PermissionError):
        (user.home / "mnt" / "disk").stat()
    files = [file for mount in list_sync() if mount.mountpoint == f"{user.home}/mnt" for file in mount.files]
    assert [file.path for file in files] == [f"{user.home}/mnt/disk"]  # without looking there
    user.fusedisk("umount", "mnt")
    assert not is_mounted(user.home / "mnt")
    assert image.read_bytes()[:8192] == bytes(8192)
    assert str(image) not in user.fusedisk("list").stdout


@pytest.mark.parametrize("where", ["run", None])
def test_the_log_lies_in_the_users_own_place(user: User, image: Path, where: str | None) -> None:
    environment = []
    place = Path(f"/tmp/fusedisk-{user.entry.pw_uid}")
    if where is not None:
        user.run("mkdir", "-m", "700", where)
        environment = ["env", f"XDG_RUNTIME_DIR={user.home / where}"]
        place = user.home / where / "fusedisk"
    user.run("mkdir", "-p", "-m", "700", place)
    old = place / "0123456789abcdef.log"
    user.run("touch", "-d", "8 days ago", old)
    command = [*environment, sys.executable, "-m", "fusedisk"]
    user.run(*command, "mount", "--partitions", "disk.img", "mnt")
    try:
        listed = json.loads(user.run(*command, "list", "--output", "json").stdout)
        log = Path(next(mount["log"] for mount in listed if mount["mountpoint"] == f"{user.home}/mnt"))
        assert "there is no partition table" in log.read_text()
    finally:
        user.run(*command, "umount", "mnt")
    assert log.parent == place
    assert not old.exists()


def test_busy_and_force(user: User, image: Path) -> None:
    user.fusedisk("mount", "disk.img", "mnt")
    script = "exec 3<mnt/disk; echo open; exec sleep 60"
    holder = user.start("sh", "-c", script, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        done = user.fusedisk("umount", "mnt", check=False)
        assert done.returncode == 1
        assert f"(pid {holder.pid}, open file)" in done.stderr
        user.fusedisk("umount", "--force", "mnt")
        assert not is_mounted(user.home / "mnt")
    finally:
        holder.kill()
        holder.communicate()


def test_unmounting_what_is_gone_already_succeeds(user: User, image: Path) -> None:
    """Somebody else was faster; fusermount3 takes that for an error."""
    script = "import sys; from fusedisk.mount import umount_calls; sys.exit(not umount_calls.unmount(sys.argv[1]))"
    user.run(sys.executable, "-c", script, user.home / "mnt")


def test_a_signal_after_a_lazy_unmount_waits_for_the_last_file(user: User, image: Path) -> None:
    daemon = user.start(
        *(sys.executable, "-m", "fusedisk", "mount", "--foreground", "--ready-fd", "1", "-f", "raw", "disk.img", "mnt"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    holder = None
    try:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "ready\n"
        holder = user.start(
            "sh", "-c", "exec 3<mnt/disk; echo open; exec cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        user.run("fusermount3", "-uz", "mnt")
        daemon.send_signal(signal.SIGTERM)
        assert daemon.stderr is not None
        assert "goes on for 1 open file, until closed: SIGQUIT ends it now." in daemon.stderr.readline()
        holder.communicate(timeout=60)
        _, said = daemon.communicate(timeout=60)
        assert (daemon.returncode, said) == (0, "")
    finally:
        for process in (holder, daemon):
            if process is not None:
                process.kill()
                process.communicate()


@pytest.mark.slow
def test_a_mount_of_a_dead_daemon(user: User, image: Path) -> None:
    user.fusedisk("mount", "--pid-file", "pid", "disk.img", "mnt")
    user.run("kill", "-9", (user.home / "pid").read_text().strip())
    done = user.fusedisk("mount", "disk.img", "mnt")
    assert "was cleaned up" in done.stderr
    user.run("kill", "-9", user.fusedisk("list", "--output", "json").stdout.split('"pid": ')[1].split(",")[0])
    assert "was cleaned up" in user.fusedisk("umount", "mnt").stderr
    assert not is_mounted(user.home / "mnt")


def test_letting_others_in_is_refused_unless_permitted(user: User, image: Path) -> None:
    if "\nuser_allow_other" in f"\n{Path('/etc/fuse.conf').read_text()}":
        pytest.skip("this machine permits it")
    done = user.fusedisk("mount", "--allow-other", "on", "disk.img", "mnt", check=False)
    assert done.returncode == 1
    assert "needs root, or a line 'user_allow_other' in /etc/fuse.conf" in done.stderr


def test_another_users_mount_is_not_theirs_to_unmount(user: User, image: Path, tmp_path: Path) -> None:
    assert fusedisk_process("mount", "-r", image, user.home / "mnt").code == 0
    done = user.fusedisk("umount", "mnt", check=False)
    assert done.returncode == 1
    assert "Could not unmount" in done.stderr
    assert user.fusedisk("umount", "--force", "mnt", check=False).returncode == 1
    assert is_mounted(user.home / "mnt")
    assert fusedisk_process("umount", user.home / "mnt").code == 0


def test_an_image_without_write_permission(user: User, image: Path) -> None:
    image.chmod(0o400)
    done = user.fusedisk("mount", "disk.img", "mnt", check=False)
    assert done.stderr == (
        f"fusedisk: Could not open '{image}': Permission denied (to look at it only, mount it with --read-only or "
        f"--overlay)\n"
    )
    user.fusedisk("mount", "--read-only", "disk.img", "mnt")
    user.fusedisk("umount", "mnt")


def test_root_of_a_user_namespace(tmp_path: Path) -> None:
    """Root inside, nobody special outside: mounts and unmounts without fusermount3."""
    require_fuse()
    unshare = [require_tool("unshare"), "-Urm"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    (tmp_path / "disk.img").write_bytes(os.urandom(MIB))
    (tmp_path / "mnt").mkdir()
    program = shlex.join([sys.executable, "-m", "fusedisk"])
    script = f"{program} mount disk.img mnt && cmp mnt/disk disk.img && {program} list && {program} umount mnt"
    command = [*unshare, "sh", "-c", script]
    done = subprocess.run(
        own_mounts("exec " + shlex.join(command)) if os.geteuid() == 0 else command,
        cwd=tmp_path,
        env=process_environment() | {"XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done
    assert str(tmp_path / "disk.img") in done.stdout
