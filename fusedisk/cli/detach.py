"""``fusedisk detach``: take a loop device and the mount below it away, never from under somebody who uses it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import click

from fusedisk.cli.image import complete_file
from fusedisk.cli.umount import POLL, timeout_option, unmount

if TYPE_CHECKING:
    from fusedisk.mount.runtime import MountRecord


@click.command(
    epilog="""\b
Examples:
  fusedisk detach /dev/loop0                        # says who uses it if somebody does
  fusedisk detach vm.qcow2
  fusedisk detach --wait --timeout 30 /dev/loop0    # gives them half a minute
  fusedisk detach --force /dev/loop0                # flushes, then ends it; who uses it gets errors"""
)
@click.argument("target", metavar="DEVICE|IMAGE", shell_complete=complete_file)
@click.option("--wait", is_flag=True, help="Wait until nobody uses it any more.")
@timeout_option
@click.option("--force", is_flag=True, help="Flush and end it even if it is in use.")
def command(target: str, wait: bool, timeout: float | None, force: bool) -> None:
    """Detach the loop device DEVICE, or the one of IMAGE, from its image.

    When this returns, everything is flushed and the image is closed.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    detach_record(_find(target), wait=wait or timeout is not None, deadline=deadline, force=force)


def detach_record(record: MountRecord, *, wait: bool, deadline: float | None, force: bool) -> None:
    """Detach what was attached, trying until the deadline if ``wait``; raises OperationBlockedError and HostError."""
    _detach(record, deadline if wait else time.monotonic(), force)
    unmount(record.place, wait, deadline, force=force)


def _detach(record: MountRecord, deadline: float | None, force: bool) -> None:
    """Take the device off the mount's file, trying until the deadline; raises OperationBlockedError with the names of
    who uses it."""
    from fusedisk.core.errors import OperationBlockedError
    from fusedisk.mount import loop_device, loop_users

    assert record.loop is not None
    device = record.loop
    (export,) = record.exports
    path = f"{record.place}/{export.name}"
    if force:
        loop_users.flush_filesystems(device)
        loop_device.detach(device, path, force=True)
        return
    while loop_device.backing_file(device) == path:
        users = loop_users.users(device) + loop_users.openers(device)
        if not users:
            # Where the daemon has died, there is nobody left who could take what is not written.
            if loop_device.detach(device, path, force=not record.alive):
                return
            users = ["in use by something that cannot be seen from here"]
        if deadline is not None and time.monotonic() >= deadline:
            raise OperationBlockedError(
                f"'{device}' is {_list(users)}: end that first, wait with --wait, or lose what they have not written "
                f"with --force."
            )
        time.sleep(POLL)


def _list(users: list[str]) -> str:
    return f"{', '.join(users[:-1])} and {users[-1]}" if users[1:] else users[0]


def _find(target: str) -> MountRecord:
    """The mount that was attached as or from ``target``. Raises OptionError."""
    from fusedisk.core import paths
    from fusedisk.core.errors import OptionError
    from fusedisk.mount import loop_device, runtime

    records = runtime.records()
    attached = [record for record in records if record.loop is not None]
    path = paths.real(target)
    found = [record for record in attached if record.loop == path]
    # After a daemon's death and a hasty losetup -d its device may have become another's.
    found = [record for record in found if _stands(record)] or found
    found = found or _of_image(attached, target)
    if len(found) == 1:
        return found[0]
    if found:
        names = _list([record.loop or "" for record in found])
        raise OptionError(f"'{target}' is attached more than once, as {names}: say which one.")
    file = loop_device.backing_file(path)
    if file is not None:
        raise OptionError(f"'{target}' is on '{file}', and not by 'fusedisk attach': use 'losetup -d {target}'.")
    mounted = [record.place for record in _of_image(records, target)]
    if mounted:
        raise OptionError(f"'{target}' is not attached but mounted: use 'fusedisk umount {mounted[0]}'.")
    raise OptionError(f"'{target}' is not attached.")


def _stands(record: MountRecord) -> bool:
    from fusedisk.mount import loop_device

    file = loop_device.backing_file(record.loop or "")
    return file is not None and os.path.dirname(file) == record.place


def _of_image(records: list[MountRecord], image: str) -> list[MountRecord]:
    """The mounts of an image: of the file that it is now, whatever it was called then, or else of its name."""
    from fusedisk.mount import runtime

    identity = runtime.file_identity(image)
    if identity is not None:
        # A daemon has its file open, so that no other file can have become it.
        found = [
            record for record in records if record.alive and any(export.file == identity for export in record.exports)
        ]
        if found:
            return found
    return [record for record in records if _is_named(record, image)]


def _is_named(record: MountRecord, image: str) -> bool:
    from fusedisk.core import paths

    names = {export.image for export in record.exports}
    return image in names or paths.real(image) in {os.path.realpath(name) for name in names if os.path.isabs(name)}
