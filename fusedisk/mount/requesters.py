"""Whether a thread that waits for one of our replies is about to die. Reads /proc, and waits for nothing."""

from __future__ import annotations

import signal

_KILL = 1 << signal.SIGKILL - 1


def is_dying(thread: int) -> bool:
    """Whether a thread, by its number, was killed: whatever signal ends a process, each of its threads is sent SIGKILL.
    True also for one that cannot be seen."""
    try:
        with open(f"/proc/{thread}/status", "rb") as lines:
            for line in lines:
                name, _, value = line.partition(b":")
                if name == b"SigPnd":
                    return bool(int(value, 16) & _KILL)
    except OSError:
        pass
    return True
