"""Sector ciphers: AES in the modes and with the IV generators of LUKS and qcow2.

A sector is 512 bytes. Its number, made into an initialization vector (IV) by the generator, and the key decide
its ciphertext, so that equal sectors differ on the disk. Longer sectors exist in LUKS2 alone.

What a long run costs depends on the mode. CBC decryption and ECB are one call with the interpreter lock
released: to them a run is one message, and for CBC only the first block of each sector is put right afterwards.
XTS, CTR and CBC encryption need a call per sector.

Serpent, Twofish and CAST5, which QEMU also offers, are refused by name: libcrypto lacks them, or keeps them in
a module that is off by default.

Source: the LUKS1 on-disk format specification 1.2.3, section "Cipher and hash specification registry"; IEEE
1619-2007 for XTS; the kernel's Documentation/admin-guide/device-mapper/dm-crypt.rst for the IV generators.
"""

from __future__ import annotations

import array
import hashlib
import re
import sys
from collections.abc import Callable
from typing import NamedTuple, Protocol

from fusedisk.core.errors import ImageError, UnsupportedFeatureError
from fusedisk.crypto.libcrypto import BLOCK, SECTOR, Contexts

CIPHERS = ("aes",)
MODES = ("xts", "cbc", "ctr", "ecb")
IV_GENERATORS = ("plain", "plain64", "essiv")
HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
"""What QEMU 7.2 knows, by LUKS's names, which are also hashlib's."""

AES_KEY_SIZES = (16, 24, 32)
"""Bytes; XTS takes two such keys."""

PIECE = 1 << 20
"""Bytes handled at a time, which bounds the temporary memory."""

_MODE = re.compile(r"([^-:]+)-([^-:]+)(?::([^-:]+))?")
_WORDS_PER_SECTOR = SECTOR // 8
_XTS_POLYNOMIAL = 0x87

IvGenerator = Callable[[int, int], bytearray]
"""From the number of the first sector and a count to that many IVs of 16 bytes."""


class CipherSpec(NamedTuple):
    """A cipher by LUKS's names; ``iv_hash`` is set where the generator needs it."""

    cipher: str
    mode: str
    iv_generator: str
    iv_hash: str | None = None

    @classmethod
    def parse(cls, cipher: str, mode: str) -> CipherSpec:
        """From a LUKS header's two strings, such as ``aes`` and ``cbc-essiv:sha256``.

        Raises ImageError for a mode of another form, UnsupportedFeatureError for names that are not known. A
        hash after a generator that needs none is ignored, as QEMU and dm-crypt do.
        """
        match = _MODE.fullmatch(mode)
        if match is None:
            raise ImageError(f"the cipher mode is '{mode}', expected MODE-GENERATOR or MODE-GENERATOR:HASH.")
        name, generator, iv_hash = match.groups()
        _check_name("cipher", cipher, CIPHERS)
        _check_name("cipher mode", name, MODES)
        _check_name("IV generator", generator, IV_GENERATORS)
        if generator != "essiv":
            return cls(cipher, name, generator)
        if iv_hash is None:
            raise ImageError(f"the cipher mode is '{mode}', but the IV generator essiv needs a hash behind a colon.")
        _check_name("IV hash", iv_hash, HASHES)
        return cls(cipher, name, generator, iv_hash)

    @property
    def mode_string(self) -> str:
        """The second string of a LUKS header."""
        text = f"{self.mode}-{self.iv_generator}"
        return f"{text}:{self.iv_hash}" if self.iv_hash is not None else text

    def key_sizes(self) -> tuple[int, ...]:
        """The lengths that a key may have, in bytes."""
        return tuple(2 * size for size in AES_KEY_SIZES) if self.mode == "xts" else AES_KEY_SIZES

    def check(self, key_bytes: int) -> None:
        """Raise UnsupportedFeatureError where no key of that length fits, or the generator cannot use its hash."""
        if key_bytes not in self.key_sizes():
            wanted = ", ".join(map(str, self.key_sizes()))
            raise UnsupportedFeatureError(
                f"the key of {self.cipher}-{self.mode} has {key_bytes} bytes, expected one of {wanted}."
            )
        if self.iv_hash is not None:
            check_hash(self.iv_hash)
            size = hashlib.new(self.iv_hash).digest_size
            if size not in AES_KEY_SIZES:
                raise UnsupportedFeatureError(
                    f"the IV generator essiv:{self.iv_hash} makes a key of {size} bytes, but AES takes 16, 24 or 32."
                )


