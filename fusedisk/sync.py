"""The library for code outside trio: the same disk with plain blocking methods, and as a Python file.

All synchronous disks of a process share one background thread that runs trio. A call hands its request to that thread
and waits for the answer, so any number of threads may use one disk at once. The background thread ends with the main
thread, and closes what was left open first.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, TypeVarTuple, Unpack

import trio

from fusedisk import api, images, mounts
from fusedisk.api import Data, Disk
from fusedisk.arguments import AnyPath, fillable, readable, whole_number
from fusedisk.block.image.mapping import MapEntry
from fusedisk.block.model.extent import BlockStatus
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.core.errors import FusediskError, NoMediumError
from fusedisk.forgotten import of_this_run

_MAIN_THREAD_POLL_SECONDS = 0.5
_ENTRIES_AT_ONCE = 256
"""Map entries fetched with one hop to the background thread."""

_Args = TypeVarTuple("_Args")
_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")


class _Loop:
    """The background thread."""

    def __init__(self) -> None:
        self.process = os.getpid()
        """Which the thread runs in: a forked child has none of its parent's threads."""
        self.disks: set[Disk] = set()
        self._token: trio.lowlevel.TrioToken | None = None
        self._ready = threading.Event()
        # No daemon: the interpreter waits for it at exit, so that what was left open is flushed.
        self._thread = threading.Thread(target=trio.run, args=(self._main,), name="fusedisk", daemon=False)
        self._thread.start()
        self._ready.wait()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._ready.set()
        while threading.main_thread().is_alive():  # noqa: ASYNC110 - the end of a thread sets no event
            await trio.sleep(_MAIN_THREAD_POLL_SECONDS)
        for disk in list(self.disks):
            with contextlib.suppress(FusediskError):
                await disk.close()
        await of_this_run().close()

    def call(self, function: Callable[[*_Args], Awaitable[_Result]], *args: *_Args) -> _Result:
        """Run an async function in the background thread and wait for it."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("a synchronous disk was used in its own background thread, which would wait for itself")
        return trio.from_thread.run(function, *args, trio_token=self._token)


_loop: _Loop | None = None
_loop_lock = threading.Lock()


def _background() -> _Loop:
    global _loop
    with _loop_lock:
        if _loop is None:
            _loop = _Loop()
        return _loop


def _forget() -> None:
    """In a forked child the background thread does not run: start anew. Disks opened before are the parent's."""
    global _loop, _loop_lock
    _loop, _loop_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


