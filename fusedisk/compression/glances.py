"""Decides whether to inflate a whole piece or only its first part. No I/O.

Inflating half of a piece takes half of the time, but the next request must start again. So the first request for a
piece inflates only what it needs. The second, if it comes soon, inflates all of it; the piece is cached and further
requests cost nothing. Random reads of a large image touch most pieces once, which saves half of the work; at worst half
of it is done twice.

"Soon" matters: caching a piece pays only if it is requested again before it is evicted. A piece that was requested
again too late will be too late the next time, too.
"""

from __future__ import annotations

MOST_GLANCES = 1 << 12
"""How many first requests are remembered at most; the oldest is forgotten first."""
_SOON = 8
"""Also at most 1/N of the pieces that the cache can hold."""


class Glances:
    """The pieces of one image that were requested once, by key."""

    def __init__(self, size: int, room: int) -> None:
        """``size``: bytes of a piece. ``room``: bytes that the cache can hold."""
        self._worth = size - size // 4
        self._most = max(min(room // size // _SOON, MOST_GLANCES), 1)
        self._seen: dict[int, None] = {}

    def first(self, key: int, end: int) -> bool:
        """Note a request for the first ``end`` bytes of a piece; True if only those are to be inflated."""
        seen = self._seen
        if end > self._worth or key in seen:
            return False
        if len(seen) == self._most:
            del seen[next(iter(seen))]
        seen[key] = None
        return True

    def whole(self, key: int) -> None:
        """Note that all of a piece was inflated."""
        self._seen.pop(key, None)
