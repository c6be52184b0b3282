"""Loop devices over the files of a mount (loop(4)): attaching, detaching, following the size of the file.

Everything here blocks, and most of it makes the kernel ask the daemon behind the file, so a daemon calls it from a
thread while it serves. No descriptor of a device is kept: a process that dies with the last one, and with its own
mount, would wait for itself while the kernel writes the device's dirty pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fusedisk.core.errors import HostError, NotSupportedError, host_error
from fusedisk.mount import device_nodes

SECTOR = 512
"""Unit of a block device's size in sysfs, in bytes, whatever its own sectors are."""

_CONTROL = "/dev/loop-control"
_SYSFS = Path("/sys/block")
_CLASS = Path("/sys/class/block")
"""Partitions, too."""
_LOOP_SET_FD = 0x4C00
_LOOP_CLR_FD = 0x4C01
_LOOP_SET_STATUS64 = 0x4C04
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_SET_CAPACITY = 0x4C07
_LOOP_SET_DIRECT_IO = 0x4C08
_LOOP_SET_BLOCK_SIZE = 0x4C09
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_READ_ONLY, _AUTOCLEAR, _PARTSCAN = 1, 4, 8
_INFO = struct.Struct("=5Q4I64s64s32s2Q")
"""``struct loop_info64``."""
_FLAGS = 8
"""Index of ``lo_flags`` in it."""
_CONFIG = struct.Struct(f"=2I{_INFO.size}s64x")
"""``struct loop_config``."""
_ATTEMPTS = 64
"""The number of free devices to try: another process may attach one first."""
_PATIENCE = 3.0
"""Seconds that a device may take to become free: udev and its like look at it now and then."""
_PAUSE = 0.02
_AT_FDCWD, _AT_STATX_FORCE_SYNC, _STATX_SIZE = -100, 0x2000, 0x200


class FlushError(HostError):
    """A loop device could not be flushed. The kernel tells of an input/output error whatever the reason is, such as a
    file without room."""


@dataclasses.dataclass(slots=True)
class LoopSettings:
    """How a loop device shall be; ``sector_size`` in bytes, ``direct_io``: ``on``, ``off``, or ``auto`` (on where the
    kernel can)."""

    sector_size: int = SECTOR
    direct_io: str = "auto"


# --- attaching ----------------------------------------------------------------------------------------------


def check() -> None:
    """Raise NotSupportedError or HostError where this process cannot attach loop devices at all."""
    if os.geteuid() != 0:
        raise HostError(
            "Attaching an image to a loop device needs root: use sudo, or 'fusedisk mount' for a file.",
            errno=errno.EPERM,
        )
    if not os.path.exists(_CONTROL):
        if any(_SYSFS.glob("loop[0-9]*")):
            raise NotSupportedError(
                f"{_CONTROL} is missing here, though this kernel has loop devices: pass the device into the container, "
                f"or make it (mknod {_CONTROL} c 10 237)."
            )
        raise NotSupportedError(f"{_CONTROL} is missing, so this kernel has no loop devices: load the module loop.")


def attach(path: str, settings: LoopSettings, *, read_only: bool = False) -> str:
    """Attach a free loop device to a file, with its partitions; returns its name, ``/dev/loopN``.

    Raises HostError; nothing stays attached then.
    """
    with _open(path, os.O_RDONLY if read_only else os.O_RDWR, "open") as file:
        device = _take_free(file, settings.sector_size, _PARTSCAN | (_READ_ONLY if read_only else 0), path)
    if settings.direct_io != "off":
        try:
            # A step of its own: with both in one a refusal can leave the device attached.
            _set_direct_io(device)
        except OSError as exc:
            if settings.direct_io == "on":
                detach(device, path, force=True)
                raise host_error(exc, device, "switch direct I/O on for") from exc
    return device


