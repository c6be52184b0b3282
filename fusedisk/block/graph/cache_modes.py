"""QEMU's cache modes by name: what each says about the host's page cache, about flushes, and about writes.

Source: qemu-img(1), option ``-t``.
"""

from __future__ import annotations

from typing import NamedTuple


class CacheMode(NamedTuple):
    """One mode."""

    direct: bool
    """``cache.direct``: bypass the host's page cache (O_DIRECT)."""
    no_flush: bool
    """``cache.no-flush``: ignore flushes to disk."""
    write_cache: bool
    """False: each write is on stable storage when it is answered."""


CACHE_MODES = {
    "writeback": CacheMode(direct=False, no_flush=False, write_cache=True),
    "writethrough": CacheMode(direct=False, no_flush=False, write_cache=False),
    "none": CacheMode(direct=True, no_flush=False, write_cache=True),
    "directsync": CacheMode(direct=True, no_flush=False, write_cache=False),
    "unsafe": CacheMode(direct=False, no_flush=True, write_cache=True),
}
