"""Operations that tests can watch, suspend and break: what the drivers for tests go through before they act.

``steps.hold("write")`` makes the next write wait until the test lets it go on, so that a test chooses an interleaving
instead of hoping for one. ``steps.fail("write", NoSpaceError(...))`` makes it raise.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import trio


class Call(NamedTuple):
    """One operation that reached a driver."""

    operation: str
    offset: int
    length: int
    flags: int = 0


@dataclasses.dataclass(eq=False)
class Hold:
    """An operation to suspend: ``reached`` is set when it is there, it goes on once ``release`` was called."""

    operation: str
    offset: int | None
    reached: trio.Event = dataclasses.field(default_factory=trio.Event)
    _resume: trio.Event = dataclasses.field(default_factory=trio.Event)

    def release(self) -> None:
        """Let it go on."""
        self._resume.set()

    async def _wait(self) -> None:
        self.reached.set()
        await self._resume.wait()


@dataclasses.dataclass(eq=False)
class Fault:
    """An operation to break with ``error``, ``times`` times after ``skip`` harmless ones."""

    operation: str
    error: BaseException
    skip: int = 0
    times: int = 1


class Steps:
    """What happens to the operations of one driver for tests."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.running: dict[str, int] = {}
        """Operations under way by name."""
        self.eager = True
        """False: every operation gives way to other tasks once, so that requests interleave."""
        self._holds: list[Hold] = []
        self._faults: list[Fault] = []

    def hold(self, operation: str, offset: int | None = None) -> Hold:
        """Suspend the next ``operation`` (at ``offset``, if given)."""
        hold = Hold(operation, offset)
        self._holds.append(hold)
        return hold

    def fail(self, operation: str, error: BaseException, *, skip: int = 0, times: int = 1) -> None:
        """Let ``operation`` raise ``error`` after ``skip`` calls, ``times`` times."""
        self._faults.append(Fault(operation, error, skip, times))

    def heal(self) -> int:
        """Forget all faults that did not happen yet; returns how many."""
        left = len(self._faults)
        self._faults.clear()
        return left

    def of(self, *operations: str) -> list[Call]:
        """The calls of these operations, in order."""
        return [call for call in self.calls if call.operation in operations]

    async def take(self, operation: str, offset: int = 0, length: int = 0, flags: int = 0) -> None:
        """Called by a driver before it acts."""
        self.calls.append(Call(operation, offset, length, flags))
        self.running[operation] = self.running.get(operation, 0) + 1
        try:
            for hold in self._holds:
                if hold.operation == operation and hold.offset in (None, offset):
                    self._holds.remove(hold)
                    await hold._wait()
                    break
            if not self.eager:
                await trio.lowlevel.checkpoint()
            self._break(operation)
        finally:
            self.running[operation] -= 1

    def _break(self, operation: str) -> None:
        for fault in self._faults:
            if fault.operation != operation:
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            fault.times -= 1
            if not fault.times:
                self._faults.remove(fault)
            raise fault.error
