"""Files that come, go and change under a real mount while it serves, by the Python API."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import NoMediumError, OperationBlockedError, OptionError
from fusedisk.drivers.table import DRIVERS
from fusedisk.export.opening import ImageRequest, OpenSettings
from fusedisk.export.registry import Registry
from fusedisk.mount import loop_device, mountinfo, runtime
from fusedisk.mount.live import LiveMount, serve
from fusedisk.mount.operations import Operations
from tests.conftest import require_fuse, require_root, run_tool
from tests.mount.test_passthrough import pytestmark as needs_passthrough
from tests.support.clients import Client
from tests.support.mounts import wait_until
from tests.support.views import partitioned

MIB = 1 << 20
STALE = "error", errno.ESTALE

channel = pytest.mark.parametrize("channel", ["auto", "off"])


@pytest.fixture(autouse=True)
def images(tmp_path: Path) -> Path:
    """A directory with the raw images a, b and c, each full of its letter, and a place to mount on."""
    require_fuse()
    require_root()
    for name in "abc":
        (tmp_path / f"{name}.img").write_bytes(name.encode() * MIB)
    (tmp_path / "mnt").mkdir()
    return tmp_path


@asynccontextmanager
async def mounted(folder: Path, *names: str, **options: Any) -> AsyncIterator[tuple[LiveMount, Client]]:
    """A mount of images, and somebody who uses it."""
    client = Client()
    try:
        await client(f"os.chdir({str(folder)!r})")
        options = {"format": "raw", "passthrough": "off", **options}
        images = [folder / f"{name}.img" for name in names or ("a",)]
        async with serve(images, folder / "mnt", **options) as mount:
            try:
                yield mount, client
            finally:
                await client.close()
    finally:
        await client.close()


def record_of(folder: Path) -> dict[str, tuple[str, bool]]:
    """What other commands learn of the files: image, and whether it is read-only."""
    record = runtime.find(str(folder / "mnt"))
    assert record is not None
    return {export.name: (os.path.basename(export.image), export.read_only) for export in record.exports}


@channel
async def test_a_file_comes_while_another_is_under_load(images: Path, channel: str) -> None:
    async with mounted(images, channel=channel) as (mount, client):
        await client(
            "def load():\n"
            "    while not stop:\n"
            "        os.pwrite(busy, b'x' * 4096, 4096)\n"
            "        wrong.extend([1] if os.pread(busy, 4096, 0) != b'a' * 4096 else [])\n"
            "        rounds.append(1)\n"
            "stop, wrong, rounds = [], [], []\n"
            "busy = os.open('mnt/a', os.O_RDWR)\n"
            "thread = threading.Thread(target=load)\n"
            "thread.start()"
        )
        assert await client("os.path.exists('mnt/b')") is False
        assert await mount.add(images / "b.img", format="raw") == ("b",)
        assert await client("sorted(os.listdir('mnt'))") == ["a", "b"]
        assert await client("set(open('mnt/b', 'rb').read())") == {ord("b")}
        assert record_of(images) == {"a": ("a.img", False), "b": ("b.img", False)}
        await client("stop.append(1); thread.join()")
        assert await client("(wrong, len(rounds) > 0)") == ([], True)
        await mount.remove("b")
        assert await client("os.open('mnt/b', os.O_PATH)") == ("error", errno.ENOENT), "the kernel knows the name"
        assert await client("os.listdir('mnt')") == ["a"]
        assert await client("os.path.exists('mnt/b')") is False
        assert record_of(images) == {"a": ("a.img", False)}


@channel
async def test_who_watches_a_file_learns_that_it_goes(images: Path, channel: str) -> None:
    async with mounted(images, "a", "b", channel=channel) as (mount, client):
        await client("import ctypes; libc = ctypes.CDLL(None); fd = libc.inotify_init1(0)")
        assert await client("libc.inotify_add_watch(fd, b'mnt/b', 0x400)") == 1  # IN_DELETE_SELF
        await mount.remove("b")
        assert await client("int.from_bytes(os.read(fd, 4096)[4:8], 'little')") == 0x400


@channel
async def test_an_open_file_goes_only_by_force(images: Path, channel: str) -> None:
    async with mounted(images, "a", "b", channel=channel) as (mount, client):
        other = Client()
        try:
            await client("fd = os.open('mnt/b', os.O_RDWR)")
            await other(f"fd = os.open({str(images / 'mnt/b')!r}, os.O_RDWR); memory = mmap.mmap(fd, 0)")
            assert await other("memory[:2]") == b"bb"
            await other("memory[:2] = b'me'")
            with pytest.raises(OperationBlockedError, match="'b' is open: close it first, or remove it by force"):
                await mount.remove("b")
            assert await client("os.pwrite(fd, b'last', 4096)") == 4
            await mount.remove("b", force=True)
            for use in ("os.pread(fd, 4, 0)", "os.pwrite(fd, b'x', 0)", "os.fstat(fd)", "os.ftruncate(fd, 1)"):
                assert await client(use) == STALE, use
            assert await client("os.listdir('mnt')") == ["a"]
            assert (images / "b.img").read_bytes()[:2] == b"me"
            assert (images / "b.img").read_bytes()[4096:4100] == b"last"
            with pytest.raises(
                EOFError, match=f"the client ended: {-signal.SIGBUS}"
            ):  # as a mapping of a file that is gone does
                await other("memory[:2]")
            assert await client("os.pread(os.open('mnt/a', os.O_RDONLY), 2, 0)") == b"aa"
        finally:
            await other.close()


@channel
async def test_a_new_file_of_the_same_name_has_nothing_of_the_old(images: Path, channel: str) -> None:
    """Neither its cached pages nor its handles."""
    async with mounted(images, "a", "b", channel=channel) as (mount, client):
        await client("fd = os.open('mnt/b', os.O_RDWR); path = os.open('mnt/b', os.O_PATH)")
        assert await client("os.pread(fd, 2, 0)") == b"bb"
        await mount.remove("b", force=True)
        await mount.add(images / "c.img", name="b", format="raw")
        # The kernel gives the old one up altogether, with EIO.
        for use in ("os.pread(fd, 2, 0)", "os.pwrite(fd, b'x', 0)", "os.ftruncate(fd, 1)"):
            assert await client(use) in (STALE, ("error", errno.EIO)), use
        for use in ("os.truncate(f'/proc/self/fd/{fd}', 1)", "os.truncate(f'/proc/self/fd/{path}', 1)"):
            assert await client(use) in (STALE, ("error", errno.EIO)), use
        assert await client("set(open('mnt/b', 'rb').read())") == {ord("c")}
        assert await client("os.stat('mnt/b').st_size") == MIB
        # Nobody has it open, but the kernel knows its inode.
        await client("path = os.open('mnt/b', os.O_PATH)")
        await mount.remove("b")
        await mount.add(images / "b.img", format="raw")
        assert await client("set(open('mnt/b', 'rb').read())") == {ord("b")}


async def test_a_resize_by_an_old_handle_does_not_reach_the_new_file(images: Path) -> None:
    """Whose number it names, too."""
    registry = Registry(Graph(DRIVERS))
    (export,) = await registry.add([ImageRequest("a", str(images / "a.img"))], OpenSettings(format="raw"))
    operations = Operations(registry)
    number, _ = await operations.handles.open(export, os.O_RDWR)
    operations.handles.drop(export)
    export.generation += 1  # as after it was removed, and came again
    context: Any = None
    fields: Any = SimpleNamespace(update_size=True)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.setattr(
            pyfuse3.InodeT(export.inode), pyfuse3.EntryAttributes(), fields, pyfuse3.FileHandleT(number), context
        )
    assert caught.value.errno == errno.ESTALE
    assert export.length == MIB
    await registry.graph.close()


@channel
async def test_open_handles_go_on_with_another_medium(images: Path, channel: str) -> None:
    """What was changed in memory goes to the old one, nothing of the old one is seen in the new one or reaches it."""
    async with mounted(images, "a", channel=channel) as (mount, client):
        await client("fd = os.open('mnt/a', os.O_RDWR); memory = mmap.mmap(fd, 0)")
        assert await client("(os.pread(fd, 2, 0), memory[8192:8194])") == (b"aa", b"aa")
        await client("memory[8192:8194] = b'me'; os.pwrite(fd, b'last', 4096)")
        await mount.change_medium("a", images / "b.img", format="raw")
        assert (images / "a.img").read_bytes()[4096:4100] == b"last"
        assert (images / "a.img").read_bytes()[8192:8194] == b"me"
        assert await client("set(os.pread(fd, 1 << 20, 0))") == {ord("b")}
        assert await client("set(memory[:])") == {ord("b")}
        assert await client("set(open('mnt/a', 'rb').read())") == {ord("b")}
        assert record_of(images) == {"a": ("b.img", False)}
        await client("memory[0:2] = b'in'; memory.flush()")
        assert (images / "b.img").read_bytes()[:2] == b"in"
    assert set((images / "b.img").read_bytes()[2:]) == {ord("b")}


@channel
async def test_a_medium_changes_under_load(images: Path, channel: str) -> None:
    """What is read while the old medium goes is not kept for the new one, and does not reach it."""
    async with mounted(images, "a", channel=channel) as (mount, client):
        await client(
            "def load():\n"
            "    while not stop:\n"
            "        seen.update(os.pread(fd, 1 << 20, 0)[::4096])\n"
            "        memory[:4096]\n"
            "stop, seen = [], set()\n"
            "fd = os.open('mnt/a', os.O_RDWR)\n"
            "memory = mmap.mmap(fd, 0)\n"
            "thread = threading.Thread(target=load)\n"
            "thread.start()"
        )
        for round in range(10):
            await mount.change_medium("a", images / f"{'bc'[round % 2]}.img", format="raw")
            letter = ord("bc"[round % 2])
            assert await client("set(os.pread(fd, 1 << 20, 0)) | set(memory[::512])") == {letter}
        await client("stop.append(1); thread.join()")
        assert await client("seen") <= set(b"abc")


@channel
async def test_an_empty_drive_has_no_medium(images: Path, channel: str) -> None:
    no_medium = "error", errno.ENOMEDIUM
    async with mounted(images, "a", channel=channel) as (mount, client):
        await client("fd = os.open('mnt/a', os.O_RDWR); direct = os.open('mnt/a', os.O_RDONLY | os.O_DIRECT)")
        assert await client("os.pread(fd, 2, 0)") == b"aa"
        await mount.change_medium("a", None)
        assert await client("os.stat('mnt/a').st_size") == 0
        # Without the channel nothing says which handle the kernel asks for, so a cached file just ends.
        assert await client("os.pread(fd, 2, 0)") == (no_medium if channel == "auto" else b"")
        assert await client("os.pwrite(fd, b'x', 0)") == no_medium
        assert await client("os.open('mnt/a', os.O_RDONLY)") == no_medium
        assert await client("os.listxattr('mnt/a')") == []
        assert record_of(images) == {"a": ("", True)}
        with pytest.raises(NoMediumError, match="'a' has no medium"):
            await mount.set_writable("a", True)
        await mount.change_medium("a", images / "c.img", format="raw")
        assert await client("os.pread(fd, 2, 0)") == b"cc"
        assert await client("os.stat('mnt/a').st_size") == MIB


@channel
async def test_read_only_and_back_with_open_handles(images: Path, channel: str) -> None:
    async with mounted(images, "a", "b", channel=channel) as (mount, client):
        await client("fd = os.open('mnt/a', os.O_RDWR); memory = mmap.mmap(fd, 0)")
        await client("memory[:2] = b'me'")
        with pytest.raises(OperationBlockedError, match="'a' is open for writing: close it first"):
            await mount.set_writable("a", False)
        await mount.set_writable("a", False, force=True)
        assert (images / "a.img").read_bytes()[:2] == b"me"
        assert record_of(images)["a"] == ("a.img", True)
        assert await client("os.stat('mnt/a').st_mode & 0o777") == 0o400
        assert await client("os.pwrite(fd, b'x', 0)") == ("error", errno.EROFS)
        assert await client("os.open('mnt/a', os.O_RDWR)") == ("error", errno.EROFS)
        assert await client("os.pread(fd, 4, 0)") == b"meaa"
        await mount.set_writable("a", True)
        assert await client("os.stat('mnt/a').st_mode & 0o777") == 0o600
        assert await client("os.pwrite(fd, b'xy', 0)") == 2
        assert await client("os.fsync(fd)") is None
    assert (images / "a.img").read_bytes()[:4] == b"xyaa"


async def test_a_page_that_could_not_be_written_is_not_shown(images: Path) -> None:
    """A program may still change pages in memory when the file is read-only by force."""
    async with mounted(images, "a") as (mount, client):
        await client("fd = os.open('mnt/a', os.O_RDWR); memory = mmap.mmap(fd, 0)")
        await mount.set_writable("a", False, force=True)
        await client("memory[:2] = b'me'")
        assert await client("memory.flush()") is not None
        await client(
            "import time\nend = time.monotonic() + 30\nwhile memory[:2] != b'aa' and time.monotonic() < end: pass"
        )
        assert await client("memory[:2]") == b"aa"
    assert (images / "a.img").read_bytes()[:2] == b"aa"


async def test_a_mount_is_read_only_as_long_as_all_files_are(images: Path) -> None:
    def flags() -> list[str]:
        found = mountinfo.mount_at(str(images / "mnt"))
        assert found is not None
        return found.options.split(",")

    async with mounted(images, "a", read_only=True) as (mount, client):
        assert "ro" in flags()
        await mount.add(images / "b.img", format="raw")
        assert "rw" in flags()
        assert await client("os.pwrite(os.open('mnt/b', os.O_RDWR), b'x', 0)") == 1
        with pytest.raises(OperationBlockedError):
            await mount.remove("b")
        await mount.remove("b", force=True)
        await client.close()
        await mount.set_writable("a", True)
        await mount.set_writable("a", False)
        assert "ro" in flags()


@channel
async def test_a_new_size_is_seen_at_once(images: Path, channel: str) -> None:
    async with mounted(images, "a", channel=channel) as (mount, client):
        assert await client("os.stat('mnt/a').st_size") == MIB
        device = (await trio.to_thread.run_sync(run_tool, "losetup", "-f", "--show", str(images / "mnt/a"))).strip()
        try:
            await mount.resize("a", 2 * MIB)
            assert loop_device.size_of(device) == 2 * MIB
            assert await client("os.stat('mnt/a').st_size") == 2 * MIB
            for change in (mount.remove("a", force=True), mount.change_medium("a", None)):
                with pytest.raises(OperationBlockedError, match=f"'a' has the loop device {device}: detach that"):
                    await change
        finally:
            await trio.to_thread.run_sync(run_tool, "losetup", "-d", device)
        await mount.resize("a", MIB)
        assert await client("os.stat('mnt/a').st_size") == MIB


@channel
async def test_parts_of_a_disk_go_and_come_with_its_medium(images: Path, channel: str) -> None:
    partitioned(images / "disk.img")
    async with mounted(images, "a", channel=channel) as (mount, client):
        assert await mount.add(images / "disk.img", format="raw", partitions=True) == ("disk", "disk.p1", "disk.p2")
        assert await client("sorted(os.listdir('mnt'))") == ["a", "disk", "disk.p1", "disk.p2"]
        with pytest.raises(OperationBlockedError, match=r"'disk.p1' is a part of 'disk': name that instead"):
            await mount.remove("disk.p1")
        await client("part = os.open('mnt/disk.p1', os.O_RDWR); disk = os.open('mnt/disk', os.O_RDWR)")
        with pytest.raises(OperationBlockedError, match="'disk' is open for writing"):
            await mount.set_writable("disk", False)
        await mount.set_writable("disk", False, force=True)
        for fd in ("part", "disk"):
            assert await client(f"os.pwrite({fd}, b'x', 0)") == ("error", errno.EROFS)
        await mount.set_writable("disk", True)
        assert await client("os.pwrite(part, b'xy', 0)") == 2
        assert await client("os.pread(disk, 2, 1 << 20)") == b"xy"
        with pytest.raises(OperationBlockedError, match=r"'disk.p1' is open: close it first, or remove it by force"):
            await mount.change_medium("disk", images / "b.img", format="raw")
        await mount.change_medium("disk", images / "b.img", format="raw", force=True)
        assert await client("sorted(os.listdir('mnt'))") == ["a", "disk"]
        assert await client("os.pread(part, 2, 0)") == STALE
        assert await client("os.pread(disk, 2, 0)") == b"bb"
        assert (images / "disk.img").read_bytes()[MIB : MIB + 2] == b"xy"
        await mount.change_medium("disk", images / "disk.img", format="raw", partitions=True)
        assert sorted(mount.names) == ["a", "disk", "disk.p1", "disk.p2"]
        assert await client("os.pread(os.open('mnt/disk.p1', os.O_RDONLY), 2, 0)") == b"xy"
        await mount.remove("disk", force=True)
        assert await client("os.listdir('mnt')") == ["a"]


async def test_what_is_cached_is_not_joined_by_other_files_of_the_same_bytes(images: Path) -> None:
    partitioned(images / "disk.img")
    async with mounted(images, "a") as (mount, client):
        await client("fd = os.open('mnt/a', os.O_RDWR)")
        with pytest.raises(OperationBlockedError, match="'a' is open and its content cached"):
            await mount.change_medium("a", images / "disk.img", format="raw", partitions=True)
        assert await client("os.pread(fd, 2, 0)") == b"aa"
        assert mount.names == ("a",)
        await client.close()
        wait = trio.fail_after(30)
        with wait:
            while True:
                try:
                    await mount.change_medium("a", images / "disk.img", format="raw", partitions=True)
                    break
                except OperationBlockedError:
                    await trio.sleep(0.01)
        assert mount.names == ("a", "a.p1", "a.p2")


async def test_shared_mappings_stay_refused_where_files_show_the_same_bytes(images: Path) -> None:
    """That is settled when the mount is made: with the kernel's cache it always holds, without it at the start."""
    partitioned(images / "disk.img")
    async with mounted(images, "a") as (mount, client):
        await mount.add(images / "disk.img", format="raw", partitions=True)
        assert await client("mmap.mmap(os.open('mnt/disk.p1', os.O_RDWR), 4096)") == ("error", errno.ENODEV)
    async with mounted(images, "a", kernel_cache="off") as (mount, client):
        assert await client("mmap.mmap(os.open('mnt/a', os.O_RDWR), 4096)[:2]") == b"aa"
        with pytest.raises(OperationBlockedError, match="shows the same bytes as another file"):
            await mount.add(images / "disk.img", format="raw", partitions=True)
        assert mount.names == ("a",)


