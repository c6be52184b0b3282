"""The channel between a kernel and a libfuse that are both sockets of ours."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from fusedisk.block.graph.graph import Graph
from fusedisk.block.request import background
from fusedisk.block.request.immediate import Pieces
from fusedisk.core.errors import HostError, NoSpaceError
from fusedisk.drivers.table import DRIVERS
from fusedisk.export.registry import Registry
from fusedisk.mount import channel, scheduling, wire
from fusedisk.mount.channel import Channel
from fusedisk.mount.handles import Handle, Handles
from fusedisk.mount.reply_pipe import LEAST
from fusedisk.mount.requesters import is_dying
from fusedisk.mount.settings import Passthrough
from fusedisk.mount.splicing import Spliced

LENGTH = 1 << 20
CONTENT = bytes(index * 7 % 251 for index in range(4096)) * (LENGTH // 4096)


class Disk:
    """A file that answers at once unless it is told to hold, or to break."""

    name = "disk"
    writable = True
    growable = shared_views = immutable = exchanging = False

    def __init__(self) -> None:
        self.content = bytearray(CONTENT)
        self.cached = True
        self.bug: Exception | None = None
        self.writes = 0
        self.lent = 0
        self.pieces = False
        self.held = 0
        self.most_held = 0
        self.kept: list[tuple[int, int]] = []
        self.dropped: list[tuple[int, int]] = []
        self.go_on = trio.Event()
        self._one_more = trio.Event()

    async def until_held(self, count: int) -> None:
        """Wait until so many requests wait."""
        while self.held < count:
            await self._one_more.wait()

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        if self.bug is not None:
            raise self.bug
        if not self.cached or offset + len(buffer) > LENGTH:
            return False
        buffer[:] = self.content[offset : offset + len(buffer)]
        return True

    def count_lent(self, length: int) -> None:
        self.lent += length

    def lend_now(self, offset: int, length: int) -> Pieces | None:
        if not self.pieces or offset + length > LENGTH:
            return None
        half = offset + length // 2
        view = memoryview(CONTENT)
        return Pieces((view[offset:half], view[half : offset + length]))

    def write_now(self, offset: int, data: memoryview) -> bool:
        if self.bug is not None:
            raise self.bug
        if not self.cached or offset + len(data) > LENGTH:
            return False
        self.writes += 1
        self.content[offset : offset + len(data)] = data
        return True

    def keep(self, offset: int, length: int) -> None:
        self.kept.append((offset, length))

    async def drop_kept(self, offset: int, length: int) -> None:
        self.dropped.append((offset, length))

    async def _wait(self) -> None:
        if self.cached:
            return
        self.held += 1
        self.most_held = max(self.held, self.most_held)
        self._one_more.set()
        self._one_more = trio.Event()
        try:
            await self.go_on.wait()
        finally:
            self.held -= 1

    async def read_into(self, offset: int, buffer: memoryview) -> int:
        await self._wait()
        length = max(0, min(len(buffer), LENGTH - offset))
        buffer[:length] = self.content[offset : offset + length]
        return length

    async def write(self, offset: int, data: memoryview) -> int:
        await self._wait()
        if offset >= LENGTH:
            raise NoSpaceError("the disk ends there")
        data = data[: LENGTH - offset]
        self.content[offset : offset + len(data)] = data
        return len(data)

    async def flush(self) -> None:
        await self._wait()


class Kernel:
    """Sends requests and takes replies, as ``/dev/fuse`` does."""

    def __init__(self, end: socket.socket) -> None:
        self._end = trio.socket.from_stdlib_socket(end)
        self._unique = 0
        self.thread = 0
        """Who sends requests."""

    def _message(self, opcode: int, body: bytes, length: int | None = None) -> bytes:
        self._unique += 2
        size = wire.IN_HEADER.size + len(body)
        header = wire.IN_HEADER.pack(
            size if length is None else length, opcode, self._unique, 7, 0, 0, self.thread, 0, 0
        )
        return header + body

    async def send(self, opcode: int, body: bytes = b"", *, length: int | None = None) -> int:
        await self._end.send(self._message(opcode, body, length))
        return self._unique

    def push_write(self, offset: int, data: bytes) -> None:
        """Send a write while nothing else can happen."""
        os.write(
            self._end.fileno(), self._message(wire.WRITE, wire.WRITE_IN.pack(1, offset, len(data), 0, 0, 0, 0) + data)
        )

    async def read(self, offset: int, size: int, handle: int = 1, flags: int = 0) -> int:
        return await self.send(wire.READ, wire.READ_IN.pack(handle, offset, size, flags, 0, 0, 0))

    async def write(self, offset: int, data: bytes, *, claimed: int | None = None, flags: int = 0) -> int:
        size = len(data) if claimed is None else claimed
        return await self.send(wire.WRITE, wire.WRITE_IN.pack(1, offset, size, flags, 0, 0, 0) + data)

    async def raw(self, message: bytes) -> None:
        await self._end.send(message)

    async def reply(self) -> tuple[int, int, bytes]:
        """Unique, errno and body of the next reply."""
        with trio.fail_after(30):
            message = await self._end.recv(wire.MAX_WRITE + 4096)
        length, error, unique = wire.OUT_HEADER.unpack_from(message)
        assert length == len(message)
        return unique, -error, message[wire.OUT_HEADER.size :]


class Setup(SimpleNamespace):
    """What a test deals with."""

    kernel: Kernel
    library: trio.socket.SocketType
    disk: Disk
    channel: Channel
    ended: trio.Event


@contextlib.asynccontextmanager
async def serving(busy: Callable[[], None] | None = None, *, shared: bool = False) -> AsyncIterator[Setup]:
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    for end in (end for pair in pairs for end in pair):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    (kernel, device), (library, ours) = pairs
    disk, ended = Disk(), trio.Event()
    disk.shared_views = shared
    handle = Handle(disk, os.O_RDWR)  # type: ignore[arg-type]
    handles = Handles(Registry(Graph(DRIVERS)))
    handles.by_number[1] = handle
    operations: Any = SimpleNamespace(handles=handles, exports=[disk], maps_uncached=not shared)
    served = Channel(operations, Spliced(os.dup(device.fileno()), ours), Passthrough.OFF, ended.set, None, busy)
    device.close()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(served.run)
            far = trio.socket.from_stdlib_socket(library)
            yield Setup(kernel=Kernel(kernel), library=far, disk=disk, channel=served, ended=ended)
            nursery.cancel_scope.cancel()
        assert ended.is_set()
    finally:
        served.close()
        kernel.close()
        library.close()


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    async with serving() as found:
        yield found


@pytest.mark.parametrize("cached", [True, False])
async def test_reads_and_writes(setup: Setup, cached: bool) -> None:
    setup.disk.cached = cached
    setup.disk.go_on.set()
    unique = await setup.kernel.read(4000, 9000)
    assert await setup.kernel.reply() == (unique, 0, CONTENT[4000:13000])
    unique = await setup.kernel.write(100, b"x" * 5000)
    assert await setup.kernel.reply() == (unique, 0, wire.WRITE_OUT.pack(5000, 0))
    assert setup.disk.content[99:5101] == CONTENT[99:100] + b"x" * 5000 + CONTENT[5100:5101]


@pytest.mark.parametrize("cached", [True, False])
async def test_only_reads_into_the_page_cache_of_shared_bytes_are_noted(cached: bool) -> None:
    """Whichever way they are answered. A write that is not answered on the spot has pages dropped."""
    for shared in (True, False):
        async with serving(shared=shared) as setup:
            setup.disk.cached = cached
            setup.disk.go_on.set()
            for flags, offset in ((wire.READ_LOCKOWNER, 0), (0, 4096), (1, 8192), (wire.READ_LOCKOWNER | 1, 12288)):
                await setup.kernel.read(offset, 4096, flags=flags)
                await setup.kernel.reply()
            assert setup.disk.kept == ([(4096, 4096), (8192, 4096)] if shared else [])
            await setup.kernel.write(5, b"write")
            await setup.kernel.reply()
            await setup.kernel.write(LENGTH, b"past the end")
            assert (await setup.kernel.reply())[1] == errno.ENOSPC
            assert setup.disk.dropped == ([(LENGTH, 12)] if cached else [(5, 5), (LENGTH, 12)])


async def test_large_reads_of_what_is_in_memory_are_not_copied(setup: Setup) -> None:
    setup.disk.pieces, setup.disk.cached = True, False
    unique = await setup.kernel.read(5, LEAST)
    assert await setup.kernel.reply() == (unique, 0, CONTENT[5 : 5 + LEAST])
    assert setup.disk.lent == LEAST
    setup.disk.pieces, setup.disk.cached = False, True
    unique = await setup.kernel.read(5, LEAST)
    assert await setup.kernel.reply() == (unique, 0, CONTENT[5 : 5 + LEAST])


async def test_requests_at_the_end_are_short(setup: Setup) -> None:
    unique = await setup.kernel.read(LENGTH - 10, 4096)
    assert await setup.kernel.reply() == (unique, 0, CONTENT[-10:])
    unique = await setup.kernel.read(LENGTH, 4096)
    assert await setup.kernel.reply() == (unique, 0, b"")
    unique = await setup.kernel.write(LENGTH - 10, b"y" * 20)
    assert await setup.kernel.reply() == (unique, 0, wire.WRITE_OUT.pack(10, 0))
    unique = await setup.kernel.write(LENGTH, b"y")
    assert await setup.kernel.reply() == (unique, errno.ENOSPC, b"")


async def test_a_page_written_back_while_the_medium_is_exchanged_is_refused(setup: Setup) -> None:
    """It may hold bytes of the old one. What a program writes is its own."""
    setup.disk.cached = False
    setup.disk.exchanging = True
    setup.disk.go_on.set()
    unique = await setup.kernel.write(4096, b"o" * 4096, flags=wire.WRITE_CACHE)
    assert await setup.kernel.reply() == (unique, errno.EIO, b"")
    assert bytes(setup.disk.content) == CONTENT
    unique = await setup.kernel.write(4096, b"n" * 4096)
    assert await setup.kernel.reply() == (unique, 0, wire.WRITE_OUT.pack(4096, 0))


async def test_a_request_that_waits_holds_up_no_other(setup: Setup) -> None:
    setup.disk.cached = False
    waiting = {await setup.kernel.read(0, 4096), await setup.kernel.write(8192, b"z" * 4096)}
    await setup.disk.until_held(2)
    setup.disk.cached = True
    for offset in range(0, LENGTH, 65536):
        unique = await setup.kernel.read(offset, 512)
        assert (await setup.kernel.reply())[0] == unique
    setup.disk.go_on.set()
    assert {(await setup.kernel.reply())[0], (await setup.kernel.reply())[0]} == waiting
    assert setup.disk.content[8192:12288] == b"z" * 4096


@pytest.mark.parametrize(("tick", "most"), [(0.0, 64), (100e-6, 10)])
async def test_work_in_the_background_gets_its_turn(monkeypatch: pytest.MonkeyPatch, tick: float, most: int) -> None:
    """However many requests are there that can be answered at once, and however long each of them takes."""
    monkeypatch.setattr(background, "running", lambda: 1)
    ticks = itertools.count()
    monkeypatch.setattr(channel, "perf_counter", lambda: tick * next(ticks))
    async with serving() as setup:
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(200):
            setup.kernel.push_write(0, bytes(4096))
        answered = [0]
        while answered[-1] < 200:
            await trio.lowlevel.checkpoint()
            answered.append(setup.disk.writes)
    # One or two turns, as the event loop does not keep an order.
    assert most <= max(later - earlier for earlier, later in itertools.pairwise(answered)) <= 2 * most + 2


async def test_other_work_gets_its_turn_between_naps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two milliseconds of naps in which requests come, and then a turn of the loop, but no wait in it: the next
    request comes in the nap that follows. Nobody else sends any here."""
    ticks = itertools.count()
    monkeypatch.setattr(channel, "perf_counter", lambda: 100e-6 * next(ticks))
    polling = SimpleNamespace(should_nap=True, spin_until=0.0, answered=lambda *_: None, woke=lambda *_: None)
    polling.overslept = lambda: setattr(polling, "should_nap", False)
    monkeypatch.setattr(channel, "Polling", lambda **_: polling)
    naps = 0

    def nap(_: object) -> bool:
        nonlocal naps
        naps += 1
        if 1 < naps <= 200:
            setup.kernel.push_write(0, bytes(4096))
        return naps <= 200

    monkeypatch.setattr(channel.Nap, "sleep", nap)
    busy: list[int] = []
    async with serving(lambda: busy.append(setup.disk.writes)) as setup:
        await setup.kernel.write(0, bytes(4096))
        answered = [0]
        with trio.fail_after(30):
            while polling.should_nap:
                await trio.lowlevel.checkpoint()
                answered.append(setup.disk.writes)
    assert naps == 201
    assert setup.disk.writes == 200
    assert 18 <= max(later - earlier for earlier, later in itertools.pairwise(answered)) <= 42
    assert all(later - earlier <= 22 for earlier, later in itertools.pairwise((0, *busy, 200)))


