"""Encryption of guest data: LUKS inside qcow2, and the legacy AES.

Clusters are stored as ciphertext, sector by sector of 512 bytes; compressed ones are not. LUKS numbers sectors by their
offset in the host file, so a cluster that moves is encrypted anew; the legacy AES numbers them by guest offset. A host
cluster that was never written does not read as zeroes to the guest.

Source: docs/interop/qcow2.txt, "Full disk encryption header pointer", "crypt_method".
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import NotSupportedError, OptionError, PassphraseError
from fusedisk.core.locks import Mutex
from fusedisk.core.offload import run_cpu
from fusedisk.crypto import luks, luks_layout, secrets
from fusedisk.crypto.ciphers import SectorCipher
from fusedisk.crypto.qcow_aes import legacy_cipher
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.layout import CRYPT_AES, CRYPT_LUKS, CRYPT_NAMES, SECTOR, Header
from fusedisk.drivers.format.qcow2.options import EncryptionOptions, Qcow2AmendOptions, Qcow2CreateOptions, luks_options
from fusedisk.drivers.format.qcow2.refcount import Refcounts

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver

INLINE_SIZE = 128 << 10
"""Bytes up to which a thread would cost more than it saves."""


class Encryption:
    """The encryption of one open image. Metadata needs no key; call ``unlock`` before data is read or written."""

    def __init__(self, file: Node, filename: str, luks_header: luks_layout.Header | None, start: int) -> None:
        """``luks_header`` lies at ``start`` in ``file``; without one it is the legacy AES."""
        self._file = file
        self._filename = filename
        self._luks = luks_header
        self._start = start
        self._cipher: SectorCipher | None = None
        self._unlocking = Mutex()

    async def unlock(self, options: EncryptionOptions) -> None:
        """Make the cipher from the key that ``options`` name, once.

        Raises PassphraseError without a key or with a wrong one.
        """
        if self._cipher is None:
            refuse_to_wait()
            async with self._unlocking:
                if self._cipher is None:
                    self._cipher = await self._make_cipher(options)

    def take_key(self, other: Encryption) -> None:
        """Use the key of another opening of the same image, although its passphrase may be gone."""
        self._cipher = self._cipher or other._cipher

    async def _make_cipher(self, options: EncryptionOptions) -> SectorCipher:
        passphrase = await read_passphrase(options)
        if passphrase is None:
            raise PassphraseError(
                f"'{self._filename}' is encrypted, but no key was given: name a file that holds it (the option "
                "encrypt.key-file, or --key-file)."
            )
        if self._luks is None:
            return legacy_cipher(passphrase)
        materials = {}
        for slot, (offset, size) in self._luks.material_ranges().items():
            materials[slot] = bytes(await io.read_bytes(self._file, self._start + offset, size))
        found = await run_cpu(luks.unlock, self._luks, materials, passphrase, self._filename)
        return SectorCipher(self._luks.spec, found.master_key)

    async def read(self, node: Node, offset: int, host_offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with what the guest sees at ``offset``, from ``host_offset`` in ``node``."""
        head, end = offset % SECTOR, offset + len(buffer)
        whole = buffer
        if head or end % SECTOR:
            # Used as a backing file below a format that does not align its reads.
            whole = memoryview(bytearray(head + len(buffer) + -end % SECTOR))
        await io.read(node, host_offset - head, whole)
        await self._decrypt(offset - head, host_offset - head, whole)
        if whole is not buffer:
            buffer[:] = whole[head : head + len(buffer)]

    async def _decrypt(self, offset: int, host_offset: int, buffer: memoryview) -> None:
        """Turn whole sectors of the guest's ``offset``, read at ``host_offset``, into what the guest sees."""
        assert self._cipher is not None
        sector = (offset if self._luks is None else host_offset) // SECTOR
        if len(buffer) <= INLINE_SIZE:
            self._cipher.decrypt_in_place(sector, buffer)
        else:
            await run_cpu(self._cipher.decrypt_in_place, sector, buffer)

    async def encrypt(self, offset: int, host_offset: int, data: bytes) -> memoryview:
        """Return the bytes to store at ``host_offset`` for whole sectors of the guest's at ``offset``."""
        assert self._cipher is not None
        sector = (offset if self._luks is None else host_offset) // SECTOR
        if len(data) <= INLINE_SIZE:
            return memoryview(self._cipher.encrypt(sector, data))
        return memoryview(await run_cpu(self._cipher.encrypt, sector, data))

    def information(self) -> dict[str, Any]:
        """As QMP's ``ImageInfoSpecificQCow2Encryption``."""
        if self._luks is None:
            return {"format": "aes"}
        spec = self._luks.spec
        slots: list[dict[str, Any]] = []
        for slot in self._luks.slots:
            used = {"iters": slot.iterations, "stripes": luks_layout.STRIPES} if slot.active else {}
            slots.append({"active": slot.active, "key-offset": slot.material_offset} | used)
        information: dict[str, Any] = {
            "format": "luks",
            "cipher-alg": f"{spec.cipher}-{self._cipher_bits()}",
            "cipher-mode": spec.mode,
            "ivgen-alg": spec.iv_generator,
            "hash-alg": self._luks.hash,
            "payload-offset": self._luks.payload_offset,
            "master-key-iters": self._luks.mk_digest_iterations,
            "uuid": self._luks.uuid,
            "slots": slots,
        }
        if spec.iv_hash is not None:
            information["ivgen-hash-alg"] = spec.iv_hash
        return information

    def _cipher_bits(self) -> int:
        assert self._luks is not None
        return self._luks.key_bytes * 8 // (2 if self._luks.spec.mode == "xts" else 1)


