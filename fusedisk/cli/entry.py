"""Where the process of a command begins: importing the rest takes a while, and Ctrl-C is quiet then, too."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import NoReturn

from fusedisk.cli import exit_codes


def main() -> NoReturn:
    """``fusedisk``."""
    prepare_streams()
    try:
        from fusedisk.cli.late import import_late

        import_late("trio")
        from fusedisk.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(exit_codes.INTERRUPTED)


def prepare_streams() -> None:
    """Let the standard streams take whatever is written to them.

    What the caller has closed of them leads nowhere, as the next file that is opened would take its place. File names
    are bytes, whatever the locale says; characters that its encoding lacks are written as ``\\u2026``.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    codecs.register_error("fusedisk", _encode_anyway)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fusedisk")


def _encode_anyway(exc: UnicodeError) -> tuple[bytes, int]:
    """A handler of encoding errors (:func:`codecs.register_error`)."""
    if not isinstance(exc, UnicodeEncodeError):
        raise exc
    try:
        return codecs.lookup_error("surrogateescape")(exc)  # type: ignore[return-value]
    except UnicodeEncodeError:
        first = UnicodeEncodeError(exc.encoding, exc.object, exc.start, exc.start + 1, exc.reason)
        text, end = codecs.backslashreplace_errors(first)
        return str(text).encode("ascii"), end