async def test_who_waits_for_a_disk_is_busy_if_requests_come_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(channel, "perf_counter", lambda: 1e-6 * next(ticks))
    told: list[bool] = []
    async with serving(lambda: told.append(True)) as setup:
        setup.disk.cached = False
        setup.disk.go_on.set()
        for _ in range(5):
            unique = await setup.kernel.read(0, 512)
            assert (await setup.kernel.reply())[0] == unique
    assert told


async def test_requests_in_flight_are_bounded(setup: Setup) -> None:
    """What is beyond waits where it came from, and is answered in the end."""
    setup.disk.cached = False
    sent = [await setup.kernel.read(512 * index, 512) for index in range(3 * scheduling.MOST_TASKS)]
    await setup.disk.until_held(scheduling.MOST_TASKS)
    await trio.testing.wait_all_tasks_blocked()
    assert setup.disk.most_held == scheduling.MOST_TASKS
    setup.disk.go_on.set()
    answered = {}
    for _ in sent:
        unique, error, body = await setup.kernel.reply()
        assert not error
        answered[unique] = body
    assert [answered[unique] for unique in sent] == [CONTENT[512 * index :][:512] for index in range(len(sent))]


async def test_bytes_in_flight_are_bounded(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "MOST_BYTES", 8 * 16384)
    setup.disk.cached = False
    sent = [await setup.kernel.read(0, 16384) for _ in range(16)]
    await setup.disk.until_held(8)
    await trio.testing.wait_all_tasks_blocked()
    assert setup.disk.most_held == 8
    setup.disk.go_on.set()
    assert {(await setup.kernel.reply())[0] for _ in sent} == set(sent)