@channel
async def test_a_failed_change_leaves_nothing_open(images: Path, channel: str) -> None:
    def opened() -> set[str]:
        links = Path("/proc/self/fd")
        return {os.readlink(link) for link in links.iterdir() if link.is_symlink()} & {
            str(images / f"{name}.img") for name in ("b", "c", "disk")
        }

    partitioned(images / "disk.img")
    async with mounted(images, "a", channel=channel) as (mount, client):
        for bad, match in (
            ([images / "b.img", images / "missing.img"], "No such file"),
            (
                [images / "b.img", {"file": {"driver": "file", "filename": str(images / "c.img")}, "name": "b"}],
                "would both",
            ),
            ([images / "b.img", images / "mnt/a"], "lies on the mount that is to show it"),
        ):
            with pytest.raises(Exception, match=match):
                await mount.add(bad, format="raw")  # type: ignore[arg-type]
            assert not opened(), bad
        long = "x" * 254  # too long with the number of a partition
        with pytest.raises(OptionError, match="longer than 255"):
            await mount.add(images / "disk.img", format="raw", partitions=True, name=long)
        assert not opened()
        with pytest.raises(Exception, match="No such file"):
            await mount.change_medium("a", images / "missing.img", format="raw")
        assert await client("os.listdir('mnt')") == ["a"]
        assert await client("open('mnt/a', 'rb').read(2)") == b"aa"


