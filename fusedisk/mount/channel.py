"""The data channel: requests for data are read from the kernel and answered here, all others go on to pyfuse3.

One task reads. It answers requests that need no waiting (see ``block/request/immediate.py``) on the spot, between two
reads, with no task, lock or allocation; every other request becomes a task of its own and never holds up the next one.
Requests in flight and their bytes are bounded: beyond that nothing is read, and the kernel blocks the clients.

When there is nothing to read, the task polls for some microseconds, or takes a short sleep of its own, before it waits
in the event loop (:mod:`.polling`): waking up costs more than most requests do. An idle mount takes no CPU at all.

pyfuse3 is the other end of a socket (:mod:`.splicing`): it mounts, negotiates, and answers for names and attributes.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import struct
from collections.abc import Callable
from time import perf_counter

import trio

from fusedisk.block.request import background
from fusedisk.block.request.immediate import Pieces
from fusedisk.core.errors import HostError
from fusedisk.export.export import Export
from fusedisk.mount import wire
from fusedisk.mount.answers import Answers, Work
from fusedisk.mount.errors import errno_of
from fusedisk.mount.handles import Handle
from fusedisk.mount.nap import Nap
from fusedisk.mount.negotiation import Negotiation
from fusedisk.mount.operations import Operations
from fusedisk.mount.passthrough import PassedThrough
from fusedisk.mount.polling import Polling
from fusedisk.mount.reply_pipe import LEAST, ReplyPipe
from fusedisk.mount.requesters import is_dying
from fusedisk.mount.scheduling import Admission, Turns
from fusedisk.mount.settings import Passthrough
from fusedisk.mount.splicing import Spliced

log = logging.getLogger(__name__)

_LEAST_SPARE, _MOST_SPARE = 2, 8
"""The number of buffers of each kind that are made at the start, and kept for reuse."""
_REPLY = 4096
"""The offset of a reply's data in its buffer: at a page, with the header in front of it."""
_REPLY_HEADER = _REPLY - wire.OUT_HEADER.size
_OUT = wire.OUT_HEADER.size
_HEAD = struct.Struct("=IIQ24xQQII8xI")
"""Of any message: len, opcode, unique; of a READ or WRITE also fh, offset, size, its own flags, and how its file was
opened."""
_SYNCHRONOUS = os.O_DSYNC
"""Of a WRITE: it must be on stable storage when it is answered, since its file was opened for that or since this write
asks for it (RWF_DSYNC). O_SYNC has the same bit."""
_WRITTEN = struct.Struct("=IiQII")
"""A reply to WRITE."""
_GONE = (errno.ENODEV, errno.ECONNABORTED)
"""The mount is gone."""
_AGAIN = (errno.ENOENT, errno.EINTR, errno.EAGAIN)
"""The request was withdrawn while it was read."""
_INTERRUPTIBLE = frozenset((wire.FALLOCATE, wire.LSEEK))
"""Beside READ, the requests that may be left undone, or half done, when their client has gone. A copy must not: the
kernel keeps its cached pages of the target unless the reply says how many bytes were copied."""
_LOOK_AGAIN = 0.1
"""Seconds between looks at a reader that has had a signal: the kernel tells of the first one only."""


def _pages(size: int) -> memoryview:
    """Return memory whose pages exist already: if the kernel had to allocate them while it copies a message, it might
    have to wait for us."""
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))


class Request:
    """The buffer for one message: the header and its arguments, and the data of a write, aligned to a page."""

    __slots__ = ("data", "head", "vector", "view")

    def __init__(self) -> None:
        self.head = bytearray(wire.WRITE_HEAD)
        self.view = memoryview(self.head)
        self.data = _pages(wire.MAX_WRITE)
        self.vector = [self.view, self.data]

    def start(self, length: int) -> bytearray:
        """Return the start of a message of that length, with all arguments: those of a copy are longer than the part
        in front of a write's data."""
        if length <= wire.WRITE_HEAD:
            return self.head
        return self.head + self.data[: min(length, wire.LONGEST_HEAD) - wire.WRITE_HEAD]


class BrokenConnectionError(HostError):
    """The connection to the kernel is broken: the mount ends. Errors of single requests are answered instead."""


