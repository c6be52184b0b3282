"""``fusedisk umount``: unmounts, never while the mount is in use, and returns when everything is flushed."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fusedisk.cli.image import complete_file
from fusedisk.cli.output import tell
from fusedisk.core.errors import FusediskError

if TYPE_CHECKING:
    from fusedisk.cli.serving import ServingProcess
    from fusedisk.mount.mountinfo import Mount
    from fusedisk.mount.runtime import MountRecord

_PATIENCE = 10.0
"""Seconds that --force waits for flushing from outside: the daemon may hang."""


def _parse_seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Parse a time to wait. Refuses ``nan`` and ``inf``, which are numbers for Python but no times."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise click.BadParameter(f"it is '{value}', but must be a number of seconds, such as 0, 1.5 or 30.", ctx, param)
    return seconds


WAIT_OPTIONS = (
    click.option("--wait", is_flag=True, help="Wait until it is no longer in use."),
    click.option("--timeout", callback=_parse_seconds, metavar="S", help="Wait at most S seconds; implies --wait."),
)
"""The options of every command that ends mounts."""


def wait_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--wait`` and ``--timeout``."""
    for option in reversed(WAIT_OPTIONS):
        command = option(command)
    return command


@click.command(
    epilog="""\b
Examples:
  fusedisk umount /mnt/disk                       # names its users if it is in use
  fusedisk umount vm.qcow2 /mnt/other             # an image stands for its mount
  fusedisk umount --wait --timeout 30 /mnt/disk   # gives them half a minute
  fusedisk umount --force /mnt/disk               # flushes, then ends it; open handles get errors
  fusedisk umount --all"""
)
@click.argument("targets", metavar="[MOUNTPOINT|IMAGE]...", nargs=-1, shell_complete=complete_file)
@click.option("-a", "--all", "every", is_flag=True, help="Unmount all of your mounts, but not attached images.")
@wait_options
@click.option("--force", is_flag=True, help="Flush and end it even if it is in use.")
def command(targets: tuple[str, ...], every: bool, wait: bool, timeout: float | None, force: bool) -> None:
    """Unmount each MOUNTPOINT, or where IMAGE is mounted. When this returns, everything is flushed and the daemons have
    ended.

    If one of several cannot be unmounted, the others still are.
    """
    if every == bool(targets):
        raise click.UsageError("name what to unmount, or use --all." if not every else "--all takes no names.")
    deadline = None if timeout is None else time.monotonic() + timeout
    end = functools.partial(
        _unmount_any if every else _unmount_named, wait=wait or timeout is not None, deadline=deadline, force=force
    )
    from fusedisk.cli import exit_codes
    from fusedisk.cli.main import report

    names = _all_places() if every else list(targets)
    failed = False
    for name in names:
        try:
            end(name)
        except FusediskError as exc:
            if len(names) == 1:
                raise
            report(exc)
            failed = True
    if failed:
        raise click.exceptions.Exit(exit_codes.FAILED)


def _all_places() -> list[str]:
    """Return the places of this user's mounts without those of attached images: the newest first, as their images may
    lie on older ones. Then the places of former mounts whose daemons still run."""
    from fusedisk.mount import mountinfo, runtime

    user = os.geteuid()
    records = [record for record in runtime.records() if record.owner == user]
    attached = {record.device for record in records if record.loop is not None}
    found = [
        mount.mountpoint
        for mount in reversed(mountinfo.mounts())
        if (mount.fstype, mount.user_id) == (mountinfo.FSTYPE, user) and mount.device not in attached
    ]
    found += [record.place for record in records if record.alive and not record.mounted and not record.foreign]
    return list(dict.fromkeys(found))


def _unmount_any(place: str, *, wait: bool, deadline: float | None, force: bool) -> None:
    """Unmount one of all mounts, which may be gone already."""
    from fusedisk.mount import mountinfo, runtime

    if mountinfo.mount_at(place) is not None or runtime.find(place, os.geteuid()) is not None:
        unmount(place, wait, deadline, force=force)


def _unmount_named(name: str, *, wait: bool, deadline: float | None, force: bool) -> None:
    """Unmount what is at a path, or else the mount of the image with that name."""
    from fusedisk.cli.running import interruptible
    from fusedisk.mount import mountinfo, runtime

    with interruptible():
        place = mountinfo.absolute(name)
        is_place = mountinfo.mount_at(place) is not None or runtime.find(place) is not None
        record = None if is_place else _mount_of_image(name)
    if record is not None and record.foreign:
        _end_unmounted(record, place, wait, deadline, force=force)
        return
    unmount(place if record is None else record.place, wait, deadline, force=force)