async def test_an_interrupted_read_ends(setup: Setup) -> None:
    setup.disk.cached = False
    read, write = await setup.kernel.read(0, 512), await setup.kernel.write(0, b"w" * 512)
    await setup.disk.until_held(2)
    for unique in (read, write, 4711):
        await setup.kernel.send(wire.INTERRUPT, wire.INTERRUPT_IN.pack(unique))
    assert await setup.kernel.reply() == (read, errno.EINTR, b"")
    setup.disk.go_on.set()
    # A write is not cut short: half of one would be worse than waiting for it.
    assert await setup.kernel.reply() == (write, 0, wire.WRITE_OUT.pack(512, 0))


async def test_a_signal_that_its_reader_survives_ends_no_read(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A timer would keep a reader from ever getting anything. Once it is killed its read ends."""
    dying: set[int] = set()
    monkeypatch.setattr(channel, "is_dying", dying.__contains__)
    setup.disk.cached = False
    sent = []
    for setup.kernel.thread in (1, 2):
        sent.append(await setup.kernel.read(0, 512))
    await setup.disk.until_held(2)
    for unique in sent:
        await setup.kernel.send(wire.INTERRUPT, wire.INTERRUPT_IN.pack(unique))
    await trio.sleep(1)
    assert setup.disk.held == 2
    dying.add(1)
    assert await setup.kernel.reply() == (sent[0], errno.EINTR, b"")
    setup.disk.go_on.set()
    assert await setup.kernel.reply() == (sent[1], 0, CONTENT[:512])


async def test_a_search_for_holes_ends_only_with_who_wants_it(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    may_interrupt = setup.channel._may_interrupt
    monkeypatch.setattr(
        setup.channel, "_may_interrupt", lambda unique, thread: asked.append(thread) or may_interrupt(unique, thread)
    )
    setup.kernel.thread = 4711
    for opcode, body in ((wire.LSEEK, wire.LSEEK_IN), (wire.FALLOCATE, wire.FALLOCATE_IN)):
        await setup.kernel.send(opcode, body.pack(*[0] * len(body.unpack(bytes(body.size)))))
        await setup.kernel.reply()
    assert asked == [4711, 0]


async def test_who_is_dying() -> None:
    """Of a process in all states but one it is known that it does not."""
    assert not is_dying(threading.get_native_id())
    assert is_dying(2**30)


async def test_an_interrupt_that_comes_at_once(setup: Setup) -> None:
    """It may be read before the request's task has begun."""
    setup.disk.cached = False
    read = await setup.kernel.read(0, 512)
    await setup.kernel.send(wire.INTERRUPT, wire.INTERRUPT_IN.pack(read))
    assert await setup.kernel.reply() == (read, errno.EINTR, b"")


async def test_interrupts_are_heard_although_nothing_more_is_served(setup: Setup) -> None:
    setup.disk.cached = False
    sent = [await setup.kernel.read(512 * index, 512) for index in range(2 * scheduling.MOST_TASKS)]
    await setup.disk.until_held(scheduling.MOST_TASKS)
    served, parked = sent[0], sent[-1]
    for unique in (parked, served):
        await setup.kernel.send(wire.INTERRUPT, wire.INTERRUPT_IN.pack(unique))
        assert await setup.kernel.reply() == (unique, errno.EINTR, b"")
    setup.disk.go_on.set()
    assert {(await setup.kernel.reply())[0] for _ in sent[2:]} == set(sent[1:-1])


async def test_requests_that_are_known_of_are_bounded(setup: Setup) -> None:
    """The others stay where they are."""
    setup.disk.cached = False
    sent = [await setup.kernel.read(512 * index, 512) for index in range(scheduling.MOST_PLACES + 30)]
    await setup.disk.until_held(scheduling.MOST_TASKS)
    await trio.testing.wait_all_tasks_blocked()
    assert len(setup.channel._interruptible) == scheduling.MOST_PLACES
    setup.disk.go_on.set()
    assert {(await setup.kernel.reply())[0] for _ in sent} == set(sent)


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), KeyError("a bug"), OSError(errno.ESTALE, "a bug")])
async def test_a_bug_costs_one_request(setup: Setup, bug: Exception, caplog: pytest.LogCaptureFixture) -> None:
    setup.disk.bug = bug
    read, write = await setup.kernel.read(0, 512), await setup.kernel.write(0, b"w")
    assert [await setup.kernel.reply(), await setup.kernel.reply()] == [
        (read, errno.EIO, b""),
        (write, errno.EIO, b""),
    ]
    assert "a bug in fusedisk" in caplog.text
    setup.disk.bug = None
    unique = await setup.kernel.read(0, 512)
    assert await setup.kernel.reply() == (unique, 0, CONTENT[:512])


