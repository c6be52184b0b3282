"""File names and inode numbers of exports: functions of configuration, never of history."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

from fusedisk.core.errors import OptionError

EXTENSIONS = frozenset(
    (
        "bochs",
        "cloop",
        "dmg",
        "hdd",
        "img",
        "luks",
        "qcow",
        "qcow2",
        "qed",
        "raw",
        "vdi",
        "vhd",
        "vhdx",
        "vmdk",
        "vpc",
    )
)
"""Extensions of image formats, which a default name drops."""

NAME_MAX = 255
"""The longest file name in bytes (the C library's NAME_MAX; FUSE would allow 1024)."""

INODE_BITS = 48
"""The bits of an inode number; the rest of a handle number is :mod:`..mount.handles`'."""
ROOT_INODE = 1


def default_name(filename: str | None) -> str:
    """Return the export's name for an image's file name: its base name without the extension of a known format.

    An image without a file name (``null-co``) is ``disk``.
    """
    base = os.path.basename(filename.rstrip("/")) if filename else ""
    stem, dot, extension = base.rpartition(".")
    if dot and stem and extension.lower() in EXTENSIONS:
        return stem
    return base or "disk"


def check_name(name: str) -> str:
    """Return ``name`` if it is valid as a file name; raises OptionError."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise OptionError(f"'{name}' is not a valid file name, choose another with name=.")
    if len(os.fsencode(name)) > NAME_MAX:
        raise OptionError(f"the name '{name}' is longer than {NAME_MAX} bytes, choose a shorter one with name=.")
    return name


def check_unique(named: Iterable[tuple[str, str]]) -> None:
    """Raise OptionError if two of the (name, image) pairs have the same name, or the same inode number."""
    seen: dict[int, tuple[str, str]] = {}
    for name, image in named:
        number = inode_number(name)
        if number in seen:
            other, its_image = seen[number]
            what = f"be the file '{name}'" if name == other else f"have the inode number {number}"
            raise OptionError(
                f"'{its_image}' and '{image}' would both {what}, give one of them another name with name=."
            )
        seen[number] = name, image


def inode_number(name: str) -> int:
    """Return the inode number of a file: a hash of its name alone, so the same in every mount and whatever other files
    there are. It is none of the numbers of nothing (0) and of the root (1)."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8, salt=bytes(4)).digest()
    number = int.from_bytes(digest, "little") >> (64 - INODE_BITS)
    return number if number > ROOT_INODE else number + 2