def _mount_of_image(image: str) -> MountRecord | None:
    """Return this user's mount of an image, None without one. Raises NotMountedError if there are several."""
    from fusedisk.cli import finding
    from fusedisk.core.errors import NotMountedError
    from fusedisk.mount import holders, runtime

    own = [record for record in runtime.records() if record.owner == os.geteuid() and record.alive]
    found = finding.mounts_of_image(own, image)
    mounted = [record for record in found if record.loop is None]
    if len(mounted) > 1:
        places = holders.listed([f"'{record.place}'" for record in mounted])
        raise NotMountedError(f"'{image}' is mounted more than once, at {places}: say which one.")
    if found and not mounted:
        raise NotMountedError(f"'{image}' is not mounted but attached: use 'fusedisk detach {found[0].loop}'.")
    return mounted[0] if mounted else None


def unmount(path: str, wait: bool, deadline: float | None, *, force: bool) -> None:
    """Unmount what is at an absolute path, trying again until the deadline if ``wait``; return when the daemon has
    ended. Raises a FusediskError."""
    from fusedisk.cli import waiting

    with waiting.tell_when_interrupted(lambda: _state(path)):
        _unmount_at(path, wait, deadline, force=force)


def _state(path: str) -> str:
    """Return what an interrupted command leaves behind."""
    from fusedisk.mount import mountinfo, runtime

    if mountinfo.mount_at(path) is not None:
        return f"'{path}' is still mounted."
    record = runtime.find(path, os.geteuid())
    if record is not None and record.alive:
        return f"'{path}' is unmounted; its daemon (pid {record.pid}) goes on, and ends when everything is flushed."
    return f"'{path}' is unmounted."


def _unmount_at(path: str, wait: bool, deadline: float | None, *, force: bool) -> None:
    from fusedisk.cli import waiting
    from fusedisk.cli.serving import ServingProcess
    from fusedisk.mount import mountinfo

    mount = mountinfo.mount_at(path)
    if mount is None:
        _finish_unmounted(path, wait, deadline, force=force)
        return
    _check_ours(mount)
    daemon = ServingProcess.of(mount)
    if daemon is None:
        _unmount_without_daemon(mount)
        return
    if force:
        _end(daemon, deadline)
        return
    _flush(daemon.record, deadline)
    warnings = _of_changed_files(daemon.record)
    _unmount(mount, deadline if wait else time.monotonic(), daemon.record)
    for sentence in warnings:
        tell(sentence)
    daemon.wait_ended(waiting.with_a_moment(deadline), patient=wait)


def _of_changed_files(record: MountRecord) -> list[str]:
    """A sentence for each file of a written disk that was replaced or removed beneath the mount. A new name alone
    surprises nobody."""
    from fusedisk.mount import beneath

    found = []
    for export in record.exports:
        if not export.written:
            continue  # nothing was written, or only to a throw-away layer
        for changed in beneath.changed_files(record, export):
            if changed.state == "renamed":
                continue
            if changed.written:
                where = f"in '{changed.now}'" if changed.now is not None else "in the old file"
                lost = "lost, as the old file has no name any more"
                consequence = f"what was written to the mount is {lost if changed.nameless else where}"
            else:
                consequence = f"'{export.written[0]}' may not fit what is there now"
            found.append(f"{changed} while it was mounted at '{record.place}': {consequence}.")
    return found


def _flush(record: MountRecord, deadline: float | None) -> None:
    """Flush first, while the daemon is still there to retry, but not longer than until the deadline: the daemon may
    hang. Raises HostError, and OperationBlockedError if the time was too short."""
    from fusedisk.cli import flushing, waiting
    from fusedisk.core.errors import HostError, OperationBlockedError

    try:
        failure = flushing.flush(record, waiting.left(waiting.with_a_moment(deadline)))
    except TimeoutError as exc:
        raise OperationBlockedError(
            f"'{record.place}' stays mounted: its daemon (pid {record.pid}) did not flush it in time."
        ) from exc
    if failure is not None:
        raise HostError(
            f"'{failure.path}' could not be flushed ({os.strerror(failure.errno)}) and stays mounted: put that right "
            f"and try again, or lose unwritten data with --force.",
            errno=failure.errno,
        )


def _end(daemon: ServingProcess, deadline: float | None) -> None:
    """End a daemon although its mount is in use, after flushing as much as possible. Raises HostError."""
    warnings = _of_changed_files(daemon.record)
    lost = _flush_what_can_be(daemon.record, deadline) if daemon.record.mounted or daemon.record.foreign else None
    daemon.end_now()
    for sentence in warnings:
        tell(sentence)
    daemon.wait_ended(deadline)
    if lost is not None:
        raise lost


