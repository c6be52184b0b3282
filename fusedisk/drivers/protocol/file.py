"""``file``: a regular file of the host, the bottom of most graphs.

Bytes move here: from the page cache inline, the rest in worker threads (:mod:`.host_file`). Requests need no
order among themselves: the shared state is the host's file, and the request path serialises what overlaps
and matters. QEMU's image locks keep other processes out, as far as the parents' permissions ask for it
(:mod:`fusedisk.core.image_locks`).

With ``cache.direct`` (O_DIRECT) everything is aligned, so a write to a file's unaligned last block makes the
file longer than it is meant to be; it is cut back to the node's length at the next flush and at close.

Not here: block devices (``host_device``), character devices, directories.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import stat
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NoReturn

from fusedisk.block.graph.filenames import check_filename, has_protocol
from fusedisk.block.model.driver import Driver
from fusedisk.block.model.extent import DATA, ZERO, Extent
from fusedisk.block.model.flags import MAY_UNMAP, Buffer
from fusedisk.block.model.limits import Limits
from fusedisk.block.model.node import NodeConfig
from fusedisk.block.model.observer import Change
from fusedisk.core import image_locks, paths
from fusedisk.core.at_once import is_at_once
from fusedisk.core.errors import FusediskError, HostError, NotSupportedError, OptionError, host_error
from fusedisk.core.host_open import Found, kind_name
from fusedisk.core.image_locks import ImageLocks
from fusedisk.core.offload import run_opening
from fusedisk.core.options import Options, option
from fusedisk.drivers.protocol.direct_io import Alignment, find_alignment
from fusedisk.drivers.protocol.host_file import INLINE_MAX, HostFile
from fusedisk.drivers.protocol.host_flush import flush_file
from fusedisk.drivers.protocol.host_io import total_length
from fusedisk.drivers.protocol.host_ranges import FileRanges
from fusedisk.drivers.protocol.resize import create_regular_file, resize_file

log = logging.getLogger(__name__)

_READ_ONLY_ERRORS = (errno.EACCES, errno.EROFS, errno.EPERM)


@dataclasses.dataclass(slots=True)
class FileOptions(Options):
    """Options of ``file`` and ``host_device``."""

    filename: str = option("", help="path of the file")
    locking: str = option(
        "auto",
        help="QEMU's image locks, which keep other processes out: on, off, or auto (where the host has them)",
        choices=("on", "off", "auto"),
    )
    aio: str = option(
        "threads",
        help="accepted for QEMU's sake: what would wait runs in worker threads, whatever this says",
        choices=("threads", "native", "io_uring"),
    )


@dataclasses.dataclass(slots=True)
class _Reopened:
    """State between ``reopen_prepare`` and its end."""

    file: HostFile
    locks: ImageLocks | None = None
    """The image locks on the new descriptor, once the new permissions are checked."""


class FileDriver(Driver):
    """A regular file."""

    name = "file"
    prefixes = ("file",)
    is_protocol = True
    moves_bytes = True
    can_run_at_once = True
    options_type: ClassVar[type[Options]] = FileOptions

    file: HostFile
    """The open descriptor and how to use it."""
    ranges: FileRanges
    """Its space."""
    ranges_type: ClassVar[type[FileRanges]] = FileRanges
    locks: ImageLocks | None = None

    _reopened: _Reopened | None = None
    """What ``reopen_prepare`` has opened, until its end."""
    _flush_failure: OSError | None = None
    """The error of the first failed flush: the kernel may have dropped unwritten data, so later flushes fail too."""
    _padded = False
    """The file may be longer than the node, by less than the alignment."""
    _extending = 0
    """O_DIRECT requests in flight that end past the node's length."""

    # --- naming -----------------------------------------------------------------------------------------

    @property
    def filename(self) -> str:
        """The path as given."""
        return str(self.options.filename)

    def may_be_named(self) -> bool:
        return True

    def exact_filename(self) -> str | None:
        return f"./{self.filename}" if has_protocol(self.filename) else self.filename

    # --- life -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        if not self.filename:
            raise OptionError(f"{self.name} needs the option 'filename', the path of the file.")
        config = self.node.config
        file = await run_opening(self._open_file, self.filename, config, unwanted=HostFile.close)
        try:
            self.locks = self._make_locks(file.fd, config)
        except BaseException:
            file.close()
            raise
        self.file, self.ranges = file, self.ranges_type(file.fd, self.filename)
        config.read_only = file.read_only

    async def close(self) -> None:
        try:
            self._cut_padding()
        finally:
            if self.locks is not None:
                self.locks.release()
            with self._errors("close"):
                self.file.close()

    def _open_file(self, path: str, config: NodeConfig) -> HostFile:
        """Open ``path`` as ``config`` says, if the driver can open that kind of file and the gate allows it. Does not
        change ``config``. Blocks."""
        with self._errors("open"):
            found = self._find(path)
        with found:
            if config.reference is not None:
                config.reference.check_file(found.fd)
            self._check_kind(found.mode)
            return self._open_found(found, config)

    def _find(self, path: str) -> Found:
        try:
            return Found(path)
        except FileNotFoundError:
            paths.absolute(path)  # says so if the working directory is what is missing
            raise
        except ValueError as exc:
            check_filename(self.filename)
            raise OptionError(f"{self.filename!r} is not a valid path: {exc}.") from exc

    def _open_found(self, found: Found, config: NodeConfig) -> HostFile:
        read_only = config.read_only
        flags = os.O_DIRECT if config.cache_direct else 0
        try:
            fd = self._open_descriptor(found, flags, read_only)
        except OSError as exc:
            if read_only or not config.auto_read_only or exc.errno not in _READ_ONLY_ERRORS:
                self._refuse_open(exc, config)
            read_only = True
            try:
                fd = self._open_descriptor(found, flags, read_only)
            except OSError as again:
                self._refuse_open(again, config)
        try:
            with self._errors("open"):
                return HostFile(fd, read_only, self._alignment(fd) if config.cache_direct else None)
        except BaseException:
            os.close(fd)
            raise

    def _check_kind(self, mode: int) -> None:
        """Raise OptionError unless this driver opens files of that mode."""
        if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
            kind = "block" if stat.S_ISBLK(mode) else "character"
            raise OptionError(
                f"'{self.filename}' is a {kind} device, but '{self.name}' opens regular files: use the driver "
                f"'host_device'."
            )
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
            raise HostError(f"'{self.filename}' is {kind_name(mode)}, expected a regular file.", errno=code)

    def _open_descriptor(self, found: Found, flags: int, read_only: bool) -> int:
        """Open for reading or for both. Blocks; raises OSError."""
        return found.open(flags | (os.O_RDONLY if read_only else os.O_RDWR))

    def _refuse_open(self, exc: OSError, config: NodeConfig) -> NoReturn:
        if exc.errno == errno.EINVAL and config.cache_direct:
            raise self._no_direct_io() from exc
        raise host_error(exc, self.filename, "open") from exc

    def _alignment(self, fd: int) -> Alignment:
        """Return the alignment that O_DIRECT needs. Blocks; raises OSError or NotSupportedError."""
        found = find_alignment(fd)
        if found is None:
            raise self._no_direct_io()
        return found

    def _no_direct_io(self) -> FusediskError:
        return NotSupportedError(
            f"The filesystem of '{self.filename}' has no O_DIRECT, which cache.direct=on asks for: use a cache "
            f"mode without it, such as writeback."
        )

    def _make_locks(self, fd: int, config: NodeConfig) -> ImageLocks | None:
        locking = self.options.locking
        if locking == "off":
            return None
        if config.force_share:
            self._tell_writer(fd)
            return None
        with self._errors("lock"):
            if image_locks.supported(fd):
                return ImageLocks(fd, self.filename)
        if locking == "on":
            raise NotSupportedError(
                f"The host cannot lock '{self.filename}' for us, which locking=on asks for: use locking=auto."
            )
        return None

    def _tell_writer(self, fd: int) -> None:
        """Warn once that the data may change during reads, unless only headers are read."""
        with self._errors("lock"):
            if not self.node.graph.look_only and image_locks.is_written(fd):
                log.warning(
                    "'%s' is being written to by another program: what you read may be out of date or inconsistent.",
                    self.filename,
                )

    # --- reopening --------------------------------------------------------------------------------------

    async def reopen_prepare(self, config: NodeConfig, options: Any) -> object:
        old = self.node.config
        if options != self.options or config.force_share != old.force_share:
            raise NotSupportedError(
                f"'{self.filename}' is open, so its filename, locking, aio and force-share cannot change."
            )
        if config.read_only == old.read_only and config.cache_direct == old.cache_direct:
            return None
        # By way of the open descriptor: the path may lead to another file by now. The gate has let this one through.
        place = f"/proc/self/fd/{self.file.fd}"
        granted = dataclasses.replace(config, reference=None)
        file = await run_opening(self._open_file, place, granted, unwanted=HostFile.close)
        config.read_only = file.read_only
        self._reopened = _Reopened(file)
        return self._reopened

    def reopen_commit(self, state: object) -> None:
        if not isinstance(state, _Reopened):
            return
        with contextlib.suppress(FusediskError):
            self._cut_padding()
        if self.locks is not None:
            self.locks.release()
        with contextlib.suppress(OSError):
            self.file.close()
        self.file, self.locks, self._reopened = state.file, state.locks, None
        self.ranges = self.ranges_type(self.file.fd, self.filename)
        self._flush_failure = None
        self.node.change_mapping()

    def reopen_abort(self, state: object) -> None:
        if isinstance(state, _Reopened):
            self._reopened = None
            with contextlib.suppress(OSError):
                state.file.close()

    # --- size, limits, permissions ----------------------------------------------------------------------

    async def length(self) -> int:
        with self._errors("look at"):
            return os.fstat(self.file.fd).st_size

    def refresh_limits(self, limits: Limits) -> None:
        alignment = self.file.alignment
        if alignment is not None:
            limits.request_alignment = alignment.request
            limits.memory_alignment = alignment.memory

    def check_permissions(self, perm: int, shared: int) -> None:
        if self.locks is None:
            return
        self.locks.check(perm, shared)
        if self._reopened is not None:
            try:
                self._reopened.locks = self.locks.moved_to(self._reopened.file.fd)
            except BaseException:
                self.locks.abort()
                raise

    def commit_permissions(self, perm: int, shared: int) -> None:
        if self.locks is not None:
            self.locks.commit()

    def abort_permissions(self) -> None:
        if self.locks is not None:
            self.locks.abort()

    # --- data -------------------------------------------------------------------------------------------

    async def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        file = self.file
        try:
            left = file.read_inline(buffers, offset)
            if left:
                await file.read(left, offset + total_length(buffers) - total_length(left))
        except OSError as exc:
            raise host_error(exc, self.filename, "read from") from exc

    async def pwritev(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        file = self.file
        try:
            left = file.write_inline(buffers, offset)
            if left:
                end = offset + total_length(buffers)
                with self._extension(end):
                    await file.write(left, end - total_length(left))
        except BaseException as exc:
            self._grew_in_part()
            if isinstance(exc, OSError):
                raise host_error(exc, self.filename, "write to") from exc
            raise

    def read_now(self, offset: int, buffer: Buffer) -> bool:
        file = self.file
        if file.alignment is not None:
            return False
        length = len(buffer)
        if file.nowait_reads and length <= INLINE_MAX:
            # A copy of the common case of read_inline, since this is the hottest path.
            try:
                if os.preadv(file.fd, (buffer,), offset, os.RWF_NOWAIT) == length:
                    return True
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    return False  # preadv says what it is
                file.nowait_reads = False
        try:
            return not file.read_inline((buffer,), offset)
        except OSError:
            return False  # preadv says what it is

    def write_now(self, offset: int, buffer: Buffer) -> bool:
        rest: Sequence[Buffer] = ()
        try:
            rest = self.file.write_inline((buffer,), offset)
            if not rest:
                return True
        except OSError:
            pass  # pwritev says what it is
        self._grew_in_part()
        done = len(buffer) - total_length(rest)
        if done:
            self.node.changed(offset, done, Change.WRITE)
        return False

    def _grew_in_part(self) -> None:
        """Note that an unfinished write left bytes behind the node's end that do not read as zeroes."""
        if self.file.alignment is None:
            with contextlib.suppress(OSError):
                self.node.length = max(self.node.length, os.fstat(self.file.fd).st_size)

    def resident_descriptor(self, offset: int, length: int) -> int | None:
        return self.file.fd if self.file.is_resident(offset, length) else None

    @contextlib.contextmanager
    def _extension(self, end: int) -> Iterator[None]:
        """Run a request that ends at ``end`` in a worker thread. With O_DIRECT it may leave the file longer than the
        node."""
        if self.file.alignment is None or end <= self.node.length:
            yield
            return
        self._extending += 1
        self._padded = True
        try:
            yield
        finally:
            self._extending -= 1

    def _cut_padding(self) -> None:
        """Cut off the bytes that alignment added behind the node's end.

        The node's length is exact only while no request extends the file, so after several extending requests the
        padding stays until the next flush.
        """
        alignment = self.file.alignment
        if not self._padded or self._extending or alignment is None:
            return
        length = self.node.length
        with self._errors("resize"):
            if length < os.fstat(self.file.fd).st_size < length + alignment.request:
                os.ftruncate(self.file.fd, length)
        self._padded = False

    def storage_descriptor(self) -> int | None:
        return self.file.fd

    def host_descriptor(self) -> int | None:
        return self.file.fd if self.file.alignment is None else None

    async def map(self, offset: int, length: int) -> Extent:
        fd, unit = self.file.fd, self.node.limits.request_alignment
        try:
            data = os.lseek(fd, offset, os.SEEK_DATA)
            if data >= offset + unit:
                return Extent(ZERO, min(length, (data - offset) & -unit), None, offset)
            hole = os.lseek(fd, data, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole up to the end of the file, or past it
                return Extent(ZERO, length, None, offset)
            if exc.errno == errno.EINVAL:  # the filesystem does not tell
                return Extent(DATA, length, None, offset)
            raise host_error(exc, self.filename, "look for holes in") from exc
        # Data may turn into a hole at any moment: another process punches one, or the filesystem writes back delayed
        # allocations. The answer "data" is never wrong.
        return Extent(DATA, min(length, (max(hole - offset, 1) + unit - 1) & -unit), None, offset)

    # --- other requests ---------------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        may_free = bool(flags & MAY_UNMAP) and self.node.config.discard == "unmap"
        with self._extension(offset + length):
            await self.ranges.zero(offset, length, may_free=may_free)

    async def preallocate(self, offset: int, length: int) -> None:
        await self.ranges.reserve(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await self.discard_ranges(((offset, length),))

    async def discard_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        if self.node.config.discard == "unmap":
            await self.ranges.free(ranges)

    async def flush_to_disk(self) -> None:
        if self.node.config.cache_no_flush:
            return
        self._cut_padding()
        if self._flush_failure is not None:
            reason = os.strerror(self._flush_failure.errno or 0)
            raise HostError(
                f"Could not flush '{self.filename}': an earlier flush failed ({reason}) and may have lost data, "
                f"reopen it to go on.",
                errno=self._flush_failure.errno,
            )
        pace, node = self.file.flush_pace, self.node
        start = time.perf_counter()
        try:
            if is_at_once() and pace.is_quick(node.completed_writes - node.writes_flushed):
                os.fdatasync(self.file.fd)
            else:
                await flush_file(self.file.fd)
            pace.measured(time.perf_counter() - start)
        except OSError as exc:
            if self.file.alignment is None:  # O_DIRECT leaves nothing in the page cache that could be dropped
                self._flush_failure = exc
            raise host_error(exc, self.filename, "flush") from exc

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        self._cut_padding()
        if preallocation != "off" or length < self.node.length or not self._grow_now(length):
            await resize_file(self.file.fd, length, preallocation, self.filename)

    def _grow_now(self, length: int) -> bool:
        """Extend the file by a hole, if that is possible without waiting."""
        start = time.perf_counter()
        if not self.file.pace.is_quick(start):
            return False
        try:
            os.ftruncate(self.file.fd, length)
        except OSError:
            return False  # resize_file says what it is
        now = time.perf_counter()
        self.file.pace.measured(now, now - start)
        return True

    # --- information ------------------------------------------------------------------------------------

    async def allocated_size(self) -> int | None:
        with self._errors("look at"):
            return os.fstat(self.file.fd).st_blocks * 512

    def has_zero_init(self) -> bool:
        return True

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turn OSError into ``Could not {doing} 'x': …``. Not for the hot path."""
        try:
            yield
        except OSError as exc:
            raise host_error(exc, self.filename, doing) from exc

    # --- creation ---------------------------------------------------------------------------------------

    @classmethod
    async def create_file(cls, filename: str, size: int, preallocation: str, nocow: bool) -> None:
        await create_regular_file(filename, size, preallocation, nocow)
