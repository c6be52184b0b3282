"""The short way for requests: where a part of the disk leads is remembered until that changes."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.extent import Extent
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.model.tracked import Request
from fusedisk.block.request import places, snapshot
from fusedisk.block.request.immediate import Pieces
from fusedisk.core.errors import FusediskError, HostError
from fusedisk.drivers.protocol import host_file
from fusedisk.drivers.protocol.host_io import read_vector
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, qemu_io
from tests.support.qcow2 import assert_clean, create_image, opened
from tests.support.thinning import thinned

pytestmark = pytest.mark.usefixtures("places_at_once")
KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB


def read(backend: Backend, offset: int, length: int) -> bytes | None:
    """What the short way reads, if it does."""
    buffer = memoryview(bytearray(b"\xee" * length))
    return bytes(buffer) if backend.immediate.read(offset, buffer) else None


def no_lookup(offset: int, length: int) -> Extent | None:
    raise AssertionError("the place was not remembered")


@asynccontextmanager
async def chain(tmp_path: Path, depth: int, **options: Any) -> AsyncIterator[Backend]:
    """Overlays with a piece of data each, the lowest shorter than the others; the top is open."""
    path = await create_image(tmp_path / "0.qcow2", size=SIZE - 3 * MIB)
    for number in range(1, depth):
        above = tmp_path / f"{number}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", above, str(SIZE))
        path = above
    for number in range(depth):
        image = tmp_path / f"{number}.qcow2"
        qemu_io(
            image, *(f"write -P {10 + number} {at * MIB + number * 192 * KIB} 256k" for at in range(5)), fmt="qcow2"
        )
    async with opened(path, **options) as backend:
        await backend.read(0, backend.length)  # tables and pages are in memory then
        yield backend


@pytest.mark.parametrize("depth", [1, 4])
async def test_what_was_read_is_found_without_a_lookup(
    tmp_path: Path, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with chain(tmp_path, depth) as backend:
        offsets = range(0, SIZE - 4 * KIB if depth > 1 else SIZE - 3 * MIB, 12 * KIB)
        expected = {offset: bytes(await backend.read(offset, 4 * KIB)) for offset in offsets}
        assert len({content[:1] for content in expected.values()}) == depth + 1
        for offset in offsets:
            assert read(backend, offset, 4 * KIB) == expected[offset]
        monkeypatch.setattr(backend.node.driver, "lookup", no_lookup)
        for offset in offsets:
            if offset // (64 * KIB) == (offset + 4 * KIB - 1) // (64 * KIB):
                assert read(backend, offset, 4 * KIB) == expected[offset]


async def test_one_look_finds_the_places_that_lie_behind_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with chain(tmp_path, 1) as backend:
        start, length = MIB + 256 * KIB, 768 * KIB
        expected = random.Random(0).randbytes(length)
        await backend.write(start, expected)
        assert read(backend, start, 512) == expected[:512]
        monkeypatch.setattr(backend.node.driver, "lookup", no_lookup)
        for offset in range(512, length - 128 * KIB, 28 * KIB):
            assert read(backend, start + offset, 60 * KIB) == expected[offset : offset + 60 * KIB]


async def test_one_look_finds_the_places_in_all_layers_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with chain(tmp_path, 3) as backend:
        expected = bytes(await backend.read(MIB, MIB))
        # The top's own data begins at 384 KiB.
        for first, end in ((0, 384), (640, 1024 - 64)):
            assert read(backend, MIB + first * KIB, 512) == expected[first * KIB : first * KIB + 512]
            with monkeypatch.context() as patched:
                patched.setattr(backend.node.driver, "lookup", no_lookup)
                for offset in range(first * KIB, end * KIB, 16 * KIB):
                    assert read(backend, MIB + offset, 16 * KIB) == expected[offset : offset + 16 * KIB]
        assert len({expected[offset * KIB] for offset in (0, 192, 300, 1000)}) == 3


async def test_places_that_were_found_together_pay_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pays is counted in looks: many places of which few are read are no reason to stop."""
    monkeypatch.setattr(places, "MOST_PLACES", 8)
    monkeypatch.setattr(places, "PAUSE", 1000)
    async with chain(tmp_path, 1) as backend:
        await backend.write(256 * KIB, b"x" * 768 * KIB)
        known = backend.immediate._places.known
        known.clear()
        for _ in range(5):
            assert read(backend, 256 * KIB, 512) == b"x" * 512
        assert len(known) > 8
        for _ in range(2):
            assert read(backend, 3 * MIB, 512) is not None
        assert 3 * MIB >> 16 in known


