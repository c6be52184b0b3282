"""Flags of requests, one bit each, and what requests carry."""

from __future__ import annotations

Buffer = memoryview
"""A C-contiguous memoryview of unsigned bytes."""

MAY_UNMAP = 1
"""write_zeroes: the space may be freed, as long as the range reads as zeroes."""
NO_FALLBACK = 2
"""write_zeroes: raise NotSupportedError rather than write zeroes out at length."""
FUA = 4
"""The request is on stable storage when it is answered."""
COPY_ON_READ = 8
"""Read: store in this node what came from its backing file."""
UNCHANGED = 16
"""Write: the range reads the same afterwards; needs only the *write unchanged* permission."""
ZERO_NEW = 32
"""truncate: the space added must read as zeroes, whatever a longer backing file holds there."""
COMPRESSED = 64
"""Write: store whole clusters compressed."""
