"""Creating, growing, shrinking and preallocating host files.

Long work goes to worker threads in steps, so that it can be cancelled between them; whatever ends it early
leaves the file at its old length.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from fusedisk.block.model import permissions
from fusedisk.core import image_locks
from fusedisk.core.errors import NotSupportedError, OptionError, host_error
from fusedisk.core.host_open import Found, kind_name
from fusedisk.core.image_locks import ImageLocks
from fusedisk.core.offload import run_host_io, run_opening
from fusedisk.core.zeroes import ZEROES
from fusedisk.drivers.protocol.host_io import write_vector
from fusedisk.drivers.protocol.hostcalls import fallocate, set_nocow

PREALLOCATION_MODES = ("off", "falloc", "full")

_FALLOCATE_STEP = 1 << 30
_WRITE_STEP = 32 << 20


def check_preallocation(preallocation: str, filename: str) -> None:
    """Raise NotSupportedError for a mode that host files do not have."""
    if preallocation not in PREALLOCATION_MODES:
        raise NotSupportedError(
            f"'{filename}' is a host file and has no preallocation mode '{preallocation}', expected one of "
            f"{', '.join(PREALLOCATION_MODES)}."
        )


async def resize_file(fd: int, length: int, preallocation: str, filename: str) -> None:
    """Set the length of the file in bytes; space added reads as zeroes and is reserved as ``preallocation`` says.

    Raises NotSupportedError, NoSpaceError or HostError; the length is then the old one.
    """
    check_preallocation(preallocation, filename)
    old = os.fstat(fd).st_size
    if preallocation != "off" and length < old:
        raise OptionError(
            f"'{filename}' is to shrink from {old} to {length} bytes, so there is nothing to preallocate: "
            f"leave preallocation off."
        )
    try:
        if preallocation == "falloc":
            await _fallocate(fd, old, length)
        elif preallocation == "full":
            await _write_out(fd, old, length)
        else:
            await run_host_io(os.ftruncate, fd, length)
    except OSError as exc:
        _restore(fd, old)
        if preallocation == "falloc" and exc.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise NotSupportedError(
                f"The filesystem of '{filename}' cannot reserve space (fallocate), preallocation=full writes it "
                f"out instead."
            ) from exc
        raise host_error(exc, filename, "resize") from exc
    except BaseException:
        _restore(fd, old)
        raise


def _restore(fd: int, length: int) -> None:
    # The first failure is the one to report; nothing beyond `length` is in use.
    with contextlib.suppress(OSError):
        os.ftruncate(fd, length)


async def _fallocate(fd: int, start: int, end: int) -> None:
    for offset in range(start, end, _FALLOCATE_STEP):
        await run_host_io(fallocate, fd, 0, offset, min(_FALLOCATE_STEP, end - offset))


async def _write_out(fd: int, start: int, end: int) -> None:
    """Write real zeroes, through a descriptor of its own: ``fd`` may want aligned requests (O_DIRECT)."""
    target = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        for offset in range(start, end, _WRITE_STEP):
            await run_host_io(_write_zeroes, target, offset, min(_WRITE_STEP, end - offset))
        await run_host_io(os.fdatasync, target)
    finally:
        os.close(target)


def _write_zeroes(fd: int, offset: int, length: int) -> None:
    end = offset + length
    while offset < end:
        part = ZEROES[: end - offset]
        write_vector(fd, (part,), offset)
        offset += len(part)


async def create_regular_file(filename: str, size: int, preallocation: str, nocow: bool) -> None:
    """Make a file of ``size`` bytes that reads as zeroes.

    What was there is replaced, unless another process uses it (LockConflictError). A file that was not there before
    does not stay when this fails. ``nocow`` switches copy-on-write off where the filesystem has it.
    """
    check_preallocation(preallocation, filename)
    fd, created = await run_opening(_open_new, filename, unwanted=lambda opened: _drop_new(filename, *opened))
    try:
        await run_host_io(_empty, fd, filename, size, nocow)
        await resize_file(fd, size, preallocation, filename)
    except BaseException:
        _drop_new(filename, fd, created)
        raise
    os.close(fd)


def _drop_new(filename: str, fd: int, created: bool) -> None:
    """Close a file that is not to be after all, and take it away again if it is a new one."""
    os.close(fd)
    if created:
        with contextlib.suppress(OSError):
            os.unlink(filename)


def _open_new(filename: str) -> tuple[int, bool]:
    """A descriptor for the file to create, and whether it was not there before."""
    try:
        try:
            return os.open(filename, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), True
        except FileExistsError:
            return _open_existing(filename), False
    except OSError as exc:
        raise host_error(exc, filename, "create") from exc
    except ValueError as exc:
        raise OptionError(f"{filename!r} is not a valid path: {exc}.") from exc


def _open_existing(filename: str) -> int:
    try:
        found = Found(filename)
    except FileNotFoundError:  # a symbolic link to what is not there yet
        os.close(os.open(filename, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, 0o644))
        found = Found(filename)
    with found:
        if stat.S_ISDIR(found.mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(found.mode):
            raise OptionError(
                f"'{filename}' is {kind_name(found.mode)}, so it is not replaced: expected a regular file or a new one."
            )
        return found.open(os.O_RDWR)


def _empty(fd: int, filename: str, size: int, nocow: bool) -> None:
    """Empty the file, once it is sure that nobody uses it and that it can have ``size`` bytes; the lock lasts as long
    as ``fd``."""
    try:
        if image_locks.supported(fd):
            ImageLocks(fd, filename).check(
                permissions.WRITE | permissions.RESIZE, permissions.ALL & ~permissions.RESIZE
            )
        if size > os.fstat(fd).st_size:
            os.ftruncate(fd, size)
        os.ftruncate(fd, 0)
        if nocow:
            set_nocow(fd)
    except OSError as exc:
        raise host_error(exc, filename, "create") from exc
