"""``mount -t fuse.fusedisk`` and lines of an fstab, by the real mount(8) and a link in /sbin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedisk.cli.mount_helper import HelperUsageError, remounting, split_options, translate
from fusedisk.mount import mountinfo
from tests.conftest import qemu_io, require_root, require_tool
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, daemon_of, has_ended, is_mounted, wait_until

MIB = 1 << 20
LINK = Path("/sbin/mount.fuse.fusedisk")
PROGRAM = Path(sys.executable).with_name("mount.fuse.fusedisk")


@pytest.fixture
def helper() -> Iterator[None]:
    """The helper where mount(8) looks for it, as the documentation says; a link of somebody else's stays."""
    require_root()
    require_tool("mount")
    if not PROGRAM.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{PROGRAM} is not installed", pytrace=False)
        pytest.skip(f"{PROGRAM} is not installed")
    if os.path.lexists(LINK):
        pytest.skip(f"{LINK} is there already")
    LINK.symlink_to(PROGRAM)
    yield
    LINK.unlink()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_qcow2(tmp_path / "vm.qcow2", MIB, "write -P 7 0 64k")


def _mount(*args: str | Path) -> tuple[int, str]:
    done = subprocess.run(["mount", *map(str, args)], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def _place(mounts: Mounts) -> Path:
    """A directory that ``mounts`` unmounts."""
    on = mounts.directory()
    mounts.adopt(on)
    return on


def _umount(on: Path) -> None:
    """By umount(8), which does not wait for the daemon."""
    daemon = daemon_of(on)
    subprocess.run(["umount", on], check=True, timeout=60)
    wait_until(lambda: has_ended(daemon), "the daemon has ended")


@pytest.mark.usefixtures("helper")
def test_mount_by_type(mounts: Mounts, image: Path) -> None:
    on = _place(mounts)
    assert _mount("-t", "fuse.fusedisk", image, on) == (0, "")
    with (on / "vm").open("r+b") as file:
        file.write(b"\x09" * 4096)
    _umount(on)
    qemu_io(image, "read -P 9 0 4096", "read -P 7 4096 60k")


@pytest.mark.usefixtures("helper")
def test_read_only_with_options(mounts: Mounts, image: Path) -> None:
    on = _place(mounts)
    options = "ro,overlay,allow_other,noatime,nofail,name=disk,mode=0444,uid=1234"
    assert _mount("-t", "fuse.fusedisk", "-o", options, image, on) == (0, "")
    found = (on / "disk").stat()
    assert (found.st_mode & 0o777, found.st_uid) == (0o444, 1234)
    with pytest.raises(OSError, match="Read-only file system"):
        (on / "disk").open("r+b")
    _umount(on)


@pytest.mark.usefixtures("helper")
def test_a_line_of_fstab(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    """By its mountpoint; with the others, ``mount -a``, twice; and never with ``noauto``."""
    on, other = _place(mounts), mounts.directory()
    fstab = tmp_path / "fstab"
    fstab.write_text(
        f"{image} {on} fuse.fusedisk overlay,umask=027,_netdev,nofail,x-systemd.idle-timeout=5,comment=ours 0 0\n"
        f"{image} {other} fuse.fusedisk noauto,ro 0 0\n"
    )
    before = image.read_bytes()
    assert _mount("-T", fstab, on) == (0, "")
    assert (on / "vm").stat().st_mode & 0o777 == 0o640
    with (on / "vm").open("r+b") as file:
        file.write(b"gone")
    _umount(on)
    assert image.read_bytes() == before
    for _ in range(2):
        assert _mount("-a", "-T", fstab) == (0, "")
    assert is_mounted(on)
    assert not is_mounted(other)
    _umount(on)
    assert not is_mounted(on)


@pytest.mark.usefixtures("helper")
@pytest.mark.parametrize(
    ("options", "source", "code", "sentence"),
    [
        ("nonsense", "vm.qcow2", 1, "mount.fuse.fusedisk: the option 'nonsense' is unknown"),
        ("cache=fast", "vm.qcow2", 1, "'fast' is not one of 'writeback',"),
        ("overlay-file=x,ro", "vm.qcow2", 1, "an overlay takes writes, which --read-only forbids"),
        ("ro", "missing.qcow2", 32, "missing.qcow2': No such file or directory"),
    ],
)
def test_failures_have_the_exit_codes_of_mount(
    mounts: Mounts, image: Path, options: str, source: str, code: int, sentence: str
) -> None:
    on = _place(mounts)
    found, said = _mount("-t", "fuse.fusedisk", "-o", options, image.with_name(source), on)
    assert (found, sentence in said, is_mounted(on)) == (code, True, False), said
    assert "Traceback" not in said


@pytest.mark.usefixtures("helper")
def test_fake(mounts: Mounts, image: Path) -> None:
    """``mount -f`` does everything but mounting: a wrong option is found, no mount is made."""
    on = _place(mounts)
    assert _mount("-f", "-t", "fuse.fusedisk", image, on) == (0, "")
    assert not is_mounted(on)
    assert _mount("-f", "-t", "fuse.fusedisk", "-o", "nonsense", image, on)[0] == 1


@pytest.mark.usefixtures("helper")
def test_remounting(mounts: Mounts, image: Path) -> None:
    """Read-only and writable again, by the mountpoint alone; not while a file is open for writing."""
    on = _place(mounts)
    assert _mount("-t", "fuse.fusedisk", image, on) == (0, "")
    with (on / "vm").open("r+b", buffering=0) as file:
        file.write(b"kept")
        code, said = _mount("-o", "remount,ro", on)
        assert code == 32
        assert re.fullmatch(
            rf"fusedisk: '{on}' stays writable, as a file on it is open for writing: it is in use by \S+ \(pid "
            rf"{os.getpid()}, open file\)\.\n",
            said,
        )
    for _ in range(2):
        assert _mount("-o", "remount,ro", on) == (0, "")
    found = mountinfo.mount_at(str(on))
    assert found is not None
    assert found.flags.startswith("ro,nosuid,nodev")
    with pytest.raises(OSError, match="Read-only file system"):
        (on / "vm").open("r+b")
    assert qemu_io(image, "read -v 0 4", options="-U -r").startswith("00000000:  6b 65 70 74")
    assert _mount("-o", "remount,rw", on) == (0, "")
    with (on / "vm").open("r+b") as file:
        file.write(b"more")
    _umount(on)


@pytest.mark.usefixtures("helper")
def test_a_mount_that_is_read_only_does_not_become_writable(mounts: Mounts, image: Path) -> None:
    on = _place(mounts)
    assert _mount("-t", "fuse.fusedisk", "-o", "ro", image, on) == (0, "")
    code, said = _mount("-o", "remount,rw", on)
    assert (code, said) == (
        32,
        f"fusedisk: '{on}' was mounted read-only: unmount it and mount it again without 'ro'.\n",
    )
    daemon = daemon_of(on)
    daemon.kill()
    wait_until(lambda: has_ended(daemon), "the daemon is dead")
    assert "the daemon of" in _mount("-o", "remount,ro", on)[1]


# --- the translation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("rw", []),
        ("defaults,noauto,user=me,users,_netdev,nofail,x-a=b,X-a,comment=c,nodev,nosuid,exec,lazytime", []),
        ("ro", ["--read-only"]),
        ("ro,rw", []),
        ("rw,read_only", ["--read-only"]),
        ("overlay", ["--overlay"]),
        ("overlay,ro", ["--read-only"]),
        ("allow_other", ["--allow-other", "on"]),
        ("allow-other=auto", ["--allow-other", "auto"]),
        ("copy_on_read,detect-zeroes=unmap", ["--copy-on-read", "--detect-zeroes", "unmap"]),
        ("uid=1000,gid=5,mode=0640", ["--uid", "1000", "--gid", "5", "--mode", "0640"]),
        ("umask=077", ["--mode", "600"]),
        ("sync", ["--cache", "writethrough"]),
        ("discard,nosymfollow", ["--discard", "unmap"]),
        ("nodiscard", ["--discard", "ignore"]),
        ("sync,cache=none", ["--cache", "none"]),
        ("cache=none,cache=unsafe", ["--cache", "unsafe"]),
        ("allow_path=/a,allow-path=/b", ["--allow-path", "/a", "--allow-path", "/b"]),
        ('name="a,b",format=raw', ["--name", "a,b", "--format", "raw"]),
        ("partitions,snapshots", ["--partitions", "--snapshots"]),
        ("low_latency", ["--low-latency"]),
    ],
)
def test_options(options: str, expected: list[str]) -> None:
    assert translate(["vm", "/mnt", "-o", options]) == ["mount", *expected, "--", "vm", "/mnt"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["vm"], "expected an image and a directory, found 1 names"),
        (["vm", "/mnt", "more"], "found 3 names"),
        (["vm", "/mnt", "-x"], "option -x not recognized"),
        (["vm", "/mnt", "-o", "ro=yes"], "the option 'ro' takes no value, but 'yes' was given."),
        (["vm", "/mnt", "-o", "overlay=yes"], "the option 'overlay' takes no value, but 'yes' was given."),
        (["vm", "/mnt", "-o", "uid"], "the option 'uid' needs a value: uid=USER."),
        (["vm", "/mnt", "-o", "umask=9"], "umask=9 is invalid; expected an octal mask, such as umask=027."),
        (["vm", "/mnt", "-o", "umask=0_7"], "umask=0_7 is invalid; expected an octal mask, such as umask=027."),
        (["vm", "/mnt", "-o", "umask=٣"], "umask=٣ is invalid; expected an octal mask, such as umask=027."),
        (["vm", "/mnt", "-o", "foreground"], "the option 'foreground' is unknown"),
    ],
)
def test_wrong_usage(args: list[str], sentence: str) -> None:
    with pytest.raises(HelperUsageError, match=sentence.split("'")[0]) as caught:
        translate(args)
    assert sentence in str(caught.value)