async def test_a_mount_that_is_one_file_has_no_others(images: Path) -> None:
    place = images / "file"
    place.touch()
    async with serve(images / "a.img", place, format="raw", passthrough="off") as mount:
        with pytest.raises(OperationBlockedError, match="shows one image only, so 'b' cannot join it"):
            await mount.add(images / "b.img", format="raw")
        with pytest.raises(OperationBlockedError, match=r"'a' is all that '.*/file' shows: unmount that"):
            await mount.remove("a")
        client = Client()
        try:
            await mount.change_medium("a", images / "b.img", format="raw")
            assert await client(f"open({str(place)!r}, 'rb').read(2)") == b"bb"
        finally:
            await client.close()


@needs_passthrough[0]
@needs_passthrough[1]
async def test_what_the_kernel_serves_itself_is_closed_first(images: Path) -> None:
    async with mounted(images, "a", passthrough="on") as (mount, client):
        await client("fd = os.open('mnt/a', os.O_RDWR)")
        for change in (
            mount.remove("a", force=True),
            mount.change_medium("a", None),
            mount.set_writable("a", False, force=True),
        ):
            with pytest.raises(
                OperationBlockedError, match=r"accesses its host file directly \(passthrough\): close it"
            ):
                await change
        assert await client("os.pread(fd, 2, 0)") == b"aa"


