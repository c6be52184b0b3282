"""The library without trio: `fusedisk.open_sync`, and the disk as a file."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

import fusedisk
from fusedisk.core.errors import (
    HostError,
    NoMediumError,
    OptionError,
    OutOfRangeError,
)
from tests.conftest import qemu_img, qemu_io
from tests.support.commands import process_environment
from tests.support.images import KIB, MIB, make_overlay, make_sparse_raw


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_overlay(tmp_path)


# --- with blocking methods ------------------------------------------------------------------------------


def test_a_synchronous_disk_does_what_the_other_one_does(image: Path) -> None:
    with fusedisk.open_sync(image, writable=True) as disk:
        assert (disk.size, disk.format, disk.writable, disk.filename) == (4 * MIB, "qcow2", True, str(image))
        assert disk.read(MIB, 2) == b"\x09\x09"
        buffer = bytearray(2)
        disk.read_into(MIB, buffer)
        assert buffer == b"\x09\x09"
        disk.write(0, b"hello", fua=True)
        disk.write_zeroes(MIB, 64 * KIB, may_unmap=False)
        disk.discard(2 * MIB, 64 * KIB)
        disk.flush()
        disk.truncate(5 * MIB)
        assert disk.block_status(0, 4096).data
        ours = [(entry.start, entry.length, entry.data) for entry in disk.extents()]
        information, chain = disk.info(), disk.info_chain()
    assert information == json.loads(qemu_img("info", "--output=json", image))
    assert [layer["format"] for layer in chain] == ["qcow2", "qcow2"]
    theirs = json.loads(qemu_img("map", "--output=json", image))
    assert ours == [(entry["start"], entry["length"], entry["data"]) for entry in theirs]
    qemu_img("check", "-q", image)
    qemu_io(image, "read -P 0 1M 64k")
    with pytest.raises(NoMediumError):
        disk.read(0, 1)
    disk.close()


def test_errors_are_the_same(image: Path, tmp_path: Path) -> None:
    with pytest.raises(HostError):
        fusedisk.open_sync(tmp_path / "none")
    with pytest.raises(OptionError):
        fusedisk.open_sync(image, cache="fast")
    with fusedisk.open_sync(image) as disk, pytest.raises(OutOfRangeError):
        disk.read(4 * MIB, 1)
    with pytest.raises(ZeroDivisionError), fusedisk.open_sync(image) as disk:
        raise ZeroDivisionError
    with pytest.raises(NoMediumError):
        disk.read(0, 1)


def test_more_extents_than_are_fetched_at_once(tmp_path: Path) -> None:
    raw = make_sparse_raw(tmp_path / "x.raw", 16 * MIB, *((at * 16 * KIB, 1) for at in range(1000)))
    with fusedisk.open_sync(raw, format="raw") as disk:
        entries = list(disk.extents())
        assert len(entries) > 1500
        assert sum(entry.length for entry in entries) == 16 * MIB
        first = disk.extents()
        assert next(first) == entries[0]
        part = list(disk.extents(100, 10 * MIB))
        assert (part[0].start, part[-1].start + part[-1].length) == (100, 100 + 10 * MIB)
        assert part[1:-1] == entries[1 : len(part) - 1]
        assert disk.read(0, 1) == b"\xa5"


def test_several_threads_share_disks(image: Path, tmp_path: Path) -> None:
    raw = make_sparse_raw(tmp_path / "x.raw", 4 * MIB)
    failures: list[BaseException] = []

    def work(disk: fusedisk.SyncDisk, index: int) -> None:
        try:
            start = index * 512 * KIB
            for round_ in range(30):
                data = bytes([index + 1]) * (1 + round_ * 1000)
                disk.write(start + round_ * 7, data)
                assert disk.read(start + round_ * 7, len(data)) == data
        except BaseException as exc:
            failures.append(exc)

    with fusedisk.open_sync(image, writable=True) as one, fusedisk.open_sync(raw, format="raw", writable=True) as two:
        threads = [threading.Thread(target=work, args=(disk, index)) for disk in (one, two) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    qemu_img("check", "-q", image)


async def test_a_synchronous_disk_refuses_to_block_trio(image: Path) -> None:
    with pytest.raises(RuntimeError, match="blocking function"):
        fusedisk.open_sync(image)


def test_creating_synchronously(tmp_path: Path) -> None:
    fusedisk.create_sync(tmp_path / "x.qcow2", "qcow2", "1M", options={"compat": "0.10"})
    fusedisk.create_sync(tmp_path / "y.qcow2", "qcow2", backing="x.qcow2", backing_format="qcow2")
    with fusedisk.open_sync(tmp_path / "y.qcow2") as disk:
        assert disk.size == MIB
    with pytest.raises(OptionError):
        fusedisk.create_sync(tmp_path / "z", "qcow2")


def _run(script: str, *args: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", script, *map(str, args)],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_a_disk_left_open_is_closed_when_the_program_ends(image: Path) -> None:
    out = _run(
        "import fusedisk, sys\n"
        "disk = fusedisk.open_sync(sys.argv[1], writable=True)\n"
        "node = disk._disk._backend.node\n"
        "node.close_notifiers.append(lambda node: print('closed', flush=True))\n"
        "for at in range(0, 4 << 20, 65536): disk.write(at, b'\\7' * 65536)\n",
        image,
    )
    assert out == "closed\n"
    qemu_img("check", "-q", image)
    qemu_io(image, "read -P 7 0 4M")


def test_a_forgotten_disk_is_closed_and_warned_about(image: Path) -> None:
    file = fusedisk.open_sync(image, writable=True).as_file()
    file.write(b"kept")
    with pytest.warns(ResourceWarning, match=f"^the disk '{image}' was forgotten without closing it.$"):
        del file
    with fusedisk.open_sync(image, writable=True) as disk:  # so the lock is gone
        assert disk.read(0, 4) == b"kept"
        cycle: list[object] = [fusedisk.open_sync(image.with_name("base.qcow2"), force_share=True)]
        cycle.append(cycle)
        del cycle
        with pytest.warns(ResourceWarning, match=r"base\.qcow2' was forgotten"):
            gc.collect()
    qemu_img("check", "-q", image)
    del disk  # closed: no warning


def test_a_disk_forgotten_in_the_background_thread_is_closed(image: Path) -> None:
    disks = [fusedisk.open_sync(image, writable=True)]
    loop, closed = disks[0]._loop, threading.Event()
    disks[0]._disk._backend.node.close_notifiers.append(lambda node: closed.set())

    async def forget() -> None:
        disks.clear()

    with pytest.warns(ResourceWarning):
        loop.call(forget)
    assert closed.wait(30)


def test_a_disk_forgotten_as_the_program_ends_is_closed(image: Path) -> None:
    out = _run(
        "import fusedisk, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "disk = fusedisk.open_sync(sys.argv[1], writable=True)\n"
        "disk._disk._backend.node.close_notifiers.append(lambda node: print('closed', flush=True))\n"
        "disk.write(0, b'\\7' * 65536)\n"
        "del disk\n",
        image,
    )
    assert out == "closed\n"
    qemu_io(image, "read -P 7 0 64k")


def test_after_a_fork_the_child_can_open_disks_of_its_own(image: Path) -> None:
    out = _run(
        "import fusedisk, os, sys\n"
        "with fusedisk.open_sync(sys.argv[1]) as disk:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        with fusedisk.open_sync(sys.argv[1]) as mine: print(mine.read(1 << 20, 2), flush=True)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    print(disk.read(1 << 20, 2))\n",
        image,
    )
    assert out == "b'\\t\\t'\n" * 2


def test_after_a_fork_the_disk_is_the_parents(image: Path) -> None:
    out = _run(
        "import fusedisk, gc, os, sys\n"
        "disk = fusedisk.open_sync(sys.argv[1], writable=True)\n"
        "disk.write(0, b'parent')\n"
        "disk.flush()\n"
        "entries = disk.extents()\n"
        "parent, child = os.getpid(), os.fork()\n"
        "if not child:\n"
        "    file = disk.as_file()\n"
        "    for use in (lambda: disk.read(0, 1), lambda: disk.write(0, b'child'), disk.flush, disk.snapshots,\n"
        "                lambda: list(entries), lambda: file.read(1)):\n"
        "        try: use()\n"
        "        except (fusedisk.FusediskError, OSError) as exc: message = str(exc).removeprefix('[Errno 123] ')\n"
        "        else: message = 'done'\n"
        "        wanted = f'belongs to process {parent}, open it again in this one ({os.getpid()}).'\n"
        "        assert message == f\"'{sys.argv[1]}' {wanted}\", message\n"
        "    disk.close()\n"
        "    with disk: pass\n"
        "    del disk, entries, use, file; gc.collect()\n"
        "    sys.exit()\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "try: fusedisk.open_sync(sys.argv[1])\n"
        "except fusedisk.errors.FusediskError as exc: print(type(exc).__name__)\n"
        "print(disk.read(0, 6))\n"
        "next(entries); disk.close()\n",
        image,
    )
    assert out == "LockConflictError\nb'parent'\n"
    qemu_img("check", "-q", image)


def test_multiprocessing_with_fork(image: Path) -> None:
    out = _run(
        "import fusedisk, multiprocessing, sys\n"
        "def work(disk):\n"
        "    try: disk.read(0, 1)\n"
        "    except fusedisk.errors.NoMediumError: print('refused', flush=True)\n"
        "    global mine\n"
        "    mine = fusedisk.open_sync(sys.argv[1]); print(mine.read(1 << 20, 1), flush=True)\n"
        "context = multiprocessing.get_context('fork')\n"
        "with fusedisk.open_sync(sys.argv[1]) as disk:\n"
        "    process = context.Process(target=work, args=(disk,)); process.start(); process.join()\n"
        "    print(process.exitcode, disk.read(1 << 20, 1))\n",
        image,
    )
    assert out == "refused\nb'\\t'\n0 b'\\t'\n"


def test_in_a_thread_of_its_own(image: Path) -> None:
    out = _run(
        "import fusedisk, sys, threading\n"
        "def work():\n"
        "    with fusedisk.open_sync(sys.argv[1]) as disk: print(disk.size)\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n",
        image,
    )
    assert out == f"{4 * MIB}\n"


# --- as a file ------------------------------------------------------------------------------------------


def test_a_file_reads_to_the_end_of_the_disk(image: Path) -> None:
    with fusedisk.open_sync(image) as disk, disk.as_file() as file:
        assert (file.readable(), file.writable(), file.seekable(), file.tell()) == (True, False, True, 0)
        assert file.seek(MIB) == MIB
        assert file.read(2) == b"\x09\x09"
        assert file.tell() == MIB + 2
        assert file.seek(-3, os.SEEK_CUR) == MIB - 1
        assert file.read(2) == b"\0\x09"
        assert file.seek(-2, os.SEEK_END) == 4 * MIB - 2
        assert file.read(10) == b"\0\0"
        assert file.read(10) == b""
        file.seek(9 * MIB)
        assert file.read(1) == b""
        file.seek(0)
        assert len(file.read()) == 4 * MIB
        with pytest.raises(OSError, match="before the start"):
            file.seek(-1)
        with pytest.raises(ValueError, match="whence"):
            file.seek(0, 9)
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
        with pytest.raises(io.UnsupportedOperation):
            file.truncate(5)
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_a_file_writes_to_the_end_of_the_disk(image: Path) -> None:
    with fusedisk.open_sync(image, writable=True) as disk:
        file = disk.as_file()
        assert file.writable()
        file.seek(-2, os.SEEK_END)
        assert file.write(b"abcd") == 2
        assert file.write(b"") == 0
        with pytest.raises(OSError, match="the disk ends at 4194304") as full:
            file.write(b"cd")
        assert full.value.errno == errno.ENOSPC
        assert file.truncate(5 * MIB) == disk.size == 5 * MIB
        assert file.write(b"cd") == 2
        file.close()
        assert disk.read(4 * MIB - 2, 4) == b"abcd", "closing the file leaves the disk open"


def test_errors_of_a_file_are_oserrors(image: Path) -> None:
    with fusedisk.open_sync(image) as disk:
        file = disk.as_file()
    with pytest.raises(OSError, match="closed") as caught:
        file.read(1)
    assert caught.value.errno == errno.ENOMEDIUM
    assert isinstance(caught.value.__cause__, NoMediumError)


def test_a_zip_archive_on_a_disk(tmp_path: Path) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", MIB)
    with fusedisk.open_sync(image, format="raw", writable=True) as disk, io.BufferedRandom(disk.as_file()) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for index in range(20):
                archive.writestr(f"{index}.txt", f"file {index}\n" * 1000)
        end = file.tell()
        file.truncate(end)
    with fusedisk.open_sync(image, format="raw") as disk, zipfile.ZipFile(io.BufferedReader(disk.as_file())) as archive:
        assert archive.testzip() is None
        assert archive.read("7.txt") == b"file 7\n" * 1000


def test_a_disk_copied_by_way_of_files(image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"
    with fusedisk.open_sync(image) as disk, copy.open("wb") as target:
        shutil.copyfileobj(disk.as_file(), target)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", image, copy)
