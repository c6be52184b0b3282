"""Replies whose data we never copy: pages of the host's page cache go through a pipe to the kernel.

The kernel copies from those pages to the reader, once; through our memory it would be twice. That pays from some tens
of pages on; below that the additional calls cost more.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence

from fusedisk.block.request.immediate import Lent
from fusedisk.mount import wire

LEAST = 128 << 10
"""The least bytes of data for which a reply goes through the pipe."""
_SHORTEST = 512 << 10
"""If the longest request had to be shorter than this, the pipe would cost more than it saves."""
_WANTED_PAGES = 512
"""Enough for the longest reply: one for the header, one for each page, and more for parts that start inside a page."""


class ReplyPipe:
    """A pipe that takes one reply at a time; nothing is in it between two."""

    def __init__(self) -> None:
        """Make the pipe. Raises OSError if it cannot be long enough."""
        self._take, self._give = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.pages = fcntl.fcntl(self._give, fcntl.F_GETPIPE_SZ) // mmap.PAGESIZE
        for wanted in (_WANTED_PAGES, _WANTED_PAGES // 2):
            try:
                self.pages = fcntl.fcntl(self._give, fcntl.F_SETPIPE_SZ, wanted * mmap.PAGESIZE) // mmap.PAGESIZE
                break
            except OSError:  # more than a user may have
                continue
        if self.longest < _SHORTEST:
            self.close()
            raise OSError(errno.EPERM, f"a pipe may only have {self.pages} pages")

    @property
    def longest(self) -> int:
        """The most bytes of data, a power of two, for which there is always room; the best limit for one request."""
        pages = self.pages // 2
        return min(1 << (pages.bit_length() - 1 + (mmap.PAGESIZE.bit_length() - 1)), wire.MAX_WRITE)

    def close(self) -> None:
        """Close both ends."""
        os.close(self._take)
        os.close(self._give)

    def send(self, device: int, unique: int, length: int, parts: Sequence[Lent]) -> bool:
        """Answer a READ with the ``length`` bytes in ``parts``. False: nothing was answered.

        Raises OSError if the kernel rejects the reply.
        """
        if len(parts) + length // mmap.PAGESIZE + 2 > self.pages:
            return False
        total = wire.OUT_HEADER.size + length
        os.write(self._give, wire.OUT_HEADER.pack(total, 0, unique))
        if not self._fill(parts):
            self._empty()
            return False
        try:
            if os.splice(self._take, device, total) == total:
                return True
        except OSError:
            self._empty()
            raise
        self._empty()
        return True

    def _fill(self, parts: Sequence[Lent]) -> bool:
        for descriptor, offset, length in parts:
            end = offset + length
            while offset < end:
                try:
                    done = os.splice(descriptor, self._give, end - offset, offset_src=offset)
                except OSError:
                    return False  # the normal read reports the error
                if not done:
                    return False
                offset += done
        return True

    def _empty(self) -> None:
        """Empty the pipe of what was not sent."""
        try:
            while os.read(self._take, wire.MAX_WRITE):
                pass
        except BlockingIOError:
            pass
