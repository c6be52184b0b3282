"""Zeroes found and made."""

from __future__ import annotations

import pytest

from fusedisk.core.zeroes import ZEROES, is_zero, zero_fill

MIB = 1 << 20


def test_the_block() -> None:
    assert len(ZEROES) == MIB
    assert ZEROES.readonly
    assert not any(ZEROES[:4096])


@pytest.mark.parametrize("length", [0, 1, 511, 65536, MIB, MIB + 1, 3 * MIB + 7])
def test_is_zero(length: int) -> None:
    data = bytearray(length)
    assert is_zero(memoryview(data))
    for place in {0, length // 2, length - 1} if length else ():
        data[place] = 1
        assert not is_zero(memoryview(data)), place
        assert not is_zero(memoryview(bytes(data))), place
        data[place] = 0


def test_is_zero_of_a_slice() -> None:
    data = memoryview(b"x" + bytes(4096) + b"x")
    assert is_zero(data[1:-1])
    assert not is_zero(data[:-1])
    assert not is_zero(data[1:])


@pytest.mark.parametrize("length", [0, 1, 4096, MIB, 2 * MIB + 3])
def test_zero_fill(length: int) -> None:
    data = bytearray(b"\xff" * (length + 2))
    zero_fill(memoryview(data)[1:-1])
    assert data == b"\xff" + bytes(length) + b"\xff"
