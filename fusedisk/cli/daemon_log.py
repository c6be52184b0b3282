"""The log of a daemon: a file beside the record of its mount, made when there is something to say.

It is gone when nobody will ask for it: after a clean end without a warning, or when a daemon starts a week later.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import time
from pathlib import Path

from fusedisk.cli.output import LineFormatter
from fusedisk.core.errors import FusediskError

log = logging.getLogger(__name__)

_SIZE = 1 << 20
_KEPT_SECONDS = 7 * 86400.0
_FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"


class DaemonLog(logging.handlers.RotatingFileHandler):
    """Logs to a file, with one more for what was before.

    Until the daemon is ready its warnings are for the terminal as well: :meth:`hand_over`.
    """

    def __init__(self, path: str) -> None:
        self._worth_keeping = _holds_something(path)
        self._warnings: list[str] | None = []
        super().__init__(path, maxBytes=_SIZE, backupCount=1, delay=True)
        self.setFormatter(LineFormatter(_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        if record.levelno >= logging.WARNING:
            if self._warnings is None:
                self._worth_keeping = True
            elif record.exc_info is None:  # a bug is what the daemon fails with, which it reports
                self._warnings.append(record.getMessage())
        super().emit(record)

    def hand_over(self) -> list[str]:
        """Return the warnings so far, each a sentence, for the terminal of the command that started the daemon. They
        do not make the log worth keeping; those that follow do."""
        warnings, self._warnings = self._warnings or [], None
        return warnings

    def end(self) -> None:
        """The daemon has ended well: remove the log unless it holds a warning, or what another daemon has said."""
        self.close()
        if not self._worth_keeping:
            for path in (self.baseFilename, f"{self.baseFilename}.1"):
                _unlink(path)


def _holds_something(path: str) -> bool:
    try:
        return os.path.getsize(path) > 0
    except OSError:
        return False


def log_to(path: str) -> DaemonLog:
    """Log to a file from now on, as much as this process logs anyway."""
    handler = DaemonLog(path)
    logging.basicConfig(handlers=[handler], level=logging.getLogger().getEffectiveLevel(), force=True)
    return handler


def remove_old() -> None:
    """Remove this user's logs of last week and before, but for those of daemons that live."""
    from fusedisk.mount import runtime

    try:
        folder = runtime.directory()
        kept = {record.log for record in runtime.records() if record.alive}
    except FusediskError as exc:
        log.debug("old logs were not looked for: %s", exc)
        return
    for path in [*Path(folder).glob("*.log"), *Path(folder).glob("*.log.1")]:
        try:
            old = time.time() - path.lstat().st_mtime > _KEPT_SECONDS
        except OSError:
            continue
        if old and str(path).removesuffix(".1") not in kept:
            _unlink(str(path))


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        log.debug("the log '%s' could not be removed: %s", path, exc)
