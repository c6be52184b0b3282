"""Flushes a mount through its files. The daemon cannot do that itself: the kernel holds data that programs wrote into
mappings, to loop devices and to filesystems on them."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from fusedisk.cli import waiting
from fusedisk.cli.background import let_go_of_caller
from fusedisk.mount import loop_device, loop_users
from fusedisk.mount.runtime import MountRecord


class Failure(NamedTuple):
    """A file that could not be flushed."""

    path: str
    errno: int


def flush(record: MountRecord, seconds: float | None, *, loop_devices: bool = False) -> Failure | None:
    """Flush the writable files of a mount, and with ``loop_devices`` first the devices attached to them. Returns the
    first failure. Raises TimeoutError if it did not end in time; None is no limit."""
    receiving, sending = os.pipe()
    # A process that waits for a daemon that hangs cannot even be killed, and its threads neither. It is left behind.
    child = os.fork()
    if child == 0:
        _run_child(record, sending, loop_devices)
    os.close(sending)
    with open(receiving, "rb") as pipe:
        ended = waiting.is_readable(
            pipe.fileno(),
            seconds,
            lambda: f"flushing '{record.place}', which its daemon (pid {record.pid}) is slow to do.",
        )
        answer = pipe.read() if ended else b""
    if not answer:
        os.kill(child, signal.SIGKILL)
        raise TimeoutError
    os.waitpid(child, 0)
    failures = json.loads(answer)
    return Failure(*failures[0]) if failures else None


def _run_child(record: MountRecord, sending: int, loop_devices: bool) -> NoReturn:
    try:
        let_go_of_caller({sending})
        failures: list[Failure] = []
        if not record.thrown_away:
            failures += _flush_loop_devices(record) if loop_devices else []
            failures += _flush_files(record)
        os.write(sending, json.dumps(failures).encode())
    finally:
        os._exit(0)


def _flush_files(record: MountRecord) -> Iterator[Failure]:
    for export in record.exports:
        if not export.read_only:
            # On a regular file the mount is the disk.
            place = record.reached(record.place)
            path = f"{place}/{export.name}" if os.path.isdir(place) else place
            yield from _flush_file(path)


def _flush_loop_devices(record: MountRecord) -> Iterator[Failure]:
    for device, path in loop_device.devices():
        if path == record.place or path.startswith(f"{record.place}/"):
            loop_users.flush_filesystems(device)
            # What was written to a partition is held apart from what was written to the whole.
            for name in (*loop_device.partitions(device), device):
                yield from _flush_file(name)


def _flush_file(path: str) -> Iterator[Failure]:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return  # it is another user's, or gone
    try:
        os.fsync(file)
    except OSError as exc:
        if exc.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            yield Failure(path, exc.errno or errno.EIO)
    finally:
        os.close(file)
