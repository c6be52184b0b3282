"""Where the process of a command begins: importing the rest takes a while, and Ctrl-C is quiet then, too."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

EXIT_INTERRUPTED = 130


def main() -> NoReturn:
    """``fusedisk``."""
    complete_streams()
    try:
        from fusedisk.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def complete_streams() -> None:
    """Let what the caller has closed of the standard streams lead nowhere, as the next file that is opened would take
    their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
