"""Key slots without QEMU: unlocking, adding, erasing, the splitter and the benchmark."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedisk.core.errors import OptionError, PassphraseError
from fusedisk.crypto import af_splitter, ciphers, luks, luks_layout
from tests.crypto.images import Area
from tests.hostile.sentence import assert_sentence

FAST = luks.Options(iterations=1000)


def _apply(area: bytes, pieces: list[luks.Piece]) -> bytes:
    content = bytearray(area)
    for piece in pieces:
        content[piece.offset : piece.offset + len(piece.data)] = piece.data
    return bytes(content)


def _area(content: bytes) -> Area:
    return Area(content, luks_layout.parse(content[: luks_layout.HEADER_SIZE], len(content), "disk.luks"))


@pytest.fixture
def made() -> luks.NewHeader:
    return luks.format(b"first", FAST)


@pytest.fixture
def area(made: luks.NewHeader) -> Area:
    return _area(_apply(bytes(made.header.payload_offset), made.pieces))


def test_a_new_header_unlocks(made: luks.NewHeader, area: Area) -> None:
    assert area.unlock("first") == (0, made.master_key)
    assert len(made.master_key) == 64
    assert area.header == made.header
    assert area.header.material_ranges() == {0: (4096, 256000)}


def test_two_headers_share_nothing_random(made: luks.NewHeader) -> None:
    other = luks.format(b"first", FAST)
    assert other.master_key != made.master_key
    assert other.header.mk_digest_salt != made.header.mk_digest_salt
    assert other.header.slots[0].salt != made.header.slots[0].salt
    assert other.header.uuid != made.header.uuid


@pytest.mark.parametrize("passphrase", ["", "Firs", "first ", "FIRST"])
def test_a_wrong_passphrase_has_its_own_error(area: Area, passphrase: str) -> None:
    with pytest.raises(PassphraseError) as caught:
        area.unlock(passphrase)
    assert_sentence(caught.value, "disk.luks")


def test_a_newline_is_hinted_at(area: Area) -> None:
    with pytest.raises(PassphraseError, match="ends with a newline"):
        area.unlock("first\n")


def test_damaged_key_material_does_not_unlock(area: Area) -> None:
    """One bit anywhere in the 4000 stripes."""
    for at in (4096, 4096 + 128000, 4096 + 255999):
        content = bytearray(area.content)
        content[at] ^= 1
        with pytest.raises(PassphraseError):
            _area(bytes(content)).unlock("first")


@pytest.mark.slow
def test_every_slot(made: luks.NewHeader, area: Area) -> None:
    """Eight passphrases at once; a ninth has no place; then they go one by one but for the last."""
    content, header = area.content, area.header
    for number in range(1, 8):
        pieces = luks.add_passphrase(header, made.master_key, b"%d" % number, FAST)
        content = _apply(content, pieces)
    full = _area(content)
    assert full.header == header
    assert [full.unlock(str(number)) for number in range(1, 8)] == [(n, made.master_key) for n in range(1, 8)]
    with pytest.raises(OptionError, match="All 8 key slots are in use"):
        luks.add_passphrase(full.header, made.master_key, b"ninth", FAST)
    for slot in range(7):
        content = _apply(content, luks.erase_slot(header, slot))
    assert _area(content).header.active_slots() == [7]
    assert _area(content).unlock("7").master_key == made.master_key


def test_every_prefix_of_the_pieces_is_sound(made: luks.NewHeader, area: Area) -> None:
    """Adding and erasing may stop after each piece: what is active unlocks, the other passphrase all the time."""
    content, header = area.content, area.header
    seen = []

    def write(pieces: list[luks.Piece]) -> None:
        nonlocal content
        for piece in pieces:
            content = _apply(content, [piece])
            now = _area(content)
            assert now.unlock("first").master_key == made.master_key
            if 3 in now.header.active_slots():
                assert now.unlock("second").slot == 3
            seen.append(now.header.active_slots())

    write(luks.add_passphrase(header, made.master_key, b"second", FAST, slot=3))
    write(luks.erase_slot(header, 3))
    assert seen == [[0], [0, 3], [0], [0]]


def test_erased_material_is_overwritten(made: luks.NewHeader, area: Area) -> None:
    content = _apply(area.content, luks.erase_slot(area.header, 0, force=True))
    before, after = area.content[4096 : 4096 + 256000], content[4096 : 4096 + 256000]
    assert sum(a == b for a, b in zip(before, after, strict=True)) < 256000 / 256 * 1.5
    assert area.header.slots[0].salt == bytes(32)
    with pytest.raises(PassphraseError, match="no active key slot"):
        _area(content).unlock("first")


def test_what_slots_refuse(made: luks.NewHeader, area: Area) -> None:
    header, before = area.header, area.header.pack()
    changes: list[tuple[str, Callable[[], object]]] = [
        ("slot 0 is the last one", lambda: luks.erase_slot(header, 0)),
        ("slot 1 is not in use", lambda: luks.erase_slot(header, 1)),
        ("slot is 8, expected 0 to 7", lambda: luks.erase_slot(header, 8)),
        ("slot is -1, expected 0 to 7", lambda: luks.add_passphrase(header, made.master_key, b"x", FAST, slot=-1)),
        ("slot 0 is in use", lambda: luks.add_passphrase(header, made.master_key, b"x", FAST, slot=0)),
        ("every key slot in use", lambda: luks.remove_passphrase(header, area.materials(), b"first", "disk.luks")),
    ]
    for match, change in changes:
        with pytest.raises(OptionError, match=match) as caught:
            change()
        assert_sentence(caught.value)
    with pytest.raises(PassphraseError):
        luks.remove_passphrase(header, area.materials(), b"other", "disk.luks")
    assert header.pack() == before


def test_a_passphrase_in_several_slots_is_removed_from_all(made: luks.NewHeader, area: Area) -> None:
    content, header = area.content, area.header
    for passphrase in (b"twice", b"twice", b"kept"):
        content = _apply(content, luks.add_passphrase(header, made.master_key, passphrase, FAST))
    before = _area(content)
    content = _apply(content, luks.remove_passphrase(before.header, before.materials(), b"twice", "disk.luks"))
    after = _area(content)
    assert after.header.active_slots() == [0, 3]
    assert after.unlock("kept").slot == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cipher_alg": "aes"}, "expected aes-128, aes-192 or aes-256"),
        ({"cipher_alg": "aes-130"}, "The cipher is 'aes-130', expected aes-128, aes-192 or aes-256"),
        ({"cipher_alg": "serpent-256"}, "the cipher is 'serpent'"),
        ({"cipher_mode": "lrw"}, "the cipher mode is 'lrw'"),
        ({"ivgen_alg": "random"}, "the IV generator is 'random'"),
        ({"hash_alg": "whirlpool"}, "the hash is 'whirlpool'"),
        ({"ivgen_alg": "essiv", "ivgen_hash_alg": "sha512"}, "makes a key of 64 bytes"),
        ({"iterations": 999}, "999 iterations"),
        ({"iterations": luks_layout.MAX_ITERATIONS + 1}, "iterations were asked for"),
        ({"iterations": None, "iter_time": 0}, "iter-time is 0"),
    ],
)
def test_options_that_make_no_header(options: dict[str, object], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        luks.format(b"x", luks.Options(**{"iterations": 1000, **options}))  # type: ignore[arg-type]
    assert text in str(caught.value)
    assert_sentence(caught.value)


def test_iterations_follow_the_wanted_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that does a million a second: the slot takes the time, the digest an eighth of it."""
    monkeypatch.setattr(luks, "_iterations_per_second", lambda *_: 1e6)
    header = luks.format(b"x", luks.Options(iter_time=400)).header
    assert header.slots[0].iterations == 400_000
    assert header.mk_digest_iterations == 50_000
    header = luks.format(b"x", luks.Options(iter_time=1)).header
    assert (header.slots[0].iterations, header.mk_digest_iterations) == (1000, 1000)