def _take_free(file: int, sector_size: int, flags: int, path: str) -> str:
    with _open(_CONTROL, os.O_RDWR, "open") as control:
        for _ in range(_ATTEMPTS):
            try:
                device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            except OSError as exc:
                raise host_error(exc, _CONTROL, "get a free loop device from") from exc
            if not device_nodes.has_node(device):
                raise NotSupportedError(
                    f"the kernel offers {device}, but this /dev has no such device, as in a container without udev or "
                    f"devtmpfs: pass it in, or make it ({device_nodes.mknod_command(device)})."
                )
            with _open(device, os.O_RDWR, "open") as loop:
                try:
                    _configure(loop, file, sector_size, flags, path)
                    return device
                except OSError as exc:
                    if exc.errno != errno.EBUSY:  # another process was faster
                        raise host_error(exc, path, f"attach {device} to") from exc
    raise HostError(f"Could not attach a loop device to '{path}': others took every free one.", errno=errno.EBUSY)


def _configure(loop: int, file: int, sector_size: int, flags: int, path: str) -> None:
    name = os.fsencode(path)[:63]
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
    try:
        fcntl.ioctl(loop, _LOOP_CONFIGURE, _CONFIG.pack(file, sector_size, info))
        return
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTTY):
            raise
    # Kernels before 5.8 want several steps; if something else was invalid, they say so again.
    fcntl.ioctl(loop, _LOOP_SET_FD, file)
    try:
        if sector_size != SECTOR:
            fcntl.ioctl(loop, _LOOP_SET_BLOCK_SIZE, sector_size)
        _set_status(loop, info)  # looks for partitions, in sectors of the right size
    except OSError:
        fcntl.ioctl(loop, _LOOP_CLR_FD)
        raise


