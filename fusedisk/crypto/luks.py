"""LUKS1: unlocking a header, making one, and changing its passphrases. Bytes only; callers read and write.

The data is encrypted with a random master key. Each active key slot holds that key, spread by the
anti-forensic splitter and encrypted with a key that PBKDF2 derives from the slot's passphrase.

All functions that take a passphrase compute for up to seconds with the interpreter lock released, as PBKDF2 is
made to: call them in a worker thread.

What changes a header returns pieces, each an offset from the start of the header area and bytes, to be written
in that order with a flush after each, so that a power cut leaves a header that still unlocks.

Source: the LUKS1 on-disk format specification 1.2.3, sections "Master key recovery", "Partition initialization",
"Adding new passwords" and "Passwords revocation".
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import time
import uuid
from collections.abc import Mapping
from typing import NamedTuple

from fusedisk.core.errors import ImageError, OptionError, PassphraseError
from fusedisk.crypto import af_splitter
from fusedisk.crypto.ciphers import CipherSpec, SectorCipher, check_hash
from fusedisk.crypto.libcrypto import SECTOR
from fusedisk.crypto.luks_layout import (
    ALIGNMENT,
    DIGEST_SIZE,
    KEY_SLOTS,
    MAX_ITERATIONS,
    SALT_SIZE,
    STRIPES,
    Header,
    KeySlot,
    area_size,
    material_spacing,
)

MIN_ITERATIONS = 1000
"""The specification's lower bound for new headers."""
DEFAULT_ITERATION_TIME = 2000
"""Milliseconds."""
_CIPHER_KEY_BYTES = {"128": 16, "192": 24, "256": 32}
"""The end of a cipher's name, and its key's length; XTS takes two keys."""
_DIGEST_SHARE = 8
"""The master key's digest takes this fraction of a slot's time: every slot that is tried computes it."""
_BENCHMARK_TIME = 0.1
"""Seconds of processor time that are enough to tell how fast this machine is."""

Materials = Mapping[int, bytes | bytearray | memoryview]
"""The key material of each slot, read at Header.material_ranges()."""


class Piece(NamedTuple):
    """Bytes to write at an offset from the start of the header area."""

    offset: int
    data: bytes


class Unlocked(NamedTuple):
    """What a passphrase opened."""

    slot: int
    master_key: bytes


@dataclasses.dataclass(slots=True, frozen=True)
class Options:
    """How to make a header; names and defaults are those of QEMU's ``encrypt.*`` options."""

    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    ivgen_alg: str = "plain64"
    ivgen_hash_alg: str | None = None
    """For essiv; None is sha256 there."""
    hash_alg: str = "sha256"
    iter_time: int = DEFAULT_ITERATION_TIME
    """Milliseconds that deriving a key shall take on this machine."""
    iterations: int | None = None
    """Instead of iter_time."""


class NewHeader(NamedTuple):
    """A header that was made, the key it holds, and what to write into a header area that reads as zeroes.

    The area is ``header.payload_offset`` bytes long.
    """

    header: Header
    master_key: bytes
    pieces: list[Piece]


def unlock(header: Header, materials: Materials, passphrase: bytes, filename: str) -> Unlocked:
    """The master key, from the first active slot that ``passphrase`` opens.

    Raises PassphraseError when it opens none.
    """
    for index in header.active_slots():
        key = _try_slot(header, index, bytes(materials[index]), passphrase)
        if key is not None:
            return Unlocked(index, key)
    if not header.active_slots():
        raise PassphraseError(f"'{filename}' has no active key slot, so no passphrase can open it.")
    hint = " (it ends with a newline, which counts)" if passphrase.endswith(b"\n") else ""
    raise PassphraseError(f"The passphrase{hint} opens none of the key slots of '{filename}'.")


def check_options(options: Options) -> None:
    """Raise OptionError for options that make no cipher, or too little work against guessing of passphrases."""
    _cipher_of(options)
    _check_iterations(options)


