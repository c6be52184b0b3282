"""Passphrases from where the user keeps them: QEMU's ``secret`` object, and standard input.

A file is taken byte for byte, as QEMU does, so a newline at its end counts; a line from standard input comes
without its newline. A passphrase is text, so bytes that are not UTF-8 are refused, as QEMU refuses them.

Standard input and pipes (the shell's ``<(command)``) are read once and remembered. Reading them may take as long as
somebody takes to type; that is said, and can be interrupted.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import errno
import logging
import os
import stat
import sys
import threading
from collections.abc import Iterator
from typing import IO

from fusedisk.core.errors import OptionError, host_error
from fusedisk.core.host_open import Found, kind_name
from fusedisk.core.offload import run_opening

log = logging.getLogger(__name__)

MAX_SIZE = 1 << 20
"""Bytes; limits the damage if a disk is named by mistake instead of a file with a passphrase."""

FORMATS = ("raw", "base64")


@dataclasses.dataclass(slots=True, frozen=True)
class Secret:
    """QEMU's ``secret`` object: exactly one of ``data`` and ``file``."""

    data: str | None = None
    """The passphrase itself; visible to all users in the list of processes."""
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


_SILENCE_SECONDS = 0.3
"""How long to wait for a passphrase without a word."""

_said: dict[str, bytes] = {}
"""What came from what can be read but once, by its path."""


async def read(path: str, format: str | None) -> bytes:
    """The passphrase in a file; - is standard input's first line. Raises as :meth:`Secret.passphrase`."""
    return await run_opening(read_blocking, path, format)


def read_blocking(path: str, format: str | None) -> bytes:
    """The same, without an event loop."""
    if path == "-":
        return _from_standard_input()
    return Secret(file=path, format=format or "raw").passphrase()


def can_be_read_once(path: str) -> bool:
    """Whether a passphrase comes from standard input, a pipe or the like."""
    return path == "-" or (os.path.exists(path) and not os.path.isfile(path))


def _from_standard_input() -> bytes:
    if "-" not in _said:
        # Without a buffer, whose lock a thread that still waits would hold when the process ends.
        with _telling("standard input"), open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stream:
            _said["-"] = read_line(stream)
    return _said["-"]


@contextlib.contextmanager
def _telling(source: str) -> Iterator[None]:
    """Say what is waited for, if the block takes long."""
    timer = threading.Timer(_SILENCE_SECONDS, log.warning, ("waiting for the passphrase from %s", source))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # the caller may be about to fork


def read_line(stream: IO[bytes]) -> bytes:
    """A passphrase from the first line of ``stream``, without its newline."""
    line = stream.readline(MAX_SIZE + 1)
    return _decoded(line.removesuffix(b"\n"), "raw", "The passphrase from standard input")


def _read_file(path: str) -> bytes:
    if path in _said:
        return _said[path]
    try:
        with Found(path) as found:
            if stat.S_ISDIR(found.mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if stat.S_ISREG(found.mode):
                return _content(found)
            with _telling(f"'{path}', which is {kind_name(found.mode)}"):
                _said[path] = _content(found)
            return _said[path]
    except OSError as exc:
        raise host_error(exc, path, "read the secret from") from exc


def _content(found: Found) -> bytes:
    with open(found.open(os.O_RDONLY), "rb") as file:
        return file.read(MAX_SIZE + 1)


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