def _check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UnsupportedFeatureError(f"the {what} is '{name}', expected {' or '.join(known)}.")


def check_hash(name: str) -> None:
    """Raise UnsupportedFeatureError for a hash that LUKS does not name, or that this Python lacks."""
    _check_name("hash", name, HASHES)
    try:
        hashlib.new(name)
    except ValueError as exc:
        raise UnsupportedFeatureError(f"the hash is '{name}', which this system's OpenSSL has switched off.") from exc


class SectorCipher:
    """Encrypts and decrypts runs of sectors with one key; any number of threads may use it at once.

    XTS takes 0.1 ms for 64 KiB, with the interpreter lock held, so that up to about 128 KiB are quicker inline than in
    a worker thread. Runs of 64 KiB and more in CBC decryption and ECB release the lock.
    """

    def __init__(self, spec: CipherSpec, key: bytes) -> None:
        """Raises UnsupportedFeatureError for a key of the wrong length, NotSupportedError without libcrypto."""
        spec.check(len(key))
        self.spec = spec
        ivs = _iv_generator(spec, key)
        self._encrypt = _transform(spec.mode, key, ivs, encrypt=True)
        self._decrypt = _transform(spec.mode, key, ivs, encrypt=False)

    def encrypt(self, sector_number: int, data: bytes | bytearray | memoryview) -> bytearray:
        """The ciphertext of ``data``, whole sectors of which ``sector_number`` is the first one's."""
        copy = bytearray(data)
        self.encrypt_in_place(sector_number, copy)
        return copy

    def decrypt(self, sector_number: int, data: bytes | bytearray | memoryview) -> bytearray:
        """The plaintext of ``data``, whole sectors of which ``sector_number`` is the first one's."""
        copy = bytearray(data)
        self.decrypt_in_place(sector_number, copy)
        return copy

    def encrypt_in_place(self, sector_number: int, buffer: bytearray | memoryview) -> None:
        """As :meth:`encrypt`, overwriting ``buffer``, which must be writable and contiguous."""
        _run(self._encrypt, sector_number, buffer)

    def decrypt_in_place(self, sector_number: int, buffer: bytearray | memoryview) -> None:
        """As :meth:`decrypt`, overwriting ``buffer``, which must be writable and contiguous."""
        _run(self._decrypt, sector_number, buffer)


class _Transform(Protocol):
    def __call__(self, sector_number: int, view: memoryview, /) -> None:
        """Overwrite ``view``, at least one sector and at most :data:`PIECE` bytes."""


