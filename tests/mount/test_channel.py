"""The data channel under real mounts: alone, switched off, refused, idle, and with requests that hang."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import run_tool
from tests.support.commands import process_environment
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, daemon_of, is_mounted, wait_until

MIB = 1 << 20


@pytest.mark.parametrize("channel", ["auto", "off"])
@pytest.mark.parametrize("cache", ["auto", "off"])
def test_content_by_every_way(mounts: Mounts, tmp_path: Path, channel: str, cache: str) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", 8 * MIB, "write -P 1 0 1M", "write -P 2 5M 64k")
    on = mounts.mount("--channel", channel, "--kernel-cache", cache, image)
    expected = bytearray(8 * MIB)
    expected[:MIB] = b"\1" * MIB
    expected[5 * MIB : 5 * MIB + 65536] = b"\2" * 65536
    with (on / "vm").open("r+b", buffering=0) as file:
        for offset, length in ((0, 1), (MIB - 5, 10), (3 * MIB, 2 * MIB), (8 * MIB - 1, 1), (5 * MIB + 1, 70000)):
            data = os.urandom(length)
            assert os.pwrite(file.fileno(), data, offset) == length
            expected[offset : offset + length] = data
        os.fsync(file.fileno())
        assert file.read() == expected
    mounts.umount(on)
    raw = tmp_path / "raw"
    run_tool("qemu-img", "convert", "-O", "raw", image, raw)
    assert raw.read_bytes() == expected
    run_tool("qemu-img", "check", image)


def test_without_the_channel_there_are_no_holes(mounts: Mounts, tmp_path: Path) -> None:
    """What pyfuse3 cannot do is refused or told to be all data, as the kernel does for it."""
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    for channel, data in (("off", 0), ("auto", -1)):
        on = mounts.mount("--channel", channel, image)
        with (on / "vm").open("r+b", buffering=0) as file:
            try:
                found = os.lseek(file.fileno(), 0, os.SEEK_DATA)
            except OSError:
                found = -1
        assert found == data
        mounts.umount(on)


def test_a_host_that_lets_nobody_in_between(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    """The mount works by pyfuse3 alone then, and says so once."""
    script = tmp_path / "refused.py"
    script.write_text(
        "from fusedisk.cli.main import main\n"
        "from fusedisk.mount import session, splicing\n"
        "session.fuse_descriptors = splicing.fuse_descriptors = lambda: set()\n"
        "main()\n"
    )
    on = mounts.directory()
    before = set(os.listdir("/proc/self/fd"))
    process = mounts.start("-f", "raw", raw, on=on, program=[sys.executable, str(script)])
    assert (on / "disk").read_bytes() == raw.read_bytes()
    with (on / "disk").open("r+b", buffering=0) as file:
        file.write(b"written")
    mounts.umount(on)
    _, said = process.communicate(timeout=60)
    assert said.decode().count("The data channel is off") == 1
    assert "0 new descriptors" in said.decode()
    assert raw.read_bytes()[:7] == b"written"
    assert set(os.listdir("/proc/self/fd")) == before


def _switches(process: psutil.Process) -> int:
    found = process.num_ctx_switches()
    return int(found.voluntary + found.involuntary)


def test_an_idle_mount_does_nothing(mounts: Mounts, raw: Path) -> None:
    """Not one turn on a processor, once the load is over and what was written has been handed on."""
    on = mounts.mount("--read-only", raw)
    daemon = daemon_of(on)
    with (on / "disk").open("rb", buffering=0) as file:
        for offset in range(0, 4 * MIB, 4096):
            os.pread(file.fileno(), 4096, offset)

    def is_quiet() -> bool:
        before = _switches(daemon), daemon.cpu_times()
        time.sleep(0.5)
        return before == (_switches(daemon), daemon.cpu_times())

    wait_until(is_quiet, "the daemon is quiet")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_reader_that_hangs_can_be_killed(
    mounts: Mounts, raw: Path, tmp_path: Path, program: list[str], number: int
) -> None:
    """The kernel interrupts the request of a process that is to die, and others are served all the time."""
    on = mounts.directory()
    mounts.start("-f", "raw", "--kernel-cache", "off", raw, on=on, program=program)
    broken = tmp_path / "broken"
    broken.write_text("hold preadv 65536")
    reader = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.pread(os.open({str(on / 'disk')!r}, os.O_RDONLY), 512, 65536)"]
    )
    try:
        with (on / "disk").open("rb", buffering=0) as file:
            wait_until(lambda: psutil.Process(reader.pid).status() in ("disk-sleep", "sleeping"), "the reader waits")
            assert os.pread(file.fileno(), 512, 0) == raw.read_bytes()[:512]
            reader.send_signal(number)
            assert reader.wait(60) == -number
            assert broken.exists()
            assert os.pread(file.fileno(), 512, 4096) == raw.read_bytes()[4096:4608]
    finally:
        reader.kill()
        reader.wait()
        broken.unlink()


def test_a_signal_does_not_end_a_read(mounts: Mounts, raw: Path, tmp_path: Path, program: list[str]) -> None:
    """No program expects that of a file, and none restarts the read that a mapping makes."""
    on = mounts.directory()
    mounts.start("-f", "raw", "--kernel-cache", "off", raw, on=on, program=program)
    broken = tmp_path / "broken"
    broken.write_text("hold preadv 65536")
    script = (
        "import ctypes, os, signal; signal.signal(signal.SIGUSR1, lambda *_: None); buffer = bytes(512);"
        "pread = ctypes.CDLL(None, use_errno=True).pread;"
        "pread.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_long, ctypes.c_long];"
        f"disk = os.open({str(on / 'disk')!r}, os.O_RDONLY);"
        "print('ready', flush=True);"
        "print(pread(disk, buffer, 512, 65536), ctypes.get_errno(), buffer.hex())"
    )
    reader = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        with (on / "disk").open("rb", buffering=0) as file:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
            wait_until(lambda: psutil.Process(reader.pid).status() == "sleeping", "the reader waits")
            reader.send_signal(signal.SIGUSR1)
            wait_until(lambda: psutil.Process(reader.pid).status() in ("disk-sleep", "zombie"), "it had the signal")
            assert os.pread(file.fileno(), 512, 0) == raw.read_bytes()[:512]
        broken.unlink()
        assert reader.communicate(timeout=60)[0].split() == ["512", "0", raw.read_bytes()[65536:66048].hex()]
    finally:
        reader.kill()
        reader.communicate()
        broken.unlink(missing_ok=True)


def test_a_message_that_makes_no_sense(mounts: Mounts, raw: Path, tmp_path: Path) -> None:
    """The mount ends, with one sentence and its image closed."""
    script = tmp_path / "misread.py"
    script.write_text(
        "import struct\n"
        "from fusedisk.cli.main import main\n"
        "from fusedisk.mount import channel\n"
        "channel._HEAD = struct.Struct('=4xIIQ20xQQII8xI')\n"
        "main()\n"
    )
    command = [sys.executable, str(script), "mount", "--foreground", "-f", "raw", str(raw), str(mounts.directory())]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"fusedisk: The kernel sent \d+ bytes as a request of \d+: the mount ends\.\n", done.stderr)
    assert not is_mounted(Path(command[-1]))


def test_a_connection_that_the_kernel_aborts(mounts: Mounts, raw: Path) -> None:
    """The daemon ends, with its image closed, and the mount can be taken away."""
    on = mounts.directory()
    process = mounts.start("-f", "raw", raw, on=on)
    device = os.stat(on).st_dev
    control = Path(f"/sys/fs/fuse/connections/{os.minor(device)}/abort")
    if not control.exists():
        run_tool("mount", "-t", "fusectl", "none", "/sys/fs/fuse/connections")
    (control).write_text("1")
    process.communicate(timeout=60)
    wait_until(lambda: not is_mounted(on), "the mount is gone")


@pytest.mark.slow
def test_memory_and_descriptors_stay_after_a_million_requests(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", 64 * MIB, "write -P 1 0 64M")
    on = mounts.mount("--kernel-cache", "off", image)
    daemon = daemon_of(on)

    def load(requests: int) -> None:
        with (on / "vm").open("r+b", buffering=0) as file:
            block = os.urandom(4096)
            for number in range(requests):
                offset = number * 7919 % 16384 * 4096
                if number % 3:
                    os.pread(file.fileno(), 4096, offset)
                else:
                    os.pwrite(file.fileno(), block, offset)

    load(100_000)
    before, descriptors = daemon.memory_info().rss, daemon.num_fds()
    load(1_000_000)
    assert daemon.num_fds() == descriptors
    assert daemon.memory_info().rss < before + 4 * MIB
