"""Detecting an image's format from its bytes, if it is not given."""

from __future__ import annotations

import logging
import os
from typing import TypeGuard

from fusedisk.block.graph.registry import Registry
from fusedisk.block.graph.signatures import EDGE, recognise
from fusedisk.block.model.driver import Driver
from fusedisk.block.model.node import Node
from fusedisk.block.request import checks, io
from fusedisk.core.errors import UnsupportedFeatureError

log = logging.getLogger(__name__)

RAW = "raw"
"""The format of an image that no other driver recognises."""


async def probe(drivers: Registry, storage: Node, above: Node | None = None) -> type[Driver]:
    """Return the driver for the image in ``storage``, which is opened as a child of ``above`` if that is given.

    Reads the first bytes, and the last ones if the first show nothing. Raises UnsupportedFeatureError, which names the
    format and a way out, for an image that is known not to be raw.
    """
    head = bytes(await io.read_bytes(storage, 0, min(checks.PROBE_SIZE, storage.length)))
    name = drivers.probe(head, storage.filename)
    if name == RAW:
        edge = min(EDGE, storage.length)
        found = recognise(head, bytes(await io.read_bytes(storage, storage.length - edge, edge)))
        if found is not None:
            raise UnsupportedFeatureError(
                f"'{storage.filename}' is {found.what}, which fusedisk cannot open: {found.advice}, or "
                f"{_as_raw(above)} to use its bytes as they are."
            )
    return drivers.load(name)


def tell_guess(storage: Node, above: Node | None = None) -> None:
    """Warn once that ``storage`` was only guessed to be raw.

    Block devices and nodes without a file get no warning: they usually hold a disk, so the guess is no surprise.
    """
    if os.path.isfile(storage.filename):
        role = f", the backing file of '{above.filename}'," if _names_backing(above) else ""
        log.warning(
            "'%s'%s is taken for raw, which is a guess: %s if that is right.", storage.filename, role, _as_raw(above)
        )


def _names_backing(above: Node | None) -> TypeGuard[Node]:
    """Whether the header of ``above`` names the image as its backing file."""
    return above is not None and above.driver.supports_backing and not above.backing_overridden


def _as_raw(above: Node | None) -> str:
    """Return the advice how to declare an image raw."""
    if above is None:
        return "say --format raw"
    if _names_backing(above):
        return f"record it with 'fusedisk amend --force -o backing_fmt=raw {above.filename}'"
    return "give it the option driver=raw"
