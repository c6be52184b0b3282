"""Processes that inflate, for programs that need more of it than threads can do.

A thread releases the GIL while it inflates, but must take it again after each piece: two threads use one and a half
processors. Processes share no lock. They start once there was a lot to inflate and end after a while without work. If
anything happens to them, the caller has to inflate by itself, so nothing is lost.

Compressed data and results lie in memory shared with the processes. A result stays there while it is in use. So neither
is copied.
"""

from __future__ import annotations

import ctypes
import functools
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
from itertools import chain

import trio

from fusedisk.compression.inflate import CODECS
from fusedisk.compression.inflate_worker import ANSWER_SIZE, READY

log = logging.getLogger(__name__)

MOST_PROCESSES = 4
BATCHES = 3
"""Batches for each process that keep it busy: one being inflated, one queued, one being read."""
BREAK_EVEN = 64 << 20
"""How many bytes threads inflate before starting processes pays off: a tenth of a second's work."""
CONTENT_SIZE = (2 << 20) + (64 << 10)
"""Bytes that a batch inflates to, at most: 2 MiB at any offset, in clusters of 64 KiB, are one batch."""
SOURCE_SIZE = CONTENT_SIZE + (64 << 10)
"""Bytes of a batch's compressed data, at most, gaps between the pieces included."""
_WORTH_HOLDING = CONTENT_SIZE // 2
"""Results smaller than this are copied, so that they do not occupy a whole slab of CONTENT_SIZE bytes."""
_PATIENCE = 10.0
"""Seconds after which a process that does not get ready is ended."""
_UNANSWERED = 10.0
"""Seconds, up to twice as many, after which a process that does not answer is ended. A batch takes milliseconds."""
_IDLE_SECONDS = 30.0
"""Seconds without a batch after which the processes are ended."""

Piece = tuple[int, int]
"""Offset and length of compressed data in a source, in bytes."""

_NUMBERS = {codec: number for number, codec in enumerate(CODECS)}
_Slab = ctypes.c_char * CONTENT_SIZE
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_fallocate = ctypes.CDLL(None).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@functools.cache
def _pool() -> trio.lowlevel.RunVar[InflatePool | None]:
    return trio.lowlevel.RunVar("inflate_pool", None)


def allow_processes(capacity: int) -> None:
    """Let this trio run use processes if there is more than one processor. For our own programs only: a library cannot
    know whether ``sys.executable`` is Python. ``capacity``: bytes of results that will be in use at a time."""
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    if processes > 1 and sys.executable:
        _pool().set(InflatePool(processes, capacity))


def inflate_pool() -> InflatePool | None:
    """Return the pool of this trio run; None unless processes are allowed."""
    return _pool().get()


class InflatePool:
    """The processes of a trio run."""

    def __init__(self, processes: int, capacity: int) -> None:
        self.batches = BATCHES * processes
        """How many batches at a time keep the processes busy; also the most that fit."""
        self._processes = processes
        self._slabs = capacity // CONTENT_SIZE + 3 * self.batches
        self._crew: _Crew | None = None
        self._starting = self._failed = False
        self._inflated_without = 0

    def parallel(self, size: int) -> int:
        """Return how many batches of at least ``size`` bytes to submit at once; 0: inflate in threads."""
        return self.batches if self._crew is not None and size <= CONTENT_SIZE else 0

    def begin(self, source_size: int, content_size: int) -> Batch | None:
        """Return a batch for ``source_size`` bytes of compressed data that inflate to ``content_size``; None: inflate
        in threads. The caller must call :meth:`Batch.leave` in all cases."""
        if source_size > SOURCE_SIZE or content_size > CONTENT_SIZE:
            return None
        crew = self._crew
        if crew is None:
            self._inflated_without += content_size
            if self._inflated_without >= BREAK_EVEN and not self._starting and not self._failed:
                self._inflated_without, self._starting = 0, True
                trio.lowlevel.spawn_system_task(self._run, name="processes that inflate")
            return None
        room = crew.room()
        if not crew.sources or not room:
            return None
        crew.used = True
        return Batch(crew, copied=room <= self.batches or content_size < _WORTH_HOLDING)

    async def _run(self) -> None:
        """Start the processes, and end them after a while without work. If one fails, all end."""
        crew = None
        try:
            crew = _Crew(self._slabs, self.batches)
            async with trio.open_nursery() as nursery:
                for _ in range(self._processes):
                    await nursery.start(crew.employ, nursery.cancel_scope)
                self._crew = crew
                while crew.used:
                    crew.used = False
                    await trio.sleep(_IDLE_SECONDS)
                self._crew = None
                nursery.cancel_scope.cancel()
        except* Exception as group:
            # Whatever the reason, threads inflate instead.
            log.warning("there are no processes to inflate in: %s", group.exceptions[0])
            self._failed = True
        finally:
            self._crew = None
            self._starting = False
            if crew is not None:
                crew.end()


