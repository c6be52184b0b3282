"""How to wait for the next request: decisions only, no I/O and no clock.

There are three ways. *Spinning* (polling the descriptor in a loop; "asking" in the names below) notices a request at
once and uses a processor all that time. *Napping* (:mod:`.nap`) costs one sleep and one wake-up. *Waiting* in the event
loop costs the most, and is the only way that lets other tasks run.

Spinning for one request may cost as much as it saves: one wake-up, plus half of the time spent answering. A credit
account keeps the balance. A request that arrives sooner adds the rest to the account, a later one draws on it. While
the account is empty the channel naps, and each nap adds a little credit. So short gaps are always bridged by spinning.
Long gaps are tried now and then, which shows when they have become shorter. After a gap of a millisecond the channel
waits in the event loop.
"""

from __future__ import annotations

ASK = 80e-6
"""Seconds to spin for one request, at most."""
_SOON = 1e-3
"""A gap of fewer seconds between an answer and the next request predicts another short gap."""
_WAKING = 22e-6
"""Processor seconds that one sleep and one wake-up cost."""
_ANSWER_SHARE = 0.5
"""What spinning may cost, as a share of the time spent answering."""
_NAP_CREDIT = 1e-6
"""Credit in seconds that a nap adds."""
_MAX_CREDIT = 400e-6
"""The largest credit in seconds. A small limit, so that longer gaps end the spinning soon."""


class Polling:
    """What is known of the gaps between an answer and the next request on one connection. All times are seconds of one
    monotonic clock."""

    __slots__ = ("_account", "_answered", "_may_ask", "recent_request", "should_nap", "spin_until")

    def __init__(self, *, may_ask: bool) -> None:
        """``may_ask``: there are at least two processors, so that spinning does not starve the client."""
        self._may_ask = may_ask
        self._account = 0.0
        self._answered = 0.0
        self.recent_request = False
        """Whether the last request followed the one before it closely."""
        self.spin_until = 0.0
        """Spin until then; 0: do not spin."""
        self.should_nap = False
        """Whether to nap instead of spinning."""

    def woke(self, now: float, asked: float) -> None:
        """Note a request that arrived while waiting in the event loop. ``asked``: time of the last empty poll before
        that; 0 if there was at most one."""
        if asked:
            self._account -= asked - self._answered
        self.recent_request = now - self._answered < _SOON
        self.spin_until = 0.0
        self.should_nap = False

    def overslept(self) -> None:
        """Note a nap in which nothing arrived."""
        self.recent_request = self.should_nap = False

    def answered(self, now: float, asked: float) -> None:
        """Note that a request was answered or handed on. ``asked``: time of the last empty poll before it; 0 if it was
        there already, arrived during a nap, or was waited for."""
        if asked:
            worth = _WAKING + _ANSWER_SHARE * (now - asked)
            self._account = min(self._account + worth - (asked - self._answered), _MAX_CREDIT)
        elif self.should_nap:
            self._account += _NAP_CREDIT
        self._answered = now
        asks = self.recent_request and self._may_ask and self._account > 0
        self.spin_until = now + ASK if asks else 0.0
        self.should_nap = self.recent_request and not asks
