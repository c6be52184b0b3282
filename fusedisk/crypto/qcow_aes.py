"""qcow's and qcow2's old encryption, method 1: AES-128 in CBC mode with the passphrase itself as the key.

There is no header, no key derivation and no check: with a wrong passphrase the guest sees noise. Sectors are
numbered by guest offset. QEMU's emulator refuses such images, its tools still read them; make no new ones.

Source: docs/interop/qcow2.txt, "crypt_method" 1.
"""

from __future__ import annotations

from fusedisk.crypto.ciphers import CipherSpec, SectorCipher

KEY_SIZE = 16


def legacy_cipher(passphrase: bytes) -> SectorCipher:
    """The cipher of ``passphrase``, of which the first 16 bytes count; a shorter one is filled up with zeroes."""
    return SectorCipher(CipherSpec("aes", "cbc", "plain64"), passphrase[:KEY_SIZE].ljust(KEY_SIZE, b"\0"))
