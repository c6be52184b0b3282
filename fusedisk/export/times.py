"""The times of one file, so that backup tools skip a disk that did not change.

mtime and ctime are the newest mtime of the files of the image's chain. They are looked up when the image is opened and
again after a guest-visible write or the flush of one, not after other writes to the image (copy-on-read), and they are
the same in the next mount. An image whose files do not show that they were written (a device node, a file without a
name) gets the time of the last write from our clock.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable

from fusedisk.core.offload import run_host_io
from fusedisk.export.family import Family


class Times:
    """mtime and ctime of one export. ``files`` names the files of its chain, ``notify`` is called when the kernel's
    cached attributes are stale without its knowledge."""

    __slots__ = ("_changed", "_files", "_notify", "_own_clock", "_reported", "ctime_ns", "family", "mtime_ns")

    def __init__(self, files: Callable[[], list[str | None]], notify: Callable[[], None]) -> None:
        self.mtime_ns = 0
        self.ctime_ns = 0
        self.family = Family()
        self._files = files
        self._notify = notify
        self._own_clock = False
        self._changed = False
        """There were guest-visible writes, or a flush of them, since the files' times were last read."""
        self._reported = False
        """The kernel has the current attributes cached: no request since then has made it forget them."""

    async def start(self, written: list[str | None]) -> None:
        """Read the times for the first time. ``written``: the files that writes reach."""
        self._own_clock = not await run_host_io(_all_regular, written)
        await self._look_at_files()

    def join(self, other: Times) -> None:
        """Take the times of another file that shows the same bytes, now and after each write."""
        self.family.up_to_date.discard(self)
        self.family = other.family
        self._own_clock = other._own_clock
        self.mtime_ns, self.ctime_ns = other.mtime_ns, other.ctime_ns
        self._mark_up_to_date()

    def leave(self) -> None:
        """Have no part in the family any more, but in one of its own."""
        self.family.up_to_date.discard(self)
        self.family = Family()

    def touch(self) -> None:
        """Note that content has changed or is about to."""
        self._changed = True
        self._reported = False
        family = self.family
        if self._own_clock:
            family.written_ns = time.time_ns()
        if family.up_to_date:
            for times in family.up_to_date:
                times._changed = True
                if times._reported:
                    times._reported = False
                    times._notify()
            family.up_to_date.clear()

    async def image_written(self) -> None:
        """Note that the image's files were written without a request of the guest, so they may have new times."""
        if self._own_clock:
            return
        self._changed = True
        for times in [self, *self.family.up_to_date - {self}]:
            times._changed = True
            self.family.up_to_date.discard(times)
            if times._reported:
                before = times.mtime_ns
                await times._look_at_files()
                if times.mtime_ns != before:
                    times._notify()

    async def report(self) -> None:
        """Make the times current, for an answer that the kernel will cache."""
        self._reported = True  # first, so that the kernel hears of changes that come while the times are read
        if not self._changed:
            return
        if self._own_clock:
            self.mtime_ns = self.ctime_ns = self.family.written_ns
            self._mark_up_to_date()
        else:
            await self._look_at_files()

    def set_mtime(self, mtime_ns: int) -> None:
        """Set the modification time until the next write."""
        self._mark_up_to_date()
        self.mtime_ns = mtime_ns
        self.attributes_changed()

    def pin(self, mtime_ns: int) -> None:
        """Fix the modification time, whatever happens to the image's files. For exports that are never written to."""
        self.mtime_ns = self.ctime_ns = mtime_ns

    def attributes_changed(self) -> None:
        """Note a change of mode, owner or mtime."""
        self.ctime_ns = time.time_ns()

    def _mark_up_to_date(self) -> None:
        self._changed = False
        self.family.up_to_date.add(self)

    async def _look_at_files(self) -> None:
        """Set the times to the newest mtime of the chain's files."""
        self._mark_up_to_date()
        newest = await run_host_io(_newest_mtime, self._files())
        if newest:
            self.mtime_ns = self.ctime_ns = newest


def _newest_mtime(paths: list[str | None]) -> int:
    """Return the newest mtime in nanoseconds, 0 without any; missing and inaccessible files do not count. Blocks."""
    newest = 0
    for path in paths:
        if path is not None:
            try:
                newest = max(newest, os.stat(path).st_mtime_ns)
            except OSError:
                continue
    return newest


def _all_regular(paths: list[str | None]) -> bool:
    """Whether every path leads to a regular file, so that writes show in its mtime. Blocks."""
    for path in paths:
        try:
            if path is None or not stat.S_ISREG(os.stat(path).st_mode):
                return False
        except OSError:
            return False
    return bool(paths)
