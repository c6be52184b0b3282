"""Waiting for other processes: with a message if it takes long, and a message about the state on Ctrl-C."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Callable, Iterator

from fusedisk.cli.output import tell
from fusedisk.core.errors import OperationBlockedError

_WORD_AFTER, _WORD_IN_SCRIPTS_AFTER = 1.0, 10.0
"""Seconds of waiting after which a message tells the reason: at a terminal, and elsewhere."""
_MOMENT = 1.0
"""Seconds that a daemon gets at least."""
POLL = 0.3
"""Seconds between attempts with --wait."""
_MAX_SECONDS = 2_000_000.0
"""poll(2) counts milliseconds in 31 bits."""


def left(deadline: float | None) -> float | None:
    """Return the seconds until a deadline; None: no limit."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def with_a_moment(deadline: float | None) -> float | None:
    """Return the deadline for what only the daemon has to do: it gets a moment, even if users get no time."""
    return None if deadline is None else max(deadline, time.monotonic() + _MOMENT)


def is_readable(fd: int, seconds: float | None, word: Callable[[], str] | None = None) -> bool:
    """Wait until a descriptor becomes readable, for at most ``seconds`` (None: for ever). Returns whether it did.

    If that takes long, tell the user what ``word`` returns.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if word is not None:
        patience = _WORD_AFTER if sys.stderr.isatty() else _WORD_IN_SCRIPTS_AFTER
        if seconds is None or seconds > patience:
            if poll.poll(patience * 1000):
                return True
            seconds = None if seconds is None else seconds - patience
            tell(word())
    return bool(poll.poll(None if seconds is None else min(seconds, _MAX_SECONDS) * 1000))


@contextlib.contextmanager
def tell_when_interrupted(state: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C tell the user what ``state`` returns, a sentence without its beginning, ``interrupted:``."""
    try:
        yield
    except KeyboardInterrupt:
        tell(f"interrupted: {state()}")
        raise


def until_free(
    attempt: Callable[[], Callable[[], str] | None],
    deadline: float | None,
    way_out: str,
    *,
    grace: float = 0.0,
) -> None:
    """Call ``attempt`` until it returns None, the only loop of a command that waits for the users of something.

    Otherwise it returns a function that describes what stands in the way, as the beginning of a sentence. The first
    description is shown. At the deadline (None: never) this raises OperationBlockedError with the last one and
    ``way_out``, which says how to end it. For ``grace`` seconds it tries in silence, whatever the deadline.
    """
    told = False
    quiet_until = time.monotonic() + grace
    while (obstacle := attempt()) is not None:
        now = time.monotonic()
        if now >= quiet_until:
            if deadline is not None and now >= deadline:
                raise OperationBlockedError(
                    f"{obstacle()}: {way_out} first, wait with --wait, or lose unwritten data with --force."
                )
            if not told:
                tell(f"{obstacle()}: waiting until that is over.")
                told = True
        time.sleep(POLL)