async def test_a_place_ends_where_its_data_does(tmp_path: Path) -> None:
    async with chain(tmp_path, 2) as backend:
        await backend.write(MIB, b"a" * 64 * KIB)
        await backend.write(3 * MIB, b"b" * 64 * KIB)
        await backend.write(MIB + 64 * KIB, b"c" * 64 * KIB)
        assert read(backend, MIB, 512) == b"a" * 512
        assert read(backend, MIB + 60 * KIB, 8 * KIB) == b"a" * 4 * KIB + b"c" * 4 * KIB


async def test_nothing_is_read_past_a_serialising_request(tmp_path: Path) -> None:
    async with chain(tmp_path, 1) as backend:
        assert read(backend, 0, 512) == b"\x0a" * 512
        for node in (backend.node, backend.node.children["file"].node):
            request = Request(0, 512, write=True, serialising=True)
            request.enter(node)
            assert read(backend, 0, 512) is None
            request.leave(node)
            assert read(backend, 0, 512) == b"\x0a" * 512


async def test_places_are_bounded_and_not_kept_where_they_do_not_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "MOST_PLACES", 8)
    monkeypatch.setattr(places, "PAUSE", 1000)
    monkeypatch.setattr(places, "_REACH", 128 * KIB)  # one place for each look
    async with chain(tmp_path, 1) as backend:
        known = backend.immediate._places.known
        known.clear()
        for offset in range(0, 8 * 64 * KIB, 64 * KIB):
            assert read(backend, offset, 512) is not None
        assert len(known) == 8
        # What is read again and again pays: it starts anew.
        for _ in range(32):
            assert read(backend, 0, 512) is not None
        assert read(backend, MIB, 512) is not None
        assert len(known) == 0
        assert read(backend, MIB, 512) is not None
        assert len(known) == 1
        # What is read only once does not.
        for offset in range(0, 5 * MIB, 64 * KIB):
            assert read(backend, offset, 512) is not None
        assert len(known) == 0
        assert read(backend, 0, 512) is not None
        assert len(known) == 0


async def test_a_plain_file_has_no_places_that_pay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MOST_PLACES", 8)
    monkeypatch.setattr(places, "PAUSE", 1000)
    (tmp_path / "file").write_bytes(b"x" * 2 * MIB)
    graph = Graph(DRIVERS)
    try:
        backend = await graph.open_backend({"driver": "file", "filename": str(tmp_path / "file")})
        for offset in range(0, 2 * MIB, 64 * KIB):
            assert read(backend, offset, 512) == b"x" * 512
        assert not backend.immediate._places.known
    finally:
        await graph.close()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("seed", thinned(range(6), 3))
