"""What every driver promises, see ``block/model/driver.py``; their disks are in :mod:`tests.contract.samples`."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.reopen import reopen
from fusedisk.block.image.create import create_image
from fusedisk.block.image.information import image_information
from fusedisk.block.image.mapping import map_entries
from fusedisk.block.model.extent import DATA, SPECIAL, UNALLOCATED, ZERO
from fusedisk.core.errors import (
    FusediskError,
    HostError,
    LockConflictError,
    NotSupportedError,
    OptionError,
    ReadOnlyError,
)
from tests.block.conftest import assert_idle
from tests.contract.samples import ALL, SAMPLES, SIZE, Options, Sample
from tests.hostile.sentence import assert_sentence
from tests.support.filters import CONTRACT_DRIVERS
from tests.support.mounts import wait_until
from tests.support.oracle import random_bytes, random_range, random_request
from tests.support.registry import FORMAT_DRIVERS as DRIVERS

REMEMBERING = [name for name, sample in ALL.items() if sample.remembers]
STORING = [name for name, sample in ALL.items() if sample.storage]


class Disk:
    """A sample's disk: open it as often as needed, each time in a graph of its own."""

    def __init__(self, sample: Sample, options: Options) -> None:
        self.sample = sample
        self.options = options

    @contextlib.asynccontextmanager
    async def open(self, *, writable: bool = True, **more: Any) -> AsyncIterator[Backend]:
        """A backend on it; everything is closed and gone afterwards."""
        before = sorted(os.listdir("/proc/self/fd"))
        graph = Graph(CONTRACT_DRIVERS)
        writable = writable or self.sample.writes_always
        backend = await graph.open_backend({**self.options, **more}, name="disk", writable=writable)
        try:
            yield backend
            for node in graph.nodes.values():
                assert_idle(node)
        finally:
            with trio.CancelScope(shield=True):
                await graph.close()
        assert not graph.nodes
        assert sorted(os.listdir("/proc/self/fd")) == before, "file descriptors stay open"


@pytest.fixture
async def disk(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Disk]:
    sample = ALL[request.param]
    async with sample.make(tmp_path) as options:
        yield Disk(sample, options)


def every(*names: str) -> pytest.MarkDecorator:
    """Run a test for each of these samples; for all of them, without any."""
    chosen = [pytest.param(name, marks=[pytest.mark.root] if "host_device" in name else []) for name in names or ALL]
    return pytest.mark.parametrize("disk", chosen, indirect=True)


def test_every_driver_has_a_sample() -> None:
    missing = [name for name in DRIVERS.names if name not in SAMPLES]
    assert not missing, f"add a Sample to tests/contract/samples.py for: {', '.join(missing)}"
    assert not SAMPLES.keys() - set(DRIVERS.names)


@every()
async def test_declarations(disk: Disk) -> None:
    driver = CONTRACT_DRIVERS.load(disk.options["driver"])
    assert driver.name == disk.options["driver"]
    assert driver.__doc__
    assert not (driver.is_protocol and driver.is_filter)
    assert not driver.is_protocol or driver.moves_bytes
    assert not driver.supports_backing or not (driver.is_filter or driver.is_protocol)
    for name, field in driver.options_type.names().items():
        assert field.metadata.get("help"), f"the option {name} has no help"
    for prefix in driver.prefixes:
        assert CONTRACT_DRIVERS.by_prefix(prefix) is driver


@every()
async def test_opens_with_the_length_it_has(disk: Disk) -> None:
    for writable in (False, True, False):
        async with disk.open(writable=writable) as backend:
            assert backend.length == SIZE
            assert await backend.node.driver.length() == SIZE
            assert backend.writable is (writable or disk.sample.writes_always)
            limits = backend.node.limits
            assert limits.request_alignment & (limits.request_alignment - 1) == 0
            assert limits.max_transfer % limits.request_alignment == 0
            assert limits.max_transfer >= 4096
            assert isinstance(backend.node.driver.has_zero_init(), bool)


@every()
async def test_new_disks_read_as_zeroes(disk: Disk) -> None:
    async with disk.open(writable=False) as backend:
        assert await backend.read(0, SIZE) == bytes(SIZE)


