"""Sector ciphers: against published vectors, against themselves sector by sector, and from several threads."""

from __future__ import annotations

import hashlib
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedisk.core.errors import FusediskError, ImageError, NotSupportedError, UnsupportedFeatureError
from fusedisk.crypto import ciphers, libcrypto
from fusedisk.crypto.ciphers import CipherSpec, SectorCipher

SPECS = [
    CipherSpec("aes", mode, generator, "sha256" if generator == "essiv" else None)
    for mode in ciphers.MODES
    for generator in ciphers.IV_GENERATORS
]
CIPHERS = [(spec, size) for spec in SPECS for size in spec.key_sizes()]
COUNTING = bytes(range(256)) * 2


def _cipher(spec: CipherSpec, size: int) -> SectorCipher:
    return SectorCipher(spec, bytes(range(100, 100 + size)))


@pytest.mark.parametrize(
    ("keys", "sector", "begin"),
    [
        # IEEE 1619-2007, annex B: vectors 4 and 10.
        (
            "2718281828459045235360287471352631415926535897932384626433832795",
            0,
            "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
        ),
        (
            "2718281828459045235360287471352662497757247093699959574966967627"
            "3141592653589793238462643383279502884197169399375105820974944592",
            0xFF,
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
        ),
    ],
)
def test_published_xts_vectors(keys: str, sector: int, begin: str) -> None:
    got = SectorCipher(CipherSpec("aes", "xts", "plain64"), bytes.fromhex(keys)).encrypt(sector, COUNTING)
    assert got[:32].hex() == begin


def test_published_blocks() -> None:
    """FIPS 197, appendix C, for the three key sizes; CBC of zeroes with a zero IV begins with the same block."""
    block = bytes.fromhex("00112233445566778899aabbccddeeff")
    wanted = {
        16: "69c4e0d86a7b0430d8cdb78070b4c55a",
        24: "dda97ca4864cdfe06eaf70a0ec0d7191",
        32: "8ea2b7ca516745bfeafc49904b496089",
    }
    for size, text in wanted.items():
        key = bytes(range(size))
        for mode in ("ecb", "cbc"):
            cipher = SectorCipher(CipherSpec("aes", mode, "plain64"), key)
            assert cipher.encrypt(0, block + bytes(496))[:16].hex() == text, (size, mode)


def test_essiv_iv() -> None:
    """ECB of the sector number under the key's hash is the IV: CBC of it as plaintext is the cipher of zeroes."""
    key = bytes(range(32))
    number = (1 << 33) + 5
    ecb = SectorCipher(CipherSpec("aes", "ecb", "plain64"), hashlib.sha256(key).digest())
    iv = ecb.encrypt(0, number.to_bytes(16, "little") + bytes(496))[:16]
    got = SectorCipher(CipherSpec("aes", "cbc", "essiv", "sha256"), key).encrypt(number, iv + bytes(496))
    zeroes = SectorCipher(CipherSpec("aes", "ecb", "plain64"), key).encrypt(0, bytes(512))
    assert got[:16] == zeroes[:16]


