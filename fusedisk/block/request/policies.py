"""What a user may put between a backend and its requests. Each is None by default, and costs nothing then."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol

from fusedisk.block.request.accounting import Kind
from fusedisk.core.errors import FusediskError

OnDone = Callable[[Kind, int, float], None]
"""Called with the kind of an answered request, its length in bytes and the seconds that it took."""


class Throttle(Protocol):
    """Delays requests."""

    async def admit(self, kind: Kind, length: int) -> None:
        """Return when the request may begin. It is not in flight meanwhile, so a drained section passes it. Cancelled
        when the backend closes."""


class Decision(enum.Enum):
    """What becomes of a failed request."""

    REPORT = "report"
    IGNORE = "ignore"
    """Answer it as if it had succeeded; a read gets zeroes where nothing was read."""
    STOP = "stop"
    """Park it until ``Backend.retry_stopped``, then make it again from the start."""


class ErrorPolicy(Protocol):
    """Decides about failed requests."""

    def decide(self, kind: Kind, offset: int, length: int, error: FusediskError) -> Decision:
        """Return what becomes of a request that failed. Called without the request in flight; must not suspend."""
