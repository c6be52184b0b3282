"""Telling how far a long operation has come."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the amount of work done, and the total as far as it is known by then."""


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""
