"""An export without FUSE: ends of the disk, growth, times, flushes, attributes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import HostError, NoSpaceError, NotSupportedError, ReadOnlyError
from fusedisk.drivers.protocol.host_file import Pace
from fusedisk.drivers.table import DRIVERS
from fusedisk.export.export import Export, FileSettings
from tests.support.memory import Store
from tests.support.opening import memory_backend
from tests.support.registry import TEST_DRIVERS

OLD = 1_500_000_000_123_456_789


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    """A graph of real drivers."""
    graph = Graph(DRIVERS)
    yield graph
    await graph.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 10,000 bytes from long ago."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"abcdefghij" * 1000)
    os.utime(path, ns=(OLD, OLD))
    return path


async def open_export(
    graph: Graph, image: Path, settings: FileSettings | None = None, *, writable: bool = True
) -> Export:
    backend = await graph.open_backend(str(image), writable=writable, format="raw")
    return await Export.open(backend, "disk", 77, settings)


async def test_reads_end_at_the_end(graph: Graph, image: Path) -> None:
    export = await open_export(graph, image, writable=False)
    assert await export.read(9_990, 100) == b"abcdefghij"
    assert await export.read(10_000, 1) == b""
    assert await export.read(20_000, 1) == b""
    assert await export.read(0, 0) == b""


async def test_writes_end_at_the_end(graph: Graph, image: Path) -> None:
    export = await open_export(graph, image)
    assert await export.write(9_995, b"0123456789") == 5
    for offset in (10_000, 1 << 40):
        with pytest.raises(NoSpaceError, match="does not grow") as caught:
            await export.write(offset, b"x")
        assert caught.value.errno == errno.ENOSPC
    assert image.read_bytes()[9_990:] == b"abcde01234"


async def test_a_growable_export_grows(graph: Graph, image: Path) -> None:
    export = await open_export(graph, image, FileSettings(growable=True))
    assert await export.write(10_010, b"far") == 3
    assert (await export.attributes()).size == 10_013
    assert await export.read(9_999, 100) == b"j" + bytes(10) + b"far"


async def test_an_append_to_a_file_takes_no_task(graph: Graph, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a thread, unless the host is slow."""
    export = await open_export(graph, image, FileSettings(growable=True))
    assert export.write_now(9_998, memoryview(b"0123456789"))
    assert export.write_now(20_000, memoryview(b"end"))
    assert export.length == image.stat().st_size == 20_003
    assert await export.read(9_996, 14) == b"gh0123456789\0\0"
    monkeypatch.setattr(Pace, "is_quick", lambda *_: False)
    assert not export.write_now(20_003, memoryview(b"more"))
    assert await export.write(20_003, b"more") == 4
    assert export.length == image.stat().st_size == 20_007
    image.with_name("fixed").write_bytes(b"short")
    fixed = await open_export(graph, image.with_name("fixed"), FileSettings())
    assert not fixed.write_now(5, memoryview(b"past"))


async def test_a_read_only_export_takes_nothing(graph: Graph, image: Path) -> None:
    export = await open_export(graph, image, FileSettings(mode=0o666, growable=True), writable=False)
    for call in (export.write(0, b"x"), export.truncate(5)):
        with pytest.raises(ReadOnlyError):
            await call
    assert (await export.attributes()).mode == stat.S_IFREG | 0o444
    export.set_mode(0o7777)
    assert (await export.attributes()).mode == stat.S_IFREG | 0o555


async def test_truncate_asks_the_node_only_for_another_size(graph: Graph, image: Path) -> None:
    backend = await graph.open_backend({"driver": "raw", "file.filename": str(image), "size": 4096}, writable=True)
    export = await Export.open(backend, "disk", 77)
    await export.truncate(4096)
    with pytest.raises(NotSupportedError):
        await export.truncate(8192)


async def test_times_are_the_images_until_the_guest_writes(graph: Graph, image: Path) -> None:
    export = await open_export(graph, image)
    found = await export.attributes()
    assert (found.mtime_ns, found.ctime_ns) == (OLD, OLD)
    await export.read(0, 100)
    await export.flush()
    assert (await export.attributes()).mtime_ns == OLD
    await export.write(0, b"x")
    found = await export.attributes()
    assert found.mtime_ns == found.ctime_ns == image.stat().st_mtime_ns > OLD


