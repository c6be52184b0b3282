"""Names that hold what ends a line in text, or that are no text at all: the kernel tells them as they are."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fusedisk.mount import loop_device, loop_users, mountinfo, namespaces
from tests.conftest import require_root
from tests.support.attachments import attachments_below
from tests.support.commands import fusedisk_process
from tests.support.files import mounted_tmpfs
from tests.support.mounts import Mounts, daemon_of, has_ended, is_mounted

ODD = [f"a{odd}b" for odd in ("\r", "\n", "\r\n", "\x0b", "\x1c", "\x85", "\u2028", "\udcff", "\\015", " - ")]
odd_names = pytest.mark.parametrize("name", ODD, ids=ascii)


@odd_names
def test_mount_list_and_umount(mounts: Mounts, raw: Path, tmp_path: Path, name: str) -> None:
    on, image = tmp_path / name, raw.rename(tmp_path / f"{name}.img")
    on.mkdir()
    mounts.mount(image, on=on)
    daemon = daemon_of(on)
    (found,) = [mount for mount in fusedisk_process("list", "--output", "json").json if mount["mountpoint"] == str(on)]
    assert (found["state"], found["exports"][0]["image"]) == ("serving", str(image))
    assert (on / name).read_bytes() == image.read_bytes()
    with (on / name).open("rb"):
        assert f"(pid {os.getpid()}, open file)" in fusedisk_process("umount", on).err
    mounts.umount(on)
    assert has_ended(daemon)
    assert not is_mounted(on)


@odd_names
def test_attach_and_detach(mounts: Mounts, raw: Path, tmp_path: Path, name: str) -> None:
    image = raw.rename(tmp_path / f"{name}.img")
    with attachments_below(tmp_path) as attached:
        device = attached.attach(image)
        file = attached.file(device)
        assert file.name == name
        (found,) = [
            mount for mount in fusedisk_process("list", "--output", "json").json if mount["loop-device"] == device
        ]
        assert found["exports"][0]["loop-devices"] == [device]
        attached.detach(image)
        assert loop_device.backing_file(device) != str(file)
        assert not is_mounted(file.parent)


@odd_names
def test_a_mount_of_others_is_no_obstacle(tmp_path: Path, name: str) -> None:
    require_root()
    with mounted_tmpfs(tmp_path / name, "size=1M") as place:
        assert fusedisk_process("list").code == 0
        found = mountinfo.mount_at(str(place))
        assert found is not None
        assert found.fstype == "tmpfs"


def test_lines_that_make_no_sense_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "36 22 0:32 / /mnt rw - ext4 /dev/sda1 rw\n"
    (tmp_path / "mountinfo").write_text(f"\n{line}new - words\nx 22 0:32 / /x rw - ext4 /dev/sda1 rw\n36 22 - a b c\n")
    monkeypatch.setattr(mountinfo, "_MOUNTINFO", str(tmp_path / "mountinfo"))
    assert [mount.mountpoint for mount in mountinfo.mounts()] == ["/mnt"]


def test_swap_files_do_not_hide_swap_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swaps = b"Filename\t\t\t\tType\t\tSize\n/a\r/b\xff\xc2\x85 file\t\t8\n/dev/loop0                  partition\t8\n"
    (tmp_path / "swaps").write_bytes(swaps)
    monkeypatch.setattr(loop_users, "_SWAPS", tmp_path / "swaps")
    assert "used as swap (/dev/loop0)" in loop_users.users("/dev/loop0")
    assert loop_users.users("/dev/loop99") == []


def test_a_process_whose_name_is_no_text_is_named(tmp_path: Path) -> None:
    """Among those that have a filesystem mounted in a namespace of their own."""
    require_root()
    program = tmp_path / "\udcff\rcat"
    shutil.copy(shutil.which("cat") or "", program)
    with mounted_tmpfs(tmp_path / "mnt", "size=1M") as place:
        mount = mountinfo.mount_at(str(place))
        assert mount is not None
        with subprocess.Popen(["unshare", "-m", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"there\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"there\n"
            assert f"the mount of {program.name} (pid {process.pid}) at '{place}'" in map(
                str, namespaces.copies(mount.device)
            )