class Channel:
    """The data channel of one mount."""

    def __init__(
        self,
        operations: Operations,
        spliced: Spliced,
        passthrough: Passthrough,
        ended: Callable[[], None],
        pipe: ReplyPipe | None,
        busy: Callable[[], None] | None = None,
    ) -> None:
        """``ended`` is called when the channel has ended. ``pipe`` is closed with the channel. ``busy`` is called every
        few milliseconds while requests follow each other closely."""
        self._ended = ended
        self._busy = busy
        self._pipe = pipe
        self._operations = operations
        self._handles = operations.handles.by_number
        self._device, self._library = spliced
        longest = wire.MAX_WRITE if pipe is None else pipe.longest
        self.shared = any(export.shared_views for export in operations.exports)
        """Whether there are files that show the same bytes; kept up to date by the mount's face."""
        self._negotiation = Negotiation(
            passthrough=passthrough is not Passthrough.OFF, longest=longest, maps_uncached=operations.maps_uncached
        )
        self._answers = Answers(operations, self._negotiation, PassedThrough(self._device, passthrough))
        self._spare = [Request() for _ in range(_LEAST_SPARE)]
        self._replies = [_pages(_REPLY + wire.MAX_WRITE) for _ in range(_LEAST_SPARE)]
        self._admission = Admission()
        self._forwarded = 0
        """Requests that pyfuse3 has not answered yet."""
        self._interruptible: dict[int, tuple[trio.CancelScope, int]] = {}
        """By request number, the scope to cancel, and the thread that must be dying for that; 0: any signal will do."""
        self._polling = Polling(may_ask=len(os.sched_getaffinity(0)) > 1)
        self._nap = Nap(self._device)
        self._turns = Turns()

    async def run(self) -> None:
        """Serve until the mount is gone, then let pyfuse3 end. Raises BrokenConnectionError."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._return_replies)
                try:
                    await self._serve(nursery)
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            self._ended()

    def close(self) -> None:
        """Close the connection."""
        self._nap.close()
        self._library.close()
        os.close(self._device)
        if self._pipe is not None:
            self._pipe.close()
        self._spare.clear()
        self._replies.clear()

    def notify(self, code: int, body: bytes) -> None:
        """Send the kernel a notification. It may wait for our replies meanwhile. Raises OSError."""
        os.write(self._device, wire.OUT_HEADER.pack(wire.OUT_HEADER.size + len(body), code, 0) + body)

    @property
    def _notes_reads(self) -> bool:
        """Whether reads that fill the kernel's cache must be noted."""
        return self.shared or self._operations.handles.past_cache > 0

    @property
    def maps_uncached(self) -> bool:
        """Whether the kernel allows shared mappings of files that it does not cache."""
        return self._negotiation.maps_uncached

    def forget(self, export: Export) -> None:
        """Forget the open handles of a file that was removed."""
        self._answers.forget(export)

    # --- reading ----------------------------------------------------------------------------------------

    async def _serve(self, nursery: trio.Nursery) -> None:
        """Read requests until the mount is gone; answer them on the spot, or start what answers them.

        The steps of each round are numbered below. Only steps 2, 5 and 6 suspend.
        """
        device, handles = self._device, self._handles
        readv, write, clock, in_background = os.readv, os.write, perf_counter, background.running
        unpack, pack = _HEAD.unpack_from, wire.OUT_HEADER.pack_into
        reply = self._take_reply()
        # ``target``: the data of a READ; ``message``: its reply with the header; ``content``: the data of a WRITE. The
        # slices are kept from one request to the next, which mostly has the same length.
        target, message = reply[_REPLY:_REPLY], reply[_REPLY_HEADER:_REPLY]
        written = bytearray(_WRITTEN.size)
        request = self._take_request()
        vector, head, data = request.vector, request.head, request.data
        content = data[:0]
        polling, nap, busy, turns = self._polling, self._nap.sleep, self._busy, self._turns
        admission, shared = self._admission, self._notes_reads
        turns.begin(clock())
        asked = 0.0
        while True:
            # 1. Nap instead of polling, unless another task has work to do.
            if polling.should_nap and not (admission.places or self._forwarded or in_background()) and not nap():
                polling.overslept()
            # 2. Read. Exits: no request yet (poll again, or wait) · the mount is gone · it was withdrawn · broken.
            try:
                length = readv(device, vector)
            except BlockingIOError:
                now = clock()
                if now < polling.spin_until and not (admission.places or self._forwarded or in_background()):
                    asked = now
                    continue
                await trio.lowlevel.wait_readable(device)
                shared = self._notes_reads
                now = clock()
                turns.begin(now)
                polling.woke(now, asked)
                if busy is not None and polling.recent_request:
                    busy()
                asked = 0.0
                continue
            except OSError as exc:
                if exc.errno in _GONE:
                    return
                if exc.errno in _AGAIN:
                    continue
                raise BrokenConnectionError(
                    f"Reading requests from '/dev/fuse' failed: {exc.strerror}.", errno=exc.errno
                ) from exc
            # 3. Decode the header. The fields behind ``unique`` mean something for READ and WRITE only.
            declared, opcode, unique, number, offset, size, own_flags, flags = unpack(head)
            if length != declared or length < wire.IN_HEADER.size:
                raise BrokenConnectionError(
                    f"The kernel sent {length} bytes as a request of {declared}: the mount ends."
                )
            answered = False
            handle = handles.get(number)
            # 4. Answer READ, WRITE and FSYNC at once, if that needs no waiting; ``answered`` tells step 5.
            try:
                if opcode == wire.READ:
                    # The kernel will keep these pages: note them before they are read.
                    if shared and handle is not None and not own_flags & wire.READ_LOCKOWNER:
                        handle.export.keep(offset, size)
                    # A large read without a copy, otherwise a copy into the reply.
                    if size >= LEAST and self._lend(unique, handle, offset, size):
                        answered = True
                    elif handle is not None and size <= wire.MAX_WRITE:
                        if size != len(target):
                            target, message = reply[_REPLY : _REPLY + size], reply[_REPLY_HEADER : _REPLY + size]
                        if handle.export.read_now(offset, target):
                            answered = True
                            pack(message, 0, _OUT + size, 0, unique)
                            write(device, message)
                elif opcode == wire.WRITE:
                    if length != wire.WRITE_HEAD + size:
                        raise BrokenConnectionError(
                            f"The kernel sent a write of {size} bytes in {length}: the mount ends."
                        )
                    if size != len(content):
                        content = data[:size]
                    if handle is not None and not flags & _SYNCHRONOUS and handle.export.write_now(offset, content):
                        answered = True
                        _WRITTEN.pack_into(written, 0, len(written), 0, unique, size, 0)
                        write(device, written)
                elif opcode == wire.FSYNC and handle is not None and handle.export.flush_now():
                    answered = True
                    write(device, wire.OUT_HEADER.pack(_OUT, 0, unique))
            except BrokenConnectionError:
                raise
            except Exception as exc:
                # Either sending the reply failed, or the request itself did.
                if answered and isinstance(exc, OSError):
                    self._reply_failed(exc)
                else:
                    answered = True
                    self.answer(unique, -errno_of("a request", exc))
            # 5. Hand everything else on. A task that writes keeps the buffer, so the next request gets another one.
            if not answered:
                if await self._dispatch(nursery, request, length, opcode, unique):
                    request = self._take_request()
                    vector, head, data = request.vector, request.head, request.data
                    content = data[:0]
                shared = self._notes_reads
            # 6. After a while give other tasks a turn: soon if there are any that we know of, later in any case.
            now = clock()
            if turns.is_over(now) and (
                admission.places or self._forwarded or in_background() or turns.is_long_over(now, polling.should_nap)
            ):
                if busy is not None:
                    busy()
                await trio.lowlevel.checkpoint()
                shared = self._notes_reads
                now = clock()
                turns.begin(now)
            polling.answered(now, asked)
            asked = 0.0

    def _lend(self, unique: int, handle: Handle | None, offset: int, size: int) -> bool:
        """Answer a READ without copying, from the page cache or from memory. Returns whether it was answered."""
        if handle is None or size > wire.MAX_WRITE:
            return False
        lent = handle.export.lend_now(offset, size)
        try:
            if isinstance(lent, Pieces):
                os.writev(self._device, (wire.OUT_HEADER.pack(_OUT + size, 0, unique), *lent))
            elif lent is None or self._pipe is None or not self._pipe.send(self._device, unique, size, lent):
                return False
        except OSError as exc:
            if exc.errno in (*_GONE, errno.ENOENT):
                return True
            log.warning("a large read is copied, as its reply without that failed: %s", exc.strerror)
            return False
        handle.export.count_lent(size)
        return True

    async def _dispatch(self, nursery: trio.Nursery, request: Request, length: int, opcode: int, unique: int) -> bool:
        """Answer a request in a task of its own, or pass it to pyfuse3. True: the task keeps the buffer."""
        _, _, _, fh, offset, size, own_flags, flags = _HEAD.unpack_from(request.head)
        if opcode == wire.READ:
            handle = self._find(fh)
            if handle is None or size > wire.MAX_WRITE:
                self.answer(unique, -errno.ESTALE if handle is None else -errno.EINVAL)
            else:
                await self._admission.take_place()
                scope = self._may_interrupt(unique, wire.IN_HEADER.unpack_from(request.head)[6])
                nursery.start_soon(self._read, unique, handle, offset, size, scope)
            return False
        if opcode == wire.WRITE:
            handle = self._find(fh)
            if handle is None:
                self.answer(unique, -errno.ESTALE)
                return False
            await self._admission.take_place()
            await self._admission.make_room()
            self._admission.begin(size)
            page = bool(own_flags & wire.WRITE_CACHE)
            nursery.start_soon(self._write, unique, handle, offset, size, flags, page, request)
            return True
        if opcode == wire.INTERRUPT:
            (number,) = wire.INTERRUPT_IN.unpack_from(request.head, wire.IN_HEADER.size)
            if number in self._interruptible:
                self._interrupt(nursery, number)
            return False
        work = self._answers.work(opcode, request.start(length))
        if work is not None:
            await self._admission.take_place()
            # fallocate(2) may end with EINTR, and cp and tar do not expect that of lseek(2).
            thread = wire.IN_HEADER.unpack_from(request.head)[6] if opcode == wire.LSEEK else 0
            scope = self._may_interrupt(unique, thread) if opcode in _INTERRUPTIBLE else trio.CancelScope()
            nursery.start_soon(self._work, unique, work, opcode, scope)
            return False
        if opcode == wire.INIT:
            self._negotiation.offered(request.head, unique)
        await self._forward(request, length, opcode)
        return False

    def _find(self, number: int) -> Handle | None:
        """Return a handle, None if its file was removed."""
        try:
            return self._operations.handles.find(number)
        except HostError:
            return None

    # --- requests that wait -----------------------------------------------------------------------------

    def _may_interrupt(self, unique: int, thread: int) -> trio.CancelScope:
        """Return a scope that ends the request when its client has gone; registered before the next message is read."""
        scope = trio.CancelScope()
        self._interruptible[unique] = scope, thread
        return scope

    def _interrupt(self, nursery: trio.Nursery, unique: int) -> None:
        """Handle a signal to the client of this request. A read of a file is not restarted after a signal, neither by
        the kernel nor by programs, so it is cancelled only if its reader is dying."""
        scope, thread = self._interruptible[unique]
        if not thread or is_dying(thread):
            scope.cancel()
        else:
            nursery.start_soon(self._interrupt_if_dying, unique, scope, thread)

    async def _interrupt_if_dying(self, unique: int, scope: trio.CancelScope, thread: int) -> None:
        while unique in self._interruptible:
            if is_dying(thread):
                scope.cancel()
                return
            await trio.sleep(_LOOK_AGAIN)

    async def _read(self, unique: int, handle: Handle, offset: int, size: int, scope: trio.CancelScope) -> None:
        reply: memoryview | None = None
        try:
            with scope:
                await self._admission.make_room()
                self._admission.begin(size)
                reply = self._take_reply()
                try:
                    size_read = await handle.export.read_into(offset, reply[_REPLY : _REPLY + size])
                except Exception as exc:
                    self.answer(unique, -errno_of("read", exc))
                    return
                wire.OUT_HEADER.pack_into(reply, _REPLY_HEADER, _OUT + size_read, 0, unique)
                self._send(reply[_REPLY_HEADER : _REPLY + size_read])
            if scope.cancelled_caught:
                self.answer(unique, -errno.EINTR)
        finally:
            del self._interruptible[unique]
            if reply is not None and len(self._replies) < _MOST_SPARE:
                self._replies.append(reply)
            self._admission.end(size, begun=reply is not None)

    async def _write(
        self, unique: int, handle: Handle, offset: int, size: int, flags: int, page: bool, request: Request
    ) -> None:
        error, body, export = 0, b"", handle.export
        synchronous = bool(flags & _SYNCHRONOUS)
        try:
            written = await handle.write(offset, request.data[:size], page=page, synchronous=synchronous)
            body = wire.WRITE_OUT.pack(written, 0)
        except Exception as exc:
            error = -errno_of("write", exc)
        finally:
            self._admission.end(size)
        await export.drop_kept(offset, size)
        try:
            while handle.past_cache and await export.drop_overtaken(offset, size) and not error:
                await handle.write(offset, request.data[:size], page=page, synchronous=synchronous)
        except Exception as exc:
            error, body = -errno_of("write", exc), b""
        if len(self._spare) < _MOST_SPARE:
            self._spare.append(request)
        self.answer(unique, error, body)

    async def _work(self, unique: int, work: Work, opcode: int, scope: trio.CancelScope) -> None:
        begun = False
        error, body = -errno.EINTR, b""
        try:
            with scope:
                await self._admission.make_room()
                self._admission.begin(0)
                begun = True
                try:
                    body = await work.run()
                    error = 0
                except Exception as exc:
                    error = -errno_of(f"request {opcode}", exc)
        finally:
            self._interruptible.pop(unique, None)
            self._admission.end(0, begun=begun)
        if work.changes is not None:
            export, offset, length = work.changes
            await export.drop_kept(offset, length)
        self.answer(unique, error, body)

    # --- answering --------------------------------------------------------------------------------------

    def answer(self, unique: int, error: int, body: bytes = b"") -> None:
        """Answer a request: ``error`` is 0 or a negative errno."""
        self._send(wire.OUT_HEADER.pack(_OUT + len(body), error, unique) + body)

    def _send(self, message: bytes | memoryview) -> None:
        try:
            os.write(self._device, message)
        except OSError as exc:
            self._reply_failed(exc)

    def _reply_failed(self, exc: OSError) -> None:
        """Log a failed reply, unless its request was interrupted (ENOENT) or the mount is gone."""
        if exc.errno not in (*_GONE, errno.ENOENT):
            log.error("a reply to the kernel failed: %s", exc.strerror)

    # --- pyfuse3 ----------------------------------------------------------------------------------------

    async def _forward(self, request: Request, length: int, opcode: int) -> None:
        """Pass a request to pyfuse3."""
        parts = [request.view[:length]]
        if length > wire.WRITE_HEAD:
            parts.append(request.data[: length - wire.WRITE_HEAD])
        if opcode not in wire.NO_REPLY:
            self._forwarded += 1
        while True:
            try:
                self._library.sendmsg(parts)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._library)

    async def _return_replies(self) -> None:
        """Pass pyfuse3's replies to the kernel."""
        buffer = memoryview(bytearray(wire.MAX_WRITE + 4096))
        library = self._library
        while True:
            try:
                length = library.recv_into(buffer)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(library)
                continue
            if not length:
                return
            _, error, unique = wire.OUT_HEADER.unpack_from(buffer)
            if not unique:
                log.error("libfuse sent the unexpected notification %d.", error)
                continue
            self._forwarded -= 1
            self._negotiation.answered(buffer, length, unique)
            self._send(buffer[:length])

    # --- buffers ----------------------------------------------------------------------------------------

    def _take_request(self) -> Request:
        return self._spare.pop() if self._spare else Request()

    def _take_reply(self) -> memoryview:
        return self._replies.pop() if self._replies else _pages(_REPLY + wire.MAX_WRITE)
