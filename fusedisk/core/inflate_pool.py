"""Processes that inflate, for programs that need more of it than threads can do.

A thread gives the GIL back while it inflates, but asks for it again after each piece, and waits while others have it:
of two processors, one and a half are used. Processes have no lock in common. They start when there was a lot to
inflate, and end when there was nothing for a while. Whatever happens to them, nobody is the worse for it: who wanted
something inflated is told to do it by themselves.

Compressed data and content are in memory that is shared with the processes, and content stays there for as long as
somebody holds on to it. So neither is copied.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import socket
import subprocess
import sys
import weakref
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import trio

from fusedisk.core.inflate import INFLATERS, Content
from fusedisk.core.inflate_worker import MESSAGE_SIZE

log = logging.getLogger(__name__)

MOST_PROCESSES = 4
BATCHES = 4
"""Batches for each process that keep all of them busy: what one has, what is on its way, and what is being read."""
BREAK_EVEN = 64 << 20
"""Bytes to be inflated by threads before processes are worth their start: a tenth of a second's work."""
CONTENT_SIZE = 1 << 20
"""Bytes that a batch inflates to, at most."""
SOURCE_SIZE = CONTENT_SIZE + (64 << 10)
"""Bytes of a batch's compressed data, at most, with what lies between the pieces."""
_PATIENCE = 10.0
"""Seconds after which a process that does not answer is ended. A batch takes milliseconds."""

Piece = tuple[int, int, int]
"""Offset and length of compressed data in a source, and the length of what it inflates to, in bytes."""

_CODECS = {codec: number for number, codec in enumerate(INFLATERS)}
_Slab = ctypes.c_char * CONTENT_SIZE
_pool: trio.lowlevel.RunVar[InflatePool | None] = trio.lowlevel.RunVar("inflate_pool", None)


def allow_processes(capacity: int) -> None:
    """Have this trio run use processes, if there is more than one processor. For programs of our own: a library cannot
    know whether ``sys.executable`` is Python. ``capacity``: bytes of content that will be held on to."""
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    if processes > 1 and sys.executable:
        _pool.set(InflatePool(processes, capacity))


def inflate_pool() -> InflatePool | None:
    """The processes of this trio run, where they are allowed."""
    return _pool.get()


class InflatePool:
    """The processes of a trio run."""

    def __init__(self, processes: int, capacity: int) -> None:
        self.batches = BATCHES * processes
        """Batches at a time that keep the processes busy. There is room for no more."""
        self._processes = processes
        self._slabs = capacity // CONTENT_SIZE + 2 * self.batches
        self._crew: _Crew | None = None
        self._starting = self._failed = False
        self._inflated_without = 0

    @property
    def ready(self) -> bool:
        """Whether there are processes."""
        return self._crew is not None

    def begin(self, source_size: int, content_size: int) -> Batch | None:
        """Room for so many bytes of compressed data that inflate to so many; None where that is to be done by other
        means. The caller leaves the batch whatever happens."""
        crew = self._crew
        if crew is None:
            self._inflated_without += content_size
            if self._inflated_without >= BREAK_EVEN and not self._starting and not self._failed:
                self._inflated_without, self._starting = 0, True
                trio.lowlevel.spawn_system_task(self._run, name="processes that inflate")
            return None
        if source_size > SOURCE_SIZE or content_size > CONTENT_SIZE or not crew.sources or not crew.slabs:
            return None
        return Batch(crew, scarce=len(crew.slabs) <= self.batches)

    async def _run(self) -> None:
        """Start the processes, and see them end."""
        try:
            crew = _Crew(self._slabs, self.batches)
            try:
                async with trio.open_nursery() as nursery:
                    for _ in range(self._processes):
                        await nursery.start(crew.employ)
                    self._crew = crew
            finally:
                self._crew = None
                os.close(crew.descriptor)
            self._failed = crew.broken
        except* OSError as group:
            log.warning("there are no processes to inflate in: %s", group.exceptions[0])
            self._failed = True
        finally:
            self._starting = False


