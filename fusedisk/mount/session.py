"""One FUSE mount of this process (pyfuse3 supports only one): mounting, serving, ending.

pyfuse3's own unmounting is lazy and would pull disks from under open files, so it is never used. Instead
:mod:`fusedisk.mount.own_mount` unmounts, the kernel then ends the connection, and :meth:`Session.serve` returns.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

from fusedisk.core.errors import HostError, host_error
from fusedisk.mount import mountinfo, own_mount, umount_calls
from fusedisk.mount.channel import Channel
from fusedisk.mount.face import MOST_FILES, MountFace
from fusedisk.mount.notifying import Notifier
from fusedisk.mount.operations import Operations
from fusedisk.mount.reply_pipe import ReplyPipe
from fusedisk.mount.settings import ServeSettings
from fusedisk.mount.splicing import fuse_descriptors, splice
from fusedisk.mount.wakefulness import Wakefulness

log = logging.getLogger(__name__)

MAX_TASKS = 128
"""Requests served at the same time by pyfuse3."""
MAX_NAME_TASKS = 8
"""The same if it serves only names and attributes, whose replies must all fit into a socket."""
READAHEAD_KIB = 1024
"""What the kernel reads ahead on a mount, if we may say so (root): FUSE's default of 128 KiB makes eight requests
of one."""


class Session:
    """A mount from ``start`` to ``close``."""

    def __init__(
        self, mountpoint: str, operations: Operations, options: set[str], settings: ServeSettings | None = None
    ) -> None:
        self.mountpoint = mountpoint
        self.operations = operations
        self._options = options
        self._settings = settings or ServeSettings()
        self._channel: Channel | None = None
        self._wakefulness: Wakefulness | None = None
        self._mount: mountinfo.Mount | None = None
        self._serving = False
        self._there = False
        """Whether there is a mount to remove at the end."""
        self._notifier = Notifier()
        self.face = MountFace(operations, self._notifier, self.place)
        """Lets files come, go and change while the mount serves."""

    def start(self) -> None:
        """Mount. Blocks for a moment; raises HostError with libfuse's message."""
        if self._settings.low_latency:
            self._wakefulness = Wakefulness()
        before = fuse_descriptors() if self._settings.channel else set()
        pipe = _reply_pipe() if self._settings.channel else None
        with _StderrCapture() as said:
            try:
                pyfuse3.init(self.operations, self.mountpoint, self._options)
            except RuntimeError as exc:
                reason = said.text() or str(exc)
                raise HostError(f"Could not mount on '{self.mountpoint}': {reason}") from exc
        self._mount = mountinfo.mount_at(self.mountpoint)
        self.face.device = self.device
        self._serving = self._there = True
        if self._settings.channel:
            try:
                spliced = splice(before)
            except HostError as exc:
                if pipe is not None:
                    pipe.close()
                log.warning("The data channel is off, so holes and discard are missing: %s", exc)
                return
            busy = self._wakefulness.busy if self._wakefulness is not None else None
            passthrough = self._settings.passthrough
            self._channel = Channel(self.operations, spliced, passthrough, pyfuse3.terminate, pipe, busy)
            self._notifier.channel = self._channel

    @property
    def device(self) -> str:
        """``major:minor`` of the mount's files, once it is mounted."""
        return self._mount.device if self._mount is not None else ""

    def place(self) -> str:
        """The current mountpoint. Blocks for a moment."""
        # The kernel reuses mount ids: once ours is gone, the id may belong to another mount.
        return mountinfo.place_of(self._mount) if self._mount is not None and self._serving else self.mountpoint

    @property
    def serving(self) -> bool:
        """Whether the mount is there, and its connection to the kernel."""
        return self._serving

    async def serve(self, ready: Callable[[], None]) -> None:
        """Serve until the mount is gone. ``ready`` is called once a ``stat`` from outside has been answered.

        Raises HostError if the connection to the kernel breaks.
        """
        try:
            await self._serve(ready)
        except BaseExceptionGroup as group:
            broken, others = group.split(HostError)
            if broken is None or others is not None:
                raise
            raise _first(broken) from group

    async def _serve(self, ready: Callable[[], None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_ready, ready)
            self.face.start(nursery)
            if self._channel is not None:
                nursery.start_soon(self._channel.run)
            if self._wakefulness is not None:
                nursery.start_soon(self._wakefulness.run)
            try:
                await pyfuse3.main(min_tasks=1, max_tasks=self._max_tasks())
            finally:
                self._serving = False
                self.face.stop()
                # Later its number may be that of another mount in its place: closing the images can take a while.
                self._there = own_mount.is_at(self.mountpoint, self.device)
                nursery.cancel_scope.cancel()

    def _max_tasks(self) -> int:
        if self._channel is not None:
            return MAX_NAME_TASKS
        # A write may wait until the kernel has dropped a page, and that until a read is served. The kernel lets one
        # write at a time into each file, so one task is left for reads.
        return MAX_TASKS + MOST_FILES

    def stop(self) -> None:
        """Make ``serve`` return although the mount still exists."""
        self.mountpoint = self.place()
        pyfuse3.terminate()

    def close(self) -> None:
        """Close the connection. A mount that still exists loses its server by this, so it is removed as well."""
        pyfuse3.close(unmount=False)
        if self._channel is not None:
            self._channel.close()
        if self._wakefulness is not None:
            self._wakefulness.close()
        if self._there and own_mount.is_on_top(self.mountpoint, self.device):
            umount_calls.detach(self.mountpoint)

    async def _wait_ready(self, ready: Callable[[], None]) -> None:
        try:
            await trio.to_thread.run_sync(os.stat, self.mountpoint, abandon_on_cancel=True)
        except OSError as exc:  # the connection was aborted, or the mount is covered by one that fails
            raise host_error(exc, self.mountpoint, "look at the mount") from exc
        self._raise_readahead()  # after INIT: the kernel overwrites it during negotiation
        ready()

    def _raise_readahead(self) -> None:
        if self._mount is None:
            return
        try:
            Path(f"/sys/class/bdi/{self._mount.device}/read_ahead_kb").write_text(str(READAHEAD_KIB))
        except OSError:
            pass


def _reply_pipe() -> ReplyPipe | None:
    try:
        return ReplyPipe()
    except OSError as exc:
        log.info("Large reads are copied twice, as there is no pipe for them: %s", exc)
        return None


def _first(group: BaseExceptionGroup[HostError]) -> HostError:
    """One of the errors of a group."""
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


def mount_options(images: list[str], *, read_only: bool, allow_other: bool) -> set[str]:
    """Options for libfuse. The kernel checks permissions; ``images`` become the source that /proc/mounts shows."""
    source = images[0] if len(images) == 1 else f"{images[0]} and {len(images) - 1} more"
    options = {f"fsname={_option_value(source)}", "subtype=fusedisk", "default_permissions"}
    if read_only:
        options.add("ro")
    if allow_other:
        options.add("allow_other")
    return options


def _option_value(text: str) -> str:
    """Return ``text`` for libfuse's option parser: commas and backslashes escaped, ASCII only."""
    plain = "".join(char if " " <= char <= "~" else "?" for char in text)[:1000]
    return plain.replace("\\", "\\\\").replace(",", "\\,")


class _StderrCapture:
    """Captures what C code writes to descriptor 2: libfuse reports its errors there."""

    def __enter__(self) -> _StderrCapture:
        sys.stderr.flush()
        self._saved = os.dup(2)
        self._kept = os.memfd_create("stderr")
        os.dup2(self._kept, 2)
        return self

    def __exit__(self, *error: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
        os.close(self._kept)

    def text(self) -> str:
        """Return the captured text in one line."""
        lines = os.pread(self._kept, 4096, 0).decode(errors="replace").splitlines()
        return "; ".join(line.strip() for line in lines if line.strip())
