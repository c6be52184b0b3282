"""The anti-forensic splitter of LUKS: a key spread over many stripes, so that losing one loses the key.

Source: the LUKS1 on-disk format specification 1.2.3, section "Anti-forensic splitter".
"""

from __future__ import annotations

import hashlib
import os

from fusedisk.crypto.ciphers import xor


def split(key: bytes, stripes: int, hash: str) -> bytes:
    """``stripes`` stripes as long as ``key``, all but the last random, from which :func:`merge` makes ``key``."""
    random = os.urandom(len(key) * (stripes - 1))
    return random + xor(_accumulate(random, len(key), hash), key)


def merge(material: bytes | bytearray, stripes: int, hash: str) -> bytes:
    """The key of ``len(material) / stripes`` bytes that was split."""
    size = len(material) // stripes
    return xor(_accumulate(material[: size * (stripes - 1)], size, hash), material[-size:])


def _accumulate(material: bytes | bytearray, size: int, hash: str) -> bytes:
    """XOR the stripes of ``size`` bytes, with a diffusion after each."""
    mixed = bytes(size)
    for start in range(0, len(material), size):
        mixed = _diffuse(xor(mixed, material[start : start + size]), hash)
    return mixed


def _diffuse(block: bytes, hash: str) -> bytes:
    """Each piece of a digest's length replaced by its hash, so that every bit changes half of them."""
    size = hashlib.new(hash).digest_size
    pieces = [block[start : start + size] for start in range(0, len(block), size)]
    digests = [hashlib.new(hash, index.to_bytes(4, "big") + piece).digest() for index, piece in enumerate(pieces)]
    return b"".join(digests)[: len(block)]
