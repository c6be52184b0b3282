"""``fusedisk detach``: detaches a loop device and unmounts the mount below it, never while the device is in use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from fusedisk.cli.image import complete_file
from fusedisk.cli.umount import unmount, wait_options

if TYPE_CHECKING:
    from fusedisk.mount.runtime import MountRecord

_REASON_SECONDS = 5.0
"""The most seconds for finding out why a device could not be flushed."""


@click.command(
    epilog="""\b
Examples:
  fusedisk detach /dev/loop0                        # names its users if it is in use
  fusedisk detach vm.qcow2
  fusedisk detach --wait --timeout 30 /dev/loop0    # gives them half a minute
  fusedisk detach --force /dev/loop0                # flushes, then ends it; its users get errors"""
)
@click.argument("target", metavar="DEVICE|IMAGE", shell_complete=complete_file)
@wait_options
@click.option("--force", is_flag=True, help="Flush and end it even if it is in use.")
def command(target: str, wait: bool, timeout: float | None, force: bool) -> None:
    """Detach the loop device DEVICE, or the one that it is a partition of, or the one of IMAGE, from its image.

    When this returns, everything is flushed and the image is closed.
    """
    from fusedisk.cli.running import interruptible

    deadline = None if timeout is None else time.monotonic() + timeout
    with interruptible():
        record = _find(target)
    detach_record(record, wait=wait or timeout is not None, deadline=deadline, force=force)


def detach_record(record: MountRecord, *, wait: bool, deadline: float | None, force: bool) -> None:
    """Detach what was attached, trying until the deadline if ``wait``; raises OperationBlockedError and HostError."""
    from fusedisk.cli import serving, waiting

    if not force:
        serving.refuse_foreign(record)
    with waiting.tell_when_interrupted(lambda: _state(record)):
        _detach(record, deadline if wait else time.monotonic(), force)
    unmount(record.place, wait, deadline, force=force)


def _state(record: MountRecord) -> str:
    """Return what an interrupted command leaves behind."""
    if _stands(record):
        return f"'{record.loop}' is still attached."
    return f"'{record.loop}' is detached, but the mount below it is still there: run the command again."


def _detach(record: MountRecord, deadline: float | None, force: bool) -> None:
    """Detach the device from the mount's file, trying until the deadline; raises OperationBlockedError with the names
    of its users."""
    from fusedisk.cli import waiting
    from fusedisk.mount import holders, loop_device, loop_users

    assert record.loop is not None
    device = record.loop
    (export,) = record.exports
    path = f"{record.place}/{export.name}"
    if force:
        loop_users.flush_filesystems(device)
        loop_device.detach(device, path, force=True)
        return

    def attempt() -> Callable[[], str] | None:
        if loop_device.backing_file(device) != path:
            return None
        users = loop_users.users(device) + loop_users.openers(device)
        if users:
            return lambda: f"'{device}' is {holders.listed(users)}"
        # If the daemon has died, unwritten data has nowhere to go.
        if _take_off(record, device, path):
            return None
        return lambda: f"'{device}' is in use by something that cannot be seen from here"

    waiting.until_free(attempt, deadline, "end that")


def _take_off(record: MountRecord, device: str, path: str) -> bool:
    """Detach a device that nobody seems to use; False where somebody does. Raises HostError where it cannot be
    flushed, and then it stays attached."""
    from fusedisk.cli import flushing
    from fusedisk.core.errors import HostError
    from fusedisk.mount import loop_device

    try:
        return loop_device.detach(device, path, force=not record.alive, must_flush=not record.thrown_away)
    except loop_device.FlushError as exc:
        try:
            failure = flushing.flush(record, _REASON_SECONDS)
        except TimeoutError:
            failure = None
        code = failure.errno if failure is not None else exc.errno
        raise HostError(
            f"'{device}' could not be flushed ({os.strerror(code)}) and stays attached: put that right and try again, "
            f"or lose unwritten data with --force.",
            errno=code,
        ) from exc


def _find(target: str) -> MountRecord:
    """Return the mount that was attached as or from ``target``. Raises NotMountedError."""
    from fusedisk.cli import finding
    from fusedisk.core import paths
    from fusedisk.core.errors import NotMountedError
    from fusedisk.mount import holders, loop_device, runtime

    records = runtime.records()
    attached = [record for record in records if record.loop is not None]
    path = loop_device.whole(paths.real(target))
    found = [record for record in attached if record.loop == path]
    # After a daemon's death and a hasty losetup -d its device may have become another's.
    found = [record for record in found if _stands(record)] or found
    found = found or finding.mounts_of_image(attached, target)
    if len(found) == 1:
        return found[0]
    if found:
        names = holders.listed([record.loop or "" for record in found])
        raise NotMountedError(f"'{target}' is attached more than once, as {names}: say which one.")
    file = loop_device.backing_file(path)
    if file is not None:
        raise NotMountedError(f"'{target}' is on '{file}', and not by 'fusedisk attach': use 'losetup -d {target}'.")
    mounted = [record.place for record in finding.mounts_of_image(records, target)]
    if mounted:
        raise NotMountedError(f"'{target}' is not attached but mounted: use 'fusedisk umount {mounted[0]}'.")
    raise NotMountedError(f"'{target}' is not attached.")


def _stands(record: MountRecord) -> bool:
    from fusedisk.mount import loop_device

    file = loop_device.backing_file(record.loop or "")
    return file is not None and os.path.dirname(file) == record.place
