"""The one border between our errors and the kernel's: both ways of serving requests, the channel's and pyfuse3's, end
here."""

from __future__ import annotations

import errno
import logging

from pyfuse3 import FUSEError

from fusedisk.core.errors import FusediskError

log = logging.getLogger(__name__)


def errno_of(what: str, exc: Exception) -> int:
    """Return the errno that tells the kernel of a failed request, ``what``. An error that nobody expected is a bug: it
    is logged and costs one EIO."""
    if isinstance(exc, FusediskError):
        log.debug("%s: %s", what, exc)
        return exc.errno
    if isinstance(exc, FUSEError):
        return int(exc.errno)
    log.error("a bug in fusedisk: %s failed", what, exc_info=exc)
    return errno.EIO