async def test_times_are_the_newest_of_the_chain(graph: Graph, tmp_path: Path, image: Path) -> None:
    from tests.support.images import make_qcow2

    top = make_qcow2(tmp_path / "top.qcow2", 10_240, backing=image)
    os.utime(top, ns=(OLD - 5, OLD - 5))
    backend = await graph.open_backend(str(top))
    assert (await (await Export.open(backend, "top", 77)).attributes()).mtime_ns == OLD


async def test_other_changes_of_the_image_do_not_show(graph: Graph, image: Path) -> None:
    """Copy-on-read and the like write to the image, but not for the guest."""
    export = await open_export(graph, image)
    os.utime(image)
    assert (await export.attributes()).mtime_ns == OLD


async def test_set_times_hold_until_the_next_write(graph: Graph, image: Path) -> None:
    export = await open_export(graph, image)
    await export.write(0, b"x")
    export.set_mtime(12345)
    found = await export.attributes()
    assert found.mtime_ns == 12345
    assert found.ctime_ns > OLD
    await export.write(0, b"x")
    assert (await export.attributes()).mtime_ns == image.stat().st_mtime_ns


async def test_a_file_without_a_name_goes_by_our_clock(graph: Graph, image: Path) -> None:
    backend = await graph.open_backend(str(image), writable=True, format="raw")
    image.unlink()
    export = await Export.open(backend, "disk", 77)
    before = (await export.attributes()).mtime_ns
    await export.write(0, b"x")
    after = (await export.attributes()).mtime_ns
    assert before < after
    assert (await export.attributes()).mtime_ns == after


async def test_who_has_seen_times_is_told_when_a_flush_moves_them(graph: Graph, image: Path) -> None:
    export = await open_export(graph, image)
    told: list[bool] = []
    export.on_change = told.append
    await export.write(0, b"x")
    await export.flush()  # nobody has asked since the write
    assert told == []
    await export.write(0, b"y")
    await export.attributes()
    os.utime(image, ns=(OLD, OLD + 10**18))  # as if the flush had written metadata
    await export.flush()
    assert told == [False]
    assert (await export.attributes()).mtime_ns == OLD + 10**18
    await export.flush()
    assert told == [False]


async def test_a_resize_from_elsewhere_is_told_and_our_own_is_not(graph: Graph, image: Path) -> None:
    export = await open_export(graph, image)
    told: list[bool] = []
    export.on_change = told.append
    await export.truncate(20_000)
    assert told == []
    await export.backend.truncate(30_000)
    assert told == [True]
    assert (await export.attributes()).size == 30_000


async def test_a_failed_flush_is_tried_again() -> None:
    store = Store(4096)
    async with memory_backend(Graph(TEST_DRIVERS), store) as backend:
        export = await Export.open(backend, "disk", 77)
        await export.write(0, b"x" * 512)
        store.steps.fail("flush", HostError("no"))
        with pytest.raises(HostError):
            await export.flush()
        await export.flush()
        assert store.durable[:512] == b"x" * 512


async def test_allocation_is_honest(graph: Graph, tmp_path: Path) -> None:
    image = tmp_path / "sparse.img"
    with image.open("wb") as file:
        file.seek(1 << 30)
        file.write(b"x")
    export = await open_export(graph, image)
    found = await export.attributes()
    assert 0 < found.blocks * 512 < 1 << 20
    assert found.size == (1 << 30) + 1
    assert found.block_size == 4096


async def test_owner_and_mode(graph: Graph, image: Path) -> None:
    export = await open_export(graph, image, FileSettings(mode=0o640, uid=12, gid=34))
    found = await export.attributes()
    assert (found.uid, found.gid, stat.S_IMODE(found.mode)) == (12, 34, 0o640)
    export.set_owner(None, 56)
    export.set_mode(0o4755)
    found = await export.attributes()
    assert (found.uid, found.gid, stat.S_IMODE(found.mode)) == (12, 56, 0o755)
    assert found.mtime_ns == OLD < found.ctime_ns


async def test_xattrs_tell_the_chain_without_filters(graph: Graph, image: Path) -> None:
    options = {"driver": "copy-on-read", "file": {"driver": "raw", "file": {"driver": "file", "filename": str(image)}}}
    backend = await graph.open_backend(options, writable=True)
    export = await Export.open(backend, "disk", 77)
    found = await export.xattrs()
    assert found["user.fusedisk.chain"] == str(image)
    assert found["user.fusedisk.format"] == "raw"
    assert export.chain_files() == [str(image)]
