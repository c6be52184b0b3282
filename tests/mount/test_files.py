"""What is seen below the mountpoint: names, contents, attributes, and the system calls that are refused."""

from __future__ import annotations

import errno
import grp
import mmap
import os
import pwd
import signal
import stat
import sys
from pathlib import Path

import pytest

from tests.conftest import qemu_img, require_tool, run_tool
from tests.support.commands import fusedisk_process
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, daemon_of, is_mounted, wait_until

MIB = 1 << 20


def test_a_raw_image_is_a_file_with_its_bytes(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    assert os.listdir(on) == ["disk"]
    assert (on / "disk").read_bytes() == raw.read_bytes()


def test_a_guessed_format_is_told(mounts: Mounts, raw: Path) -> None:
    on, done = mounts.try_mount(raw, guess=True)
    assert (on / "disk").read_bytes() == raw.read_bytes()
    assert (done.code, done.err) == (
        0,
        f"fusedisk: '{raw}' is taken for raw, which is a guess: say --format raw if that is right.\n",
    )


def test_writes_reach_the_image(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount("--format", "raw", raw)
    expected = bytearray(raw.read_bytes())
    with (on / "disk").open("r+b", buffering=0) as file:
        for offset, length in ((0, 1), (511, 2), (4095, 4098), (2 * MIB - 3, MIB), (4 * MIB - 1, 1)):
            data = os.urandom(length)
            assert os.pwrite(file.fileno(), data, offset) == length
            expected[offset : offset + length] = data
            assert (
                os.pread(file.fileno(), length + 2, max(0, offset - 1)) == expected[max(0, offset - 1) :][: length + 2]
            )
    mounts.umount(on)
    assert raw.read_bytes() == expected


def test_attributes_tell_of_the_image(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    found, image = (on / "disk").stat(), raw.stat()
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_uid, found.st_gid, found.st_nlink) == (os.getuid(), os.getgid(), 1)
    assert found.st_size == 4 * MIB
    assert found.st_blocks == image.st_blocks
    assert found.st_blocks * 512 < found.st_size
    assert found.st_mtime_ns == found.st_ctime_ns == found.st_atime_ns == image.st_mtime_ns
    assert found.st_ino > 1


def test_block_sizes_are_the_cluster_size(mounts: Mounts, tmp_path: Path) -> None:
    small = make_qcow2(tmp_path / "small.qcow2", MIB, cluster_size=16384)
    large = make_qcow2(tmp_path / "large.qcow2", MIB, cluster_size=MIB)
    on = mounts.mount(small, large)
    assert (on / "small").stat().st_blksize == 16384
    assert (on / "large").stat().st_blksize == MIB
    assert os.statvfs(on).f_bsize == 16384
    assert os.statvfs(on).f_blocks * 16384 == 2 * MIB


def test_several_images_and_names(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    other = make_qcow2(tmp_path / "vm.qcow2", MIB, "write -P 5 0 1M")
    on = mounts.mount(other, f"driver=raw,file.driver=file,file.filename={raw},name=data disk")
    assert sorted(os.listdir(on)) == ["data disk", "vm"]
    assert (on / "vm").read_bytes() == b"\5" * MIB
    assert (on / "data disk").read_bytes() == raw.read_bytes()
    assert len({path.stat().st_ino for path in (on / "vm", on / "data disk", on)}) == 3


def test_a_name_for_one_image(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount("--name", "sda", raw)
    assert os.listdir(on) == ["sda"]


def test_a_relative_path_in_options_survives_the_daemon_leaving_the_directory(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(f"driver=raw,file.driver=file,file.filename={raw.name}", cwd=raw.parent)
    assert daemon_of(on).cwd() == "/"
    assert (on / "disk").stat().st_mtime_ns == raw.stat().st_mtime_ns
    assert os.getxattr(on / "disk", "user.fusedisk.image") == os.fsencode(raw)


def test_a_window_of_a_file(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(f"driver=raw,file.filename={raw},offset=4096,size=8192,name=part")
    assert (on / "part").read_bytes() == raw.read_bytes()[4096:12288]


def test_a_regular_file_as_mountpoint_becomes_the_disk(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    on = tmp_path / "flat"
    on.write_bytes(b"hidden")
    mounts.mount(raw, on=on)
    assert on.read_bytes() == raw.read_bytes()
    assert stat.S_ISREG(on.stat().st_mode)
    with on.open("r+b") as file:
        file.write(b"written")
    assert os.getxattr(on, "user.fusedisk.format") == b"raw"
    mounts.umount(on)
    assert on.read_bytes() == b"hidden"
    assert raw.read_bytes().startswith(b"written")


def test_extended_attributes(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    top = make_qcow2(tmp_path / "top.qcow2", 4 * MIB, "write 0 64k", backing=raw)
    file = mounts.mount("-r", top) / "top"
    values = {name: os.getxattr(file, name).decode() for name in os.listxattr(file)}
    assert values == {
        "user.fusedisk.format": "qcow2",
        "user.fusedisk.image": str(top),
        "user.fusedisk.overlay": "no",
        "user.fusedisk.chain": f"{top}\n{raw}",
        "user.fusedisk.virtual-size": str(4 * MIB),
        "user.fusedisk.allocated": str(top.stat().st_blocks * 512),
        "user.fusedisk.cluster-size": "65536",
        "user.fusedisk.read-only": "yes",
        "user.fusedisk.node-name": values["user.fusedisk.node-name"],
    }
    with pytest.raises(OSError, match="No data available"):
        os.getxattr(file, "user.fusedisk.nothing")


@pytest.mark.slow
def test_times_and_inodes_are_the_same_in_the_next_mount(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB, "write 0 1M")
    before = image.read_bytes()
    first = mounts.directory()
    seen = []
    for on in (first, first, mounts.directory()):
        mounts.mount(image, on=on)
        (on / "vm").read_bytes()
        found = (on / "vm").stat()
        seen.append((found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_blocks))
        mounts.umount(on)
    assert seen[0] == seen[1] == seen[2]
    assert image.read_bytes() == before


def test_a_write_moves_the_times_and_the_next_mount_tells_the_same(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    on = mounts.mount(image)
    file = on / "vm"
    before = file.stat()
    with file.open("r+b", buffering=0) as handle:
        handle.write(b"x" * 70_000)
        while_open = os.fstat(handle.fileno())
    closed = file.stat()
    mounts.umount(on)
    mounts.mount(image, on=on)
    again = file.stat()
    assert before.st_mtime_ns < while_open.st_mtime_ns <= closed.st_mtime_ns
    assert (again.st_mtime_ns, again.st_ctime_ns) == (closed.st_mtime_ns, closed.st_ctime_ns)
    assert before.st_blocks < closed.st_blocks == again.st_blocks


def test_chmod_chown_and_utimes_are_kept_in_memory(mounts: Mounts, raw: Path) -> None:
    image = raw.stat()
    on = mounts.mount(raw)
    file = on / "disk"
    file.chmod(0o640)
    os.utime(file, ns=(1, 1_234_567_890))
    os.chown(file, os.getuid(), os.getgid())
    found = file.stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert found.st_mtime_ns == found.st_atime_ns == 1_234_567_890
    assert found.st_ctime_ns > image.st_ctime_ns
    assert (raw.stat().st_mode, raw.stat().st_mtime_ns) == (image.st_mode, image.st_mtime_ns)
    with file.open("r+b") as handle:
        handle.write(b"x")
    assert file.stat().st_mtime_ns == raw.stat().st_mtime_ns > image.st_mtime_ns


def test_owner_and_mode_as_asked(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount("--uid", "1234", "--gid", "5678", "--mode", "640", raw)
    found = (on / "disk").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 5678, 0o640)
    directory = on.stat()
    assert (directory.st_uid, directory.st_gid, stat.S_IMODE(directory.st_mode)) == (1234, 5678, 0o750)


def test_owner_by_name(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount("--uid", "nobody", "--gid", grp.getgrgid(0).gr_name, raw)
    found = (on / "disk").stat()
    assert (found.st_uid, found.st_gid) == (pwd.getpwnam("nobody").pw_uid, 0)


@pytest.mark.parametrize("option", ["--uid", "--gid"])
@pytest.mark.parametrize("value", ["", "no such name", "-1", "4294967295", "9" * 5000, "1_0", "\u0661", "0x1"])
def test_an_owner_that_is_none(raw: Path, tmp_path: Path, option: str, value: str) -> None:
    (tmp_path / "on").mkdir()
    done = fusedisk_process("mount", f"{option}={value}", raw, tmp_path / "on")
    what = "user" if option == "--uid" else "group"
    assert (done.code, done.out) == (2, "")
    assert f"'{value}' is neither a {what} of this machine nor a number up to 4294967294." in done.err
    assert not is_mounted(tmp_path / "on")


def test_read_only(mounts: Mounts, raw: Path) -> None:
    content, before = raw.read_bytes(), raw.stat().st_mtime_ns
    on = mounts.mount("--read-only", "--mode", "666", raw)
    file = on / "disk"
    assert stat.S_IMODE(file.stat().st_mode) == 0o444
    assert file.read_bytes() == content
    with pytest.raises(OSError, match="Read-only file system"):
        file.open("r+b")
    assert "ro" in run_tool("findmnt", "-no", "OPTIONS", on).split(",")
    assert (raw.read_bytes(), raw.stat().st_mtime_ns) == (content, before)


def test_a_read_only_image_beside_a_writable_one(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    other = make_qcow2(tmp_path / "vm.qcow2", MIB)
    on = mounts.mount(other, f"driver=raw,file.filename={raw},read-only=on,name=fixed")
    with pytest.raises(OSError) as caught:
        (on / "fixed").open("r+b")
    assert caught.value.errno == errno.EROFS
    with (on / "vm").open("r+b") as handle:
        handle.write(b"x")
    (on / "fixed").chmod(0o666)
    assert stat.S_IMODE((on / "fixed").stat().st_mode) == 0o444


def test_the_end_of_a_disk_is_that_of_a_block_device(mounts: Mounts, raw: Path) -> None:
    file = mounts.mount(raw) / "disk"
    with file.open("r+b", buffering=0) as handle:
        assert os.pwrite(handle.fileno(), b"x" * 100, 4 * MIB - 10) == 10
        for offset in (4 * MIB, 5 * MIB):
            with pytest.raises(OSError) as caught:
                os.pwrite(handle.fileno(), b"x", offset)
            assert caught.value.errno == errno.ENOSPC
        assert os.pread(handle.fileno(), 100, 4 * MIB - 10) == b"x" * 10
        assert os.pread(handle.fileno(), 100, 5 * MIB) == b""
    assert file.stat().st_size == 4 * MIB
    direct = os.open(file, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 8192) as buffer:
            assert os.preadv(direct, [buffer], 4 * MIB - 4096) == 4096
            buffer[:] = b"d" * 8192
            for offset in (4 * MIB - 4096, 4 * MIB):
                with pytest.raises(OSError, match="No space left"):
                    os.pwritev(direct, [buffer], offset)
            assert os.pread(direct, 4096, 4 * MIB - 4096) == b"d" * 4096
    finally:
        os.close(direct)


def test_a_growable_disk_grows(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount("--growable", raw)
    file = on / "disk"
    with file.open("r+b", buffering=0) as handle:
        assert os.pwrite(handle.fileno(), b"far", 6 * MIB) == 3
        assert os.fstat(handle.fileno()).st_size == 6 * MIB + 3
        assert os.pread(handle.fileno(), 10, 6 * MIB - 2) == b"\0\0far"
    file.write_bytes(b"short")
    assert file.stat().st_size == 5
    mounts.umount(on)
    assert raw.read_bytes() == b"short"


def test_a_growable_disk_that_has_whole_sectors_only_grows_by_whole_ones(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", MIB)
    new = tmp_path / "new"
    new.write_bytes(os.urandom(1_500_000))
    on = mounts.mount("--growable", image)
    run_tool("cp", new, on / "disk")
    assert (on / "disk").read_bytes() == new.read_bytes().ljust(1_500_160, b"\0")
    mounts.umount(on)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", new, image)


def test_tools_that_truncate_first_can_write_a_disk(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.write_bytes(os.urandom(4 * MIB))
    on = mounts.mount("-f", "raw", raw)
    run_tool("cp", new, on / "disk")
    assert (on / "disk").read_bytes() == new.read_bytes()
    run_tool("dd", f"if={new}", f"of={on / 'disk'}", "bs=1M", "count=1", "status=none")
    assert (on / "disk").stat().st_size == 4 * MIB
    mounts.umount(on)
    assert raw.read_bytes() == new.read_bytes()[:MIB] + bytes(3 * MIB)


def test_what_is_truncated_at_opening_reads_as_zeroes(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    """cp skips the holes of what it copies, since it has just emptied the target."""
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(4 * MIB)
        file.seek(2 * MIB)
        file.write(b"in between")
    for name in ("vm", "over"):
        base = make_qcow2(tmp_path / f"{name}.qcow2", 4 * MIB, "write -P 1 0 4M")
        on = mounts.mount(*(["--overlay"] if name == "over" else []), base)
        run_tool("cp", "--sparse=auto", sparse, on / name)
        assert (on / name).stat().st_size == 4 * MIB
        assert (on / name).read_bytes() == sparse.read_bytes()
        with (on / name).open("wb"):
            pass
        assert (on / name).read_bytes() == bytes(4 * MIB)
        mounts.umount(on)


def test_truncate_resizes(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB, "write -P 7 0 1M")
    on = mounts.mount(image)
    file = on / "vm"
    os.truncate(file, MIB)
    os.truncate(file, 3 * MIB)
    assert file.stat().st_size == 3 * MIB
    assert file.read_bytes() == b"\7" * MIB + bytes(2 * MIB)
    mounts.umount(on)
    run_tool("qemu-img", "check", image)
    assert '"virtual-size": 3145728' in run_tool("qemu-img", "info", "--output=json", image)


def test_truncate_to_the_same_size_is_no_change_even_where_nothing_resizes(mounts: Mounts, raw: Path) -> None:
    file = mounts.mount(f"driver=raw,file.filename={raw},size=1M,name=part") / "part"
    with file.open("r+b") as handle:
        handle.truncate(MIB)
        with pytest.raises(OSError) as caught:
            handle.truncate(2 * MIB)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert file.stat().st_size == MIB


def test_other_changes_of_the_directory_are_refused(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    file = on / "disk"
    refused = [
        lambda: (on / "new").write_bytes(b""),
        lambda: (on / "new").mkdir(),
        lambda: file.unlink(),
        lambda: file.rename(on / "new"),
        lambda: os.link(file, on / "new"),
        lambda: (on / "new").symlink_to("x"),
        lambda: os.mkfifo(on / "new"),
    ]
    for call in refused:
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EPERM
    with pytest.raises(OSError) as caught:
        os.setxattr(file, "user.x", b"y")
    assert caught.value.errno == errno.EOPNOTSUPP
    with pytest.raises(FileNotFoundError):
        (on / "none").stat()
    assert os.listdir(on) == ["disk"]


def test_shared_mappings_work(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    with (on / "disk").open("r+b") as handle, mmap.mmap(handle.fileno(), 0) as mapped:
        mapped[MIB : MIB + 6] = b"mapped"
        mapped.flush()
        assert os.pread(handle.fileno(), 6, MIB) == b"mapped"
    mounts.umount(on)
    assert raw.read_bytes()[MIB : MIB + 6] == b"mapped"


def test_common_tools(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    on = mounts.mount(raw)
    run_tool("cp", "--sparse=always", "--preserve=all", on / "disk", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == raw.read_bytes()
    run_tool("tar", "-C", on, "-cSf", tmp_path / "tar", "disk")
    run_tool("tar", "-C", tmp_path, "-xf", tmp_path / "tar")
    assert (tmp_path / "disk").read_bytes() == raw.read_bytes()
    assert run_tool("du", "--block-size=1", on / "disk").split()[0] == str(raw.stat().st_blocks * 512)


def test_rsync_skips_a_disk_that_did_not_change(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    require_tool("rsync")
    os.utime(raw, (1_000_000_000, 1_000_000_000))  # rsync compares whole seconds
    on = mounts.mount(raw)
    copy = tmp_path / "copy"
    run_tool("rsync", "-a", f"{on}/", copy)
    mounts.umount(on)
    mounts.mount(raw, on=on)
    assert "disk" not in run_tool("rsync", "-ai", f"{on}/", copy)
    with (on / "disk").open("r+b") as handle:
        handle.write(b"changed")
    assert "disk" in run_tool("rsync", "-ai", f"{on}/", copy)
    assert (copy / "disk").read_bytes() == raw.read_bytes()


def test_the_source_in_proc_mounts_is_the_image(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "a, b\\c d.img"
    image.write_bytes(bytes(4096))
    on = mounts.mount("-r", image)
    assert run_tool("findmnt", "-rno", "SOURCE,FSTYPE", on).split() == [
        str(image).replace("\\", "\\x5c").replace(" ", "\\x20"),
        "fuse.fusedisk",
    ]
    assert os.listdir(on) == ["a, b\\c d"]


_RESIZING = """
import signal
import trio
from fusedisk.cli.daemon import Daemon
from fusedisk.cli.main import main

ready = Daemon._ready


def resize_on_request(self):
    async def wait():
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            async for _ in signals:
                (export,) = self.registry
                await export.backend.truncate(1 << 20)

    trio.lowlevel.spawn_system_task(wait)
    ready(self)


Daemon._ready = resize_on_request
main()
"""


def test_a_resize_that_did_not_come_from_the_mount_is_seen(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    script = tmp_path / "resizing.py"
    script.write_text(_RESIZING)
    on = mounts.directory()
    process = mounts.start("-f", "raw", raw, on=on, program=[sys.executable, str(script)])
    file = on / "disk"
    assert len(file.read_bytes()) == file.stat().st_size == 4 * MIB
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: file.stat().st_size == MIB, "the new size is seen")
    assert file.read_bytes() == raw.read_bytes()


def test_a_shared_image_is_never_cached(mounts: Mounts, raw: Path) -> None:
    """With --force-share somebody else may write to it."""
    on = mounts.mount("-r", "--force-share", "-f", "raw", raw)
    file = os.open(on / "disk", os.O_RDONLY)
    for content in (b"first", b"again"):
        with raw.open("r+b") as image:
            image.write(content)
        assert os.pread(file, 5, 0) == content
    os.close(file)
