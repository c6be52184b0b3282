"""The output of the commands: sizes, tables of facts, JSON.

Names come from images, so their makers choose them. In all text for people (:func:`say`, :func:`tell` and the log)
characters that would control a terminal are shown by their number; JSON has its own escapes.
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
    """Return ``text`` as one line without effects on a terminal: control characters as ``\\x1b`` or ``\\u202e``."""
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
    """Write text to stdout. Unlike click's echo it keeps file names that are not valid text, and does not flush.

    Raises HostError if writing fails, BrokenPipeError if the reader has gone; all further output is dropped then.
    """
    try:
        sys.stdout.write(text)
    except OSError as exc:
        _refuse(exc)


def flush() -> None:
    """Flush stdout; raises like :func:`write`."""
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
    """Redirect a broken stream to nowhere, so that the flush at the end does not fail again."""
    with contextlib.suppress(OSError):  # io.UnsupportedOperation, too: it has no descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def tell(sentence: str) -> None:
    """Print a sentence on stderr. Errors are ignored, as there is no other place to report them."""
    tell_lines(f"fusedisk: {escape(sentence)}")


def tell_lines(text: str) -> None:
    """Print lines on stderr; see :func:`tell`."""
    try:
        sys.stderr.write(f"{_escape_lines(text)}\n")
        sys.stderr.flush()
    except OSError:
        _give_up(sys.stderr)


def say(text: str = "") -> None:
    """Print one line for people on stdout; see :func:`escape` and :func:`write`."""
    write(f"{escape(text)}\n")


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, indented as qemu-img does."""
    write(f"{json.dumps(value, indent=4)}\n")


def print_facts(facts: Iterable[tuple[str, str]], indent: str = "") -> None:
    """Print names and values in two aligned columns."""
    rows = list(facts)
    width = max((len(name) for name, _ in rows), default=0) + 2
    for name, value in rows:
        say(f"{indent}{name + ':':<{width}}{value}")
