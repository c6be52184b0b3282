"""Which pieces were looked at lately, each for a small part of it. Decisions only.

To inflate the first part of a piece takes that part of the time, but whoever looks again must begin anew. So the first
look at a piece is given a part, and the second, if it comes soon, all of it: that is kept, and costs the looks after it
nothing. Where most pieces are looked at once, as random reads of a large image do, half of the work is saved; at worst
there is half as much to do again.

Soon, since keeping a piece pays only if it is looked at again before others have pushed it out. Who comes back as late
as that will come as late the next time.
"""

from __future__ import annotations

MOST_GLANCES = 1 << 12
"""Pieces that one look is remembered of at most, oldest first forgotten."""
_SOON = 8
"""And at most one in so many of those that there is room for."""


class Glances:
    """The pieces of one image that had one look, by key."""

    def __init__(self, size: int, room: int) -> None:
        """``size``: bytes of a piece. ``room``: bytes of all that can be kept."""
        self._worth = size - size // 4
        self._most = max(min(room // size // _SOON, MOST_GLANCES), 1)
        self._seen: dict[int, None] = {}

    def first(self, key: int, end: int) -> bool:
        """Somebody looks at the first ``end`` bytes of a piece; tells whether no more than that is to be inflated."""
        seen = self._seen
        if end > self._worth or key in seen:
            return False
        if len(seen) == self._most:
            del seen[next(iter(seen))]
        seen[key] = None
        return True

    def whole(self, key: int) -> None:
        """All of a piece was inflated."""
        self._seen.pop(key, None)
