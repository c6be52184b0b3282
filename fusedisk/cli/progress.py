"""Shows the progress of a command: a bar on a terminal, lines for programs.

A bar shows up once a command has taken :data:`PATIENCE` seconds, so that quick ones neither flicker nor import rich.
``--progress`` shows it at once, and where stderr is no terminal it prints a line for each percent, such as
``(12.00/100%)``, the form of qemu-img.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import click

from fusedisk.cli.output import tell_lines

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE = 0.1
"""Seconds after which a bar is made. Importing what draws it takes as long again: a user waits for less than 0.3."""

_POLL_SECONDS = 0.2
"""How often a file is looked at that grows."""

_Command = TypeVar("_Command", bound=Callable[..., object])
Tell = Callable[[int, int], None]
"""Takes how much is done, and how much there is to do."""


def progress_option(command: _Command) -> _Command:
    """``--progress``."""
    return click.option(
        "-p",
        "--progress",
        "progress",
        is_flag=True,
        help="Show progress: a bar on a terminal, otherwise a line for each percent on stderr.",
    )(command)


@contextlib.contextmanager
def progress(
    description: str, total: int, *, asked: bool = False, shown: bool = True, bytes: bool = True
) -> Iterator[Tell]:
    """Yield a function that takes the progress, and show that on stderr. ``asked``: the user has given ``--progress``;
    with ``shown`` False it is shown only then. Without ``bytes`` only the percentage is shown, not the numbers."""
    terminal = sys.stderr.isatty()
    if asked and not terminal:
        lines = _Lines()
        lines.tell(0, total)
        yield lines.tell
        lines.end()
    elif terminal and (asked or shown):
        bar = _Bar(description, total, bytes)
        bar.begin(0 if asked else PATIENCE)
        try:
            yield bar.tell
        finally:
            bar.end()
    else:
        yield lambda done, total: None


@contextlib.asynccontextmanager
async def allocation_progress(
    description: str, filename: str, total: int, *, asked: bool = False
) -> AsyncIterator[None]:
    """Show how much a file grows on the host, of ``total`` bytes from now on. With 0, only that it takes time."""
    import trio

    async def watch() -> None:
        before = _allocated(filename)
        while True:
            await trio.sleep(_POLL_SECONDS)
            tell(min(_allocated(filename) - before, total), total)

    with progress(description, total or 1, asked=asked, bytes=bool(total)) as tell:
        async with trio.open_nursery() as nursery:
            if total:
                nursery.start_soon(watch)
            yield
            nursery.cancel_scope.cancel()


def _allocated(filename: str) -> int:
    try:
        return os.stat(filename).st_blocks * 512
    except (OSError, ValueError):
        return 0  # does not exist yet


class _Lines:
    """A line for each percent."""

    def __init__(self) -> None:
        self._told = -1

    def tell(self, done: int, total: int) -> None:
        percent = min(100, 100 * done // total) if total else 100
        if percent > self._told:
            self._told = percent
            tell_lines(f"({percent}.00/100%)")

    def end(self) -> None:
        self.tell(1, 1)


class _Bar:
    """A bar that appears after a while, drawn by a thread of its own, even while the command is blocked."""

    def __init__(self, description: str, total: int, bytes: bool) -> None:
        self._description, self._bytes = description, bytes
        self._done, self._total = 0, total
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._bar: Progress | None = None
        self._task: TaskID
        self._ended = False

    def begin(self, seconds: float) -> None:
        """Show the bar after this many seconds."""
        if not seconds:
            self._show()
            return
        self._timer = threading.Timer(seconds, self._show)
        self._timer.daemon = True
        self._timer.start()

    def tell(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)

    def end(self) -> None:
        """Remove the bar from the terminal."""
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._bar is not None:
                self._bar.stop()

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        share = DownloadColumn(binary_units=True) if self._bytes else TaskProgressColumn()
        # Redirecting, rich's default, would send our stdout to its console, which is stderr.
        bar = Progress(
            *(TextColumn("{task.description}"), BarColumn(), share, Remaining()),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with self._lock:
            if self._ended:
                return
            self._task = bar.add_task(self._description, completed=self._done, total=self._total)
            bar.start()
            self._bar = bar