def _flush_what_can_be(record: MountRecord, deadline: float | None) -> FusediskError | None:
    """Flush for a while, even if the daemon hangs; returns the error to report once the daemon has ended."""
    from fusedisk.cli import flushing, waiting
    from fusedisk.core.errors import HostError

    left = waiting.left(deadline)
    seconds = _PATIENCE if left is None else min(_PATIENCE, left / 2)
    try:
        failure = flushing.flush(record, seconds, loop_devices=True)
    except TimeoutError:
        return HostError(
            f"flushing '{record.place}' took too long, so it was ended early: data not written yet may be lost."
        )
    if failure is None:
        return None
    return HostError(
        f"'{failure.path}' could not be flushed ({os.strerror(failure.errno)}) before it was ended: data not written "
        f"yet is lost.",
        errno=failure.errno,
    )


def _check_ours(mount: Mount) -> None:
    from fusedisk.core.errors import NotMountedError
    from fusedisk.mount.mountinfo import FSTYPE

    if mount.fstype != FSTYPE:
        raise NotMountedError(
            f"'{mount.mountpoint}' is a mount of {mount.source} ({mount.fstype}), not of fusedisk: use umount."
        )


def _finish_unmounted(path: str, wait: bool, deadline: float | None, *, force: bool) -> None:
    """Finish where nothing is mounted: wait for a daemon that still flushes, or report the error that it left."""
    from fusedisk.cli import serving
    from fusedisk.core.errors import NotMountedError
    from fusedisk.mount import runtime

    record = runtime.find(path, os.geteuid())
    if record is None:
        _refuse_foreign_daemon(path)
        raise NotMountedError(f"nothing is mounted at '{path}'.")
    if record.alive:
        _end_unmounted(record, path, wait, deadline, force=force)
        return
    serving.raise_error(record)
    record.remove()
    raise NotMountedError(f"nothing is mounted at '{path}' any more.")


def _end_unmounted(record: MountRecord, path: str, wait: bool, deadline: float | None, *, force: bool) -> None:
    """Finish with a daemon that still runs, although nothing is mounted at ``path`` in this mount namespace."""
    from fusedisk.cli import serving
    from fusedisk.core.errors import NotMountedError

    daemon = serving.ServingProcess(record)
    if force:
        _end(daemon, deadline)
        return
    serving.refuse_foreign(record)
    if record.mounted:
        raise NotMountedError(f"nothing is mounted at '{path}' any more, but at '{record.place}': unmount that.")
    daemon.wait_ended(deadline, patient=wait)


def _refuse_foreign_daemon(path: str) -> None:
    """Raise NotMountedError if a living process of another user claims to have served a mount: any user can claim any
    place, so root believes only what is still mounted."""
    from fusedisk.core.errors import NotMountedError
    from fusedisk.mount import runtime

    record = runtime.find(path)
    if record is None or not record.alive:
        return
    if record.mounted:
        raise NotMountedError(f"nothing is mounted at '{path}' any more, but at '{record.place}': unmount that.")
    if record.foreign:
        raise NotMountedError(
            f"nothing is mounted at '{path}' here, but in the mount namespace of user {record.owner}'s process "
            f"{record.pid}."
        )
    raise NotMountedError(
        f"nothing is mounted at '{path}'; a process of user {record.owner} (pid {record.pid}) may still be flushing "
        f"what was, and is not waited for."
    )


def _unmount_without_daemon(mount: Mount) -> None:
    """Unmount without the record of a living daemon: either the daemon died, or its record was lost."""
    from fusedisk.mount import mountpoint, runtime, umount_calls

    record = runtime.find(mount.mountpoint, mount.user_id)
    if mountpoint.is_stale(mount):
        umount_calls.detach(mount.mountpoint)
        tell(f"the daemon of '{mount.mountpoint}' had died, its mount was cleaned up.")
    else:
        _unmount(mount, time.monotonic())
    if record is not None:
        record.remove()


def _unmount(mount: Mount, deadline: float | None, record: MountRecord | None = None) -> None:
    """Unmount, trying until the deadline; raises OperationBlockedError with the names of its users or cover."""
    from fusedisk.cli import waiting
    from fusedisk.mount import own_mount

    device = record.loop if record is not None else None
    end_that = "end that" if device is None else f"detach it (fusedisk detach {device})"

    def attempt() -> Callable[[], str] | None:
        found = own_mount.unmount_own(mount.mountpoint, mount.device)
        if found is None:
            return None
        return lambda: f"'{mount.mountpoint}' is {own_mount.describe(mount.mountpoint, found)}"

    waiting.until_free(attempt, deadline, end_that, grace=own_mount.VISIT)
