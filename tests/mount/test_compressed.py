"""Compressed images, mounted: processes inflate for heavy readers, and end with the mount."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import qemu_img
from tests.support.compressed import cluster_content
from tests.support.mounts import Mounts, daemon_of, has_ended, wait_until

MIB = 1 << 20
SIZE = 192 * MIB


def read_past_the_cache(path: Path) -> str:
    """All of a file, in large reads that the kernel does not cache; the sum of it."""
    found = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | os.O_DIRECT), "rb", buffering=0) as file:
        while data := file.read(MIB):
            found.update(data)
    return found.hexdigest()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one processor: there is nothing to share")
def test_processes_inflate_for_who_reads_a_lot(mounts: Mounts, tmp_path: Path) -> None:
    content = b"".join(cluster_content(number) for number in range(64)) * (SIZE >> 22)
    (tmp_path / "raw").write_bytes(content)
    image = tmp_path / "image.qcow2"
    qemu_img("convert", "-q", "-f", "raw", "-O", "qcow2", "-c", tmp_path / "raw", image)
    expected = hashlib.sha256(content).hexdigest()
    on = mounts.mount(image)
    daemon = daemon_of(on)
    assert not daemon.children()
    assert read_past_the_cache(on / "image") == expected
    workers = daemon.children()
    assert len(workers) >= 2
    assert all("fusedisk.compression.inflate_worker" in worker.cmdline() for worker in workers)
    for worker in workers:
        with suppress(psutil.NoSuchProcess):  # they end together
            worker.kill()
    assert read_past_the_cache(on / "image") == expected
    workers = daemon.children()
    mounts.umount(on)
    wait_until(lambda: has_ended(daemon), "the daemon has ended")
    wait_until(lambda: not any(worker.is_running() for worker in workers), "nobody is left")
