"""Encryption of disk images as QEMU writes it: LUKS1 and the old AES of qcow and qcow2. Bytes in, bytes out.

The parts:

* :mod:`~fusedisk.crypto.ciphers`: ``CipherSpec`` names a cipher, ``SectorCipher`` encrypts and decrypts runs of
  512-byte sectors, in place or into a copy.
* :mod:`~fusedisk.crypto.luks_layout`: ``parse`` makes a checked ``Header`` from 592 bytes; ``area_size``.
* :mod:`~fusedisk.crypto.luks`: ``unlock``, ``format`` with ``Options``, ``add_passphrase``, ``erase_slot``,
  ``remove_passphrase``.
* :mod:`~fusedisk.crypto.qcow_aes`: ``legacy_cipher``.
* :mod:`~fusedisk.crypto.secrets`: ``Secret`` and ``read_line`` give a passphrase.

How a format driver uses this
-----------------------------

Open a LUKS image. ``start`` and ``length`` come from qcow2's header extension 0x0537be77 (two 64-bit numbers); a
LUKS container of its own has 0 and its size::

    header = luks_layout.parse(await read(start, luks_layout.HEADER_SIZE), length, filename)
    materials = {slot: await read(start + offset, size) for slot, (offset, size) in header.material_ranges().items()}
    master_key = (await run_cpu(luks.unlock, header, materials, passphrase, filename)).master_key
    cipher = SectorCipher(header.spec, master_key)

``parse`` bounds everything: what is read is inside the header area and at most 2 MiB, and the key derivation ends.

Read and write. ``cipher.decrypt_in_place(sector, view)`` turns ciphertext that was read into the caller's buffer
into plaintext; ``cipher.encrypt(sector, data)`` makes a copy to write. Requests must be aligned to 512 bytes.
The number of the first sector, by image:

* qcow2 with LUKS (method 2): the offset in the *host* file, of the data cluster and not of the header area,
  divided by 512. So a cluster that moves must be decrypted and encrypted anew; copying its bytes is wrong.
* qcow and qcow2 with AES (method 1): the *guest* offset divided by 512.
* a LUKS container: the guest offset divided by 512; the data begins at ``header.payload_offset``.

Holes, zero clusters and compressed clusters are not encrypted and never pass through the cipher. qemu-img refuses to
compress while it makes an encrypted image, but QEMU writes compressed clusters to an existing one, in clear.

Create. ``luks.format(passphrase, Options(…))`` in a worker thread gives the pieces of a header area of
``header.payload_offset`` bytes, which qcow2 rounds up to whole clusters, zeroed; its extension holds the
unrounded length. Change passphrases with the functions that return pieces, and flush after each piece.
"""