@pytest.mark.parametrize(("code", "answered"), [(errno.ENOMEM, True), (errno.EINVAL, True), (errno.ENOENT, False)])
async def test_a_pipe_that_fails_costs_nothing(setup: Setup, code: int, answered: bool) -> None:
    """Whoever reads would wait for ever, unless the kernel knows of the request no more."""

    def fail(*_: object) -> bool:
        raise OSError(code, os.strerror(code))

    setup.disk.lend_now = lambda offset, length: [(0, offset, length)]
    setup.channel._pipe = SimpleNamespace(send=fail, close=lambda: None)
    large = await setup.kernel.read(4096, LEAST)
    small = await setup.kernel.read(0, 512)
    if answered:
        assert await setup.kernel.reply() == (large, 0, CONTENT[4096 : 4096 + LEAST])
    assert await setup.kernel.reply() == (small, 0, CONTENT[:512])
    assert not setup.disk.lent, "what is copied counts as read by itself"


async def test_unknown_handles_and_sizes(setup: Setup) -> None:
    unique = await setup.kernel.read(0, 512, handle=99)
    assert await setup.kernel.reply() == (unique, errno.ESTALE, b"")
    unique = await setup.kernel.read(0, wire.MAX_WRITE + 1)
    assert await setup.kernel.reply() == (unique, errno.EINVAL, b"")
    unique = await setup.kernel.send(wire.FSYNC, wire.FSYNC_IN.pack(99, 0) + bytes(4))
    assert await setup.kernel.reply() == (unique, errno.ESTALE, b"")


