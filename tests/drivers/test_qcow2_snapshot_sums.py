"""Sums of refcounts by whole blocks agree with sums number by number."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable

import pytest

from fusedisk.drivers.format.qcow2.counts import are_one, are_zero
from fusedisk.drivers.format.qcow2.refcount_block import RefcountOverflow, RefcountUnderflow
from fusedisk.drivers.format.qcow2.snapshots import references as snapshot_references
from fusedisk.drivers.format.qcow2.snapshots.references import balance

EDGES = [0, 1, 2, 3, 15, 16, 255, 256, 257, 65535, 65536, (1 << 24) - 1, 1 << 24, 1 << 31]
ENTRIES = 16


def numbers(rng: random.Random, most: int) -> array[int]:
    return array("I", rng.choices([value for value in EDGES if value <= most], k=ENTRIES))


def stretches(rng: random.Random, most: int) -> array[int]:
    """The same number several times, then another."""
    return array("I", [value for value in numbers(rng, most)[: ENTRIES // 4] for _ in range(4)])


@pytest.mark.parametrize("made", [numbers, stretches])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_balance_is_the_sum_of_each_number(
    bits: int, made: Callable[[random.Random, int], array[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot_references, "_BALANCED_AT_ONCE", 4)
    rng, most = random.Random(bits), (1 << bits) - 1
    for _ in range(500):
        values = made(rng, min(most, rng.choice(EDGES)))
        gained = made(rng, rng.choice([0, 0, 1, most]))
        lost = array("I", [rng.choice([0, value]) for value in values])
        expected = [a + b - c for a, b, c in zip(values, gained, lost, strict=True)]
        if max(expected) > min(most, (1 << 32) - 2):
            with pytest.raises(RefcountOverflow):
                balance(values, gained, lost, bits)
        else:
            assert balance(values, gained, lost, bits).tolist() == expected


@pytest.mark.parametrize("value", [0, 1, 255, 256, 1 << 24])
def test_a_number_below_zero_is_refused(value: int) -> None:
    values, lost = array("I", [5, value, 5, 5]), array("I", [0, value + 1, 0, 0])
    with pytest.raises(RefcountUnderflow):
        balance(values, None, lost, 64)
    with pytest.raises(RefcountUnderflow):
        balance(array("I", [value] * 4), None, array("I", [value + 1] * 4), 64)


def test_zeroes_and_ones_are_told_from_numbers_that_look_like_them_in_one_byte() -> None:
    values = array("I", [*EDGES, 0x01000001, 0x00010100])
    assert list(are_zero(values)) == [value == 0 for value in values]
    assert list(are_one(values)) == [value == 1 for value in values]


@pytest.mark.parametrize("value", [0, 1, 2, 255, 256, 257, 1 << 24, (1 << 32) - 1])
def test_many_equal_numbers_are_told_at_once(value: int) -> None:
    values = array("I", [value] * 5)
    assert list(are_zero(values)) == [value == 0] * 5
    assert list(are_one(values)) == [value == 1] * 5
