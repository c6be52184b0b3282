"""LUKS headers that lie: one clear error each, and nothing that is not bounded."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusedisk.core.errors import ImageError, UnsupportedFeatureError
from fusedisk.crypto import luks, luks_layout
from fusedisk.crypto.luks_layout import DISABLED, ENABLED, HEADER_SIZE, MAX_ITERATIONS
from tests.hostile.sentence import assert_sentence

AREA = 2068480
MATERIAL_END = 2066432
"""Where the key material of the last slot ends; it is padded to AREA."""
GOOD = luks.format(b"x", luks.Options(iterations=1000)).header.pack()
SLOT_1 = 208 + 48
"""Where key slot 1 is; it is not active."""


def _with(offset: int, data: bytes) -> bytes:
    return GOOD[:offset] + data + GOOD[offset + len(data) :]


def _number(offset: int, value: int) -> bytes:
    return _with(offset, struct.pack(">I", value))


def test_the_base_of_these_tests_is_good() -> None:
    assert luks_layout.parse(GOOD, AREA, "x").pack() == GOOD
    assert len(GOOD) == HEADER_SIZE


@pytest.mark.parametrize(
    ("head", "error", "text"),
    [
        (b"", ImageError, "it is 0 bytes long, expected 592"),
        (GOOD[:-1], ImageError, "it is 591 bytes long"),
        (bytes(592), ImageError, "it begins with 00 00"),
        (_with(0, b"SKUL"), ImageError, "expected 4c 55 4b 53 ba be"),
        (_with(6, b"\0\2"), UnsupportedFeatureError, "its version is 2, expected 1"),
        (_with(8, b"A" * 32), ImageError, "the cipher name is b'AAAA"),
        (_with(8, b"a\x1b[2J\0"), ImageError, "the cipher name is b'a\\x1b[2J"),
        (_with(8, b"a\xff\0"), ImageError, "the cipher name is b'a\\xff"),
        (_with(8, b"serpent\0"), UnsupportedFeatureError, "the cipher is 'serpent'"),
        (_with(40, b"x" * 32), ImageError, "the cipher mode is b'xxxx"),
        (_with(40, b"xts-essiv\0\0"), ImageError, "essiv needs a hash"),
        (_with(40, b"xts-essiv:sha1\0"), UnsupportedFeatureError, "essiv:sha1 makes a key of 20 bytes"),
        (_with(40, b"cbc-plain64\0"), UnsupportedFeatureError, "the key of aes-cbc has 64 bytes"),
        (_with(72, b"sha3\0\0\0"), UnsupportedFeatureError, "the hash is 'sha3'"),
        (_with(72, b"h" * 32), ImageError, "the hash name is b'hhhh"),
        (_number(104, 0), ImageError, "the end of the header area at 0"),
        (_number(104, 4035), ImageError, "the key material of slot 7 lies at"),
        (_number(108, 0), UnsupportedFeatureError, "has 0 bytes"),
        (_number(108, 0xFFFFFFFF), UnsupportedFeatureError, "has 4294967295 bytes"),
        (_number(164, 0), ImageError, "the master key's digest takes 0 iterations"),
        (_number(164, MAX_ITERATIONS + 1), ImageError, f"digest takes {MAX_ITERATIONS + 1} iterations"),
        (_with(168, b"u" * 40), ImageError, "the UUID is b'uuuu"),
        (_number(208, 1), ImageError, "key slot 0 has the state 0x1, expected 0xac71f3 or 0xdead"),
        (_number(212, 0), ImageError, "key slot 0 takes 0 iterations"),
        (_number(212, 0xFFFFFFFF), ImageError, "key slot 0 takes 4294967295 iterations"),
        (_number(208 + 40, 0), ImageError, "slot 0 lies at 0 to 256000, but it must lie between the header"),
        (_number(208 + 40, 1), ImageError, "slot 0 lies at 512 to"),
        (_number(SLOT_1 + 40, 0xFFFFFFFF), ImageError, "slot 1 lies at 2199023255040 to"),
        (_number(SLOT_1 + 40, 9), ImageError, "the key material of the slots 0 and 1 overlaps"),
        (_number(SLOT_1 + 40, 507), ImageError, "the key material of the slots 0 and 1 overlaps"),
        (_number(208 + 40, 7 * 504 + 8), ImageError, "the key material of the slots 0 and 7 overlaps"),
        (_number(208 + 44, 0), ImageError, "key slot 0 has 0 stripes, expected 4000"),
        (_number(SLOT_1 + 44, 0xFFFFFFFF), ImageError, "key slot 1 has 4294967295 stripes"),
    ],
)
def test_lies_are_refused(head: bytes, error: type[ImageError], text: str) -> None:
    with pytest.raises(error) as caught:
        luks_layout.parse(head, AREA, "disk.luks")
    assert type(caught.value) is error
    assert_sentence(caught.value, "disk.luks", text)


@pytest.mark.parametrize("area", [0, HEADER_SIZE, MATERIAL_END - 1])
def test_a_cut_off_area_is_refused(area: int) -> None:
    with pytest.raises(ImageError, match=f"the end of the header area at {area}"):
        luks_layout.parse(GOOD, area, "disk.luks")


def test_an_area_may_end_with_the_key_material() -> None:
    assert luks_layout.parse(GOOD, MATERIAL_END, "disk.luks").slots[7].material_offset + 256000 == MATERIAL_END


def test_inactive_slots_may_ask_for_no_iterations() -> None:
    assert struct.unpack_from(">II", GOOD, SLOT_1) == (DISABLED, 0)
    head = _with(SLOT_1, struct.pack(">II", ENABLED, 0))
    with pytest.raises(ImageError, match="key slot 1 takes 0 iterations"):
        luks_layout.parse(head, AREA, "disk.luks")


def test_key_material_may_touch() -> None:
    assert luks_layout.parse(_number(SLOT_1 + 40, 508), AREA, "x").slots[1].material_offset == 4096 + 256000


def test_ignored_hashes_survive_a_rewrite() -> None:
    head = _with(40, b"xts-plain64:sha512\0")
    assert luks_layout.parse(head, AREA, "x").pack() == head


@settings(max_examples=400)
@given(
    changes=st.lists(st.tuples(st.integers(0, HEADER_SIZE - 4), st.binary(min_size=1, max_size=4)), max_size=5),
    area=st.one_of(st.just(AREA), st.integers(0, 1 << 62)),
)
@example(changes=[], area=0)
def test_any_header_is_bounded_or_refused(changes: list[tuple[int, bytes]], area: int) -> None:
    """What passes reads inside its area, at most 2 MiB, and derives keys for a bounded time."""
    head = bytearray(GOOD)
    for offset, data in changes:
        head[offset : offset + len(data)] = data
    try:
        header = luks_layout.parse(bytes(head), area, "disk.luks")
    except ImageError as exc:
        assert_sentence(exc, "disk.luks")
        return
    ranges = header.material_ranges()
    assert all(offset >= HEADER_SIZE and offset + size <= area for offset, size in ranges.values())
    assert sum(size for _, size in ranges.values()) <= 2 << 20
    assert header.mk_digest_iterations <= MAX_ITERATIONS
    assert all(header.slots[index].iterations <= MAX_ITERATIONS for index in ranges)