async def open_encryption(file: Node, header: Header, options: EncryptionOptions, filename: str) -> Encryption | None:
    """The encryption of an image in ``file``; None where it has none.

    Raises OptionError for options that do not fit, ImageError for an invalid LUKS header.
    """
    if not header.crypt_method:
        if options.encrypt_key_file is not None:
            raise OptionError(f"'{filename}' is not encrypted, but a key was given (encrypt.key-file).")
        return None
    name = CRYPT_NAMES[header.crypt_method]
    if options.encrypt_format not in (None, name):
        raise OptionError(
            f"'{filename}' is encrypted with {name}, but encrypt.format={options.encrypt_format} was given."
        )
    if header.crypto_header is None:
        return Encryption(file, filename, None, 0)
    start, length = header.crypto_header
    parsed = luks_layout.parse(bytes(await io.read_bytes(file, start, luks_layout.HEADER_SIZE)), length, filename)
    return Encryption(file, filename, parsed, start)


async def read_passphrase(options: EncryptionOptions) -> bytes | None:
    """Read the passphrase from ``encrypt.key-file``; None without that option."""
    path = options.encrypt_key_file
    return None if path is None else await secrets.read(path, options.encrypt_key_format)


async def check_new(options: Qcow2CreateOptions) -> None:
    """Raise what :func:`encrypt_new` would."""
    if options.encrypt_format is None:
        _refuse_leftovers(options)
        return
    if options.encrypt_key_file is None:
        raise OptionError("qcow2 encrypt.format is set, but encrypt.key-file, which names the passphrase, is not.")
    if options.encrypt_format != "aes":
        luks.check_options(luks_options(options))
    await read_passphrase(options)


async def encrypt_new(image: Image, refcounts: Refcounts, options: Qcow2CreateOptions) -> None:
    """Make an image without data an encrypted one. Raises OptionError for options that do not fit together."""
    header = image.header
    if options.encrypt_format is None:
        _refuse_leftovers(options)
        return
    await check_new(options)
    passphrase = await read_passphrase(options)
    assert passphrase is not None
    refcounts.encrypted = True
    if options.encrypt_format == "aes":
        header.crypt_method = CRYPT_AES
    else:
        new = await run_cpu(luks.format, passphrase, luks_options(options))
        length = new.header.payload_offset
        clusters = image.geometry.clusters(length)
        run = await refcounts.allocate(clusters, exact=True)
        start = run.first << image.geometry.cluster_bits
        await image.zero_host(start, clusters << image.geometry.cluster_bits)
        for piece in new.pieces:
            await image.put_new_table(start + piece.offset, piece.data)
        header.crypt_method = CRYPT_LUKS
        header.extensions.append(layout.crypto_header_pointer(start, length))
    area = layout.encode_header_area(header, image.filename)
    await image.put_bytes(0, area)
    image.place_fixed()


def _refuse_leftovers(options: Qcow2CreateOptions) -> None:
    for name, field in options.names().items():
        if name.startswith("encrypt.") and getattr(options, field.name) is not None:
            raise OptionError(f"qcow2 {name} is set, but encrypt.format, which asks for encryption, is not.")


# --- key slots of an existing image ------------------------------------------------------------------