class Batch:
    """Pieces on their way through a process: fill :attr:`source`, then :meth:`inflate`, then :meth:`leave`."""

    __slots__ = ("_crew", "_place", "_scarce", "_slab", "_source_place", "source")

    def __init__(self, crew: _Crew, *, scarce: bool) -> None:
        self._crew = crew
        self._scarce = scarce
        self._source_place = crew.sources.pop()
        self.source = crew.view[self._source_place : self._source_place + SOURCE_SIZE]
        """For the compressed data."""
        self._place, self._slab = crew.take_slab()

    async def inflate(self, codec: str, pieces: Sequence[Piece], processes: int = 1) -> list[Content | None]:
        """What each piece of :attr:`source` inflates to, or None if the caller is to inflate it, or to find out about
        it, by themselves. ``codec``: a key of INFLATERS. ``processes``: how many share the work."""
        messages = [array("I", [_CODECS[codec]]) for _ in range(processes)]
        place = self._place
        for number, (offset, length, size) in enumerate(pieces):
            message = messages[number * processes // len(pieces)]
            message.extend((self._source_place + offset, length, place, size))
            place += size
        done = await self._crew.have_done(messages)
        content = memoryview(self._slab).cast("B")
        results: list[Content | None] = []
        place = 0
        for there, (_, _, size) in zip(done or bytes(len(pieces)), pieces, strict=True):
            piece = content[place : place + size]
            results.append((bytes(piece) if self._scarce else piece) if there else None)
            place += size
        return results

    def leave(self) -> None:
        """The compressed data is needed no more."""
        self._crew.sources.append(self._source_place)


class _Crew:
    """Processes that started together, and the memory they share."""

    def __init__(self, slabs: int, sources: int) -> None:
        first_source = slabs * CONTENT_SIZE
        size = first_source + sources * SOURCE_SIZE
        self.descriptor = os.memfd_create("fusedisk-inflate", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.descriptor, size)
            self._memory = mmap.mmap(self.descriptor, size)
        except OSError:
            os.close(self.descriptor)
            raise
        self.view = memoryview(self._memory)
        self.slabs = [number * CONTENT_SIZE for number in reversed(range(slabs))]
        """Offsets of room for content that nobody holds on to. The last was free before, so it is in use again."""
        self.sources = [first_source + number * SOURCE_SIZE for number in range(sources)]
        """Offsets of room for compressed data."""
        self._taken: dict[int, weakref.ref[object]] = {}
        self._workers: list[_Worker] = []
        self.broken = False
        """A process ended with an error."""

    def take_slab(self) -> tuple[int, ctypes.Array[ctypes.c_char]]:
        """Room for content, free again as soon as nobody refers to it or a view of it."""
        place = self.slabs.pop()
        slab = _Slab.from_buffer(self._memory, place)

        def free(_: object) -> None:
            del self._taken[place]
            self.slabs.append(place)

        self._taken[place] = weakref.ref(slab, free)
        return place, slab

    async def employ(self, task_status: trio.TaskStatus[None]) -> None:
        """Start one more process and attend to it until it ends. Raises OSError where it cannot be started."""
        worker = await _Worker.start(self.descriptor)
        self._workers.append(worker)
        try:
            task_status.started()
            await worker.attend()
        finally:
            self._workers.remove(worker)
            self.broken = worker.end() > 0 or self.broken

    async def have_done(self, messages: list[array[int]]) -> bytes:
        """What processes answer, one behind the other; nothing unless all do."""
        orders = [(worker, worker.order(message)) for message in messages if (worker := self._next()) is not None]
        # The processes write to where the messages say: nothing else may do so before they are done.
        with trio.CancelScope(shield=True):
            answers = [await self._answer(worker, answer) for worker, answer in orders]
        return b"".join(answers) if len(answers) == len(messages) and all(answers) else b""

    def _next(self) -> _Worker | None:
        """Who has the least to do."""
        return min(self._workers, key=_Worker.duties, default=None)

    async def _answer(self, worker: _Worker, answer: _Answer) -> bytes:
        with trio.move_on_after(_PATIENCE):
            return await answer.wait()
        log.warning("a process that inflates did not answer, and was ended")
        worker.end()
        return b""


class _Worker:
    """One process."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        connection.setblocking(False)
        self._process = process
        self._connection = connection
        self._answers: deque[_Answer] = deque()
        """To what was sent, in that order."""
        self.ended = False

    @classmethod
    async def start(cls, memory: int) -> _Worker:
        """Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = await trio.to_thread.run_sync(_start, theirs.fileno(), memory)
            except BaseException:
                ours.close()
                raise
        return cls(process, ours)

    def duties(self) -> int:
        """Messages that it has not answered."""
        return len(self._answers)

    async def attend(self) -> None:
        """Hand out answers until the process ends."""
        while not self.ended:
            try:
                done = self._connection.recv(MESSAGE_SIZE)
            except BlockingIOError:
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(self._connection)
            except OSError:
                return
            else:
                if not done:
                    return
                self._answers.popleft().give(done)

    def order(self, message: array[int]) -> _Answer:
        """Send a message. The answer is empty if the process ends first."""
        answer = _Answer()
        try:
            self._connection.send(message)
        except OSError:
            answer.give(b"")
        else:
            self._answers.append(answer)
        return answer

    def end(self) -> int:
        """End the process. After that it writes nothing any more. Returns its exit status."""
        if not self.ended:
            self.ended = True
            self._process.kill()
            trio.lowlevel.notify_closing(self._connection)
            self._connection.close()
        status = self._process.wait()
        while self._answers:
            self._answers.popleft().give(b"")
        return status


class _Answer:
    """What a process answers, some day."""

    def __init__(self) -> None:
        self._there = trio.Event()
        self._answer = b""

    def give(self, answer: bytes) -> None:
        self._answer = answer
        self._there.set()

    async def wait(self) -> bytes:
        await self._there.wait()
        return self._answer


def _start(connection: int, memory: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path if folder)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "fusedisk.core.inflate_worker", str(connection), str(memory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(connection, memory),
        start_new_session=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": path},
    )
