"""What the commands print: sizes, tables of facts, JSON, progress bars.

Names come from images and from whoever made those. What would steer a terminal is shown by its number in everything
that is for people (:func:`say`, :func:`tell` and the log); JSON has its own way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn, TextIO

import click

from fusedisk.core.errors import HostError

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\udc80-\udc9f]")
"""Control characters, also as bytes of a file name that is no text, line separators, and what turns the direction of
writing."""

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


def escape(text: str) -> str:
    """``text`` as one line that only says something: control characters as ``\\x1b`` or ``\\u202e``."""
    return _UNSEEN.sub(_number, text)


def _number(match: re.Match[str]) -> str:
    code = ord(match[0])
    code -= 0xDC00 if code >= 0xDC00 else 0  # a byte of a file name
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class LineFormatter(logging.Formatter):
    """Escapes each message, and the lines of a traceback, as :func:`escape`."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        return escape(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """The traceback's lines."""
        return _escape_lines(super().formatException(ei))


def _escape_lines(text: str) -> str:
    return "\n".join(map(escape, text.split("\n")))


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
    tell_lines(f"fusedisk: {escape(sentence)}")


def tell_lines(text: str) -> None:
    """Lines on stderr; see :func:`tell`."""
    try:
        sys.stderr.write(f"{_escape_lines(text)}\n")
        sys.stderr.flush()
    except OSError:
        _give_up(sys.stderr)


def say(text: str = "") -> None:
    """One line on stdout, for people; see :func:`escape` and :func:`write`."""
    write(f"{escape(text)}\n")


def print_json(value: Any) -> None:
    """One JSON document on stdout, indented as the field's tools do."""
    write(f"{json.dumps(value, indent=4)}\n")


def print_facts(facts: Iterable[tuple[str, str]], indent: str = "") -> None:
    """Names and values in two aligned columns."""
    rows = list(facts)
    width = max((len(name) for name, _ in rows), default=0) + 2
    for name, value in rows:
        say(f"{indent}{name + ':':<{width}}{value}")