async def test_changes_of_all_kinds_between_reads(tmp_path: Path, depth: int, seed: int) -> None:
    rng = random.Random(seed)
    by_place = written = 0
    async with chain(tmp_path, depth, discard="unmap") as backend:
        if depth == 1:
            await backend.truncate(SIZE)
        disk = bytearray(await backend.read(0, SIZE))
        kept: dict[str, bytes] = {}
        for _ in range(120):
            offset = rng.randrange(SIZE // 512) * 512
            length = min(rng.choice((512, 4 * KIB, 64 * KIB, 200 * KIB)), len(disk) - offset)
            what = rng.choice(("write", "write", "write", "zero", "unmap", "discard", "compressed", "snapshot", "size"))
            if what == "write" and length > 0:
                data = rng.randbytes(length)
                await backend.write(offset, data)
                disk[offset : offset + length] = data
            elif what in ("zero", "unmap") and length > 0:
                await backend.write_zeroes(offset, length, may_unmap=what == "unmap")
                disk[offset : offset + length] = bytes(length)
            elif what == "discard" and length > 0:
                await backend.discard(offset, length)
                disk[:] = await backend.read(0, len(disk))
            elif what == "compressed" and offset + 64 * KIB <= len(disk):
                offset &= -64 * KIB
                data = rng.randbytes(1 * KIB) * 64
                await backend.write_compressed(offset, data)
                disk[offset : offset + 64 * KIB] = data
            elif what == "size" and not kept:
                length = SIZE - rng.randrange(4) * MIB
                await backend.truncate(length)
                disk[:] = disk[:length].ljust(length, b"\0")
            elif what == "snapshot":
                if kept and rng.random() < 0.6:
                    name = rng.choice(list(kept))
                    await snapshot.apply_snapshot(
                        backend.node, snapshot.find_snapshot(snapshot.list_snapshots(backend.node), name, "").id
                    )
                    disk[:] = kept[name]
                else:
                    made = await snapshot.create_snapshot(
                        backend.node, SnapshotInfo(id="", name=f"s{len(kept)}", date=0)
                    )
                    kept[made.name] = bytes(disk)
            for _ in range(60):
                position = rng.randrange(len(disk) // 512) * 512
                if rng.random() < 0.7:
                    position = min(offset // (64 * KIB) * 64 * KIB + rng.randrange(256) * 512, len(disk) - 512)
                length = min(rng.choice((512, 4 * KIB, 60 * KIB)), len(disk) - position)
                place = backend.immediate._places.known.get(position >> 16)
                if rng.random() < 0.2:
                    data = rng.randbytes(length)
                    if backend.immediate.write(position, memoryview(data)):
                        written += place is not None and place[4] is not None and position + length <= place[2]
                        disk[position : position + length] = data
                    else:
                        await backend.write(position, data)
                        disk[position : position + length] = data
                    continue
                found = read(backend, position, length)
                if found is not None:
                    by_place += place is not None and position + length <= place[2]
                    assert found == disk[position : position + length]
    assert by_place > 500
    assert written > 100
    assert_clean(tmp_path / f"{depth - 1}.qcow2")


async def test_places_that_come_to_nothing_are_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change of the mapping that comes too early doubles the wait; one that comes late ends that."""
    monkeypatch.setattr(places, "STEADY", 2)
    monkeypatch.setattr(places, "PAUSE", 12)
    async with chain(tmp_path, 1) as backend:
        known = backend.immediate._places.known
        waits = []
        for _ in range(5):
            backend.node.change_mapping()
            waits.append(0)
            assert read(backend, 0, 512) is not None
            while not known:
                assert read(backend, 0, 512) is not None
                waits[-1] += 1
        assert waits == sorted(waits)
        assert waits[0] < waits[-1] == 12
        for _ in range(4):
            assert read(backend, 0, 512) is not None
        backend.node.change_mapping()
        for _ in range(2):
            assert read(backend, 0, 512) is not None
            assert not known
        assert read(backend, 0, 512) is not None
        assert known


async def test_a_backing_node_that_grows(tmp_path: Path) -> None:
    """It is not read-only, so nothing is known of what lies behind its end."""
    (tmp_path / "base").write_bytes(bytes(MIB))
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "top", str(4 * MIB))
    graph = Graph(DRIVERS)
    try:
        file = {"driver": "file", "filename": str(tmp_path / "base")}
        base = await graph.open_backend({"driver": "raw", "node-name": "base", "file": file}, writable=True)
        file = {"driver": "file", "filename": str(tmp_path / "top")}
        top = await graph.open_backend({"driver": "qcow2", "file": file, "backing": "base"})
        assert await top.read(2 * MIB, 512) == bytes(512)
        assert read(top, 2 * MIB, 512) == bytes(512)
        await base.truncate(4 * MIB)
        await base.write(2 * MIB, b"x" * 512)
        assert read(top, 2 * MIB, 512) in (None, b"x" * 512)
    finally:
        await graph.close()


@pytest.mark.usefixtures("quick_host")
async def test_small_writes_one_after_the_other_grow_the_image(tmp_path: Path) -> None:
    """The first write of all makes a table; those after it take no waiting."""
    async with opened(await create_image(tmp_path / "disk.qcow2", size=SIZE)) as backend:
        storage = backend.node.children["file"].node
        assert not backend.immediate.write(0, memoryview(bytes(4 * KIB)))
        await backend.write(0, b"%08d" % 0 * 512)
        for offset in range(4 * KIB, 4 * 64 * KIB, 4 * KIB):
            before = storage.length
            assert backend.immediate.write(offset, memoryview(b"%08d" % offset * 512))
            assert storage.length == before + 4 * KIB == (tmp_path / "disk.qcow2").stat().st_size
        for offset in range(0, 4 * 64 * KIB, 4 * KIB):
            assert read(backend, offset, 4 * KIB) == b"%08d" % offset * 512
    assert_clean(tmp_path / "disk.qcow2")


@pytest.mark.usefixtures("quick_host")
async def test_nothing_goes_past_the_end_of_a_node_in_between(tmp_path: Path) -> None:
    """An image that was cut in its last cluster, in a window of a file that goes on."""
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_io(image, "write -P 7 0 4k", fmt="qcow2")
    length = image.stat().st_size - 64 * KIB + 4 * KIB
    os.truncate(image, length)
    with image.open("ab") as file:
        file.write(b"n" * 128 * KIB)
    window = {"driver": "raw", "size": length, "file": {"driver": "file", "filename": str(image)}}
    graph = Graph(DRIVERS)
    try:
        backend = await graph.open_backend({"driver": "qcow2", "file": window}, writable=True)
        assert await backend.read(0, 4 * KIB) == b"\7" * 4 * KIB
        assert not backend.immediate.write(32 * KIB, memoryview(b"z" * 4 * KIB))
        assert read(backend, 32 * KIB, 4 * KIB) is None
        with pytest.raises(FusediskError):
            await backend.write(32 * KIB, b"z" * 4 * KIB)
        assert backend.immediate.write(0, memoryview(b"z" * 4 * KIB))
    finally:
        await graph.close()
    assert image.read_bytes()[length:] == b"n" * 128 * KIB


async def test_a_failed_change_of_the_whole_image(tmp_path: Path) -> None:
    async with chain(tmp_path, 1) as backend:
        before = backend.node.generation
        with pytest.raises(HostError):
            async with snapshot.alone(backend.node, "amend"):
                raise HostError("half-way")
        assert backend.node.generation > before


def lent(backend: Backend, offset: int, length: int) -> bytes | None:
    """What the parts hold that a range is lent as, if it is."""
    parts = backend.immediate.lend(offset, length)
    if parts is None:
        return None
    if isinstance(parts, Pieces):
        return b"".join(parts)
    return b"".join(os.pread(descriptor, count, place) for descriptor, place, count in parts)


@pytest.mark.parametrize("depth", [1, 3])
async def test_what_lies_in_files_is_lent(tmp_path: Path, depth: int) -> None:
    async with chain(tmp_path, depth) as backend:
        found = 0
        for offset in range(0, SIZE - 4 * MIB, 60 * KIB):
            expected = bytes(await backend.read(offset, 128 * KIB))
            assert read(backend, offset, 128 * KIB) == expected  # the chain is known from now on
            data = lent(backend, offset, 128 * KIB)
            assert data in (None, expected)
            found += data is not None
        assert found >= 5
        accounting = backend.accounting
        reads, length = accounting.reads, accounting.bytes_read
        assert lent(backend, 0, 128 * KIB)
        assert accounting.reads == reads, "it may yet turn out that it cannot be taken"
        backend.immediate.count_lent(128 * KIB)
        assert (accounting.reads, accounting.bytes_read) == (reads + 1, length + 128 * KIB)


async def test_what_does_not_lie_in_a_file_is_not_lent(tmp_path: Path) -> None:
    async with chain(tmp_path, 1, discard="unmap") as backend:
        assert lent(backend, 0, 128 * KIB) == b"\x0a" * 128 * KIB
        assert lent(backend, 128 * KIB, 256 * KIB) is None  # nothing is there
        assert lent(backend, backend.length - 512, 1024) is None
        for node in (backend.node, backend.node.children["file"].node):
            request = Request(0, 512, write=True, serialising=True)
            request.enter(node)
            assert lent(backend, 0, 128 * KIB) is None
            request.leave(node)
        await backend.write_compressed(0, b"c" * 64 * KIB)
        assert lent(backend, 0, 128 * KIB) is None
        backend.immediate.disable()
        assert lent(backend, 64 * KIB, 64 * KIB) is None


@pytest.mark.parametrize("through", ["disk", "partition"])
async def test_inflated_clusters_are_lent(tmp_path: Path, through: str) -> None:
    path = await create_image(tmp_path / "disk.qcow2", size=MIB)
    rng = random.Random(7)
    content = b"".join(rng.randbytes(1 * KIB) * 64 for _ in range(16))
    start = 0
    async with opened(path) as disk:
        await disk.write_compressed(0, content[: 15 * 64 * KIB])
        await disk.write(15 * 64 * KIB, content[15 * 64 * KIB :])
    options: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
    if through == "partition":
        start = 512
        options = {"driver": "raw", "offset": start, "size": MIB - start, "file": options}
    graph = Graph(DRIVERS)
    try:
        backend = await graph.open_backend(options)
        assert lent(backend, 0, 192 * KIB) is None  # nothing is inflated yet
        assert await backend.read(0, 15 * 64 * KIB - start) == content[start : 15 * 64 * KIB]
        for offset, length in ((0, 64 * KIB), (100, 128 * KIB), (4096, 512), (60 * KIB, 800 * KIB)):
            assert lent(backend, offset, length) == content[start + offset : start + offset + length]
        assert lent(backend, 14 * 64 * KIB, 127 * KIB) is None  # in a file and in memory
    finally:
        await graph.close()


async def test_what_is_not_in_the_page_cache_is_not_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with chain(tmp_path, 1) as backend:
        assert lent(backend, 0, 128 * KIB) is not None
        pages = 32
        monkeypatch.setattr(host_file, "cached_pages", lambda *_: pages - 1)
        assert lent(backend, 0, 128 * KIB) is None
        monkeypatch.setattr(host_file, "cached_pages", lambda *_: pages)
        assert lent(backend, 0, 128 * KIB) is not None

        def unknown(*_: object) -> int:
            raise OSError(errno.ENOSYS, "")

        monkeypatch.setattr(host_file, "cached_pages", unknown)
        assert lent(backend, 0, 128 * KIB) is None
        monkeypatch.setattr(host_file, "cached_pages", lambda *_: pages)
        assert lent(backend, 0, 128 * KIB) is None  # not asked again


async def test_nothing_is_lent_while_a_thread_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages count as cached before they are there, and whoever took them would wait for them."""
    begun, go_on = trio.Event(), threading.Event()

    def slow(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> Sequence[memoryview]:
        if flags:
            return buffers
        trio.from_thread.run_sync(begun.set)
        assert go_on.wait(60)
        return read_vector(fd, buffers, offset)

    async with chain(tmp_path, 1) as backend:
        assert lent(backend, 0, 128 * KIB) is not None
        with monkeypatch.context() as patch:
            patch.setattr(host_file, "read_vector", slow)
            async with trio.open_nursery() as nursery:
                storage = backend.node.children["file"].node
                (part,) = backend.immediate.lend(0, 128 * KIB) or ()
                buffers = [memoryview(bytearray(4096))]
                nursery.start_soon(storage.driver.preadv, part[1] + 64 * KIB, buffers)
                try:
                    await begun.wait()
                    assert lent(backend, 0, 128 * KIB) is None
                finally:
                    go_on.set()
        assert lent(backend, 0, 128 * KIB) is not None


@pytest.mark.parametrize("size", ["1G", "0"])
async def test_nothing_at_the_end_is_nothing_to_do(tmp_path: Path, size: str) -> None:
    """Where the disk ends with its last table, there is no table for what comes behind."""
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, size)
    async with opened(image) as backend:
        assert await backend.read(backend.length, 0) == b""
        await backend.write(backend.length, b"")
        await backend.read_into(backend.length, memoryview(bytearray()))
        await backend.write_zeroes(backend.length, 0)
    assert_clean(image)
