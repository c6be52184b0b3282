"""Adding and subtracting counters by whole refcount blocks. No I/O.

A block of counters of 32 bits is added as one large number: as long as each counter is far from its limits, none
carries into its neighbour. Whether that was so shows in the bytes of the result; where it was not, counters are added
one by one.
"""

from __future__ import annotations

import functools
import sys
from array import array

from fusedisk.drivers.format.qcow2.refcount_block import RefcountOverflow, RefcountUnderflow

_WIDTH = 4
_PLANES = range(_WIDTH) if sys.byteorder == "little" else range(_WIDTH - 1, -1, -1)
"""Where the bytes of a counter are, the lowest first."""
_TOP = _PLANES[-1]
_MOST = (1 << 32) - 1


def balance(values: array[int], gained: array[int] | None, lost: array[int] | None, bits: int) -> array[int]:
    """``values`` with what they gained and without what they lost; arrays of as many 32-bit numbers.

    Raises RefcountOverflow where a result does not fit into ``bits`` bits, RefcountUnderflow where one is negative.
    """
    arrays = [values, *(part for part in (gained, lost) if part is not None)]
    raw = [part.tobytes() for part in arrays]
    if any(part[_TOP::_WIDTH].strip(b"\0") for part in raw):
        return _balance_each(values, gained, lost, bits)
    guards = _guards(len(values))
    total = guards + sum(_number(part) for part in (values, gained) if part is not None)
    if lost is not None:
        total -= _number(lost)
    result = bytearray(total.to_bytes(len(values) * _WIDTH, sys.byteorder))
    if result[_TOP::_WIDTH].strip(b"\x80"):
        return _balance_each(values, gained, lost, bits)
    result[_TOP::_WIDTH] = bytes(len(values))
    for place, plane in enumerate(_PLANES):
        if result[plane::_WIDTH].strip(_allowed(bits - 8 * place)):
            raise RefcountOverflow
    return array("I", bytes(result))


def _number(values: array[int]) -> int:
    return int.from_bytes(values.tobytes(), sys.byteorder)


@functools.cache
def _guards(count: int) -> int:
    """The highest bit of each counter: it is borrowed from where a result is negative."""
    return _number(array("I", [1 << 31]) * count)


@functools.cache
def _allowed(bits: int) -> bytes:
    """What a byte may be of which ``bits`` bits, or what there is of them, belong to a refcount."""
    return bytes(range(1 << max(min(bits, 8), 0)))


def _balance_each(values: array[int], gained: array[int] | None, lost: array[int] | None, bits: int) -> array[int]:
    zeroes = [0] * len(values)
    found = [a + b - c for a, b, c in zip(values, gained or zeroes, lost or zeroes, strict=True)]
    if min(found) < 0:
        raise RefcountUnderflow
    # Larger ones are not told apart.
    if max(found) > min((1 << bits) - 1, _MOST - 1):
        raise RefcountOverflow
    return array("I", found)
