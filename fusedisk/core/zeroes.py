"""Zeroes: a shared block of them, the test for them, filling with them."""

from __future__ import annotations

_BLOCK = bytes(1 << 20)

ZEROES = memoryview(_BLOCK)
"""1 MiB of zero bytes, read-only, to slice for writing."""


def is_zero(view: memoryview) -> bool:
    """Whether every byte of a C-contiguous ``view`` is zero; stops at the first that is not.

    ``bytes.startswith`` takes any buffer and compares with ``memcmp``, without a copy; comparing memoryviews
    goes item by item and costs a hundred times as much.
    """
    length = view.nbytes
    if length <= len(_BLOCK):
        return _BLOCK.startswith(view)
    flat = view.cast("B")
    return all(_BLOCK.startswith(flat[start : start + len(_BLOCK)]) for start in range(0, length, len(_BLOCK)))


def zero_fill(view: memoryview) -> None:
    """Fill a writable, C-contiguous view of bytes with zeroes."""
    length = len(view)
    for start in range(0, length, len(_BLOCK)):
        part = view[start : start + len(_BLOCK)]
        part[:] = ZEROES[: len(part)]
