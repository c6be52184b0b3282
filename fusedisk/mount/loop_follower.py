"""Passes the new size of a disk on to all loop devices that are attached to its file."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from fusedisk.core.locks import Signal
from fusedisk.export.export import Export
from fusedisk.mount import loop_device

log = logging.getLogger(__name__)

_ATTEMPTS = 200
_PAUSE = 0.05
"""Seconds between attempts: while the kernel resizes the file itself (ftruncate), it believes the old size."""
_REST = 0.25
"""Seconds after which the devices are looked at again: a file that grows with each write is not followed each time."""


class LoopFollower:
    """Watches one export; ``path`` tells where its file is mounted, and blocks for a moment."""

    def __init__(self, export: Export, path: Callable[[], str]) -> None:
        self._export = export
        self._path = path
        self._resized = Signal()
        export.backend.on_resize.append(self._note)

    def _note(self, length: int) -> None:
        self._resized.notify()

    async def run(self) -> None:
        """Give the devices the size of the disk whenever that changes. Never returns."""
        while True:
            await self._resized.wait()
            await self.follow()
            await trio.sleep(_REST)

    def leave(self) -> None:
        """Hear of no new size any more."""
        self._export.backend.on_resize.remove(self._note)

    async def follow(self) -> None:
        """Give the devices the size of the disk now."""
        try:
            await self._follow()
        except OSError as exc:
            log.warning("'%s' was resized, but the loop devices on it could not be: %s", self._path(), exc)

    async def _follow(self) -> None:
        """In a thread, since the kernel asks us for the size meanwhile; left alone there when the mount ends."""
        for _ in range(_ATTEMPTS):
            length = 0 if self._export.empty else self._export.backend.length
            if await trio.to_thread.run_sync(loop_device.follow_size, self._path, length, abandon_on_cancel=True):
                return
            await trio.sleep(_PAUSE)
        log.warning("'%s' was resized, but the loop devices on it still have their old size", self._path())