class Batch:
    """Pieces to be inflated by a process: fill :attr:`source`, then :meth:`inflate`, then :meth:`leave`."""

    __slots__ = ("_copied", "_crew", "_place", "_slab", "_source_place", "source")

    def __init__(self, crew: _Crew, *, copied: bool) -> None:
        self._crew = crew
        self._copied = copied
        self._source_place = crew.sources.pop()
        self.source = crew.view[self._source_place : self._source_place + SOURCE_SIZE]
        """For the compressed data."""
        self._place, self._slab = crew.take_slab()

    async def inflate(
        self, codec: str, pieces: Sequence[Piece], size: int, processes: int = 1
    ) -> tuple[memoryview, list[int]]:
        """Inflate ``pieces`` of :attr:`source`, each to ``size`` bytes.

        Returns all of them in order, and the indices of the pieces that failed, which the caller inflates itself to
        find out why. ``codec``: a key of CODECS. ``processes``: how many share the work, at most ``len(pieces)``."""
        count = len(pieces)
        assert processes <= count, (processes, count)
        messages = []
        for number in range(processes):
            first, end = number * count // processes, (number + 1) * count // processes
            message = array("I", (_NUMBERS[codec], size, self._source_place, self._place + first * size))
            message.extend(chain.from_iterable(pieces[first:end]))
            messages.append(message)
        done = await self._crew.have_done(messages) or bytes(count)
        assert len(done) == count, (done, count)
        content = memoryview(self._slab).cast("B")[: count * size]
        if self._copied:
            content = memoryview(bytearray(content))
        return content, [number for number, there in enumerate(done) if not there] if 0 in done else []

    def leave(self) -> None:
        """Give the space of the compressed data back."""
        self._crew.give_source(self._source_place)