class SyncDisk:
    """An open image as a flat disk, with blocking methods; made by :func:`open_sync`.

    Threads may share it, processes may not: the disk is the parent's, so in a forked child requests raise NoMediumError
    and closing does nothing. Methods, ranges and errors are those of :class:`fusedisk.api.Disk`. Inside a trio task use
    :func:`fusedisk.open` instead: these methods refuse to block its event loop (RuntimeError).
    """

    def __init__(self, loop: _Loop, disk: Disk) -> None:
        self._loop = loop
        self._disk = disk
        self._name = disk.filename

    def __del__(self) -> None:
        # In this order: at any moment one of the two lists has it, when the background thread ends.
        self._disk._forget(self)
        self._loop.disks.discard(self._disk)

    @property
    def size(self) -> int:
        """Length of the disk in bytes."""
        return self._disk.size

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._disk.writable

    @property
    def format(self) -> str:
        """The image's format, such as ``qcow2``."""
        return self._disk.format

    @property
    def filename(self) -> str:
        """A name that opens the same disk again."""
        return self._disk.filename

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``."""
        return self._call(self._disk.read, offset, length)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the whole of ``buffer`` from ``offset``."""
        self._call(self._disk.read_into, offset, buffer)

    def write(self, offset: int, data: Data, *, fua: bool = False) -> None:
        """Write all of ``data`` at ``offset``; ``fua``: it is on stable storage on return."""
        self._call(lambda: self._disk.write(offset, data, fua=fua))

    def write_compressed(self, offset: int, data: Data) -> None:
        """Write whole clusters of a qcow2 image, or up to the disk's end, compressed."""
        self._call(self._disk.write_compressed, offset, data)

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Make a range read as zeroes; ``may_unmap`` lets its space go."""
        self._call(lambda: self._disk.write_zeroes(offset, length, may_unmap=may_unmap))

    def discard(self, offset: int, length: int) -> None:
        """Give a range up."""
        self._call(self._disk.discard, offset, length)

    def flush(self) -> None:
        """On return all writes before are on stable storage."""
        self._call(self._disk.flush)

    def truncate(self, size: int, *, preallocation: api.Preallocation = "off") -> None:
        """Resize the disk; what is added reads as zeroes."""
        self._call(lambda: self._disk.truncate(size, preallocation=preallocation))

    def block_status(self, offset: int, length: int) -> BlockStatus:
        """Status of a prefix of the range."""
        return self._call(self._disk.block_status, offset, length)

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[MapEntry]:
        """All of a range, by default of the disk, as the entries of ``qemu-img map``."""
        while True:
            found = self._call(self._some_extents, start, length)
            yield from found
            if len(found) < _ENTRIES_AT_ONCE:
                return
            end = found[-1].start + found[-1].length
            start, length = end, None if length is None else start + length - end

    async def _some_extents(self, start: int, length: int | None) -> list[MapEntry]:
        """The first ones. Nothing in the background waits for somebody to come for the others."""
        found: list[MapEntry] = []
        async with contextlib.aclosing(self._disk.extents(start, length)) as entries:
            async for entry in entries:
                found.append(entry)
                if len(found) == _ENTRIES_AT_ONCE:
                    break
        return found

    def snapshots(self) -> list[SnapshotInfo]:
        """The internal snapshots that the image holds, the oldest first."""
        self._check_process()
        return self._disk.snapshots()

    def create_snapshot(
        self, name: str, *, vm_state_size: int = 0, vm_clock: int = 0, icount: int | None = None
    ) -> SnapshotInfo:
        """Keep what the disk holds now under a name."""
        make = self._disk.create_snapshot
        return self._call(lambda: make(name, vm_state_size=vm_state_size, vm_clock=vm_clock, icount=icount))

    def apply_snapshot(self, id_or_name: str) -> None:
        """Let the disk hold what it held when the snapshot was made."""
        self._call(self._disk.apply_snapshot, id_or_name)

    def delete_snapshot(self, name: str | None = None, *, id: str | None = None) -> None:
        """Delete a snapshot."""
        self._call(lambda: self._disk.delete_snapshot(name, id=id))

    def save_vmstate(self, offset: int, data: Data) -> None:
        """Write to the state of a virtual machine that the next snapshot shall hold."""
        self._call(self._disk.save_vmstate, offset, data)

    def load_vmstate(self, offset: int, length: int) -> bytes:
        """Read from the VM state that belongs to what the disk holds."""
        return self._call(self._disk.load_vmstate, offset, length)

    def info(self) -> dict[str, Any]:
        """The keys and values of ``qemu-img info --output=json``."""
        return self._call(self._disk.info)

    def info_chain(self) -> list[dict[str, Any]]:
        """:meth:`info` of the image and of each of its backing files, from the top down."""
        return self._call(self._disk.info_chain)

    def as_file(self) -> DiskFile:
        """The disk as an unbuffered binary file with a position of its own; see :class:`DiskFile`."""
        return DiskFile(self)

    def close(self) -> None:
        """Flush and close; the disk is closed even if that raises. Closing twice is fine."""
        if self._disk not in self._loop.disks or not self._is_ours():
            return
        self._loop.disks.discard(self._disk)
        self._call(self._disk.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except FusediskError as failure:
            if exc is None:
                raise
            exc.add_note(f"while closing the disk: {failure}")

    def _is_ours(self) -> bool:
        return self._loop.process == os.getpid()

    def _check_process(self) -> None:
        if not self._is_ours():
            raise NoMediumError(
                f"'{self._name}' belongs to process {self._loop.process}, open it again in this one ({os.getpid()})."
            )

    def _call(self, function: Callable[[*_Args], Awaitable[_Result]], *args: *_Args) -> _Result:
        self._check_process()
        try:
            return self._loop.call(function, *args)
        except trio.RunFinishedError as exc:
            raise NoMediumError("the disk was closed when the main thread ended.") from exc


def _open_like(prepare: Callable[_Params, AbstractAsyncContextManager[Disk]]) -> Callable[_Params, SyncDisk]:
    @functools.wraps(prepare, assigned=())
    def open_sync(*args: _Params.args, **kwargs: _Params.kwargs) -> SyncDisk:
        """Open an image: ``with fusedisk.open_sync("vm.qcow2") as disk``, or close it with :meth:`SyncDisk.close`.

        Takes the arguments of :func:`fusedisk.open`, and raises its errors at once.
        """
        loop = _background()
        opening = prepare(*args, **kwargs)

        async def enter() -> Disk:
            disk = await opening.__aenter__()
            loop.disks.add(disk)
            return disk

        return SyncDisk(loop, loop.call(enter))

    return open_sync


def _like(function: Callable[_Params, Awaitable[_Result]]) -> Callable[_Params, _Result]:
    """A blocking function with the arguments, the result and the errors of an async one."""

    @functools.wraps(function, assigned=())
    def blocking(*args: _Params.args, **kwargs: _Params.kwargs) -> _Result:
        return _background().call(lambda: function(*args, **kwargs))

    name = f"{function.__name__}_sync"
    blocking.__name__ = blocking.__qualname__ = name
    blocking.__doc__ = f"The same as :func:`fusedisk.{name.removesuffix('_sync')}`, for code outside trio."
    return blocking


open_sync = _open_like(api.open)
create_sync = _like(api.create)
amend_sync = _like(api.amend)
check_sync = _like(images.check)
map_sync = _like(images.map)
measure_sync = _like(images.measure)
resize_sync = _like(images.resize)


def mount_sync(
    images: api.Image | Sequence[api.Image], mountpoint: AnyPath, **options: Unpack[mounts.MountOptions]
) -> AbstractContextManager[mounts.Mount]:
    """Mount images: ``with fusedisk.mount_sync("vm.qcow2", "/mnt/disk") as mounted``; see :func:`fusedisk.mount`."""
    command = mounts.mount_command(images, mountpoint, options)
    return mounts.lasting_sync(command, mounts.read_mount, mounts.unmount_command)


def attach_sync(image: api.Image, **options: Unpack[mounts.DeviceOptions]) -> AbstractContextManager[mounts.Attachment]:
    """Attach an image: ``with fusedisk.attach_sync("vm.qcow2") as attached``; see :func:`fusedisk.attach`."""
    command = mounts.attach_command(image, options)
    return mounts.lasting_sync(command, mounts.read_attachment, mounts.detach_command)


def umount_sync(mountpoint: AnyPath, **options: Unpack[mounts.LeaveOptions]) -> None:
    """Unmount; see :func:`fusedisk.umount`."""
    mounts.run_sync(mounts.leave_command("umount", mountpoint, options))


def detach_sync(device_or_image: AnyPath, **options: Unpack[mounts.LeaveOptions]) -> None:
    """Detach; see :func:`fusedisk.detach`."""
    mounts.run_sync(mounts.leave_command("detach", device_or_image, options))


def list_sync() -> tuple[mounts.Mount, ...]:
    """What is mounted; see :func:`fusedisk.list`."""
    return mounts.read_list(mounts.run_sync(mounts.LIST_COMMAND))


class DiskFile(io.RawIOBase):
    """A disk as a binary file: ``seek``, ``read``, ``readinto``, ``write``, ``truncate``, for whatever takes one
    (``zipfile``, ``shutil``, forensic libraries).

    It ends where the disk ends: reads there are short or empty, a write that starts there fails with ENOSPC.
    ``truncate`` resizes the disk. Errors are OSError with the errno and sentence of the FusediskError that caused them.
    ``flush`` does nothing, as on any unbuffered file; :meth:`SyncDisk.flush` reaches the disk. Closing the file leaves
    the disk open. Each call is a hop to another thread: wrap it in ``io.BufferedReader`` for many small reads. One file
    has one position, so give each thread its own.
    """

    def __init__(self, disk: SyncDisk) -> None:
        super().__init__()
        self._disk = disk
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def writable(self) -> bool:
        """As the disk."""
        return self._disk.writable

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; positions past the end are allowed."""
        self._check_open()
        offset, whence = whole_number("offset", offset), whole_number("whence", whence)
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._disk.size}.get(whence)
        if start is None:
            raise ValueError(f"whence is {whence}, expected one of SEEK_SET, SEEK_CUR and SEEK_END.")
        if start + offset < 0:
            raise OSError(errno.EINVAL, f"cannot seek to {start + offset}, before the start of the disk")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """The position in bytes."""
        self._check_open()
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as the disk reaches; returns how many bytes that were."""
        self._check_open()
        view = fillable("buffer", buffer)
        with _as_os_errors():
            length = max(0, min(len(view), self._disk.size - self._position))
            if length:
                self._disk.read_into(self._position, view[:length])
        self._position += length
        return length

    def write(self, data: Any) -> int:
        """Write as far as the disk reaches; returns how many bytes that were."""
        self._check_open()
        if not self.writable():
            raise io.UnsupportedOperation("the disk is open read-only")
        view = readable("data", data)
        with _as_os_errors():
            length = max(0, min(len(view), self._disk.size - self._position))
            if len(view) and not length:
                raise OSError(errno.ENOSPC, f"the disk ends at {self._disk.size}, nothing can be written behind that")
            if length:
                self._disk.write(self._position, view[:length])
        self._position += length
        return length

    def truncate(self, size: int | None = None) -> int:
        """Resize the disk, to the position if ``size`` is None; the position stays."""
        self._check_open()
        if not self.writable():
            raise io.UnsupportedOperation("the disk is open read-only")
        size = self._position if size is None else whole_number("size", size)
        with _as_os_errors():
            self._disk.truncate(size)
        return size

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except FusediskError as exc:
        raise OSError(exc.errno, str(exc)) from exc
