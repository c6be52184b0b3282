"""Adding and removing passphrases of LUKS encryption inside qcow2."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

from fusedisk.core.errors import NotSupportedError, OptionError, PassphraseError
from fusedisk.core.offload import run_cpu
from fusedisk.crypto import luks, luks_layout, secrets
from fusedisk.drivers.format.qcow2.amend_options import Qcow2AmendOptions
from fusedisk.drivers.format.qcow2.encryption import read_passphrase
from fusedisk.drivers.format.qcow2.image import Image

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver


async def prepare(driver: Qcow2Driver, options: Qcow2AmendOptions, *, force: bool) -> list[luks.Piece]:
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


async def write(image: Image, pieces: list[luks.Piece]) -> None:
    """Write what :func:`prepare` has returned."""
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
