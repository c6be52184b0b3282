"""How to wait for the next request: decisions only, no I/O and no clock.

There are three ways. *Asking* again and again notices a request at once and takes a processor all that time. *Napping*
(:mod:`.nap`) takes what falling asleep and waking up costs. *Waiting* along with everything else in the event loop
costs the most, and is the only one that lets others go on.

Asking is worth what the request would cost otherwise: the time of waking up, and half of what answering takes, since
who answers for long may as well ask for longer. That is an account: a request that was asked for in less puts the rest
on it, one that took longer takes from it, and while nothing is on it there are naps, of which each puts a little on it.
So short gaps are always bridged by asking, and long ones now and then, which shows when they have become shorter. Not
more often: where most requests are slept for, the few that are not gain nothing. Behind a gap of a millisecond there
is neither.
"""

from __future__ import annotations

ASK = 80e-6
"""Seconds to ask for one request, at most."""
_SOON = 1e-3
"""Seconds between an answer and the next request below which the one after it will probably come soon, too."""
_WAKING = 22e-6
"""Seconds of a processor that falling asleep and waking up take."""
_SHARE = 0.5
"""What asking may take, as a share of the time in which requests are answered."""
_NAPPED = 1e-6
"""Seconds that a nap puts on the account."""
_MOST = 400e-6
"""Seconds that are on the account at most, so that it notices soon when gaps become longer."""


class Polling:
    """What is known of the gaps between an answer and the next request, of one connection. Times are in seconds, of
    one clock."""

    __slots__ = ("_account", "_answered", "_may_ask", "deadline", "naps", "soon")

    def __init__(self, *, may_ask: bool) -> None:
        """``may_ask``: there is a processor for who asks and another for who is waited for."""
        self._may_ask = may_ask
        self._account = 0.0
        self._answered = 0.0
        self.soon = False
        """Whether the request came close upon the one before it."""
        self.deadline = 0.0
        """Until when to ask; nothing is asked for a second time where that is past."""
        self.naps = False
        """Whether to nap rather than ask."""

    def woke(self, now: float, asked: float) -> None:
        """A request came while waiting. ``asked``: when it was last asked for in vain before that; 0 if it was not
        asked for more than once."""
        if asked:
            self._account -= asked - self._answered
        self.soon = now - self._answered < _SOON
        self.deadline = 0.0
        self.naps = False

    def overslept(self) -> None:
        """Nothing came during a nap."""
        self.soon = self.naps = False

    def answered(self, now: float, asked: float) -> None:
        """A request was answered, or is on its way to who answers it. ``asked``: when it was last asked for in vain; 0
        if it was there already, came during a nap, or was waited for."""
        if asked:
            worth = _WAKING + _SHARE * (now - asked)
            self._account = min(self._account + worth - (asked - self._answered), _MOST)
        elif self.naps:
            self._account += _NAPPED
        self._answered = now
        asks = self.soon and self._may_ask and self._account > 0
        self.deadline = now + ASK if asks else 0.0
        self.naps = self.soon and not asks
