"""The daemon behind a mount, as the commands that end it see it: ending it, and waiting until it has ended."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import time

from fusedisk.cli import waiting
from fusedisk.cli.output import tell
from fusedisk.core.errors import HostError, OperationBlockedError
from fusedisk.mount import holders, namespaces, own_mount, runtime
from fusedisk.mount.mountinfo import Mount
from fusedisk.mount.runtime import MountRecord

_LOOK_AFTER = 1.0
"""Seconds that a daemon has to end before we ask whether the filesystem is mounted elsewhere."""
_POLL = 0.05
"""Seconds between two looks at a record."""


class ServingProcess:
    """The process behind a mount, held by a descriptor so that its number cannot come to mean another."""

    def __init__(self, record: MountRecord) -> None:
        self.record = record
        self._pidfd: int | None = None
        if record.hidden:  # its number means nothing here
            return
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(record.pid)
        if not record.alive:  # the number had been taken by another process before we held it
            self._pidfd = None

    @classmethod
    def of(cls, mount: Mount) -> ServingProcess | None:
        """The daemon of a mount, None if it is dead or unknown."""
        record = runtime.find(mount.mountpoint, mount.user_id)
        return cls(record) if record is not None and record.alive else None

    def end_now(self) -> None:
        """Let it flush and end although the mount is in use. Raises HostError where that is not possible from here."""
        if self.record.hidden:
            raise HostError(
                f"the daemon of '{self.record.place}' (pid {self.record.pid} in another PID namespace) cannot be ended "
                f"from here: run the command where it was mounted."
            )
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

    def wait_ended(self, deadline: float | None, *, patient: bool = True) -> None:
        """Wait until the daemon has flushed, closed and ended.

        Raises HostError with what went wrong there, or where the time was too short. Where the filesystem is mounted
        elsewhere, too, that may take for ever: raises OperationBlockedError at once unless ``patient``.
        """
        if self._pidfd is not None:
            if not self._ends_within(_LOOK_AFTER, deadline):
                self._wait_on(deadline, patient=patient)
            os.close(self._pidfd)
        elif self.record.hidden:
            self._wait_hidden(deadline, patient=patient)
        left_behind = runtime.reread(self.record)
        if left_behind is not None:
            raise_error(left_behind)
            left_behind.remove()
            raise HostError(
                f"the daemon of '{self.record.place}' (pid {self.record.pid}) died before it had flushed everything."
            )

    def _wait_hidden(self, deadline: float | None, *, patient: bool) -> None:
        """The same for a daemon in another PID namespace, whose record alone tells whether it lives."""
        soon = time.monotonic() + _LOOK_AFTER
        while (found := runtime.reread(self.record)) is not None and found.alive:
            now = time.monotonic()
            if (deadline is not None and now >= deadline) or (now >= soon and not (patient or found.closing)):
                raise HostError(f"{self._state()} {self._reason()}, in another PID namespace.")
            time.sleep(_POLL)

    def _ends_within(self, seconds: float, deadline: float | None) -> bool:
        assert self._pidfd is not None
        remaining = waiting.left(deadline)
        return waiting.is_readable(self._pidfd, seconds if remaining is None else min(seconds, remaining))

    def _wait_on(self, deadline: float | None, *, patient: bool) -> None:
        assert self._pidfd is not None
        copies = self._copies()
        if copies:
            said = f"{self._state()} goes on for {holders.listed([str(copy) for copy in copies])}"
            if not patient:
                way = copies[0].way_to_unmount()
                raise OperationBlockedError(f"{said}: end that ({way}), or lose unwritten data with --force.")
            tell(f"{said}: waiting until that ends.")
        if not waiting.is_readable(self._pidfd, waiting.left(deadline), None if copies else self._word):
            raise HostError(f"{self._state()} {self._reason()}.")

    def _word(self) -> str:
        return f"{self._state()} {self._reason()}: waiting for that."

    def _state(self) -> str:
        """The beginning of a sentence."""
        record = self.record
        if not record.foreign and own_mount.is_at(record.place, record.device):
            return f"'{record.place}' is to end, but its daemon (pid {record.pid})"
        return f"'{record.place}' is unmounted, but its daemon (pid {record.pid})"

    def _reason(self) -> str:
        """Why the daemon is still there."""
        if self._is_closing():
            return "has not finished flushing"
        copies = self._copies()
        return f"goes on for {holders.listed([str(copy) for copy in copies])}" if copies else "has not ended yet"

    def _copies(self) -> list[namespaces.Copy]:
        """Return the filesystem's other mounts; none once the daemon closes its images or must end."""
        record = self.record
        if not record.device or self._is_closing() or own_mount.is_at(record.place, record.device):
            return []
        return namespaces.copies(record.device)

    def _is_closing(self) -> bool:
        found = runtime.reread(self.record)
        return found is None or found.closing


def raise_error(record: MountRecord) -> None:
    """Raise what the daemon had to say at its end, once."""
    if record.error is not None:
        record.remove()
        raise HostError(record.error)


def refuse_foreign(record: MountRecord) -> None:
    """Raise OperationBlockedError if the mount is in another mount namespace, where this process cannot unmount it."""
    if record.foreign:
        end = f"umount {shlex.quote(record.place)}" if record.loop is None else f"detach {record.loop}"
        way = f"{namespaces.enter(record.pid)} fusedisk {end}"
        raise OperationBlockedError(
            f"'{record.place}' is mounted in another mount namespace ({namespaces.of(record.pid)}), that of its daemon "
            f"(pid {record.pid}): end it there ({way}), or with --force and lose unwritten data."
        )