async def test_the_end_of_the_block_names_who_uses_the_mount(images: Path) -> None:
    client = Client()
    try:
        with pytest.raises(ZeroDivisionError):
            async with serve(images / "a.img", images / "mnt", format="raw"):
                raise ZeroDivisionError
        with pytest.raises(OperationBlockedError, match=r"'.*/mnt' was in use by python"):
            async with serve(images / "a.img", images / "mnt", format="raw", passthrough="off"):
                await client(f"fd = os.open({str(images / 'mnt/a')!r}, os.O_RDWR); os.pwrite(fd, b'me', 0)")
        assert (images / "a.img").read_bytes()[:2] == b"me"
        assert mountinfo.mount_at(str(images / "mnt")) is None
        assert (await client("os.pread(fd, 2, 0)"))[0] == "error"
    finally:
        await client.close()


_CHANGING = """
import sys, trio
from fusedisk.mount.live import serve

async def main(folder, channel):
    async with serve(f"{folder}/a.img", f"{folder}/mnt", format="raw", channel=channel) as mount:
        while True:
            await mount.add(f"{folder}/b.img", format="raw")
            await mount.change_medium("b", f"{folder}/c.img", format="raw")
            await mount.remove("b", force=True)
            print("round", flush=True)

trio.run(main, *sys.argv[1:])
"""
_USING = """
import os, sys
print("begun", flush=True)
while True:
    try:
        with open(sys.argv[1] + "/b", "r+b") as file:
            file.write(file.read(4096))
        os.listdir(sys.argv[1])
    except OSError as exc:
        if exc.errno in (107, 103):  # not connected, aborted
            break
        if not os.path.ismount(sys.argv[1]):
            break
"""


@channel
@pytest.mark.parametrize("end", ["kill", "umount"])
def test_nothing_hangs_when_the_mount_ends_amid_changes(images: Path, channel: str, end: str) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", _CHANGING, images, channel], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    users: list[subprocess.Popen[str]] = []
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "round\n"
        for _ in range(2):
            users.append(
                subprocess.Popen([sys.executable, "-c", _USING, images / "mnt"], stdout=subprocess.PIPE, text=True)
            )
        for _ in range(20):
            assert server.stdout.readline() == "round\n"
        if end == "kill":
            server.kill()
        else:
            run_tool("umount", "-l", images / "mnt")
        for user in users:
            user.wait(60)
        server.communicate(timeout=60)
    finally:
        if mountinfo.mount_at(str(images / "mnt")) is not None:
            run_tool("umount", "-l", images / "mnt")
        for process in (server, *users):
            process.kill()
            process.communicate(timeout=60)
    wait_until(lambda: mountinfo.mount_at(str(images / "mnt")) is None, "the mount is gone")
