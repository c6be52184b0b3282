"""The LUKS1 header and what must hold before anything it says is believed. Bytes only.

On disk, all numbers big-endian: a header of 592 bytes with 8 key slots; the slots' key material at 4096 bytes
and at multiples of that; then, in a container of its own, the data. In a qcow2 image the header extension
"full disk encryption header pointer" says where this area lies; offsets count from its start, and the data is
in the image's clusters.

Source: the LUKS1 on-disk format specification 1.2.3, section "The LUKS header"; where the material lies
follows cryptsetup and QEMU, which round differently from the specification's text.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Iterator

from fusedisk.core.errors import ImageError, UnsupportedFeatureError
from fusedisk.crypto.ciphers import CipherSpec, check_hash
from fusedisk.crypto.libcrypto import SECTOR

MAGIC = b"LUKS\xba\xbe"
VERSION = 1
HEADER_SIZE = 592
KEY_SLOTS = 8
STRIPES = 4000
"""The only number of stripes that anyone writes; QEMU refuses others as we do."""
ALIGNMENT = 4096
"""Of key material, in bytes."""
DIGEST_SIZE = 20
SALT_SIZE = 32
ENABLED = 0x00AC71F3
DISABLED = 0x0000DEAD
MAX_ITERATIONS = 1 << 26
"""Of PBKDF2: about half a minute's work for a slot. A header has room for 64 times as many, in each of 8 slots, and a
thread that derives keys cannot be stopped."""

_FIXED = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")


@dataclasses.dataclass(slots=True)
class KeySlot:
    """One place for the master key, encrypted with a passphrase of its own."""

    active: bool
    iterations: int
    salt: bytes
    material_offset: int
    """Bytes from the start of the header area."""


@dataclasses.dataclass(slots=True)
class Header:
    """The header's fields by the specification's names; offsets in bytes from the start of the header area."""

    spec: CipherSpec
    hash: str
    """Of the key derivation and the anti-forensic splitter."""
    payload_offset: int
    key_bytes: int
    mk_digest: bytes
    mk_digest_salt: bytes
    mk_digest_iterations: int
    uuid: str
    slots: list[KeySlot]
    cipher_mode: str
    """As it is on disk: a hash that the IV generator does not need is kept."""

    @property
    def material_size(self) -> int:
        """Bytes of key material in a slot."""
        return self.key_bytes * STRIPES

    def active_slots(self) -> list[int]:
        """The numbers of the slots that hold a key."""
        return [index for index, slot in enumerate(self.slots) if slot.active]

    def material_ranges(self) -> dict[int, tuple[int, int]]:
        """What must be read to unlock: for each active slot the offset and length of its key material."""
        return {index: (self.slots[index].material_offset, self.material_size) for index in self.active_slots()}

    def pack(self) -> bytes:
        """The 592 bytes on disk."""
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            self.spec.cipher.encode(),
            self.cipher_mode.encode(),
            self.hash.encode(),
            self.payload_offset // SECTOR,
            self.key_bytes,
            self.mk_digest,
            self.mk_digest_salt,
            self.mk_digest_iterations,
            self.uuid.encode(),
        )
        return fixed + b"".join(
            _SLOT.pack(
                ENABLED if slot.active else DISABLED,
                slot.iterations,
                slot.salt,
                slot.material_offset // SECTOR,
                STRIPES,
            )
            for slot in self.slots
        )


def material_spacing(key_bytes: int) -> int:
    """Bytes from a slot's key material to the next one's in a new header."""
    return -(-key_bytes * STRIPES // ALIGNMENT) * ALIGNMENT


def area_size(key_bytes: int) -> int:
    """Bytes from the start of a new header to the payload: what QEMU reserves in a qcow2 image."""
    return ALIGNMENT + KEY_SLOTS * material_spacing(key_bytes)


def parse(head: bytes, area: int, filename: str) -> Header:
    """The header from the first 592 bytes of a header area of ``area`` bytes.

    ``area`` is the length in qcow2's header extension, or the size of a LUKS container. Key slots that pass
    lie inside it, so their ranges may be read. Raises ImageError for what is no LUKS header or contradicts
    itself, UnsupportedFeatureError for versions, ciphers and hashes that are not known.
    """
    try:
        header = _parse(head)
        _check(header, area)
    except ImageError as exc:
        raise type(exc)(f"'{filename}' has a LUKS header that cannot be used: {exc.message}") from exc
    return header


def _parse(head: bytes) -> Header:
    if len(head) < HEADER_SIZE:
        raise ImageError(f"it is {len(head)} bytes long, expected {HEADER_SIZE}.")
    magic, version, cipher, mode, hash, payload, key_bytes, digest, salt, iterations, uuid = _FIXED.unpack_from(head)
    if magic != MAGIC:
        raise ImageError(f"it begins with {magic.hex(' ')}, expected {MAGIC.hex(' ')}.")
    if version != VERSION:
        raise UnsupportedFeatureError(f"its version is {version}, expected {VERSION}.")
    cipher_mode = _text(mode, "cipher mode")
    header = Header(
        spec=CipherSpec.parse(_text(cipher, "cipher name"), cipher_mode),
        hash=_text(hash, "hash name"),
        payload_offset=payload * SECTOR,
        key_bytes=key_bytes,
        mk_digest=digest,
        mk_digest_salt=salt,
        mk_digest_iterations=iterations,
        uuid=_text(uuid, "UUID"),
        slots=[],
        cipher_mode=cipher_mode,
    )
    header.slots.extend(_slots(head))
    return header


def _slots(head: bytes) -> Iterator[KeySlot]:
    for index in range(KEY_SLOTS):
        state, iterations, salt, sector, stripes = _SLOT.unpack_from(head, _FIXED.size + index * _SLOT.size)
        if state not in (ENABLED, DISABLED):
            raise ImageError(f"key slot {index} has the state {state:#x}, expected {ENABLED:#x} or {DISABLED:#x}.")
        if stripes != STRIPES:
            raise ImageError(f"key slot {index} has {stripes} stripes, expected {STRIPES}.")
        yield KeySlot(state == ENABLED, iterations, salt, sector * SECTOR)


def _text(field: bytes, what: str) -> str:
    text, end, _ = field.partition(b"\0")
    if not end or not text.isascii() or not text.decode("ascii").isprintable():
        raise ImageError(f"the {what} is {field!r}, expected printable text and a zero byte.")
    return text.decode("ascii")


def _check(header: Header, area: int) -> None:
    """What concerns more than one field, and everything that sizes an allocation, a read or a loop."""
    header.spec.check(header.key_bytes)
    check_hash(header.hash)
    _check_iterations("the master key's digest", header.mk_digest_iterations)
    end = min(header.payload_offset, area)
    material: list[tuple[int, int]] = []
    for index, slot in enumerate(header.slots):
        if slot.active:
            _check_iterations(f"key slot {index}", slot.iterations)
        first, last = slot.material_offset, slot.material_offset + header.material_size
        if first < HEADER_SIZE or last > end:
            raise ImageError(
                f"the key material of slot {index} lies at {first} to {last}, but it must lie between the header, "
                f"which ends at {HEADER_SIZE}, and the end of the header area at {end}."
            )
        material.append((first, index))
    material.sort()
    for (first, index), (second, other) in itertools.pairwise(material):
        if first + header.material_size > second:
            raise ImageError(f"the key material of the slots {index} and {other} overlaps.")


def _check_iterations(what: str, iterations: int) -> None:
    if not 0 < iterations <= MAX_ITERATIONS:
        raise ImageError(f"{what} takes {iterations} iterations, expected 1 to {MAX_ITERATIONS}.")
