"""Refcount blocks of every width against a plain list."""

from __future__ import annotations

import random

import pytest

from fusedisk.drivers.format.qcow2.refcount_block import (
    RefcountCodec,
    RefcountOverflow,
    RefcountUnderflow,
    refcount_codec,
)

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
BLOCK = 64


def block_of(codec: RefcountCodec, values: list[int]) -> bytearray:
    block = bytearray(BLOCK)
    position, data = codec.encoded(block, 0, values)
    assert position == 0
    block[: len(data)] = data
    return block


@pytest.fixture(params=WIDTHS)
def codec(request: pytest.FixtureRequest) -> RefcountCodec:
    return refcount_codec(request.param, BLOCK * 8 // request.param)


@pytest.mark.parametrize(
    ("bits", "index", "value", "expected"),
    [
        (1, 9, 1, (1, b"\x02")),
        (2, 5, 3, (1, b"\x0c")),
        (4, 3, 9, (1, b"\x90")),
        (8, 3, 0xAB, (3, b"\xab")),
        (16, 3, 0xABCD, (6, b"\xab\xcd")),
        (32, 1, 0xABCD, (4, b"\0\0\xab\xcd")),
        (64, 1, 1, (8, b"\0\0\0\0\0\0\0\x01")),
    ],
)
def test_entries_lie_where_the_specification_puts_them(
    bits: int, index: int, value: int, expected: tuple[int, bytes]
) -> None:
    codec = refcount_codec(bits, BLOCK * 8 // bits)
    assert codec.encoded(bytearray(BLOCK), index, [value]) == expected


def test_entries_come_back_and_neighbours_stay(codec: RefcountCodec) -> None:
    rng = random.Random(codec.bits)
    values = [rng.randint(0, codec.maximum) for _ in range(codec.entries)]
    block = block_of(codec, values)
    for _ in range(200):
        index = rng.randrange(codec.entries)
        new = [rng.randint(0, codec.maximum) for _ in range(rng.randint(1, min(20, codec.entries - index)))]
        position, data = codec.encoded(block, index, new)
        block[position : position + len(data)] = data
        values[index : index + len(new)] = new
        assert codec.values(block, 0, codec.entries) == values
        assert codec.get(block, index) == new[0]
    assert len(block) == BLOCK


def test_searches_find_the_first_run(codec: RefcountCodec) -> None:
    rng = random.Random(codec.bits)
    for _ in range(200):
        density = rng.random()
        values = [rng.randint(1, codec.maximum) if rng.random() < density else 0 for _ in range(codec.entries)]
        block = block_of(codec, values)
        index, count = rng.randrange(codec.entries + 1), rng.randint(1, 6)
        expected = first_run(values, index, count)
        found = codec.find_free(block, index, count)
        assert found == expected or found[1] == expected[1] == 0, (values, index, count)
        if index < codec.entries:
            limit = rng.randint(1, codec.entries - index)
            run = next((i for i, value in enumerate(values[index : index + limit]) if value), limit)
            assert codec.free_run(block, index, limit) == run


def first_run(values: list[int], index: int, count: int) -> tuple[int, int]:
    for at in range(index, len(values)):
        run = values[at : at + count]
        if not any(run) and (len(run) == count or at + len(run) == len(values)):
            return at, len(run)
    return len(values), 0


@pytest.mark.parametrize("bits", WIDTHS[1:])
def test_adding_reports_what_drops_to_zero(bits: int) -> None:
    codec = refcount_codec(bits, BLOCK * 8 // bits)
    block = block_of(codec, [1, 1, 2, 1])
    position, data, freed = codec.added(block, 0, [-1, -1, -1, -1])
    assert freed == [(0, 2), (3, 1)]
    block[position : position + len(data)] = data
    assert codec.values(block, 0, 5) == [0, 0, 1, 0, 0]
    assert codec.added(block, 0, [1, 1])[2] == []
    position, data, freed = codec.added(block_of(codec, [3, 2, 3]), 0, [-3, -1, -2])
    assert freed == [(0, 1)]
    block[position : position + len(data)] = data
    assert codec.values(block, 0, 4) == [0, 1, 1, 0]


def test_a_refcount_leaves_its_range_in_neither_direction(codec: RefcountCodec) -> None:
    block = block_of(codec, [codec.maximum, 0])
    with pytest.raises(RefcountOverflow):
        codec.added(block, 0, [1])
    with pytest.raises(RefcountUnderflow):
        codec.added(block, 1, [-1])
    with pytest.raises(RefcountUnderflow):
        codec.added(block, 0, [-1, -1])


def test_a_run_of_free_entries_ends_with_the_block() -> None:
    for bits in (1, 2, 4, 8, 16, 32, 64):
        assert refcount_codec(bits, 64).free_run(bytearray(8 * bits), 60, 1000) == 4
