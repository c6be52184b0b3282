"""An open host file and the cheapest way to reach its bytes.

Bytes in the page cache are read in the trio thread. Calls that would wait go to a worker thread; the hop there costs
far more than a copy. The numbers are in ``docs/adr/0002-inline-host-writes.md``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from mmap import PAGESIZE
from time import perf_counter

from fusedisk.core.offload import run_host_io
from fusedisk.drivers.protocol.direct_io import Alignment, read_direct, write_direct
from fusedisk.drivers.protocol.host_io import read_vector, total_length, write_vector
from fusedisk.drivers.protocol.hostcalls import cached_pages, lives_in_memory

INLINE_MAX = 1 << 20
"""The longest transfer in the trio thread, in bytes: a copy of about 150 microseconds, as long as handing it to a
worker takes."""


class Pace:
    """Keeps track of whether calls that should be quick have been quick lately.

    After a slow one, calls go to threads for a pause, which doubles, up to a second, each time the first call
    after it is slow again.
    """

    SLOW = 0.001
    """Seconds: several times what the longest inline copy takes, and five hops."""
    _FIRST_PAUSE = 0.01
    _LONGEST_PAUSE = 1.0

    __slots__ = ("_pause", "_until")

    def __init__(self) -> None:
        self._pause = 0.0
        self._until = 0.0

    def is_quick(self, now: float) -> bool:
        """Whether the next call may run inline; ``now`` is ``time.perf_counter()``."""
        return now >= self._until

    def measured(self, now: float, seconds: float) -> None:
        """An inline call that ended at ``now`` took this long."""
        if seconds > self.SLOW:
            self._pause = min(max(self._pause * 2, self._FIRST_PAUSE), self._LONGEST_PAUSE)
            self._until = now + self._pause
        elif self._pause:
            self._pause = 0.0


class FlushPace:
    """Keeps track of whether flushes of one file have been quick lately, so that the next one may run inline.

    Unlike other calls a flush may take long for reasons of its own: much was written, or the host's disk is busy. So
    one slow flush sends many to the kernel's threads, more each time, and it takes several quick ones to return.
    """

    QUICK = 0.001
    """Seconds: less than what a task, a thread of the kernel and waking up cost together three times."""
    MOST_WRITES = 16
    """Writes since the last flush with which one may still be expected to be quick."""
    _LEAST = 4
    _MOST = 64

    __slots__ = ("_needed", "_streak")

    def __init__(self) -> None:
        self._streak = 0
        """Quick flushes in a row."""
        self._needed = self._LEAST
        """How many there must be."""

    def is_quick(self, writes: int) -> bool:
        """Whether a flush may run inline. ``writes``: since the last flush."""
        return self._streak >= self._needed and writes <= self.MOST_WRITES

    def measured(self, seconds: float) -> None:
        """A flush took this long, inline or not."""
        if seconds <= self.QUICK:
            self._streak += 1
            if self._streak > 4 * self._MOST:
                self._needed = self._LEAST
            return
        if self._streak >= self._needed:
            self._needed = min(2 * self._needed, self._MOST)
        self._streak = 0


class HostFile:
    """A descriptor with what is known about it. All methods raise OSError."""

    __slots__ = (
        "_probe",
        "_reading",
        "_tells_residency",
        "alignment",
        "fd",
        "flush_pace",
        "in_memory",
        "nowait_reads",
        "nowait_writes",
        "pace",
        "read_only",
    )

    def __init__(self, fd: int, read_only: bool, alignment: Alignment | None) -> None:
        """Takes over ``fd``. ``alignment`` is given for descriptors opened with O_DIRECT."""
        self.fd = fd
        self.read_only = read_only
        self.alignment = alignment
        self.in_memory = lives_in_memory(fd)
        self.nowait_reads = alignment is None and not self.in_memory
        self.nowait_writes = alignment is None and not self.in_memory
        self.pace = Pace()
        self.flush_pace = FlushPace()
        self._tells_residency = True
        self._probe = bytearray(1)
        self._reading = 0
        """The number of worker threads that read: pages appear in the cache before their content does."""

    def close(self) -> None:
        """Close the descriptor."""
        fd, self.fd = self.fd, -1
        os.close(fd)

    def read_inline(self, buffers: Sequence[memoryview], offset: int) -> Sequence[memoryview]:
        """Fill the buffers as far as that does not wait; returns the rest."""
        if self.nowait_reads:
            if total_length(buffers) > INLINE_MAX:
                return buffers
            try:
                return read_vector(self.fd, buffers, offset, os.RWF_NOWAIT)
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    raise
                self.nowait_reads = False
        elif self.in_memory and total_length(buffers) <= INLINE_MAX:
            start = perf_counter()
            if self.pace.is_quick(start):
                read_vector(self.fd, buffers, offset)
                now = perf_counter()
                self.pace.measured(now, now - start)
                return ()
        return buffers

    def write_inline(self, buffers: Sequence[memoryview], offset: int) -> Sequence[memoryview]:
        """Write the buffers as far as that should not wait; returns the rest."""
        length = len(buffers[0]) if len(buffers) == 1 else total_length(buffers)
        if self.alignment is not None or length > INLINE_MAX:
            return buffers
        if self.nowait_writes:
            try:
                return write_vector(self.fd, buffers, offset, os.RWF_NOWAIT)
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    raise
                self.nowait_writes = False
        start = perf_counter()
        if not self.pace.is_quick(start):
            return buffers
        # Mostly there is one buffer, and all of it is written.
        if len(buffers) > 1 or os.pwrite(self.fd, buffers[0], offset) != length:
            write_vector(self.fd, buffers, offset)
        now = perf_counter()
        self.pace.measured(now, now - start)
        return ()

    def is_resident(self, offset: int, length: int) -> bool:
        """Whether all of a range is in the page cache; False also where that is not known for certain."""
        if self._reading or self.alignment is not None or not self._tells_residency:
            return False
        last = offset + length - 1
        try:
            if cached_pages(self.fd, offset, length) <= last // PAGESIZE - offset // PAGESIZE:
                return False
            # A page that is on its way counts too, and comes last where the kernel reads ahead.
            return self.in_memory or (
                self.nowait_reads and os.preadv(self.fd, (self._probe,), last, os.RWF_NOWAIT) == 1
            )
        except BlockingIOError:
            return False
        except OSError:
            self._tells_residency = False
            return False

    async def read(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill all buffers in a worker thread; what lies past the end becomes zeroes."""
        if self.alignment is not None:
            await run_host_io(read_direct, self.fd, buffers, offset, self.alignment)
            return
        self._reading += 1
        try:
            await run_host_io(read_vector, self.fd, buffers, offset)
        finally:
            self._reading -= 1

    async def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Write all buffers in a worker thread."""
        if self.alignment is not None:
            await run_host_io(write_direct, self.fd, buffers, offset, self.alignment)
        else:
            await run_host_io(write_vector, self.fd, buffers, offset)
