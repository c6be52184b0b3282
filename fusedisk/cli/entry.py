"""Where the process of a command begins: importing the rest takes a while, and Ctrl-C is quiet then, too."""

from __future__ import annotations

import sys
from typing import NoReturn

EXIT_INTERRUPTED = 130


def main() -> NoReturn:
    """``fusedisk``."""
    try:
        from fusedisk.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
