"""Parses image names into options: ``json:{…}``, ``proto:rest``, dotted keys, plain paths."""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING, Any

from fusedisk.core import paths
from fusedisk.core.errors import OptionError
from fusedisk.core.options import parse_json, parse_options

if TYPE_CHECKING:
    from fusedisk.block.graph.registry import Registry

_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*):")
_DOTTED = re.compile(r"(driver|file|filename|node-name|name|backing)(\.[A-Za-z0-9_.-]+)?=")


def has_protocol(filename: str) -> bool:
    """Whether ``filename`` starts with a protocol: a word and a colon before any slash."""
    return _PROTOCOL.match(filename) is not None


def check_filename(filename: str) -> None:
    """Raise OptionError for text that cannot be a file name."""
    if not filename:
        raise OptionError("the file name is empty.")
    if "\0" in filename:
        raise OptionError(f"the file name '{filename.replace(chr(0), chr(92) + '0')}' has a zero byte in it.")
    try:
        os.fsencode(filename)
    except UnicodeEncodeError as exc:
        raise OptionError(f"the file name {filename!a} cannot be written in this system's {exc.encoding}.") from exc


def parse_filename(filename: str, drivers: Registry) -> dict[str, Any]:
    """Return options for a file name; a plain path gets the protocol driver for its type of file.

    Raises OptionError for a protocol that no driver knows.
    """
    check_filename(filename)
    if filename.startswith("json:"):
        return parse_json(filename[5:])
    match = _PROTOCOL.match(filename)
    if match is None:
        return {"driver": protocol_of_path(filename), "filename": filename}
    driver = drivers.by_prefix(match[1])
    if driver is None:
        known = ", ".join(sorted(drivers.prefixes))
        hint = f"; write './{filename}' if it is a file of that name" if os.path.exists(filename) else ""
        raise OptionError(f"'{filename}' asks for the protocol '{match[1]}', known are {known}{hint}.")
    return {"driver": driver.name, **driver.parse_filename(filename[match.end() :])}


def protocol_of_path(path: str) -> str:
    """Return ``host_device`` for device nodes, ``file`` for all other paths."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return "file"
    return "host_device" if stat.S_ISBLK(mode) or stat.S_ISCHR(mode) else "file"


def parse_argument(text: str) -> str | dict[str, Any]:
    """Parse an image argument of the command line: a file name, or options as dotted keys or JSON.

    An existing file wins over options of the same spelling.
    """
    if (text.startswith("{") or _DOTTED.match(text)) and not _exists(text):
        return parse_options(text)
    return text


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:
        return False


def resolve_reference(reference: str, image: str | None) -> str:
    """Resolve a file name in an image's header relative to the image's directory. If the image is opened through a
    symbolic link, that is the link's directory, as for QEMU; if the name does not exist there, that of its target.

    Raises OptionError for a relative name if the image has no directory of its own.
    """
    if reference.startswith("/") or has_protocol(reference):
        return reference
    if image is None:
        raise OptionError(f"the image refers to '{reference}', but has no directory of its own to look in.")
    found = os.path.join(os.path.dirname(image), reference)
    if os.path.islink(image) and not os.path.lexists(found):
        behind = os.path.join(os.path.dirname(paths.real(image)), reference)
        if os.path.exists(behind):
            return behind
    return found
