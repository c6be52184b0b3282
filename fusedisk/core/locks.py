"""A mutex whose free case does not suspend, and a signal that wakes the tasks that wait for it."""

from __future__ import annotations

from types import TracebackType

import trio

from fusedisk.core.at_once import refuse_to_wait


class Mutex:
    """Mutual exclusion between tasks, first come first served.

    ``trio.Lock`` costs a trip through the scheduler even when it is free; here ``acquire`` suspends only when
    someone else holds it. The owner hands it to the first waiter, so no waiter starves. Release is
    synchronous and needs no shield.
    """

    __slots__ = ("_lot", "locked")

    def __init__(self) -> None:
        self.locked = False
        self._lot: trio.lowlevel.ParkingLot | None = None

    async def acquire(self) -> None:
        """Take the mutex, waiting for its owner. Cancelled while waiting: not taken."""
        if not self.locked:
            self.locked = True
            return
        refuse_to_wait()
        if self._lot is None:
            self._lot = trio.lowlevel.ParkingLot()
        await self._lot.park()

    def release(self) -> None:
        """Give it to the first waiter, or free it."""
        if self._lot:
            self._lot.unpark()
        else:
            self.locked = False

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Signal:
    """Wakes the tasks that wait for something to happen; they look at it again and wait anew if need be.

    If no task waits, the next ``wait`` returns at once, however many signals there were. ``notify`` costs next to
    nothing while nobody waits.
    """

    __slots__ = ("_given", "_lot")

    def __init__(self) -> None:
        self._given = False
        self._lot: trio.lowlevel.ParkingLot | None = None

    def notify(self) -> None:
        """Wake all tasks that wait."""
        if self._lot:
            self._lot.unpark_all()
        else:
            self._given = True

    async def wait(self) -> None:
        """Wait for the next signal, or take the one that nobody has waited for."""
        refuse_to_wait()
        if self._given:
            await trio.lowlevel.checkpoint()
            self._given = False
            return
        if self._lot is None:
            self._lot = trio.lowlevel.ParkingLot()
        await self._lot.park()

    def clear(self) -> None:
        """Forget a signal that nobody has waited for."""
        self._given = False