def _set_status(loop: int, info: bytes) -> None:
    """LOOP_SET_STATUS64, which some kernels refuse as long as the device has pages in the cache."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.ioctl(loop, _LOOP_SET_STATUS64, info)
            return
        except OSError as exc:
            if exc.errno != errno.EAGAIN or time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE)


def _set_direct_io(device: str) -> None:
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _LOOP_SET_DIRECT_IO, 1)
    finally:
        os.close(fd)


# --- detaching ----------------------------------------------------------------------------------------------


def detach(device: str, path: str, *, force: bool = False, must_flush: bool = True) -> bool:
    """Flush a loop device and take it off the file at ``path``; True if that is so when this returns.

    False: somebody uses the device, and it is as it was. With ``force`` it is then taken off as soon as nobody does. A
    flush that fails is no obstacle then, nor without ``must_flush``. Nodes of its partitions go with it. Raises
    FlushError and HostError.
    """
    names = partitions(device)
    gone = _detach(device, path, force=force, must_flush=must_flush)
    if gone:
        device_nodes.remove_dead_nodes(names)
    return gone


def _detach(device: str, path: str, *, force: bool, must_flush: bool) -> bool:
    if backing_file(device) != path:
        return True
    try:
        # O_EXCL fails for what is mounted, used as swap or part of another device, its partitions included.
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC | (0 if force else os.O_EXCL))
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            return False
        if backing_file(device) != path:
            return True
        raise host_error(exc, device, "open") from exc
    try:
        _flush(fd, device, must_succeed=must_flush and not force)
        fcntl.ioctl(fd, _LOOP_CLR_FD)
    except OSError as exc:
        if exc.errno != errno.ENXIO:  # somebody else has detached it
            raise host_error(exc, device, "detach") from exc
    finally:
        os.close(fd)
    if force:
        return backing_file(device) != path
    if not _is_gone(device, path):
        _keep(device)
    return backing_file(device) != path


def _flush(fd: int, device: str, *, must_succeed: bool) -> None:
    try:
        os.fsync(fd)
    except OSError as exc:
        if must_succeed:
            raise FlushError(f"Could not flush '{device}': {exc.strerror}", errno=exc.errno) from exc


def _is_gone(device: str, path: str) -> bool:
    """Wait until a device that is to go when its last user closes it has gone."""
    deadline = time.monotonic() + _PATIENCE
    while backing_file(device) == path:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE)
    return True


def _keep(device: str) -> None:
    """Undo what detaching a device in use does: its last user would take it away."""
    with contextlib.suppress(OSError):
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            fields = list(_INFO.unpack(fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_INFO.size))))
            fields[_FLAGS] &= ~_AUTOCLEAR
            _set_status(fd, _INFO.pack(*fields))
        finally:
            os.close(fd)


# --- following the size of the file -------------------------------------------------------------------------


def follow_size(where: Callable[[], str], length: int) -> bool:
    """Give every loop device on a file the size that the file has; whether all have it now.

    ``where`` tells the file's path. ``length`` is what the file shall have, in bytes. The kernel may be in the middle
    of a resize itself, so what fails now may succeed later. Raises OSError where it never will.
    """
    attached = list(devices())
    if not attached:
        return True
    path = where()
    found = [device for device, file in attached if file == path]
    if found:
        _look_afresh(path)
    right = [_update_capacity(device, length) for device in found]
    return all(right)


def _update_capacity(device: str, length: int) -> bool:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _LOOP_SET_CAPACITY)
        _, _, _, offset, limit, *_ = _INFO.unpack(fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_INFO.size)))
    except OSError as exc:
        if exc.errno == errno.ENXIO:  # detached meanwhile
            return True
        raise
    finally:
        os.close(fd)
    wanted: int = max(0, length - offset)
    if limit:
        wanted = min(wanted, limit)
    return size_of(device) == wanted // SECTOR * SECTOR


def _look_afresh(path: str) -> None:
    """Let the kernel ask the daemon for the size of a file instead of believing what it has heard before."""
    found = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_FORCE_SYNC, _STATX_SIZE, found):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


# --- what sysfs tells ---------------------------------------------------------------------------------------


def backing_file(device: str) -> str | None:
    """The path of the file that a loop device is attached to, None where it is free or no loop device."""
    try:
        # As bytes: in text a carriage return in the name would become a line end.
        name = (_SYSFS / os.path.basename(device) / "loop/backing_file").read_bytes()
    except OSError:
        return None
    return os.fsdecode(name.removesuffix(b"\n"))


def devices() -> Iterator[tuple[str, str]]:
    """(``/dev/loopN``, path of its file) of every attached loop device, by number."""
    names = [entry.parent.parent.name for entry in _SYSFS.glob("loop*/loop/backing_file")]
    for name in sorted(names, key=lambda name: int(name.removeprefix("loop"))):
        path = backing_file(name)
        if path is not None:  # else detached while we looked
            yield f"/dev/{name}", path


def attached_to(path: str) -> list[str]:
    """The loop devices on the file at an absolute path without symbolic links."""
    return [device for device, file in devices() if file == path]


def partitions(device: str) -> list[str]:
    """The partitions of a device that the kernel knows, by number."""
    name = os.path.basename(device)
    found = [entry.parent.name for entry in (_SYSFS / name).glob(f"{name}p*/partition")]
    return [f"/dev/{part}" for part in sorted(found, key=lambda part: int(part.removeprefix(f"{name}p")))]


def whole(device: str) -> str:
    """The device that a partition belongs to; any other device itself."""
    entry = _CLASS / os.path.basename(device)
    if not (entry / "partition").exists():
        return device
    return f"/dev/{entry.resolve().parent.name}"


def size_of(device: str) -> int:
    """Size of a block device or partition in bytes."""
    return int((_CLASS / os.path.basename(device) / "size").read_text()) * SECTOR


@contextlib.contextmanager
def _open(path: str, flags: int, doing: str) -> Iterator[int]:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC)
    except OSError as exc:
        raise host_error(exc, path, doing) from exc
    try:
        yield fd
    finally:
        os.close(fd)
