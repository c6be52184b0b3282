"""``fusedisk umount``: take a mount away, never from under somebody who uses it, and return when everything is
flushed."""

from __future__ import annotations

import math
import os
import select
import signal
import time
from typing import TYPE_CHECKING

import click

from fusedisk.cli.image import complete_file
from fusedisk.cli.output import tell

if TYPE_CHECKING:
    from fusedisk.core.errors import FusediskError
    from fusedisk.mount.mountinfo import Mount
    from fusedisk.mount.runtime import MountRecord

POLL = 0.3
"""Seconds between attempts with --wait."""
_LOOK_AFTER = 1.0
"""Seconds that a daemon has to end before anybody asks whether the filesystem is mounted elsewhere."""
_PATIENCE = 10.0
"""Seconds that --force gives to flushing from outside: the daemon may hang."""
_LONGEST = 2_000_000.0
"""Seconds; poll(2) counts milliseconds in 31 bits, and nobody sees whether three weeks were waited for or a year."""


def _parse_seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A time to wait; ``nan`` and ``inf`` are numbers for Python, and no times."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise click.BadParameter(
            f"it is '{value}', but a number of seconds was wanted, such as 0, 1.5 or 30.", ctx, param
        )
    return min(seconds, _LONGEST)


timeout_option = click.option("--timeout", callback=_parse_seconds, metavar="S", help="Wait no longer than S seconds.")


@click.command(
    epilog="""\b
Examples:
  fusedisk umount /mnt/disk                       # says who uses it if somebody does
  fusedisk umount --wait --timeout 30 /mnt/disk   # gives them half a minute
  fusedisk umount --force /mnt/disk               # flushes, then ends it; open handles get errors"""
)
@click.argument("mountpoint", shell_complete=complete_file)
@click.option("--wait", is_flag=True, help="Wait until nobody uses it any more.")
@timeout_option
@click.option("--force", is_flag=True, help="Flush and end it even if it is in use.")
def command(mountpoint: str, wait: bool, timeout: float | None, force: bool) -> None:
    """Unmount MOUNTPOINT. When this returns, everything is flushed and the daemon has ended."""
    from fusedisk.mount import mountinfo

    deadline = None if timeout is None else time.monotonic() + timeout
    unmount(mountinfo.absolute(mountpoint), wait or timeout is not None, deadline, force=force)


def unmount(path: str, wait: bool, deadline: float | None, *, force: bool) -> None:
    """Unmount what is at an absolute path, trying again until the deadline if ``wait``; return when the daemon has
    ended. Raises a FusediskError."""
    from fusedisk.mount import mountinfo

    mount = mountinfo.mount_at(path)
    if mount is None:
        _finish_unmounted(path, wait, deadline, force=force)
        return
    _check_ours(mount)
    daemon = _Daemon.of(mount)
    if daemon is None:
        _unmount_without_daemon(mount)
        return
    if force:
        _end(daemon, deadline)
        return
    _flush(daemon.record, deadline)
    _unmount(mount, deadline if wait else time.monotonic(), daemon.record)
    daemon.wait_ended(deadline, None if wait else mount.device)


def _flush(record: MountRecord, deadline: float | None) -> None:
    """See to it that all is written while there is still somebody to try again, but no longer than until the deadline:
    the daemon may hang. Raises HostError, and OperationBlockedError where the time was too short."""
    from fusedisk.cli import flushing
    from fusedisk.core.errors import HostError, OperationBlockedError

    try:
        failure = flushing.flush(record, _left(deadline))
    except TimeoutError as exc:
        raise OperationBlockedError(
            f"'{record.place}' stays mounted: its daemon (pid {record.pid}) did not flush it in time."
        ) from exc
    if failure is not None:
        raise HostError(
            f"'{failure.path}' could not be flushed ({os.strerror(failure.errno)}) and stays mounted: put that right "
            f"and try again, or lose what is not written with --force.",
            errno=failure.errno,
        )


def _end(daemon: _Daemon, deadline: float | None) -> None:
    """End a daemon although its mount is in use, with everything flushed that can be. Raises HostError."""
    lost = _flush_what_can_be(daemon.record, deadline) if daemon.record.mounted else None
    daemon.end_now()
    daemon.wait_ended(deadline)
    if lost is not None:
        raise lost


def _flush_what_can_be(record: MountRecord, deadline: float | None) -> FusediskError | None:
    """Flush for a while, even where the daemon hangs; returns what to say of a failure once the daemon has ended."""
    from fusedisk.cli import flushing
    from fusedisk.core.errors import HostError

    left = _left(deadline)
    seconds = _PATIENCE if left is None else min(_PATIENCE, left / 2)
    try:
        failure = flushing.flush(record, seconds, loop_devices=True)
    except TimeoutError:
        return HostError(
            f"'{record.place}' was ended before all of it was flushed, which took too long: what its users had not "
            f"written yet may be lost."
        )
    if failure is None:
        return None
    return HostError(
        f"'{failure.path}' could not be flushed ({os.strerror(failure.errno)}) before it was ended: what its users had "
        f"not written yet is lost.",
        errno=failure.errno,
    )


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _check_ours(mount: Mount) -> None:
    from fusedisk.core.errors import OptionError
    from fusedisk.mount.mountinfo import FSTYPE

    if mount.fstype != FSTYPE:
        raise OptionError(
            f"'{mount.mountpoint}' is a mount of {mount.source} ({mount.fstype}), not of fusedisk: use umount."
        )