@pytest.mark.parametrize(("spec", "size"), CIPHERS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_run_is_its_sectors(spec: CipherSpec, size: int, data: st.DataObject) -> None:
    """Whatever a run is made of, each sector comes out as if it were alone, and decrypts to what it was."""
    cipher = _cipher(spec, size)
    first = data.draw(st.one_of(st.integers(0, 1 << 55), st.integers((1 << 32) - 4, (1 << 32) + 4)))
    count = data.draw(st.integers(1, 6))
    plain = data.draw(st.binary(min_size=512 * count, max_size=512 * count))
    encrypted = cipher.encrypt(first, plain)
    alone = [cipher.encrypt(first + index, plain[index * 512 : index * 512 + 512]) for index in range(count)]
    assert encrypted == b"".join(alone)
    assert cipher.decrypt(first, encrypted) == plain
    back = [cipher.decrypt(first + index, alone[index]) for index in range(count)]
    assert b"".join(back) == plain


@pytest.mark.parametrize(("spec", "size"), CIPHERS)
def test_long_runs(spec: CipherSpec, size: int) -> None:
    """Runs of more than one piece, whose calls release the lock; sectors around the seams are looked at."""
    cipher = _cipher(spec, size)
    plain = hashlib.shake_128(b"plain").digest(2 * ciphers.PIECE + 1536)
    encrypted = cipher.encrypt(9, plain)
    for sector in (0, 1, 2047, 2048, 4095, 4096, 4098):
        at = slice(sector * 512, sector * 512 + 512)
        assert encrypted[at] == cipher.encrypt(9 + sector, plain[at]), sector
    assert cipher.decrypt(9, encrypted) == plain


@pytest.mark.parametrize("mode", ["xts", "cbc", "ctr"])
def test_sectors_differ(mode: str) -> None:
    got = _cipher(CipherSpec("aes", mode, "plain64"), 32).encrypt(0, bytes(1024))
    assert got[:512] != got[512:]


def test_plain_wraps_and_plain64_does_not() -> None:
    for generator, same in (("plain", True), ("plain64", False)):
        cipher = _cipher(CipherSpec("aes", "xts", generator), 64)
        assert (cipher.encrypt(7, COUNTING) == cipher.encrypt((1 << 32) + 7, COUNTING)) == same, generator


def test_in_place_leaves_the_surroundings_alone() -> None:
    cipher = _cipher(CipherSpec("aes", "xts", "plain64"), 64)
    buffer = bytearray(b"\xa5" * 2048)
    cipher.encrypt_in_place(3, memoryview(buffer)[512:1536])
    assert buffer[:512] == buffer[1536:] == b"\xa5" * 512
    assert buffer[512:1536] == cipher.encrypt(3, b"\xa5" * 1024)
    cipher.decrypt_in_place(3, memoryview(buffer)[512:1536])
    assert buffer == b"\xa5" * 2048


def test_nothing_is_nothing() -> None:
    assert _cipher(SPECS[0], 32).encrypt(0, b"") == b""


def test_part_of_a_sector_is_refused() -> None:
    with pytest.raises(ValueError, match="513 bytes are not whole sectors"):
        _cipher(SPECS[0], 32).encrypt(0, bytes(513))


def test_a_read_only_buffer_is_refused_untouched() -> None:
    for spec, size in CIPHERS:
        data = bytes(1024)
        with pytest.raises(TypeError):
            _cipher(spec, size).decrypt_in_place(0, memoryview(data))
        assert data == bytes(1024)


def test_threads_share_a_cipher() -> None:
    """Each thread's runs are long enough to be interrupted, and differ from the others'."""
    cipher = _cipher(CipherSpec("aes", "cbc", "essiv", "sha256"), 32)
    plain = hashlib.shake_128(b"threads").digest(256 << 10)
    wanted = [cipher.encrypt(number, plain) for number in range(4)]
    wrong: list[int] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for _ in range(20):
            if cipher.encrypt(number, plain) != wanted[number] or cipher.decrypt(number, wanted[number]) != plain:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("cipher", "mode", "error", "text"),
    [
        ("serpent", "xts-plain64", UnsupportedFeatureError, "the cipher is 'serpent', expected aes"),
        ("twofish", "cbc-plain64", UnsupportedFeatureError, "the cipher is 'twofish'"),
        ("cast5", "cbc-plain64", UnsupportedFeatureError, "the cipher is 'cast5'"),
        ("aes", "gcm-random", UnsupportedFeatureError, "the cipher mode is 'gcm', expected xts or cbc or ctr or ecb"),
        ("aes", "xts-benbi", UnsupportedFeatureError, "the IV generator is 'benbi'"),
        ("aes", "cbc-essiv:whirlpool", UnsupportedFeatureError, "the IV hash is 'whirlpool'"),
        ("aes", "cbc-essiv", ImageError, "the IV generator essiv needs a hash behind a colon"),
        ("aes", "xts", ImageError, "expected MODE-GENERATOR or MODE-GENERATOR:HASH"),
        ("aes", "", ImageError, "the cipher mode is ''"),
    ],
)
def test_unknown_names_are_refused(cipher: str, mode: str, error: type[FusediskError], text: str) -> None:
    with pytest.raises(error) as caught:
        CipherSpec.parse(cipher, mode)
    assert type(caught.value) is error
    assert text in str(caught.value)


def test_names_round_trip() -> None:
    for spec in SPECS:
        assert CipherSpec.parse(spec.cipher, spec.mode_string) == spec
    assert CipherSpec.parse("aes", "xts-plain64:sha1") == CipherSpec("aes", "xts", "plain64")


@pytest.mark.parametrize("size", [0, 15, 16, 31, 33, 65])
def test_keys_of_another_length_are_refused(size: int) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"has {size} bytes, expected one of 32, 48, 64"):
        SectorCipher(CipherSpec("aes", "xts", "plain64"), bytes(size))


@pytest.mark.parametrize("hash", ["sha1", "sha512"])
def test_essiv_hashes_that_make_no_aes_key_are_refused(hash: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"essiv:{hash} makes a key of"):
        SectorCipher(CipherSpec("aes", "cbc", "essiv", hash), bytes(32))


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcrypto, "LIBRARIES", ("libcrypto.so.none",))
    libcrypto._library.cache_clear()
    try:
        with pytest.raises(NotSupportedError, match=r"libcrypto\.so\.none, which Debian's package libssl3 installs"):
            _cipher(SPECS[0], 32)
    finally:
        libcrypto._library.cache_clear()


def test_a_cipher_that_the_library_lacks_is_refused() -> None:
    with pytest.raises(NotSupportedError, match="no cipher 'aes-192-xts'"):
        libcrypto.Context("aes-192-xts", bytes(48), encrypt=True)


def test_every_sector_needs_an_iv() -> None:
    """The library would read on behind the IVs."""
    context = libcrypto.Context("aes-128-xts", bytes(range(32)), encrypt=True)
    with pytest.raises(ValueError, match="16 bytes of IVs for 2 sectors"):
        context.run_sectors(memoryview(bytearray(1024)), bytearray(16))


def test_a_key_that_the_library_refuses() -> None:
    """XTS with two equal halves is no encryption worth the name."""
    with pytest.raises(FusediskError, match="refuses the key for 'aes-128-xts'"):
        SectorCipher(CipherSpec("aes", "xts", "plain64"), bytes(32))