@every(*REMEMBERING)
async def test_random_requests(disk: Disk) -> None:
    """Of any alignment and length; also after it was closed."""
    rng = random.Random(7)
    oracle = bytearray(SIZE)
    async with disk.open(discard="unmap") as backend:
        for _ in range(120):
            await random_request(rng, backend, oracle, 200_000)
            if rng.random() < 0.2:
                await _discard(rng, backend, oracle)
        await backend.flush()
        assert await backend.read(0, SIZE) == oracle
    async with disk.open(writable=False) as backend:
        assert await backend.read(0, SIZE) == oracle


async def _discard(rng: random.Random, backend: Backend, oracle: bytearray) -> None:
    """What is discarded reads as zeroes or as before."""
    offset, length = random_range(rng, len(oracle), 300_000)
    await backend.discard(offset, length)
    found = await backend.read(offset, length)
    for position, value in enumerate(found, offset):
        assert value in (0, oracle[position])
    oracle[offset : offset + length] = found


@every(*REMEMBERING)
async def test_requests_at_the_same_time(disk: Disk) -> None:
    """Each task works in its own part; parts share blocks and clusters at their borders."""
    oracle = bytearray(SIZE)
    part = 100_003

    async def work(backend: Backend, index: int) -> None:
        rng = random.Random(index)
        for _ in range(20):
            start, length = random_range(rng, part, 40_000)
            offset, content = index * part + start, random_bytes(rng, length)
            if rng.random() < 0.3:
                content = bytes(length)
                await backend.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
            else:
                await backend.write(offset, content)
            oracle[offset : offset + length] = content
            assert await backend.read(offset, length) == content

    async with disk.open(discard="unmap") as backend, trio.open_nursery() as nursery:
        for index in range(10):
            nursery.start_soon(work, backend, index)
    async with disk.open(writable=False) as backend:
        assert await backend.read(0, SIZE) == oracle