async def test_what_is_not_for_us_goes_to_libfuse_and_back(setup: Setup) -> None:
    lookup = 1
    unique = await setup.kernel.send(lookup, b"a name that is longer than eighty bytes, " * 4)
    seen = await setup.library.recv(1 << 20)
    assert wire.IN_HEADER.unpack_from(seen)[:3] == (len(seen), lookup, unique)
    assert seen[wire.IN_HEADER.size :] == b"a name that is longer than eighty bytes, " * 4
    await setup.library.send(wire.OUT_HEADER.pack(16 + 5, 0, unique) + b"reply")
    assert await setup.kernel.reply() == (unique, 0, b"reply")


async def test_features_that_libfuse_does_not_know_are_negotiated(setup: Setup) -> None:
    flags = wire.ASYNC_READ | wire.MAX_PAGES | wire.INIT_EXT | wire.HANDLE_KILLPRIV_V2
    offer = wire.INIT_IN.pack(7, 45, 131072, flags | wire.AUTO_INVAL_DATA, wire.DIRECT_IO_ALLOW_MMAP >> 32) + bytes(44)
    unique = await setup.kernel.send(wire.INIT, offer)
    await setup.library.recv(1 << 20)
    taken = wire.ASYNC_READ | wire.AUTO_INVAL_DATA
    theirs = wire.INIT_OUT.pack(7, 38, 131072, taken, 12, 9, 131072, 1, 32, 0, 0, 0, 0)
    theirs += bytes(64 - len(theirs))
    await setup.library.send(wire.OUT_HEADER.pack(16 + len(theirs), 0, unique) + theirs)
    _, _, body = await setup.kernel.reply()
    found = wire.INIT_OUT.unpack_from(body)
    assert found[3] == flags, "nothing that was not offered, nor what asks for attributes after each write"
    assert found[10] == wire.DIRECT_IO_ALLOW_MMAP >> 32
    assert (found[6], found[8]) == (wire.MAX_WRITE, wire.MAX_WRITE >> 12)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"short",
        wire.IN_HEADER.pack(4096, wire.READ, 2, 1, 0, 0, 0, 0, 0),
        wire.IN_HEADER.pack(80, wire.WRITE, 2, 1, 0, 0, 0, 0, 0) + wire.WRITE_IN.pack(1, 0, 4096, 0, 0, 0, 0),
    ],
    ids=["nothing", "short", "wrong length", "write without its data"],
)
async def test_a_malformed_message_ends_the_mount(message: bytes) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012
        async with serving() as setup:
            await setup.kernel.raw(message)
            with trio.fail_after(30):
                await setup.ended.wait()
    found = caught.value.split(HostError)
    assert found[0] is not None
    assert found[1] is None