async def prepare_keys(driver: Qcow2Driver, options: Qcow2AmendOptions, *, force: bool) -> list[luks.Piece]:
    """Return the writes that change the key slots, to be done in order with a barrier after each.

    Raises OptionError and NotSupportedError for options that do not fit, PassphraseError for a wrong passphrase.
    """
    image, filename = driver.image, driver.image.filename
    if driver.encryption is None:
        raise OptionError(f"'{filename}' is not encrypted, but {options.encryption[0]} was given.")
    if image.header.crypto_header is None:
        raise NotSupportedError(f"'{filename}' is encrypted with aes, which has no key slots: only luks has.")
    start, length = image.header.crypto_header
    header = luks_layout.parse(bytes(await image.read(start, luks_layout.HEADER_SIZE)), length, filename)
    materials = {
        slot: bytes(await image.read(start + offset, size)) for slot, (offset, size) in header.material_ranges().items()
    }
    if options.encrypt_state == "active":
        return await _add(driver, header, materials, options, force=force)
    if options.encrypt_state == "inactive":
        return await _remove(filename, header, materials, options, force=force)
    raise OptionError(f"{options.encryption[0]} was given, but not encrypt.state, which says what to do.")


async def write_keys(image: Image, pieces: list[luks.Piece]) -> None:
    """Write what :func:`prepare_keys` has returned."""
    assert image.header.crypto_header is not None
    start, _ = image.header.crypto_header
    for offset, data in pieces:
        await image.put_bytes(start + offset, data)
        await image.barrier()


async def _add(
    driver: Qcow2Driver,
    header: luks_layout.Header,
    materials: dict[int, bytes],
    options: Qcow2AmendOptions,
    *,
    force: bool,
) -> list[luks.Piece]:
    filename, slot = driver.image.filename, options.encrypt_keyslot
    if options.encrypt_old_key_file is not None:
        raise OptionError("encrypt.old-key-file was given, but encrypt.state=active only adds a passphrase.")
    if options.encrypt_new_key_file is None:
        raise OptionError("encrypt.state=active was given, but not encrypt.new-key-file, the passphrase to add.")
    new = await secrets.read(options.encrypt_new_key_file, options.encrypt_new_key_format)
    present = await read_passphrase(driver.options)
    if present is None:
        raise PassphraseError(
            f"'{filename}' is encrypted, and adding a passphrase needs one that opens it: name a file that holds it "
            "(the option encrypt.key-file, or --key-file)."
        )
    found = await run_cpu(luks.unlock, header, materials, present, filename)
    pieces: list[luks.Piece] = []
    if force and slot in header.active_slots():
        if header.active_slots() == [slot]:
            raise OptionError(
                f"Key slot {slot} is the only one in use, and overwriting it could lose all data: add the passphrase "
                "in another slot, then erase this one."
            )
        pieces = luks.erase_slot(header, slot)
    time = options.encrypt_iter_time
    asked = luks.Options() if time is None else luks.Options(iter_time=time)
    return pieces + await run_cpu(partial(luks.add_passphrase, header, found.master_key, new, asked, slot=slot))


async def _remove(
    filename: str,
    header: luks_layout.Header,
    materials: dict[int, bytes],
    options: Qcow2AmendOptions,
    *,
    force: bool,
) -> list[luks.Piece]:
    slot, file = options.encrypt_keyslot, options.encrypt_old_key_file
    for name in ("encrypt.new-key-file", "encrypt.iter-time"):
        if name in options.encryption:
            raise OptionError(f"{name} was given, but encrypt.state=inactive only removes a passphrase.")
    old = None if file is None else await secrets.read(file, options.encrypt_old_key_format)
    if slot is None and old is None:
        raise OptionError(
            "encrypt.state=inactive was given, but neither encrypt.old-key-file, the passphrase to remove, nor "
            "encrypt.keyslot."
        )
    if slot is None:
        assert old is not None
        return await run_cpu(partial(luks.remove_passphrase, header, materials, old, filename, force=force))
    if old is not None:
        await run_cpu(luks.unlock, _only(header, slot), materials, old, filename)
    return luks.erase_slot(header, slot, force=force)


def _only(header: luks_layout.Header, slot: int) -> luks_layout.Header:
    """The header as if no other slot were in use."""
    slots = [dataclasses.replace(found, active=found.active and at == slot) for at, found in enumerate(header.slots)]
    return dataclasses.replace(header, slots=slots)