def _run(transform: _Transform, sector_number: int, buffer: bytearray | memoryview) -> None:
    with memoryview(buffer) as whole, whole.cast("B") as view:
        if len(view) % SECTOR:
            raise ValueError(f"{len(view)} bytes are not whole sectors of {SECTOR} bytes")
        for start in range(0, len(view), PIECE):
            transform(sector_number + start // SECTOR, view[start : start + PIECE])


def _transform(mode: str, key: bytes, ivs: IvGenerator, *, encrypt: bool) -> _Transform:
    if mode == "ecb":
        return _Ecb(key, encrypt=encrypt)
    if mode == "cbc" and not encrypt:
        return _CbcDecryption(key, ivs)
    if mode == "xts" and len(key) == 48:
        return _Xts192(key, ivs, encrypt=encrypt)
    bits = len(key) * 8 // (2 if mode == "xts" else 1)
    # CTR is the same in both directions, and libcrypto's "decryption" of it, too.
    return _Sectorwise(f"aes-{bits}-{mode}", key, ivs, encrypt=encrypt)


class _Sectorwise:
    """A mode that libcrypto has, a call per sector."""

    def __init__(self, cipher: str, key: bytes, ivs: IvGenerator, *, encrypt: bool) -> None:
        self._contexts = Contexts(cipher, key, encrypt=encrypt)
        self._ivs = ivs

    def __call__(self, sector_number: int, view: memoryview, /) -> None:
        self._contexts.run_sectors(view, self._ivs(sector_number, len(view) // SECTOR))


class _Ecb:
    """Every block by itself; there are no IVs."""

    def __init__(self, key: bytes, *, encrypt: bool) -> None:
        self._contexts = Contexts(f"aes-{len(key) * 8}-ecb", key, encrypt=encrypt)

    def __call__(self, sector_number: int, view: memoryview, /) -> None:
        self._contexts.run(view)


class _CbcDecryption:
    """A run of sectors as one message.

    CBC XORs each deciphered block with the ciphertext block before it. To the message that block is the last
    one of the sector before; what the first block of a sector needs is its IV. So both are XORed onto it.
    """

    def __init__(self, key: bytes, ivs: IvGenerator) -> None:
        self._contexts = Contexts(f"aes-{len(key) * 8}-cbc", key, encrypt=False)
        self._ivs = ivs

    def __call__(self, sector_number: int, view: memoryview, /) -> None:
        ivs = self._ivs(sector_number, len(view) // SECTOR)
        words, iv_words = view.cast("Q"), memoryview(ivs).cast("Q")
        last = _WORDS_PER_SECTOR - 2
        # Half a block of every sector but the first at a time: a memoryview can only be sliced by words.
        masks = [
            xor(words[last + half :: _WORDS_PER_SECTOR][:-1].tobytes(), iv_words[2 + half :: 2].tobytes())
            for half in (0, 1)
        ]
        self._contexts.run(view, bytes(ivs[:BLOCK]))
        for half, mask in enumerate(masks):
            firsts = words[_WORDS_PER_SECTOR + half :: _WORDS_PER_SECTOR]
            firsts[:] = memoryview(xor(firsts.tobytes(), mask)).cast("Q")


class _Xts192:
    """XTS with AES-192, which libcrypto lacks, made of AES-192 in ECB mode.

    A block is XORed with its tweak before and after; the tweak of a sector's first block is the enciphered
    IV, and each further one is the previous one times x in GF(2^128).
    """

    def __init__(self, key: bytes, ivs: IvGenerator, *, encrypt: bool) -> None:
        half = len(key) // 2
        self._blocks = Contexts("aes-192-ecb", key[:half], encrypt=encrypt)
        self._tweaks = Contexts("aes-192-ecb", key[half:], encrypt=True)
        self._ivs = ivs

    def __call__(self, sector_number: int, view: memoryview, /) -> None:
        first = self._ivs(sector_number, len(view) // SECTOR)
        self._tweaks.run(memoryview(first))
        tweaks = _xts_tweaks(first)
        view[:] = xor(view, tweaks)
        self._blocks.run(view)
        view[:] = xor(view, tweaks)


def _xts_tweaks(first: bytearray) -> bytearray:
    """The tweak of every block, from those of each sector's first one.

    All sectors are doubled at once: a large integer holds a tweak in each 128 bits.
    """
    count = len(first) // BLOCK
    ones = int.from_bytes(b"\1".ljust(BLOCK, b"\0") * count, "little")
    below_top = ones * ((1 << 127) - 1)
    tweaks = bytearray(count * SECTOR)
    words = memoryview(tweaks).cast("Q")
    lanes = int.from_bytes(first, "little")
    for word in range(0, _WORDS_PER_SECTOR, 2):
        column = memoryview(lanes.to_bytes(len(first), "little")).cast("Q")
        for half in (0, 1):
            words[word + half :: _WORDS_PER_SECTOR] = column[half::2]
        lanes = ((lanes & below_top) << 1) ^ ((lanes >> 127) & ones) * _XTS_POLYNOMIAL
    return tweaks


def xor(left: bytes | bytearray | memoryview, right: bytes | bytearray) -> bytes:
    """The two, of the same length, XORed."""
    return (int.from_bytes(left, "little") ^ int.from_bytes(right, "little")).to_bytes(len(left), "little")


def _iv_generator(spec: CipherSpec, key: bytes) -> IvGenerator:
    if spec.iv_generator == "plain":
        return _plain
    if spec.iv_generator == "plain64":
        return _plain64
    assert spec.iv_hash is not None
    salt = hashlib.new(spec.iv_hash, key).digest()
    contexts = Contexts(f"aes-{len(salt) * 8}-ecb", salt, encrypt=True)

    def essiv(first: int, count: int) -> bytearray:
        """The enciphered sector number; the key is the hash of the disk's key, so the cipher has its length."""
        ivs = _plain64(first, count)
        contexts.run(memoryview(ivs))
        return ivs

    return essiv


def _plain(first: int, count: int) -> bytearray:
    """The lower 32 bits of the sector number, little-endian."""
    return _numbers(array.array("Q", [number & 0xFFFFFFFF for number in range(first, first + count)]))


def _plain64(first: int, count: int) -> bytearray:
    """The sector number as 64 bits, little-endian."""
    return _numbers(array.array("Q", range(first, first + count)))


def _numbers(numbers: array.array[int]) -> bytearray:
    words = array.array("Q", bytes(len(numbers) * BLOCK))
    if sys.byteorder == "big":
        numbers.byteswap()
    words[::2] = numbers
    return bytearray(words.tobytes())
