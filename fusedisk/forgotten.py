"""Disks that were forgotten without closing them: the trio run that they are of closes them."""

from __future__ import annotations

import logging
import os
from collections import deque
from contextlib import suppress

import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.core.locks import Signal

log = logging.getLogger(__name__)


class Forgotten:
    """The forgotten disks of one trio run."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._token = trio.lowlevel.current_trio_token()
        self._backends: deque[Backend] = deque()
        self._some = Signal()
        self._closing = trio.Lock()
        trio.lowlevel.spawn_system_task(self._work, name="closing forgotten disks")

    def add(self, backend: Backend) -> bool:
        """Have it closed soon, as far as the run has not ended. False: it is closed, or is that of another process.

        For ``__del__``, so in any thread and between any two of its steps, with whatever locks held: it never waits.
        """
        if backend.root is None or self._process != os.getpid():
            return False
        self._backends.append(backend)
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._wake)
        return True

    def _wake(self) -> None:
        self._some.notify()

    async def _work(self) -> None:
        try:
            while True:
                await self._some.wait()
                await self.close()
        except trio.Cancelled:  # the run's main task has ended
            await self.close()
            raise

    async def close(self) -> None:
        """Flush and close them all now."""
        if not self._backends and not self._closing.locked():
            return
        with trio.CancelScope(shield=True):
            async with self._closing:
                while self._backends:
                    backend = self._backends.popleft()
                    try:
                        await backend.graph.close()
                    except Exception as exc:
                        log.warning("closing '%s', which was forgotten, failed: %s", backend.name, exc)


_forgotten: trio.lowlevel.RunVar[Forgotten] = trio.lowlevel.RunVar("forgotten_disks")


def of_this_run() -> Forgotten:
    """The trio run's forgotten disks."""
    try:
        return _forgotten.get()
    except LookupError:
        _forgotten.set(found := Forgotten())
        return found
