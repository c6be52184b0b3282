"""qcow2 images whose storage fails in the middle: what was answered stays, what failed leaves the image whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import HostError, NoSpaceError
from tests.conftest import qemu_img, qemu_io
from tests.support.memory import Store, stores
from tests.support.registry import TEST_DRIVERS

CLUSTER = 65536
OPTIONS = {"driver": "qcow2", "file": {"driver": "memory", "filename": "disk"}}


def check(path: Path) -> dict[str, Any]:
    """What is wrong with an image according to ``qemu-img check``; empty where nothing is."""
    report = json.loads(qemu_img("check", "--output=json", "-f", "qcow2", path, check=False))
    return {key: report[key] for key in ("corruptions", "leaks", "check-errors") if report.get(key)}


async def test_space_of_a_failed_write_used_for_a_longer_one(tmp_path: Path) -> None:
    """The later write is given less than it asked for, and may drop no reference that it does not replace."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -c -P 3 64k 64k", "write -c -P 4 128k 64k", fmt="qcow2")
    store = Store(path.read_bytes())
    with stores(disk=store):
        backend = await Graph(TEST_DRIVERS).open_backend(OPTIONS, writable=True)
        await backend.write(512 << 10, b"z" * 512)
        store.steps.fail("write", HostError("the disk is gone"))
        with pytest.raises(HostError, match="the disk is gone"):
            await backend.write(600 << 10, b"y" * 512)
        await backend.write(0, b"w" * 2 * CLUSTER)
        await backend.close()
    path.write_bytes(store.data)
    assert not check(path)
    qemu_io(path, "read -P 119 0 128k", "read -P 4 128k 64k", fmt="qcow2", options="-r")


@pytest.mark.parametrize("operation", ["write", "discard", "read", "flush"])
@pytest.mark.parametrize("error", [NoSpaceError("no room"), HostError("the disk is gone"), RuntimeError("a bug")])
async def test_every_host_request_of_a_workload_fails_once(tmp_path: Path, operation: str, error: Exception) -> None:
    """One after the other; the requests after it go on, and in the end the image is at most leaky."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "256k")
    qemu_io(path, *(f"write -c -P {n + 1} {n * 2048} 512" for n in range(8)), fmt="qcow2")
    image = path.read_bytes()
    number, happened = 0, True
    while happened:
        store = Store(image)
        happened = await _workload(store, operation, error, number)
        path.write_bytes(store.data)
        wrong = check(path)
        assert not wrong.keys() - {"leaks"}, f"after failure {number} of {operation}"
        number += 1
    assert number > 1, "not one operation failed"


async def _workload(store: Store, operation: str, error: Exception, number: int) -> bool:
    """Requests of which the ``number``-th storage operation fails; what was answered is read back.

    Returns whether there was such an operation.
    """
    known: dict[int, bytes] = {}
    with stores(disk=store):
        graph = Graph(TEST_DRIVERS)
        backend = await graph.open_backend(OPTIONS | {"discard": "unmap"}, writable=True)
        store.steps.fail(operation, error, skip=number)

        async def attempt(request: Any, content: dict[int, bytes]) -> None:
            try:
                await request()
            except type(error):
                for place in content:
                    known.pop(place, None)
            else:
                known.update(content)

        for step in range(12):
            place = step * 2048
            await attempt(lambda place=place: backend.write(place, b"w" * 1024), {place: b"w" * 1024})
            await attempt(lambda place=place: backend.write_zeroes(place + 1024, 512), {place + 1024: bytes(512)})
        await attempt(lambda: backend.discard(0, 2048), {0: bytes(1024), 1024: bytes(512)})
        await attempt(lambda: backend.write_zeroes(4096, 1024, may_unmap=True), {4096: bytes(1024)})
        await attempt(lambda: backend.truncate(512 << 10), {})
        last = backend.length - 512
        await attempt(lambda: backend.write(last, b"e" * 512), {last: b"e" * 512})
        await attempt(backend.flush, {})
        happened = not store.steps.heal()
        if backend.node.fenced is None:
            for place, content in known.items():
                assert await backend.read(place, len(content)) == content, place
        await backend.close()
        assert not graph.nodes
    return happened