def format(passphrase: bytes, options: Options) -> NewHeader:
    """A new header with a random master key, which ``passphrase`` opens, in slot 0.

    Raises OptionError for options that make no cipher.
    """
    spec, key_bytes = _cipher_of(options)
    master_key, salt = os.urandom(key_bytes), os.urandom(SALT_SIZE)
    iterations = _iterations(options, master_key, DIGEST_SIZE, _DIGEST_SHARE)
    header = Header(
        spec=spec,
        hash=options.hash_alg,
        payload_offset=area_size(key_bytes),
        key_bytes=key_bytes,
        mk_digest=hashlib.pbkdf2_hmac(options.hash_alg, master_key, salt, iterations, DIGEST_SIZE),
        mk_digest_salt=salt,
        mk_digest_iterations=iterations,
        uuid=str(uuid.uuid4()),
        slots=[_empty_slot(ALIGNMENT + index * material_spacing(key_bytes)) for index in range(KEY_SLOTS)],
        cipher_mode=spec.mode_string,
    )
    pieces = add_passphrase(header, master_key, passphrase, options, slot=0)
    return NewHeader(header, master_key, pieces)


def add_passphrase(
    header: Header, master_key: bytes, passphrase: bytes, options: Options, *, slot: int | None = None
) -> list[Piece]:
    """Let ``passphrase`` open the header, too, in the given slot or the first free one; changes ``header``.

    Of ``options`` only the iteration fields count. Raises OptionError where no slot is free, or the given one
    is not.
    """
    if slot is None:
        free = [index for index in range(KEY_SLOTS) if not header.slots[index].active]
        if not free:
            raise OptionError(f"All {KEY_SLOTS} key slots are in use; erase one first.")
        slot = free[0]
    _check_slot(slot)
    target = header.slots[slot]
    if target.active:
        raise OptionError(f"Key slot {slot} is in use; erase it first.")
    salt = os.urandom(SALT_SIZE)
    iterations = _iterations(options, passphrase, header.key_bytes, 1, hash=header.hash)
    key = hashlib.pbkdf2_hmac(header.hash, passphrase, salt, iterations, header.key_bytes)
    material = _cipher_material(header, key, af_splitter.split(master_key, STRIPES, header.hash), encrypt=True)
    header.slots[slot] = KeySlot(True, iterations, salt, target.material_offset)
    return [Piece(target.material_offset, material), Piece(0, header.pack())]


def erase_slot(header: Header, slot: int, *, force: bool = False) -> list[Piece]:
    """Make a slot unusable and overwrite its key material; changes ``header``.

    Raises OptionError for a slot that is not active, and for the last active one unless ``force`` is set: without
    any the data is lost for good.
    """
    _check_slot(slot)
    if not header.slots[slot].active:
        raise OptionError(f"Key slot {slot} is not in use.")
    if header.active_slots() == [slot] and not force:
        raise OptionError(f"Key slot {slot} is the last one in use; erasing it would lose all data.")
    offset = header.slots[slot].material_offset
    header.slots[slot] = _empty_slot(offset)
    # The header goes first: a slot that is active but overwritten would cost its owner time at every unlock.
    return [Piece(0, header.pack()), Piece(offset, os.urandom(header.material_size))]


def remove_passphrase(
    header: Header, materials: Materials, passphrase: bytes, filename: str, *, force: bool = False
) -> list[Piece]:
    """Erase every slot that ``passphrase`` opens; changes ``header``.

    Raises PassphraseError where there is none, OptionError where no slot would be left, unless ``force`` is set.
    """
    active = header.active_slots()
    opened = [index for index in active if _try_slot(header, index, bytes(materials[index]), passphrase) is not None]
    if not opened:
        raise PassphraseError(f"The passphrase opens none of the key slots of '{filename}'.")
    if opened == active and not force:
        raise OptionError(
            f"The passphrase opens every key slot in use of '{filename}'; erasing them would lose all data."
        )
    return [piece for index in opened for piece in erase_slot(header, index, force=force)]


