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

_INODE_BITS = 48
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
    """Raise OptionError if two of the (name, image) pairs have the same name."""
    seen: dict[str, str] = {}
    for name, image in named:
        if name in seen:
            raise OptionError(
                f"'{seen[name]}' and '{image}' would both be the file '{name}', give one of them another name "
                f"with name=."
            )
        seen[name] = image


def inode_numbers(names: Iterable[str]) -> dict[str, int]:
    """Return an inode number for each name: a hash of the name, the same in every mount that has it.

    Two names of one mount never share a number; the numbers of hard links to nothing (0) and of the root (1) are
    not given out.
    """
    numbers: dict[str, int] = {}
    taken = {0, ROOT_INODE}
    for name in sorted(names):
        attempt = 0
        while (number := _hash(name, attempt)) in taken:
            attempt += 1
        taken.add(number)
        numbers[name] = number
    return numbers


def _hash(name: str, attempt: int) -> int:
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8, salt=attempt.to_bytes(4, "little")).digest()
    return int.from_bytes(digest, "little") >> (64 - _INODE_BITS)
