"""Hosts that do not play along: files of the wrong kind, images in use, read-only media, full disks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.node import NodeConfig
from fusedisk.core.errors import FusediskError, ImageError, LockConflictError, NoSpaceError, OptionError
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, qemu_io, require_root, require_tool, run_tool
from tests.hostile.sentence import assert_sentence

MIB = 1 << 20


async def _refused(path: Path, *, format: str | None = None, writable: bool = False) -> FusediskError:
    before = sorted(os.listdir("/proc/self/fd"))
    graph = Graph(DRIVERS)
    with pytest.raises(FusediskError) as caught:
        await graph.open_backend(str(path), format=format, writable=writable)
    assert not graph.nodes
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert_sentence(caught.value, path)
    return caught.value


# --- files of the wrong kind --------------------------------------------------------------------------------


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("format", [None, "raw", "qcow2"])
async def test_what_is_no_regular_file(tmp_path: Path, format: str | None, writable: bool) -> None:
    pipe, directory, absent = tmp_path / "pipe", tmp_path / "directory", tmp_path / "absent"
    os.mkfifo(pipe)
    directory.mkdir()
    assert "is a directory, expected a regular file." in str(
        await _refused(directory, format=format, writable=writable)
    )
    assert "is a pipe, expected a regular file." in str(await _refused(pipe, format=format, writable=writable))
    error = await _refused(absent, format=format, writable=writable)
    assert error.errno == errno.ENOENT
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "round").symlink_to("round")
    assert (await _refused(tmp_path / "dangling", format=format, writable=writable)).errno == errno.ENOENT
    assert (await _refused(tmp_path / "round", format=format, writable=writable)).errno == errno.ELOOP
    assert (await _refused(absent / "below", format=format, writable=writable)).errno == errno.ENOENT


async def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    graph = Graph(DRIVERS)
    with pytest.raises(FusediskError) as caught:
        await graph.open_backend(str(tmp_path / ("x" * 300)))
    assert caught.value.errno == errno.ENAMETOOLONG


async def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert "is 0 bytes long, expected a qcow2 header" in str(await _refused(path, format="qcow2"))
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(path))
    assert backend.length == 0
    assert await backend.read(0, 0) == b""
    with pytest.raises(FusediskError):
        await backend.read(0, 1)
    await backend.close()


async def test_the_wrong_format_given(tmp_path: Path) -> None:
    raw, qcow2 = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(b"a boot sector".ljust(MIB, b"\0"))
    qemu_img("create", "-q", "-f", "qcow2", qcow2, "1M")
    error = await _refused(raw, format="qcow2")
    assert isinstance(error, ImageError)
    assert "expected qcow2's 514649fb." in str(error)
    graph = Graph(DRIVERS)
    with pytest.raises(OptionError, match="there is no image format 'nonsense'"):
        await graph.open_backend(str(raw), format="nonsense")
    backend = await graph.open_backend(str(qcow2), format="raw")
    assert await backend.read(0, 4) == b"QFI\xfb"
    await backend.close()


# --- images in use ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _held_by_qemu(path: Path, *options: str) -> Iterator[None]:
    """qemu-io has the image open, as a running virtual machine would."""
    command = [require_tool("qemu-io"), "-f", "qcow2", *options, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line.strip(), "qemu-io could not open the image"
        try:
            yield
        finally:
            process.stdin.write("quit\n")
            process.stdin.close()
            process.wait(30)


async def test_an_image_that_a_virtual_machine_uses(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with _held_by_qemu(path):
        for writable in (False, True):
            error = await _refused(path, writable=writable)
            assert isinstance(error, LockConflictError)
            assert f"is another process using the image [{path}]?" in str(error)
        graph = Graph(DRIVERS)
        backend = await graph.open_backend(str(path), config=NodeConfig(force_share=True))
        assert await backend.read(0, 512) == bytes(512)
        await backend.close()
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(path), writable=True)
    done = subprocess.run(
        [require_tool("qemu-io"), "-f", "qcow2", "-c", "length", str(path)], capture_output=True, text=True, check=False
    )
    assert "lock" in done.stderr
    await backend.close()
    qemu_io(path, "write 0 64k", fmt="qcow2")


async def test_readers_share_an_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with _held_by_qemu(path, "-r"):
        graph = Graph(DRIVERS)
        backend = await graph.open_backend(str(path))
        await backend.close()
        assert isinstance(await _refused(path, writable=True), LockConflictError)


async def test_one_image_twice_in_one_process(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    graph = Graph(DRIVERS)
    first = await graph.open_backend(str(path), writable=True)
    with pytest.raises(LockConflictError) as caught:
        await graph.open_backend(str(path), writable=True)
    assert_sentence(caught.value, path)
    await first.write(0, b"x")
    await first.close()
    assert not graph.nodes


async def test_force_share_is_for_looking_only(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    graph = Graph(DRIVERS)
    with pytest.raises(OptionError, match="force-share is for read-only images"):
        await graph.open_backend(str(path), writable=True, config=NodeConfig(force_share=True))
    assert not graph.nodes


# --- read-only media ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _mounted(place: Path, *options: str) -> Iterator[None]:
    require_root()
    place.mkdir(exist_ok=True)
    run_tool("mount", *options, place)
    try:
        yield
    finally:
        run_tool("umount", place)


@pytest.mark.root
async def test_read_only_media(tmp_path: Path) -> None:
    source, place = tmp_path / "source", tmp_path / "medium"
    source.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", source / "disk.qcow2", "1M")
    qemu_io(source / "disk.qcow2", "write -P 7 0 64k", fmt="qcow2")
    with _mounted(place, "--bind", str(source)):
        run_tool("mount", "-o", "remount,ro,bind", place)
        path = place / "disk.qcow2"
        error = await _refused(path, writable=True)
        assert error.errno == errno.EROFS
        assert str(error) == f"Could not open '{path}': Read-only file system"
        graph = Graph(DRIVERS)
        backend = await graph.open_backend(str(path))
        assert await backend.read(0, 10) == b"\x07" * 10
        await backend.close()
        node = await graph.open_node(str(path), NodeConfig(read_only=False, auto_read_only=True))
        assert node.config.read_only
        with pytest.raises(FusediskError, match="is open read-only"):
            graph.attach(node, "writer", writable=True)
        await graph.close_if_unused(node)
        assert not graph.nodes


# --- full disks ---------------------------------------------------------------------------------------------


def _check(path: Path) -> dict[str, int]:
    report = json.loads(qemu_img("check", "--output=json", "-f", "qcow2", path, check=False))
    return {key: report[key] for key in ("corruptions", "leaks", "check-errors") if report.get(key)}


@pytest.mark.root
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("limit", ["tmpfs", "ext4"])
async def test_a_full_disk_in_the_middle_of_allocations(tmp_path: Path, limit: str, cluster_size: int) -> None:
    """Writers get ENOSPC, what was written before stays, and when there is room again, they go on."""
    place = tmp_path / "small"
    if limit == "tmpfs":
        options = ["-t", "tmpfs", "-o", "size=2M", "none"]
    else:
        require_tool("mkfs.ext4")
        with (tmp_path / "fs.img").open("wb") as file:
            file.truncate(4 * MIB)
        run_tool("mkfs.ext4", "-q", "-O", "^has_journal", tmp_path / "fs.img")
        options = ["-o", "loop", str(tmp_path / "fs.img")]
    with _mounted(place, *options):
        ballast = place / "ballast"
        ballast.write_bytes(bytes(MIB // 2))
        path = place / "disk.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", path, "64M")
        graph = Graph(DRIVERS)
        backend = await graph.open_backend(str(path), writable=True)
        failures: list[NoSpaceError] = []
        written, step = [], max(cluster_size, 16384)
        for number in range(64 * MIB // step):
            # Scattered, so that tables are allocated too.
            offset = number * 37 % (64 * MIB // step) * step
            try:
                await backend.write(offset, bytes([1 + number % 255]) * step)
            except NoSpaceError as exc:
                failures.append(exc)
                if len(failures) == 20:
                    break
            else:
                written.append((offset, bytes([1 + number % 255]) * step))
        assert len(failures) == 20
        for failure in failures:
            assert failure.errno == errno.ENOSPC
            assert_sentence(failure, path)
        assert written
        for offset, content in written:
            assert await backend.read(offset, step) == content
        assert not _check_copy(path, tmp_path).keys() - {"leaks"}
        # Whoever was answered needs no room any more, so a process that dies now loses nothing.
        await backend.flush()
        commands = [f"read -P {content[0]} {offset} {step}" for offset, content in written]
        qemu_io(shutil.copy(path, tmp_path / "flushed.qcow2"), *commands, fmt="qcow2", options="-r")
        ballast.unlink()
        await backend.write(0, b"r" * step)
        await backend.flush()
        assert await backend.read(0, step) == b"r" * step
        await backend.close()
        assert not graph.nodes
        assert not _check(path).keys() - {"leaks"}
        commands = [f"read -P {content[0]} {offset} {step}" for offset, content in written if offset]
        qemu_io(path, *commands, fmt="qcow2", options="-r")


@pytest.mark.root
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_a_disk_that_cannot_grow_with_its_space_stays_as_it_is(
    tmp_path: Path, cluster_size: int, mode: str
) -> None:
    """Nothing is leaked, and the host has its space back but for what counts references."""
    with _mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=2M", "none"):
        path = tmp_path / "small" / "disk.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", path, "1M")
        graph = Graph(DRIVERS)
        backend = await graph.open_backend(str(path), writable=True, config=NodeConfig(discard="unmap"))
        await backend.write(0, b"s" * 100_000)
        await backend.flush()
        taken = path.stat().st_blocks
        target = 1 << 40 if mode == "metadata" and cluster_size > 512 else 128 * MIB
        with pytest.raises(NoSpaceError) as caught:
            await backend.truncate(target, mode)
        assert_sentence(caught.value, path)
        assert backend.length == MIB
        await backend.flush()
        if cluster_size == 65536:  # a host gives no space back for parts of pages
            assert (path.stat().st_blocks - taken) * 512 < MIB // 2
        await backend.write(MIB - 5, b"after")
        await backend.close()
        assert not _check(path)
        qemu_io(path, f"read -P {ord('s')} 0 100000", f"read -P {ord('r')} {MIB - 1} 1", fmt="qcow2", options="-r")


def _check_copy(path: Path, directory: Path) -> dict[str, int]:
    """The image as it lies while it is open."""
    copy = directory / "copy.qcow2"
    copy.write_bytes(path.read_bytes())
    return _check(copy)
