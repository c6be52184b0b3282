"""Scheduling of the data channel: how many requests are in flight, and when its reader lets other tasks run.

No I/O and no clock. Requests that are answered on the spot pass through :class:`Turns` only.
"""

from __future__ import annotations

from fusedisk.core.locks import Signal
from fusedisk.mount.nap import TICK

MOST_PLACES = 256
"""The most requests that are read and not answered yet."""
MOST_TASKS = 64
"""The most of them that are served at the same time."""
MOST_BYTES = 32 << 20
"""The most bytes of data that they hold."""

_REQUESTS = 64
"""The number of requests answered on the spot after which other work gets its turn."""
_LONGEST_TURN = 1e-3
"""Seconds after which other work gets its turn in any case: requests take very different times."""
_PATIENCE = 3e-3
"""Additional seconds for work of the event loop that the channel does not know of."""
_PATIENCE_NAPPING = _PATIENCE - 2 * TICK
"""The same before a nap, which may take two ticks of its own."""


class Turns:
    """How long the reader goes on without letting other tasks run. All times are seconds of one monotonic clock."""

    __slots__ = ("_end", "_requests")

    def __init__(self) -> None:
        self._requests = 0
        self._end = 0.0

    def begin(self, now: float) -> None:
        """Begin a turn: other tasks have just run."""
        self._requests = 0
        self._end = now + _LONGEST_TURN

    def is_over(self, now: float) -> bool:
        """Count a request; return whether it is time for tasks that are known to have work."""
        self._requests += 1
        return self._requests >= _REQUESTS or now >= self._end

    def is_long_over(self, now: float, napping: bool) -> bool:
        """Whether it is time for other tasks in any case. ``napping``: the reader is about to nap."""
        patience = _PATIENCE_NAPPING if napping else _PATIENCE
        return self._requests >= 16 * _REQUESTS or now >= self._end + patience


class Admission:
    """Bounds the requests in flight. A request first takes a place; it is served once there is room for it."""

    def __init__(self) -> None:
        self.places = 0
        """Requests that are read and not answered yet."""
        self._tasks = 0
        self._bytes = 0
        self._ended = Signal()

    async def take_place(self) -> None:
        """Wait until another request may be known of. While places are left, interrupts are read, too."""
        while self.places >= MOST_PLACES:
            await self._ended.wait()
        self.places += 1

    async def make_room(self) -> None:
        """Wait until another request may be served, and may hold data."""
        while self._tasks >= MOST_TASKS or self._bytes >= MOST_BYTES:
            await self._ended.wait()

    def begin(self, size: int) -> None:
        """Serve a request that holds ``size`` bytes."""
        self._tasks += 1
        self._bytes += size

    def end(self, size: int, *, begun: bool = True) -> None:
        """Give up a request's place and what it was served with, if that had ``begun``."""
        self.places -= 1
        if begun:
            self._tasks -= 1
            self._bytes -= size
        self._ended.notify()
