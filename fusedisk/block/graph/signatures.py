"""Signatures of containers that fusedisk recognises and cannot open.

Without this table they would be raw: mounted writable, and destroyed by the first write. It is the only place that
knows them. A format driver that comes later takes its line out.

A disk that is raw may hold anything, so each signature is long enough, or has a checksum, to leave no doubt: a boot
sector is not a tar archive because its code has the right five letters at the right place. Bytes only, no I/O.

Sources: the specification or the public documentation of each format.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

EDGE = 512
"""Bytes at the start and at the end of a file that decide."""

_Test = Callable[[bytes, bytes], bool]
"""Called with the first and the last bytes of a file, :data:`EDGE` of each or what there is."""

_CONVERT = "convert it to qcow2 or raw first"
_UNPACK = "unpack it first"
_UNLOCK = "unlock it with cryptsetup"


class Container(NamedTuple):
    """A kind of file that is not raw."""

    what: str
    """As in "'x' is …"."""
    advice: str
    """What to do with it instead."""


def recognise(head: bytes, tail: bytes) -> Container | None:
    """The container that a file with these first and last bytes is, None for none that is known."""
    for container, test in _TABLE:
        if test(head, tail):
            return container
    return None


def _begins(*magics: bytes) -> _Test:
    return lambda head, tail: head.startswith(magics)


def _has_at(offset: int, magic: bytes) -> _Test:
    return lambda head, tail: head.startswith(magic, offset)


def _is_vmdk_descriptor(head: bytes, tail: bytes) -> bool:
    return re.match(rb"\s*# disk descriptorfile\b", head, re.IGNORECASE) is not None


def _is_vhd(head: bytes, tail: bytes) -> bool:
    """A footer, of which a dynamic or differencing disk has a copy at the start."""
    return _is_vhd_footer(head) or _is_vhd_footer(tail)


def _is_vhd_footer(data: bytes) -> bool:
    if len(data) < 512 or not data.startswith(b"conectix"):
        return False
    total = sum(data[:64]) + sum(data[68:512])
    return ~total & 0xFFFFFFFF == int.from_bytes(data[64:68], "big")


def _is_dmg(head: bytes, tail: bytes) -> bool:
    """A trailer of version 4, 512 bytes long."""
    return len(tail) == EDGE and tail.startswith(b"koly\x00\x00\x00\x04\x00\x00\x02\x00")


def _is_encrypted_dmg(head: bytes, tail: bytes) -> bool:
    return head.startswith(b"encrcdsa\x00\x00\x00\x02") or tail.endswith(b"cdsaencr")


def _is_gzip(head: bytes, tail: bytes) -> bool:
    """Method deflate, and no reserved flag."""
    return head.startswith(b"\x1f\x8b\x08") and len(head) >= 18 and not head[3] & 0xE0


def _is_bzip2(head: bytes, tail: bytes) -> bool:
    return re.match(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", head) is not None


def _is_tar(head: bytes, tail: bytes) -> bool:
    """The sum of the header's bytes, with spaces for the sum itself, is written in it in octal."""
    if len(head) < 512 or head[257:262] != b"ustar":
        return False
    try:
        checksum = int(head[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return checksum == sum(head[:148]) + sum(head[156:512]) + 8 * ord(" ")


_TABLE: tuple[tuple[Container, _Test], ...] = (
    # Disk images
    (Container("a VMDK image", _CONVERT), _begins(b"KDMV", b"COWD")),
    (Container("a VMDK image", _CONVERT), _begins(b"\xbe\xba\xfe\xca\0\0\0\0\x01\0\0\0\x02\0\0\0")),  # seSparse
    (Container("the descriptor of a VMDK image", _CONVERT), _is_vmdk_descriptor),
    (Container("a VDI image", _CONVERT), _has_at(64, b"\x7f\x10\xda\xbe\x01\x00\x01\x00")),
    (Container("a VHDX image", _CONVERT), _begins(b"vhdxfile")),
    (Container("a VHD image", _CONVERT), _is_vhd),
    (Container("a QED image", _CONVERT), _begins(b"QED\0")),
    (Container("a qcow image of version 1", _CONVERT), _begins(b"QFI\xfb\0\0\0\x01")),
    (Container("a Parallels image", _CONVERT), _begins(b"WithoutFreeSpace", b"WithouFreSpacExt")),
    (Container("a bochs image", _CONVERT), _begins(b"Bochs Virtual HD Image\0")),
    (Container("a cloop image", _CONVERT), _begins(b"#!/bin/sh\n#V2.0 Format\n", b"#!/bin/sh\n#V1.0 Format\n")),
    (Container("a DMG image", _CONVERT), _is_dmg),
    (Container("an encrypted DMG image", _CONVERT), _is_encrypted_dmg),
    (Container("an ASIF image", _CONVERT), _begins(b"shdw\0\0\0\x01\0\0\x02\0")),
    (Container("a sparseimage", _CONVERT), _begins(b"sprs\0\0\0\x03")),
    (Container("an Android sparse image", _CONVERT), _begins(b"\x3a\xff\x26\xed\x01\0")),
    (Container("a partclone image", _UNPACK), _begins(b"partclone-image\0")),
    (Container("an EWF image", _CONVERT), _begins(b"EVF\x09\x0d\x0a\xff\0", b"EVF2\x0d\x0a\x81\0")),
    (Container("logical evidence (EWF)", _UNPACK), _begins(b"LVF\x09\x0d\x0a\xff\0", b"LEF2\x0d\x0a\x81\0")),
    (Container("a Proxmox backup (VMA)", _UNPACK), _begins(b"VMA\0\0\0\0\x01")),
    # Encrypted volumes
    (Container("a LUKS volume", _UNLOCK), _begins(b"LUKS\xba\xbe\0\x01", b"LUKS\xba\xbe\0\x02")),
    # Compressed files and archives
    (Container("a gzip file", _UNPACK), _is_gzip),
    (Container("a bzip2 file", _UNPACK), _is_bzip2),
    (Container("an xz file", _UNPACK), _begins(b"\xfd7zXZ\0")),
    (Container("a zstd file", _UNPACK), _begins(b"\x28\xb5\x2f\xfd")),
    (Container("an lz4 file", _UNPACK), _begins(b"\x04\x22\x4d\x18")),
    (Container("an lzop file", _UNPACK), _begins(b"\x89LZO\0\x0d\x0a\x1a\x0a")),
    (Container("an lzip file", _UNPACK), _begins(b"LZIP\x01")),
    (Container("a zip archive", _UNPACK), _begins(b"PK\x03\x04", b"PK\x05\x06")),
    (Container("a 7z archive", _UNPACK), _begins(b"7z\xbc\xaf\x27\x1c")),
    (Container("a rar archive", _UNPACK), _begins(b"Rar!\x1a\x07\x00", b"Rar!\x1a\x07\x01\x00")),
    (Container("a WIM archive", _UNPACK), _begins(b"MSWIM\0\0\0")),
    (Container("a tar archive", _UNPACK), _is_tar),
)
