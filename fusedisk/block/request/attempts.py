"""How often to try without waiting what mostly turns out to have to wait."""

from __future__ import annotations

MAX_SKIPPED_ATTEMPTS = 1 << 12
"""The most writes in a row that skip the attempt to write to new space without waiting."""


class Attempts:
    """Says which requests skip an attempt to do without waiting. Each one that fails sends more of them straight to a
    task."""

    __slots__ = ("_most", "_skip", "backoff")

    def __init__(self, most: int | None = None) -> None:
        """``most``: the most that skip it in a row; MAX_SKIPPED_ATTEMPTS by default."""
        self._most = most
        self._skip = 0
        self.backoff = 0
        """How many skipped it after the last failed attempt; set it to 0 after one that succeeds."""

    def skipped(self) -> bool:
        """Count an attempt; return whether to skip it."""
        if self._skip:
            self._skip -= 1
            return True
        return False

    def failed(self) -> None:
        """Note an attempt in vain. It is not free: what it did must be undone, and clusters that it allocated must be
        filled up when they are used again."""
        most = MAX_SKIPPED_ATTEMPTS if self._most is None else self._most
        self._skip = self.backoff = min(2 * self.backoff + 1, most)