@every()
async def test_map_covers_the_disk(disk: Disk) -> None:
    rng = random.Random(3)
    async with disk.open(discard="unmap") as backend:
        for _ in range(10):
            await backend.write(rng.randrange(SIZE - 5000), random_bytes(rng, 5000))
            await backend.write_zeroes(rng.randrange(SIZE // 65536) * 65536, 65536, may_unmap=True)
        content = await backend.read(0, SIZE)
        node = backend.node
        for asked in (SIZE, 65536, 4096):
            position = 0
            for _ in range(4 * SIZE // 512):
                if position >= SIZE:
                    break
                length = min(asked, SIZE - position)
                extent = await node.driver.map(position, length)
                assert 0 < extent.length <= length
                assert extent.status in (DATA, ZERO, UNALLOCATED, SPECIAL)
                assert extent.status != DATA or extent.child is not None or node.driver.is_protocol
                assert extent.child is None or extent.child in node.children.values()
                status = await backend.block_status(position, length)
                assert 0 < status.length <= length
                if status.zero and disk.sample.remembers:
                    assert content[position : position + status.length] == bytes(status.length)
                position += extent.length
            assert position == SIZE, "the answers do not cover the disk in a reasonable number of steps"


@every()
async def test_zeroes_without_writing_or_a_refusal(disk: Disk) -> None:
    """NO_FALLBACK: done in the driver or NotSupportedError, and then nothing has changed."""
    from fusedisk.block.model.flags import NO_FALLBACK
    from fusedisk.block.request import io

    async with disk.open() as backend:
        await backend.write(0, b"x" * (2 << 20))
        try:
            await io.write_zeroes(backend.node, 0, 2 << 20, NO_FALLBACK)
        except NotSupportedError:
            expected = b"x" * (2 << 20)
        else:
            expected = bytes(2 << 20)
        assert not disk.sample.remembers or await backend.read(0, 2 << 20) == expected


@every()
async def test_read_only_means_read_only(disk: Disk, tmp_path: Path) -> None:
    def prints() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}

    if disk.sample.writes_always:
        graph = Graph(CONTRACT_DRIVERS)
        with pytest.raises(ReadOnlyError) as refused:
            await graph.open_backend(disk.options)
        assert_sentence(refused.value)
        assert not graph.nodes
        return
    before = prints()
    async with disk.open(writable=False) as backend:
        await backend.read(0, SIZE)
        for request in (
            lambda: backend.write(0, b"x"),
            lambda: backend.write_zeroes(0, 512),
            lambda: backend.discard(0, 512),
            lambda: backend.truncate(SIZE + 512),
        ):
            with pytest.raises(ReadOnlyError) as caught:
                await request()
            assert_sentence(caught.value)
            assert caught.value.errno == errno.EROFS
        await backend.flush()
    assert prints() == before


@every()
async def test_growing(disk: Disk) -> None:
    async with disk.open() as backend:
        await backend.write(SIZE - 512, b"x" * 512)
        if not disk.sample.grows:
            with pytest.raises(NotSupportedError) as caught:
                await backend.truncate(2 * SIZE)
            assert_sentence(caught.value)
            assert backend.length == SIZE
            return
        await backend.truncate(2 * SIZE)
        assert backend.length == 2 * SIZE
        if disk.sample.remembers:
            assert await backend.read(SIZE - 512, 1024) == b"x" * 512 + bytes(512)
            assert await backend.read(SIZE, SIZE) == bytes(SIZE)
            await backend.write(2 * SIZE - 3, b"end")
            assert await backend.read(2 * SIZE - 4, 4) == b"\0end"
    if disk.sample.remembers:
        async with disk.open(writable=False) as backend:
            assert backend.length == 2 * SIZE
            assert await backend.read(2 * SIZE - 4, 4) == b"\0end"


@every()
async def test_shrinking(disk: Disk) -> None:
    async with disk.open() as backend:
        await backend.write(0, b"x" * SIZE)
        if not disk.sample.shrinks:
            with pytest.raises(NotSupportedError) as caught:
                await backend.truncate(SIZE // 2)
            assert_sentence(caught.value)
            assert backend.length == SIZE
            assert await backend.read(SIZE - 512, 512) == b"x" * 512
            return
        await backend.truncate(SIZE // 2)
        assert backend.length == SIZE // 2
        await backend.truncate(SIZE)
        if disk.sample.remembers:
            assert await backend.read(0, SIZE) == b"x" * (SIZE // 2) + bytes(SIZE // 2)


@every()
async def test_information(disk: Disk) -> None:
    async with disk.open(writable=False) as backend:
        information = json.loads(json.dumps(await image_information(backend.node)))
    assert information["virtual-size"] == SIZE
    assert information["format"] == disk.options["driver"]
    assert information["filename"]
    if "actual-size" in information:
        assert information["actual-size"] >= 0
    if "format-specific" in information:
        assert information["format-specific"]["type"] == disk.options["driver"]


@every()
async def test_its_name_opens_it_again(disk: Disk) -> None:
    """Printed, opened, printed again: the same name, the same drivers, the same bytes."""
    async with disk.open() as backend:
        await backend.write(1000, b"name")
        name = backend.node.printable_name
        options = backend.node.full_options()
    assert options["driver"] == disk.options["driver"]
    graph = Graph(CONTRACT_DRIVERS)
    again = await graph.open_backend(name, writable=disk.sample.writes_always)
    assert again.node.driver.name == disk.options["driver"]
    assert again.node.printable_name == name
    assert not disk.sample.remembers or await again.read(1000, 4) == b"name"
    await graph.close()


@every(*(name for name, sample in ALL.items() if sample.plain_name))
async def test_created_images_are_probed(disk: Disk) -> None:
    path = disk.options["file"]["filename"]
    graph = Graph(CONTRACT_DRIVERS)
    backend = await graph.open_backend(path)
    assert backend.node.driver.name == disk.options["driver"]
    assert backend.node.printable_name == path
    assert backend.length == SIZE
    await graph.close()


@every()
async def test_reopening(disk: Disk) -> None:
    """Read-only and back, in place; a setting that cannot be refused changes nothing."""
    if disk.sample.writes_always:
        return
    graph = Graph(CONTRACT_DRIVERS)
    backend = await graph.open_backend({**disk.options, "node-name": "n"}, writable=False)
    node = backend.node
    await reopen(graph, {node: {"read-only": False}})
    assert not node.config.read_only
    writer = graph.attach(node, "writer", writable=True)
    await writer.write(512, b"reopened")
    with pytest.raises(FusediskError) as caught:
        await reopen(graph, {node: {"read-only": True}})
    assert_sentence(caught.value)
    assert not node.config.read_only
    await writer.write(0, b"x")
    with pytest.raises(OptionError, match="has no option 'nonsense'"):
        await reopen(graph, {node: {"nonsense": 1}})
    await writer.close()
    await reopen(graph, {node: {"read-only": True}})
    assert node.config.read_only
    assert not disk.sample.remembers or await backend.read(512, 8) == b"reopened"
    await graph.close()


@every()
async def test_unknown_options_are_refused(disk: Disk) -> None:
    graph = Graph(CONTRACT_DRIVERS)
    with pytest.raises(OptionError, match="has no option 'nonsense'") as caught:
        await graph.open_backend({**disk.options, "nonsense": 1}, writable=True)
    assert_sentence(caught.value, disk.options["driver"])
    assert not graph.nodes


@every(*(name for name, sample in ALL.items() if sample.locked))
async def test_a_second_writer_is_refused(disk: Disk) -> None:
    async with disk.open() as backend:
        graph = Graph(CONTRACT_DRIVERS)
        with pytest.raises(LockConflictError) as caught:
            await graph.open_backend(disk.options, writable=True)
        assert_sentence(caught.value)
        assert not graph.nodes
        await backend.write(0, b"x")


@every(*STORING)
@pytest.mark.parametrize("iotype", ["read", "write", "write-zeroes", "discard", "flush"])
async def test_errors_of_the_storage_come_through(disk: Disk, iotype: str) -> None:
    """As one of ours, with the host's errno; the next request works."""
    assert disk.sample.storage is not None
    rule = {"event": "none", "errno": errno.ENOSPC if iotype == "write" else errno.EIO, "iotype": iotype, "once": True}
    storage = disk.options[disk.sample.storage]
    first, *others = storage if isinstance(storage, list) else [storage]
    broken: Any = {"driver": "blkdebug", "image": first, "inject-error": [rule]}
    if isinstance(storage, list):
        broken = [broken, *others]
    before = sorted(os.listdir("/proc/self/fd"))
    graph = Graph(CONTRACT_DRIVERS)
    errors: list[FusediskError] = []
    while True:
        try:
            backend = await graph.open_backend(
                {**disk.options, disk.sample.storage: broken, "discard": "unmap"}, writable=True
            )
        except FusediskError as exc:
            # It was needed for opening; without the fault it opens.
            errors.append(exc)
            assert not graph.nodes
            broken = storage
            continue
        break
    content = b"x" * 70_000
    for request in (
        lambda: backend.write(0, content),
        lambda: backend.read(0, len(content)),
        lambda: backend.write_zeroes(1 << 20, 1 << 20, may_unmap=True),
        lambda: backend.discard(2 << 20, 1 << 20),
        backend.flush,
    ):
        try:
            await request()
        except FusediskError as exc:
            errors.append(exc)
    for error in errors:
        assert_sentence(error)
        assert isinstance(error, HostError) or error.errno == rule["errno"]
    assert len(errors) <= 1
    for node in graph.nodes.values():
        assert_idle(node)
    await backend.write(0, content)
    await backend.flush()
    assert not disk.sample.remembers or await backend.read(0, len(content)) == content
    await graph.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


@every()
async def test_requests_may_be_cancelled(disk: Disk) -> None:
    """At any moment: the node goes on, and holds for each byte the old or the new."""
    async with disk.open(discard="unmap") as backend:
        await backend.write(0, b"o" * 300_000)
        for delay in range(12):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(backend.write, 1000, b"n" * 200_000)
                nursery.start_soon(backend.write_zeroes, 210_000, 70_000)
                for _ in range(delay):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            for node in backend.graph.nodes.values():
                assert_idle(node)
        content = await backend.read(0, 300_000)
        if disk.sample.remembers:
            assert set(content[1000:201_000]) <= set(b"on")
            assert set(content[210_000:280_000]) <= set(b"o\0")
            assert content[:1000] == b"o" * 1000
        await backend.write(0, b"z" * 300_000)
        assert not disk.sample.remembers or await backend.read(0, 300_000) == b"z" * 300_000


@every()
async def test_opening_may_be_cancelled(disk: Disk) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for delay in range(8):
        graph = Graph(CONTRACT_DRIVERS)
        async with trio.open_nursery() as nursery:

            async def work(graph: Graph = graph) -> None:
                backend = await graph.open_backend(disk.options, writable=True)
                await backend.close()

            nursery.start_soon(work)
            for _ in range(delay):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        for backend in list(graph._backends.values()):
            await backend.close()
        assert not graph.nodes
        # A file that is opened too late is closed in its thread.
        await trio.to_thread.run_sync(
            wait_until, lambda: sorted(os.listdir("/proc/self/fd")) == before, "all descriptors are closed"
        )


@pytest.mark.parametrize("name", [name for name in DRIVERS.names if DRIVERS.load(name).create_options_type is None])
async def test_what_cannot_be_created_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises((NotSupportedError, OptionError)) as caught:
        await create_image(DRIVERS, name, str(tmp_path / "new"), {"size": SIZE})
    assert_sentence(caught.value, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in DRIVERS.names if DRIVERS.load(name).create_options_type is not None])
async def test_what_can_be_created_refuses_nonsense(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        await create_image(DRIVERS, name, str(tmp_path / "new"), {"size": SIZE, "nonsense": 1})
    assert_sentence(caught.value, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.root] if name == "host_device" else []) for name in SAMPLES]
)
async def test_a_bare_filter_behaves_as_what_is_below(name: str, tmp_path: Path) -> None:
    """The same requests, once without and once with the filter: the same answers, space and refusals."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "filtered").mkdir()
    async with ALL[name].make(tmp_path / "plain") as plain, ALL[f"bare {name}"].make(tmp_path / "filtered") as filtered:
        async with Disk(ALL[name], plain).open(discard="unmap") as backend:
            expected = [answer async for answer in _answers(backend)]
        async with Disk(ALL[name], filtered).open(discard="unmap") as backend:
            found = [answer async for answer in _answers(backend)]
    assert [answer for answer, _ in found] == [answer for answer, _ in expected]
    # The host's file system decides when it gives blocks to written pages.
    assert all(abs(one - other) <= 64 << 10 for (_, one), (_, other) in zip(found, expected, strict=True))


async def _answers(backend: Backend) -> AsyncIterator[tuple[object, int]]:
    """Make requests of each kind; tell after each how it ended, the length, the map, and the space on the host."""
    rng = random.Random(11)
    kib = 1 << 10
    for _ in range(40):
        kind = rng.choice(
            ("write", "write", "zero", "unmap", "discard", "preallocate", "truncate", "compress", "flush")
        )
        offset, length = random_range(rng, backend.length, 400 * kib)
        if rng.random() < 0.5:
            offset, length = offset // (64 * kib) * 64 * kib, 64 * kib
        length = min(length, backend.length - offset)
        try:
            if kind == "write":
                await backend.write(offset, random_bytes(rng, length))
            elif kind in ("zero", "unmap"):
                await backend.write_zeroes(offset, length, may_unmap=kind == "unmap")
            elif kind == "discard":
                await backend.discard(offset, length)
            elif kind == "preallocate":
                await backend.preallocate(offset, length)
            elif kind == "truncate":
                await backend.truncate(rng.randrange(SIZE // 2, SIZE) // 512 * 512)
            elif kind == "compress":
                await backend.write_compressed(offset, bytes(length))
            else:
                await backend.flush()
            outcome: object = "done"
        except FusediskError as exc:
            outcome = type(exc)
        entries = [entry._replace(filename=None) async for entry in map_entries(backend)]
        size = await backend.node.driver.allocated_size()
        content = await backend.read(0, backend.length)
        yield (kind, offset, length, outcome, backend.length, entries, content), size or 0
