"""What the commands print: sizes, tables of facts, JSON, progress bars."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TextIO

import click

from fusedisk.core.errors import HostError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

output_option = click.option(
    "--output",
    type=click.Choice(["human", "json"]),
    default="human",
    show_default=True,
    help="For people, or as JSON for programs.",
)


def size_text(size: int) -> str:
    """A number of bytes in three or more digits with its binary unit: ``10 GiB``, ``1.5 MiB``, ``196 KiB``."""
    value, unit = float(size), 0
    while value >= 1000 and unit < len(_UNITS) - 1:  # so that four digits never hide a larger unit
        value /= 1024
        unit += 1
    return f"{value:.3g} {_UNITS[unit]}"


def exact_size_text(size: int) -> str:
    """``10 GiB (10737418240 bytes)``."""
    return f"{size_text(size)} ({size} bytes)"


def write(text: str) -> None:
    """Text on stdout. Unlike click's echo it keeps file names that are no text, and leaves flushing to the end.

    Raises HostError where it cannot be written, but BrokenPipeError where nobody reads it; what follows goes nowhere.
    """
    try:
        sys.stdout.write(text)
    except OSError as exc:
        _refuse(exc)


def flush() -> None:
    """Send what was written on its way; raises as :func:`write`."""
    try:
        sys.stdout.flush()
    except OSError as exc:
        _refuse(exc)


def _refuse(exc: OSError) -> NoReturn:
    _give_up(sys.stdout)
    if isinstance(exc, BrokenPipeError):
        raise exc
    raise HostError(f"writing to standard output failed: {exc.strerror}.", errno=exc.errno) from exc


def _give_up(stream: TextIO) -> None:
    """Let a stream that cannot be written lead nowhere: it is flushed again at the end, which must not fail again."""
    with contextlib.suppress(OSError):  # io.UnsupportedOperation, too: it has no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def tell(sentence: str) -> None:
    """One sentence of ours on stderr. Where that cannot be written, there is nobody to tell it."""
    tell_plainly(f"fusedisk: {sentence}\n")


def tell_plainly(text: str) -> None:
    """Text on stderr as it is; see :func:`tell`."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _give_up(sys.stderr)


def say(text: str = "") -> None:
    """One line on stdout; see :func:`write`."""
    write(f"{text}\n")


def print_json(value: Any) -> None:
    """One JSON document on stdout, indented as the field's tools do."""
    say(json.dumps(value, indent=4))


def print_facts(facts: Iterable[tuple[str, str]], indent: str = "") -> None:
    """Names and values in two aligned columns."""
    rows = list(facts)
    width = max((len(name) for name, _ in rows), default=0) + 2
    for name, value in rows:
        say(f"{indent}{name + ':':<{width}}{value}")


@contextlib.contextmanager
def progress(
    description: str, total: int, *, shown: bool = True, bytes: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr if that is a terminal; yields a function that takes how much is done, and how much
    there is to do. Without ``bytes``, in units that mean nothing to people, so only the share is shown."""
    if not shown or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True) if bytes else TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    # Redirecting, rich's default, would send our stdout to its console, which is stderr.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