class _Crew:
    """Processes that started together, and the memory they share: slabs for content, and sources."""

    def __init__(self, slabs: int, sources: int) -> None:
        first_source = slabs * CONTENT_SIZE
        size = first_source + sources * SOURCE_SIZE
        self.descriptor = os.memfd_create("fusedisk-inflate", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, size)
        self._memory = mmap.mmap(self.descriptor, size)
        self.view = memoryview(self._memory)
        self._empty = [number * CONTENT_SIZE for number in range(slabs)]
        """Offsets of slabs that nobody refers to, and that have no memory."""
        self._free: list[int] = []
        """Offsets of slabs that nobody refers to, and that still have theirs. So they are the first to be used again,
        and of those the one that was in use before."""
        self.sources = [first_source + number * SOURCE_SIZE for number in range(sources)]
        """Offsets of those that are free."""
        self.used = True
        """There was a batch lately."""
        self._most_free = 4 * sources
        """Slabs that keep their memory while nobody refers to them."""
        self._taken: dict[int, weakref.ref[object]] = {}
        self._workers: list[_Worker] = []
        self._ended = False

    def room(self) -> int:
        """Slabs that nobody refers to."""
        return len(self._free) + len(self._empty)

    def take_slab(self) -> tuple[int, ctypes.Array[ctypes.c_char]]:
        """Room for content, free again as soon as nobody refers to it or a view of it."""
        place = (self._free or self._empty).pop()
        slab = _Slab.from_buffer(self._memory, place)

        def free(_: object) -> None:
            del self._taken[place]
            if self._ended or len(self._free) >= self._most_free:
                self._release(place, CONTENT_SIZE)
                self._empty.append(place)
            else:
                self._free.append(place)

        self._taken[place] = weakref.ref(slab, free)
        return place, slab

    def give_source(self, place: int) -> None:
        """Nobody refers to a source any more."""
        self.sources.append(place)
        if self._ended:
            self._release(place, SOURCE_SIZE)

    def _release(self, place: int, length: int) -> None:
        """Give memory back. (madvise(2) would not: it is locked.)"""
        _fallocate(self.descriptor, _PUNCH_HOLE | _KEEP_SIZE, place, length)

    def end(self) -> None:
        """There will be no batches any more. What is held on to stays, and nothing else."""
        self._ended = True
        for place in self._free:
            self._release(place, CONTENT_SIZE)
        for place in self.sources:
            self._release(place, SOURCE_SIZE)

    async def employ(self, end: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        """Start one more process and attend to it; when it ends, so does the crew. Raises OSError where it does not get
        ready for work."""
        worker = await _Worker.start(self.descriptor)
        try:
            with trio.move_on_after(_PATIENCE):
                await worker.get_ready()
            if not worker.ready:
                raise ChildProcessError(f"{sys.executable} does not start")
            self._workers.append(worker)
            task_status.started()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.watch)
                await worker.attend()
                nursery.cancel_scope.cancel()
            end.cancel()
        finally:
            if worker in self._workers:
                self._workers.remove(worker)
            worker.end()

    async def have_done(self, messages: list[array[int]]) -> bytes:
        """Send messages to processes and return their answers, joined; nothing unless all of them answer."""
        answers = [worker.order(message) for message in messages if (worker := self._next()) is not None]
        try:
            for answer in answers:
                await answer.there.wait()
        except trio.Cancelled:
            # The processes write to the memory that the messages name, so it must not be used before they are done. The
            # cancelled task gets the cancellation again at its next checkpoint.
            with trio.CancelScope(shield=True):
                for answer in answers:
                    await answer.there.wait()
        contents = [answer.content for answer in answers]
        return b"".join(contents) if len(contents) == len(messages) and all(contents) else b""

    def _next(self) -> _Worker | None:
        """Return the worker with the least to do."""
        return min(self._workers, key=_Worker.duties, default=None)


class _Answer:
    """The future answer of a process; empty if it never answers."""

    def __init__(self) -> None:
        self.there = trio.Event()
        self.content = b""

    def give(self, content: bytes) -> None:
        self.content = content
        self.there.set()


class _Worker:
    """One process."""

    def __init__(self, process: subprocess.Popen[bytes], connection: socket.socket) -> None:
        connection.setblocking(False)
        self.ready = False
        self._process = process
        self._connection = connection
        self._answers: deque[_Answer] = deque()
        """To what was sent, in that order."""
        self._ended = False

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

    async def get_ready(self) -> None:
        """Wait until it can work, or ends."""
        self.ready = await self._receive() == READY

    async def attend(self) -> None:
        """Hand out answers until the process ends."""
        while done := await self._receive():
            self._answers.popleft().give(done)

    async def watch(self) -> None:
        """End the process if it does not answer."""
        while True:
            oldest = self._answers[0] if self._answers else None
            await trio.sleep(_UNANSWERED)
            if oldest is not None and not oldest.there.is_set():
                log.warning("a process that inflates did not answer, and was ended")
                self.end()
                return

    async def _receive(self) -> bytes:
        """A message; nothing once the process has ended."""
        while not self._ended:
            try:
                return self._connection.recv(ANSWER_SIZE)
            except BlockingIOError:
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(self._connection)
            except OSError:
                break
        return b""

    def duties(self) -> int:
        """Messages that it has not answered."""
        return len(self._answers)

    def order(self, message: array[int]) -> _Answer:
        """Send a message."""
        answer = _Answer()
        try:
            self._connection.send(message)
        except OSError:
            answer.give(b"")
        else:
            self._answers.append(answer)
        return answer

    def end(self) -> None:
        """End the process. After that it writes nothing any more."""
        if self._ended:
            return
        self._ended = True
        self._process.kill()
        trio.lowlevel.notify_closing(self._connection)
        self._connection.close()
        self._process.wait()
        while self._answers:
            self._answers.popleft().give(b"")


def _start(connection: int, memory: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path if folder)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "fusedisk.compression.inflate_worker", str(connection), str(memory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(connection, memory),
        start_new_session=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": path},
    )
