"""Finding out an image's format by its bytes, where nobody says it."""

from __future__ import annotations

import logging
import os
from typing import TypeGuard

from fusedisk.block import io
from fusedisk.block.driver import Driver
from fusedisk.block.node import Node
from fusedisk.block.registry import Registry
from fusedisk.block.signatures import EDGE, recognise
from fusedisk.core.errors import UnsupportedFeatureError

log = logging.getLogger(__name__)

RAW = "raw"
"""The format of what no other driver knows."""


async def probe(drivers: Registry, storage: Node, above: Node | None = None) -> type[Driver]:
    """Return the driver for the image in ``storage``, which is opened for the sake of ``above`` if that is given.

    Reads the first bytes, and the last ones where the first show nothing. Raises UnsupportedFeatureError, which names
    the format and the way out, for an image that is known not to be raw.
    """
    head = await _read(storage, 0, io.PROBE_SIZE)
    name = drivers.probe(head, storage.filename)
    if name == RAW:
        found = recognise(head, await _read(storage, max(storage.length - EDGE, 0), EDGE))
        if found is not None:
            raise UnsupportedFeatureError(
                f"'{storage.filename}' is {found.what}, which fusedisk cannot open: {found.advice}, or "
                f"{_as_raw(above)} to use its bytes as they are."
            )
    return drivers.load(name)


async def _read(storage: Node, offset: int, length: int) -> bytes:
    data = memoryview(bytearray(min(length, storage.length - offset)))
    await io.read(storage, offset, data)
    return bytes(data)


def tell_guess(storage: Node, above: Node | None = None) -> None:
    """Say once that ``storage`` was only guessed to be raw.

    Not of block devices, nor of what is no file at all: they hold a disk as a rule, so the guess surprises nobody.
    """
    if os.path.isfile(storage.filename):
        role = f", the backing file of '{above.filename}'," if _names_backing(above) else ""
        log.warning(
            "'%s'%s is taken for raw, which is a guess: %s if that is right.", storage.filename, role, _as_raw(above)
        )


def _names_backing(above: Node | None) -> TypeGuard[Node]:
    """Whether the header of ``above`` is what leads to the image, as its backing file."""
    return above is not None and above.driver.supports_backing and not above.backing_overridden


def _as_raw(above: Node | None) -> str:
    """How to say that an image is raw."""
    if above is None:
        return "say --format raw"
    if _names_backing(above):
        return f"record it with 'fusedisk amend --force -o backing_fmt=raw {above.filename}'"
    return "give it the option driver=raw"
