"""What cannot be mounted is refused before anything happens, each with its sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fusedisk.core.errors import FusediskError
from fusedisk.mount import mountpoint
from tests.conftest import require_root, run_tool
from tests.support.commands import fusedisk_process
from tests.support.images import make_qcow2, make_sparse_raw, with_format
from tests.support.mounts import Mounts, is_mounted

MIB = 1 << 20


def refusal(*args: str | Path, code: int = 1) -> str:
    """The one sentence with which a mount fails: 2 stands for wrong values on the command line."""
    done = fusedisk_process("mount", *with_format(*args))
    assert done.code == code, done
    assert done.err.startswith("fusedisk: ")
    assert done.err.count("\n") == 1
    return done.err.removeprefix("fusedisk: ").rstrip("\n")


def test_a_missing_mountpoint(raw: Path, tmp_path: Path) -> None:
    on = tmp_path / "none"
    assert refusal(raw, on) == f"The mountpoint '{on}' does not exist, create it first (mkdir)."


def test_a_mountpoint_of_another_kind(raw: Path, tmp_path: Path) -> None:
    on = tmp_path / "pipe"
    os.mkfifo(on)
    assert refusal(raw, on) == f"The mountpoint '{on}' is neither a directory nor a regular file."


def test_two_images_on_a_file(raw: Path, tmp_path: Path) -> None:
    on = tmp_path / "file"
    on.touch()
    assert refusal(raw, raw, on, code=2) == (
        f"The mountpoint '{on}' is a regular file, which has room for one image, but 2 were given: use a directory."
    )


@pytest.mark.slow
def test_a_busy_mountpoint(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    on = mounts.mount("-r", raw)
    expected = (
        f"The mountpoint '{on}' is busy: {raw} (fuse.fusedisk) is mounted there, unmount it first "
        f"(fusedisk umount {on})."
    )
    assert refusal("-r", raw, on) == expected
    assert refusal("-r", raw, f"{on}/") == expected
    (tmp_path / "link").symlink_to(on)
    assert refusal("-r", raw, tmp_path / "link") == expected


def test_a_mountpoint_of_another_filesystem(raw: Path) -> None:
    assert (
        refusal("-r", raw, "/proc") == "The mountpoint '/proc' is busy: proc (proc) is mounted there, choose another."
    )


def test_a_directory_with_content_is_a_mountpoint(mounts: Mounts, raw: Path) -> None:
    on = mounts.directory()
    (on / "hidden").touch()
    mounts.mount(raw, on=on)
    assert os.listdir(on) == ["disk"]
    mounts.umount(on)
    assert os.listdir(on) == ["hidden"]


def test_an_image_on_its_own_mountpoint(raw: Path) -> None:
    assert refusal(raw, raw, code=2) == (
        f"'{raw}' is the mountpoint itself and would be hidden by its own mount, use another file or a directory."
    )
    assert not is_mounted(raw)


def test_an_image_below_its_own_mountpoint(raw: Path, tmp_path: Path) -> None:
    assert refusal(raw, tmp_path, code=2) == (
        f"'{raw}' lies below the mountpoint '{tmp_path}' and would be hidden by its own mount, use another directory."
    )


def test_a_backing_file_below_the_mountpoint(tmp_path: Path) -> None:
    on = tmp_path / "mnt"
    on.mkdir()
    base = make_qcow2(on / "base.qcow2", MIB)
    top = make_qcow2(tmp_path / "top.qcow2", None, backing=base)
    assert f"'{tmp_path}/mnt/base.qcow2' lies below the mountpoint" in refusal(top, on, code=2)


def test_an_image_reached_through_a_link_below_the_mountpoint(raw: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "deep").mkdir()
    hidden = raw.rename(tmp_path / "deep" / "disk.img")
    elsewhere.symlink_to(hidden)
    assert f"'{elsewhere}' lies below the mountpoint" in refusal(elsewhere, tmp_path / "deep", code=2)


def test_names_that_collide(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    other = make_sparse_raw(tmp_path / "b" / "disk.raw", MIB)
    on = tmp_path / "mnt"
    on.mkdir()
    assert refusal(raw, other, on, code=2) == (
        f"'{raw}' and '{other}' would both be the file 'disk', give one of them another name with name=."
    )


@pytest.mark.parametrize("name", ["a/b", "..", "", "x" * 256])
def test_names_that_no_file_can_have(raw: Path, tmp_path: Path, name: str) -> None:
    assert "with name=" in refusal("--name", name, raw, tmp_path, code=2)


def test_an_image_that_may_only_be_read(mounts: Mounts, raw: Path) -> None:
    require_root()
    run_tool("chattr", "+i", raw)
    try:
        said = refusal(raw, mounts.directory())
        on = mounts.mount("--read-only", raw)
        mounts.umount(on)
    finally:
        run_tool("chattr", "-i", raw)
    assert said == (
        f"Could not open '{raw}': Operation not permitted (to look at it only, mount it with --read-only or --overlay)"
    )


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--overlay", "-r"), "an overlay takes writes, which --read-only forbids: choose one of them."),
        (("--overlay", "--overlay-file", "x"), "--overlay and --overlay-file cannot be combined."),
        (("-U",), "--force-share is for reading images that others may write to: add --read-only."),
        (
            ("--low-latency", "--channel=off"),
            "--low-latency needs the data channel, which --channel=off turns off: choose one of them.",
        ),
        (("-r", "--growable"), "--growable is about writes, which --read-only forbids."),
        (("-r", "--copy-on-read"), "--copy-on-read writes what it reads into the image, which --read-only forbids"),
        (("--mode", "999"), "'999' is invalid; expected octal permissions, such as 0640."),
        (("--name", "x", "other.img"), "--name is for one image; give each of several its own with 'name='."),
        (("--overlay-file", "x", "other.img"), "--overlay-file is for one image, but several were given."),
    ],
)
def test_options_that_do_not_go_together(raw: Path, tmp_path: Path, args: tuple[str, ...], sentence: str) -> None:
    done = fusedisk_process("mount", *args, raw, tmp_path)
    assert done.code == 2
    assert sentence in done.err


def _no_device(tmp_path: Path) -> str:
    return str(tmp_path / "none")


def _no_driver(tmp_path: Path) -> str:
    device = tmp_path / "fuse"
    os.mknod(device, 0o020600, os.makedev(10, 253))
    return str(device)


def _a_directory(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        (_no_device, "is missing, so nothing can be mounted: load the kernel module fuse"),
        (_no_driver, "is there, but this kernel has no FUSE"),
        (_a_directory, "cannot be opened (Is a directory), which mounting needs"),
    ],
)
def test_no_fuse_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Callable[[Path], str], sentence: str
) -> None:
    require_root()
    monkeypatch.setattr(mountpoint, "_FUSE", device(tmp_path))
    with pytest.raises(FusediskError) as caught:
        mountpoint.check_fuse()
    assert sentence in str(caught.value)


def test_no_fusermount_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(FusediskError, match="fusermount3 is not installed"):
        mountpoint.check_fuse()


def test_who_may_let_others_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "fuse.conf"
    monkeypatch.setattr(mountpoint, "_FUSE_CONF", str(conf))
    assert mountpoint.allow_other("auto") is (os.geteuid() == 0)
    assert mountpoint.allow_other("off") is False
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for content, permitted in (
        ("", False),
        ("#user_allow_other\n", False),
        ("mount_max = 9\nuser_allow_other\n", True),
    ):
        conf.write_text(content)
        assert mountpoint.allow_other("auto") is permitted
    assert mountpoint.allow_other("on") is True
    conf.unlink()
    with pytest.raises(FusediskError, match="needs root, or a line 'user_allow_other'"):
        mountpoint.allow_other("on")
