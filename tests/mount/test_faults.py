"""What goes wrong costs the request that met it, and nothing else: bugs, full disks, slow disks, a killed daemon."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import qemu_img, qemu_io, require_root, require_tool, run_tool
from tests.support.images import make_qcow2
from tests.support.mounts import PATIENCE, Mounts, daemon_of, has_ended, is_mounted, wait_until

MIB = 1 << 20


@pytest.mark.parametrize("method", ["preadv", "pwritev", "flush_to_disk", "allocated_size"])
def test_a_bug_in_a_driver_costs_one_request(
    mounts: Mounts, raw: Path, tmp_path: Path, program: list[str], method: str
) -> None:
    on = mounts.directory()
    process = mounts.start("-f", "raw", raw, on=on, program=program)
    rules = tmp_path / "broken"
    file = os.open(on / "disk", os.O_RDWR)
    calls = {
        "preadv": lambda: os.pread(file, 4096, 2 * MIB),
        "pwritev": lambda: os.pwrite(file, b"x", 0),
        "flush_to_disk": lambda: os.fsync(file),
        "allocated_size": lambda: os.statvfs(file),
    }
    os.pwrite(file, b"y", 0)
    rules.write_text(f"bug {method}")
    with pytest.raises(OSError) as caught:
        calls[method]()
    assert caught.value.errno == errno.EIO
    rules.unlink()
    for call in calls.values():
        call()
    os.close(file)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert b"a bug in fusedisk" in said
    assert b"RuntimeError: a bug for the test" in said
    assert process.returncode == 0


def test_an_expected_error_is_its_errno_and_no_traceback(
    mounts: Mounts, raw: Path, tmp_path: Path, program: list[str]
) -> None:
    on = mounts.directory()
    process = mounts.start("-f", "raw", raw, on=on, program=program)
    (tmp_path / "broken").write_text("error preadv")
    with pytest.raises(OSError, match="Input/output error"):
        (on / "disk").read_bytes()
    (tmp_path / "broken").unlink()
    assert (on / "disk").read_bytes() == raw.read_bytes()
    process.send_signal(signal.SIGTERM)
    assert b"Traceback" not in process.communicate(timeout=PATIENCE)[1]


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_write_that_fails_costs_itself_only(
    mounts: Mounts, raw: Path, tmp_path: Path, program: list[str], format: str
) -> None:
    """Also where it was tried without a task: the disk is there, and the same write goes well when the host can."""
    image = raw if format == "raw" else make_qcow2(tmp_path / "disk.qcow2", 4 * MIB)
    on = mounts.directory()
    process = mounts.start("-f", format, image, on=on, program=program)
    file = os.open(on / "disk", os.O_RDWR)
    os.pwrite(file, b"before", 0)
    (tmp_path / "broken").write_text("error pwritev")
    for offset in (0, 3 * MIB, 2 * MIB):
        with pytest.raises(OSError, match="Input/output error"):
            os.pwrite(file, b"x" * 4096, offset)
    (tmp_path / "broken").unlink()
    assert os.pread(file, 6, 0) == b"before"
    assert os.pwrite(file, b"y" * 4096, 3 * MIB) == 4096
    assert os.pread(file, 4096, 3 * MIB) == b"y" * 4096
    os.close(file)
    process.send_signal(signal.SIGTERM)
    assert b"Traceback" not in process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0


def test_a_request_that_waits_holds_up_no_other(mounts: Mounts, raw: Path, tmp_path: Path, program: list[str]) -> None:
    on = mounts.directory()
    mounts.start("-f", "raw", raw, on=on, program=program)
    (tmp_path / "broken").write_text("hold preadv 0\nhold pwritev 8192")
    expected = raw.read_bytes()
    file = os.open(on / "disk", os.O_RDWR | os.O_DIRECT)
    plain = os.open(on / "disk", os.O_RDONLY)
    with ThreadPoolExecutor() as pool:
        held = pool.submit(os.pread, plain, 4096, 0)
        assert os.pread(plain, 4096, 2 * MIB) == expected[2 * MIB : 2 * MIB + 4096]
        assert (on / "disk").stat().st_size == 4 * MIB
        assert os.listdir(on) == ["disk"]
        assert not held.done()
        (tmp_path / "broken").unlink()
        assert held.result(PATIENCE) == expected[:4096]
    os.close(file)
    os.close(plain)


def test_many_readers_at_once(mounts: Mounts, tmp_path: Path) -> None:
    """Uncached reads of everything by many threads, each checked."""
    image = make_qcow2(tmp_path / "vm.qcow2", 8 * MIB, *(f"write -P {index} {index}M 1M" for index in range(8)))
    file = mounts.mount("-r", image) / "vm"

    def read(seed: int) -> bool:
        fd = os.open(file, os.O_RDONLY)
        try:
            return all(
                os.pread(fd, 65536, offset) == bytes([offset // MIB]) * 65536
                for offset in range((seed % 16) * 65536, 8 * MIB, 16 * 65536)
            )
        finally:
            os.close(fd)

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(read, range(64)))


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_fio_verifies_concurrent_writers(mounts: Mounts, tmp_path: Path, format: str) -> None:
    require_tool("fio")
    image = tmp_path / f"disk.{format}"
    if format == "raw":
        image.write_bytes(bytes(32 * MIB))
    else:
        make_qcow2(image, 32 * MIB)
    on = mounts.mount("-f", format, image)
    run_tool(
        "fio",
        "--name=verify",
        f"--filename={on / 'disk'}",
        "--size=8m",
        "--offset_increment=8m",
        "--numjobs=4",
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--ioengine=libaio",
        "--iodepth=8",
        "--io_size=8m",
        "--verify=crc32c",
        "--randseed=7",
        "--group_reporting",
        f"--aux-path={tmp_path}",
    )
    content = (on / "disk").read_bytes()
    mounts.umount(on)
    qemu_img("convert", "-f", format, "-O", "raw", image, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content
    if format == "qcow2":
        qemu_img("check", image)


def test_a_full_host_disk_is_told_and_loses_nothing(mounts: Mounts, tmp_path: Path) -> None:
    """An allocation meets ENOSPC; what was written before is there, and writing goes on when there is room again."""
    require_root()
    host = tmp_path / "host"
    host.mkdir()
    run_tool("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", host)
    try:
        image = make_qcow2(host / "vm.qcow2", 16 * MIB)
        ballast = host / "ballast"
        ballast.write_bytes(bytes(MIB))
        on = mounts.mount(image)
        written = []
        with (on / "vm").open("r+b", buffering=0) as file:
            while (failure := _write(file.fileno(), bytes([len(written) + 1]) * 65536, len(written) * 131072)) is None:
                written.append(len(written))
            assert failure.errno == errno.ENOSPC
            assert 8 < len(written) < 40
            for index in written:
                assert os.pread(file.fileno(), 65536, index * 2 * 65536) == bytes([index + 1]) * 65536
            ballast.unlink()
            os.pwrite(file.fileno(), b"z" * 65536, len(written) * 2 * 65536)
            os.fsync(file.fileno())
        mounts.umount(on)
        qemu_img("check", image)
        checks = [f"read -P {index + 1} {index * 131072} 65536" for index in written]
        qemu_io(image, *checks, f"read -P {ord('z')} {len(written) * 131072} 65536", fmt="qcow2", options="-r")
    finally:
        mounts.close()
        run_tool("umount", host)


def _write(fd: int, data: bytes, offset: int) -> OSError | None:
    """Why a write failed, None if it went well."""
    try:
        os.pwrite(fd, data, offset)
    except OSError as exc:
        return exc
    return None


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_daemon_leaves_a_sound_image(mounts: Mounts, tmp_path: Path, seed: int) -> None:
    """kill -9 under write load: the image has leaks at worst, and what was flushed before is in it."""
    image = make_qcow2(tmp_path / "vm.qcow2", 256 * MIB)
    on = mounts.mount(image)
    daemon = daemon_of(on)
    with (on / "vm").open("r+b", buffering=0) as file:
        file.write(b"flushed " * 8192)
        os.fsync(file.fileno())
    progress = threading.Semaphore(0)

    def write(worker: int) -> None:
        fd = os.open(on / "vm", os.O_RDWR)
        try:
            index = 0
            while True:
                place = MIB + (index * 7919 * 4096 + worker * 65536) % (254 * MIB)
                if _write(fd, bytes([worker]) * 20_000, place) is not None:
                    break
                progress.release()
                index += 1
        finally:
            with pytest.raises(OSError):
                os.close(fd)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(150 + 50 * seed):
        progress.acquire()
    daemon.kill()
    for thread in threads:
        thread.join(PATIENCE)
    wait_until(lambda: has_ended(daemon), "the daemon is dead")
    run_tool("umount", "-l", on)
    report = json.loads(qemu_img("check", "--output=json", image, check=False))
    assert report["check-errors"] == report.get("corruptions", 0) == 0, report
    qemu_img("convert", "-O", "raw", image, tmp_path / "out")
    with (tmp_path / "out").open("rb") as out:
        assert out.read(65536) == b"flushed " * 8192


def test_an_aborted_connection_ends_the_daemon_cleanly(mounts: Mounts, tmp_path: Path) -> None:
    require_root()
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    on = mounts.mount(image)
    minor = os.minor(on.stat().st_dev)
    abort = Path(f"/sys/fs/fuse/connections/{minor}/abort")
    if not abort.exists():
        run_tool("mount", "-t", "fusectl", "fusectl", "/sys/fs/fuse/connections")
    run_tool("dd", "if=/dev/zero", f"of={on / 'vm'}", "bs=64k", "count=2", "conv=notrunc", "status=none")
    daemon = daemon_of(on)
    abort.write_text("1")
    wait_until(lambda: has_ended(daemon), "the daemon has ended")
    assert not is_mounted(on)
    qemu_img("check", image)


def test_an_image_is_locked_as_long_as_it_is_mounted(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    on = mounts.mount(image)
    _, done = mounts.try_mount(image)
    assert (done.code, "another process using the image" in done.err) == (1, True)
    refused = subprocess.run(["qemu-io", "-c", "write 0 512", str(image)], capture_output=True, text=True)
    assert 'Failed to get "write" lock' in refused.stderr
    shared, done = mounts.try_mount("-r", "-U", image)
    assert (done.code, "is being written to by another program" in done.err) == (0, True)
    mounts.umount(shared)
    mounts.umount(on)
    qemu_io(image, "write 0 512")
