"""Passphrases from where the user keeps them: QEMU's ``secret`` object, and standard input.

A file is taken byte for byte, as QEMU does, so a newline at its end counts; a line from standard input comes
without its newline. A passphrase is text, so bytes that are not UTF-8 are refused, as QEMU refuses them.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import sys
from typing import BinaryIO

from fusedisk.core.errors import OptionError, host_error

MAX_SIZE = 1 << 20
"""Bytes; whoever names a disk instead of a passphrase shall not read it all."""

FORMATS = ("raw", "base64")


@dataclasses.dataclass(slots=True, frozen=True)
class Secret:
    """QEMU's ``secret`` object: exactly one of ``data`` and ``file``."""

    data: str | None = None
    """The passphrase itself, which everyone sees who lists processes."""
    file: str | None = None
    """The path of a file that holds it."""
    format: str = "raw"
    """raw or base64."""

    def passphrase(self) -> bytes:
        """The bytes to derive a key from.

        Raises OptionError for a secret that is missing, empty or malformed, HostError for an unreadable file.
        """
        if (self.data is None) == (self.file is None):
            found = "neither data nor file" if self.data is None else "both data and file"
            raise OptionError(f"The secret has {found}, expected one of them.")
        if self.format not in FORMATS:
            raise OptionError(f"The secret's format is '{self.format}', expected raw or base64.")
        if self.file is not None:
            return _decoded(_read_file(self.file), self.format, f"The secret file '{self.file}'")
        assert self.data is not None
        return _decoded(self.data.encode(errors="surrogateescape"), self.format, "The secret's data")


_said: list[bytes] = []


def from_standard_input() -> bytes:
    """The passphrase from standard input's first line, which is read once; later calls give the same."""
    if not _said:
        _said.append(read_line(sys.stdin.buffer))
    return _said[0]


def read_line(stream: BinaryIO) -> bytes:
    """A passphrase from the first line of ``stream``, standard input's buffer, without its newline."""
    line = stream.readline(MAX_SIZE + 1)
    return _decoded(line.removesuffix(b"\n"), "raw", "The passphrase from standard input")


def _read_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_SIZE + 1)
    except OSError as exc:
        raise host_error(exc, path, "read the secret from") from exc


def _decoded(content: bytes, format: str, what: str) -> bytes:
    if len(content) > MAX_SIZE:
        raise OptionError(f"{what} has more than {MAX_SIZE} bytes, which is no passphrase.")
    if format == "base64":
        try:
            content = base64.b64decode(b"".join(content.split()), validate=True)
        except binascii.Error as exc:
            raise OptionError(f"{what} is not base64: {exc}.") from exc
    if not content:
        raise OptionError(f"{what} is empty, expected a passphrase.")
    try:
        text = content.decode()
    except UnicodeDecodeError as exc:
        raise OptionError(f"{what} is not UTF-8 text, which a passphrase has to be.") from exc
    if "\0" in text:
        raise OptionError(f"{what} holds a zero byte, which no passphrase can.")
    return content