def test_flags() -> None:
    assert translate(["-v", "vm", "/mnt", "-n"]) == ["-v", "mount", "--", "vm", "/mnt"]
    assert translate(["-s", "vm", "/mnt", "-o", "nonsense"]) == ["mount", "--", "vm", "/mnt"]
    assert translate(["-f", "vm", "/mnt"]) is None
    assert translate(["-r", "vm", "/mnt", "-t", "fuse.fusedisk"]) == ["mount", "--read-only", "--", "vm", "/mnt"]
    assert translate(["-o", "ro", "--", "-vm", "/mnt"]) == ["mount", "--read-only", "--", "-vm", "/mnt"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["-o", "remount,ro"], ("/mnt", True)),
        (["-o", "rw,uid=5,remount,ro,overlay"], ("/mnt", True)),
        (["-o", "ro,remount,rw"], ("/mnt", False)),
        (["-r", "-o", "remount"], ("/mnt", True)),
        (["-o", "ro,x-remount"], None),
        ([], None),
    ],
)
def test_what_is_to_be_remounted(args: list[str], expected: tuple[str, bool] | None) -> None:
    assert remounting(["vm", "/mnt", *args]) == expected


def test_commas_inside_values() -> None:
    assert split_options('a="x,y",b=1\\,2,,c') == ["a=x,y", "b=1,2", "c"]