def _try_slot(header: Header, index: int, material: bytes, passphrase: bytes) -> bytes | None:
    """The master key, or None where the passphrase is not this slot's."""
    slot = header.slots[index]
    key = hashlib.pbkdf2_hmac(header.hash, passphrase, slot.salt, slot.iterations, header.key_bytes)
    candidate = af_splitter.merge(_cipher_material(header, key, material, encrypt=False), STRIPES, header.hash)
    digest = hashlib.pbkdf2_hmac(
        header.hash, candidate, header.mk_digest_salt, header.mk_digest_iterations, DIGEST_SIZE
    )
    return candidate if hmac.compare_digest(digest, header.mk_digest) else None


def _cipher_material(header: Header, key: bytes, material: bytes, *, encrypt: bool) -> bytes:
    """Encrypt or decrypt a slot's key material, whose sectors count from 0.

    With keys of 24 bytes it ends amid a sector. Only XTS could not cut that sector short, and has no such keys.
    """
    cipher = SectorCipher(header.spec, key)
    buffer = bytearray(material.ljust(-(-len(material) // SECTOR) * SECTOR, b"\0"))
    if encrypt:
        cipher.encrypt_in_place(0, buffer)
    else:
        cipher.decrypt_in_place(0, buffer)
    return bytes(buffer[: len(material)])


def _cipher_of(options: Options) -> tuple[CipherSpec, int]:
    """The cipher and the length of its key in bytes."""
    name, _, bits = options.cipher_alg.rpartition("-")
    if bits not in _CIPHER_KEY_BYTES:
        raise OptionError(f"The cipher is '{options.cipher_alg}', expected aes-128, aes-192 or aes-256.")
    iv_hash = options.ivgen_hash_alg
    if options.ivgen_alg == "essiv" and iv_hash is None:
        iv_hash = "sha256"
    mode = f"{options.cipher_mode}-{options.ivgen_alg}" + (f":{iv_hash}" if iv_hash is not None else "")
    try:
        spec = CipherSpec.parse(name, mode)
        key_bytes = _CIPHER_KEY_BYTES[bits] * (2 if spec.mode == "xts" else 1)
        spec.check(key_bytes)
        check_hash(options.hash_alg)
    except ImageError as exc:
        raise OptionError(f"The encryption options make no cipher: {exc.message}") from exc
    return spec, key_bytes


def _iterations(options: Options, secret: bytes, size: int, share: int, *, hash: str | None = None) -> int:
    """PBKDF2's iterations for a key of ``size`` bytes, in ``1 / share`` of the wanted time."""
    _check_iterations(options)
    if options.iterations is not None:
        return options.iterations
    speed = _iterations_per_second(hash or options.hash_alg, secret, size)
    wanted = int(speed * options.iter_time / 1000 / share)
    return min(max(wanted, MIN_ITERATIONS), MAX_ITERATIONS)


def _check_iterations(options: Options) -> None:
    if options.iterations is not None:
        if not MIN_ITERATIONS <= options.iterations <= MAX_ITERATIONS:
            raise OptionError(
                f"{options.iterations} iterations were asked for, expected {MIN_ITERATIONS} to {MAX_ITERATIONS}."
            )
    elif options.iter_time <= 0:
        raise OptionError(f"iter-time is {options.iter_time}, expected a positive number of milliseconds.")


def _iterations_per_second(hash: str, secret: bytes, size: int) -> float:
    """How fast this machine is, by the processor time of this thread: other threads do not falsify it."""
    count = 1 << 12
    while True:
        begin = time.thread_time()
        hashlib.pbkdf2_hmac(hash, secret, bytes(SALT_SIZE), count, size)
        taken = time.thread_time() - begin
        if taken >= _BENCHMARK_TIME:
            return count / taken
        count *= 2


def _empty_slot(material_offset: int) -> KeySlot:
    return KeySlot(active=False, iterations=0, salt=bytes(SALT_SIZE), material_offset=material_offset)


def _check_slot(slot: int) -> None:
    if not 0 <= slot < KEY_SLOTS:
        raise OptionError(f"the key slot is {slot}, expected 0 to {KEY_SLOTS - 1}.")