def _finish_unmounted(path: str, wait: bool, deadline: float | None, *, force: bool) -> None:
    """Nothing is mounted: a daemon may still be flushing or serve other mounts, or may have left an error behind."""
    from fusedisk.core.errors import OptionError
    from fusedisk.mount import runtime

    record = runtime.find(path, os.geteuid())
    if record is None:
        _refuse_to_wait(path)
        raise OptionError(f"nothing is mounted at '{path}'.")
    if record.alive:
        if record.mounted and not wait and not force:
            raise OptionError(f"nothing is mounted at '{path}' any more, but at '{record.place}': unmount that.")
        daemon = _Daemon(record)
        if force:
            _end(daemon, deadline)
        else:
            daemon.wait_ended(deadline)
        return
    _tell_error(record)
    record.remove()
    raise OptionError(f"nothing is mounted at '{path}' any more.")


def _refuse_to_wait(path: str) -> None:
    """Raise OptionError where a living process of another user claims to have served a mount: anybody can claim that
    of any place, so root believes no more than what is still mounted."""
    from fusedisk.core.errors import OptionError
    from fusedisk.mount import runtime

    record = runtime.find(path)
    if record is None or not record.alive:
        return
    if record.mounted:
        raise OptionError(f"nothing is mounted at '{path}' any more, but at '{record.place}': unmount that.")
    raise OptionError(
        f"nothing is mounted at '{path}'; a process of user {record.owner} (pid {record.pid}) may still be flushing "
        f"what was, and is not waited for."
    )


def _unmount_without_daemon(mount: Mount) -> None:
    """No record of a living daemon: either it died, or the record was lost."""
    from fusedisk.mount import mountpoint, runtime, unmounting

    record = runtime.find(mount.mountpoint, mount.user_id)
    if mountpoint.is_stale(mount):
        unmounting.detach(mount.mountpoint)
        tell(f"the daemon of '{mount.mountpoint}' had died, its mount was cleaned up.")
    else:
        _unmount(mount, time.monotonic())
    if record is not None:
        record.remove()


def _unmount(mount: Mount, deadline: float | None, record: MountRecord | None = None) -> None:
    """Unmount, trying until the deadline; raises OperationBlockedError with the names of who uses or covers it."""
    from fusedisk.core.errors import OperationBlockedError
    from fusedisk.mount import leaving

    device = record.loop if record is not None else None
    end_that = "end that" if device is None else f"detach it (fusedisk detach {device})"

    while (obstacle := leaving.unmount_own(mount.mountpoint, mount.device)) is not None:
        if deadline is not None and time.monotonic() >= deadline:
            raise OperationBlockedError(
                f"'{mount.mountpoint}' is {leaving.describe(mount.mountpoint, obstacle)}: {end_that} first, wait with "
                f"--wait, or lose what they have not written with --force."
            )
        time.sleep(POLL)


def _tell_error(record: MountRecord) -> None:
    """Raise what the daemon had to say at its end, once."""
    from fusedisk.core.errors import HostError

    if record.error is not None:
        record.remove()
        raise HostError(record.error)


class _Daemon:
    """The process behind a mount, held by a descriptor so that its number cannot come to mean another."""

    def __init__(self, record: MountRecord) -> None:
        self.record = record
        try:
            self._pidfd: int | None = os.pidfd_open(record.pid)
        except ProcessLookupError:
            self._pidfd = None
        if not record.alive:  # the number had been taken by another process before we held it
            self._pidfd = None

    @classmethod
    def of(cls, mount: Mount) -> _Daemon | None:
        """The daemon of a mount, None if it is dead or unknown."""
        from fusedisk.mount import runtime

        record = runtime.find(mount.mountpoint, mount.user_id)
        return cls(record) if record is not None and record.alive else None

    def end_now(self) -> None:
        """Let it flush and end although the mount is in use."""
        from fusedisk.core.errors import HostError

        if self._pidfd is None:
            return
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGQUIT)
        except ProcessLookupError:
            pass
        except PermissionError as exc:
            raise HostError(
                f"the daemon of '{self.record.place}' (pid {self.record.pid}) is another user's, only that user "
                f"or root can end it.",
                errno=exc.errno,
            ) from exc

    def wait_ended(self, deadline: float | None, device: str | None = None) -> None:
        """Wait until the daemon has flushed, closed and ended; raises HostError with what went wrong there, and
        OperationBlockedError where it has to serve the filesystem ``device`` elsewhere."""
        from fusedisk.core.errors import HostError, OperationBlockedError
        from fusedisk.mount import holders, runtime

        if self._pidfd is not None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if device is not None and not poll.poll(_LOOK_AFTER * 1000) and (others := holders.elsewhere(device)):
                raise OperationBlockedError(
                    f"'{self.record.place}' is unmounted, but its daemon (pid {self.record.pid}) goes on for "
                    f"{holders.listed(others)}: end that, or lose what they have not written with --force."
                )
            left = _left(deadline)
            if not poll.poll(None if left is None else left * 1000):
                raise HostError(
                    f"'{self.record.place}' is unmounted, but its daemon (pid {self.record.pid}) has not finished "
                    f"flushing."
                )
            os.close(self._pidfd)
        left_behind = runtime.reread(self.record)
        if left_behind is not None:
            _tell_error(left_behind)
            left_behind.remove()
            raise HostError(
                f"the daemon of '{self.record.place}' (pid {self.record.pid}) died before it had flushed everything."
            )
