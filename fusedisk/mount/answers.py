"""The requests that the channel answers beside plain reads and writes: open, close, flush, holes, space, copies."""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

from pyfuse3 import FUSEError

from fusedisk.core.errors import FusediskError
from fusedisk.export import ranges
from fusedisk.export.export import EVERYTHING, Export
from fusedisk.mount import wire
from fusedisk.mount.handles import Handle
from fusedisk.mount.negotiation import Negotiation
from fusedisk.mount.operations import Operations
from fusedisk.mount.passthrough import PassedThrough

log = logging.getLogger(__name__)


class Work(NamedTuple):
    """How to answer one request."""

    run: Callable[[], Awaitable[bytes]]
    """Serves the request and returns the body of the reply. Raises errors for :func:`.errors.errno_of`."""
    changes: tuple[Export, int, int] | None
    """The file whose bytes it may change, even if it fails, and where: offset and length."""


_BODY = wire.IN_HEADER.size


class Answers:
    """The requests of one mount, by opcode."""

    def __init__(self, operations: Operations, negotiation: Negotiation, passed: PassedThrough) -> None:
        self._operations = operations
        self._negotiation = negotiation
        self._passed = passed
        self._handles = operations.handles
        self._table: dict[int, tuple[struct.Struct, Callable[..., Awaitable[bytes]]]] = {
            wire.OPEN: (wire.OPEN_IN, self._open),
            wire.RELEASE: (wire.RELEASE_IN, self._release),
            wire.FSYNC: (wire.FSYNC_IN, self._fsync),
            wire.FLUSH: (wire.FLUSH_IN, self._flush),
            wire.FALLOCATE: (wire.FALLOCATE_IN, self._fallocate),
            wire.LSEEK: (wire.LSEEK_IN, self._lseek),
            wire.COPY_FILE_RANGE: (wire.COPY_IN, self._copy),
        }

    def work(self, opcode: int, head: bytearray) -> Work | None:
        """Return how to answer the message that starts with ``head``; None: pyfuse3 answers it."""
        found = self._table.get(opcode)
        if found is None:
            return self._end_of_drive(head) if opcode == wire.GETATTR else None
        layout, answer = found
        arguments = layout.unpack_from(head, _BODY)
        if opcode == wire.OPEN:
            arguments = (wire.IN_HEADER.unpack_from(head)[3], *arguments)
        return Work(partial(answer, *arguments), self._changes(opcode, *arguments))

    def _end_of_drive(self, head: bytearray) -> Work | None:
        """Let the kernel, when it reads at the end of an open file that it caches, hear of a missing medium."""
        flags, _, number = wire.GETATTR_IN.unpack_from(head, _BODY)
        handle = self._handles.by_number.get(number) if flags & wire.GETATTR_FH else None
        return Work(handle.export.read_medium, None) if handle is not None and handle.export.empty else None

    def forget(self, export: Export) -> None:
        """Forget the open handles of a file that was removed."""
        self._passed.forget(export)

    def _changes(self, opcode: int, *arguments: int) -> tuple[Export, int, int] | None:
        try:
            if opcode == wire.OPEN and arguments[1] & os.O_TRUNC:
                return self._operations.export_of(arguments[0]), *EVERYTHING
            if opcode == wire.FALLOCATE:
                target, offset, length, _, _ = arguments
                return self._handle(target).export, offset, length
            if opcode == wire.COPY_FILE_RANGE:
                _, _, _, target, offset, length, _ = arguments
                return self._handle(target).export, offset, length
        except (FUSEError, FusediskError):
            pass  # the request itself reports the error
        return None

    def _handle(self, number: int) -> Handle:
        return self._handles.find(number)

    async def _open(self, inode: int, flags: int, open_flags: int) -> bytes:
        export = self._operations.export_of(inode)
        cached = self._operations.cached(export)
        past_cache = cached and flags & os.O_ACCMODE == os.O_WRONLY and self._negotiation.writes_drop_pages
        number, handle = await self._handles.open(export, flags, past_cache=past_cache)
        if self._negotiation.passthrough:
            handle.kernel_backing_id = self._passed.handle_opened(export)
            if handle.kernel_backing_id:
                return wire.OPEN_OUT.pack(number, wire.FOPEN_PASSTHROUGH, handle.kernel_backing_id)
        mode = (
            wire.FOPEN_KEEP_CACHE
            if cached and not past_cache
            else wire.FOPEN_DIRECT_IO | wire.FOPEN_PARALLEL_DIRECT_WRITES
        )
        return wire.OPEN_OUT.pack(number, mode, 0)

    async def _release(self, number: int) -> bytes:
        handle = self._handles.close(number)
        if self._negotiation.passthrough and handle is not None:
            self._passed.handle_closed(handle.export, handle.kernel_backing_id)
        return b""

    async def _fsync(self, number: int, flags: int) -> bytes:
        await self._handle(number).export.flush()
        return b""

    async def _flush(self, number: int) -> bytes:
        await self._handle(number).flush()
        return b""

    async def _fallocate(self, number: int, offset: int, length: int, mode: int, padding: int) -> bytes:
        handle = self._handle(number)
        export = handle.export
        keep_size = bool(mode & wire.KEEP_SIZE)
        what = mode & ~wire.KEEP_SIZE
        if what == 0:
            await ranges.allocate(export, offset, length, keep_size=keep_size)
        elif what == wire.ZERO_RANGE or (what == wire.PUNCH_HOLE and keep_size):
            await ranges.zero(export, offset, length, punch=what == wire.PUNCH_HOLE, keep_size=keep_size)
        else:
            raise FUSEError(errno.EOPNOTSUPP)
        await handle.sync_if_requested()
        return b""

    async def _lseek(self, number: int, offset: int, whence: int, padding: int) -> bytes:
        return wire.LSEEK_OUT.pack(await ranges.seek(self._handle(number).export, offset, whence))

    async def _copy(
        self, source: int, offset: int, inode: int, target: int, position: int, length: int, flags: int
    ) -> bytes:
        onto = self._handle(target)
        copied = await ranges.copy(self._handle(source).export, offset, onto.export, position, length)
        await onto.sync_if_requested()
        return wire.WRITE_OUT.pack(copied, 0)