def test_a_new_passphrase_is_measured_with_the_header_s_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    made = luks.format(b"x", luks.Options(iterations=1000, hash_alg="sha512"))
    measured = []

    def speed(hash: str, secret: bytes, size: int) -> float:
        measured.append((hash, size))
        return 1e6

    monkeypatch.setattr(luks, "_iterations_per_second", speed)
    luks.add_passphrase(made.header, made.master_key, b"y", luks.Options(iter_time=5))
    assert measured == [("sha512", 64)]
    assert made.header.slots[1].iterations == 5000


def test_the_benchmark_counts_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that PBKDF2 itself moves: 200,000 iterations a second."""
    clock = 0.0

    def pbkdf2(hash: str, secret: bytes, salt: bytes, count: int, size: int) -> bytes:
        nonlocal clock
        clock += count / 200_000
        return bytes(size)

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", pbkdf2)
    monkeypatch.setattr(time, "thread_time", lambda: clock)
    assert luks._iterations_per_second("sha256", b"x", 64) == pytest.approx(200_000)


@settings(max_examples=40)
@given(key=st.binary(min_size=1, max_size=70), stripes=st.integers(1, 9), hash=st.sampled_from(sorted(ciphers.HASHES)))
def test_what_is_split_merges(key: bytes, stripes: int, hash: str) -> None:
    material = af_splitter.split(key, stripes, hash)
    assert len(material) == len(key) * stripes
    assert af_splitter.merge(material, stripes, hash) == key


def test_diffusion_by_hand() -> None:
    """Two stripes: the second is the key XORed with the hashes of the first one's pieces."""
    key = bytes(range(40))
    material = af_splitter.split(key, 2, "sha256")
    random = material[:40]
    digest = hashlib.sha256(b"\0\0\0\0" + random[:32]).digest() + hashlib.sha256(b"\0\0\0\1" + random[32:]).digest()[:8]
    assert bytes(a ^ b for a, b in zip(digest, material[40:], strict=True)) == key
