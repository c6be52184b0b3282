"""Making a new image: its files first, then the format's own structures in them.

A failure leaves no new file behind. An existing file is replaced only after the options are checked, all new files
exist, and the protocol driver has its locks. A failure later than that leaves it half-written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import trio

from fusedisk.block.graph.filenames import parse_filename, resolve_reference
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.registry import Registry
from fusedisk.block.image.files import new_files, target_of
from fusedisk.block.model.driver import Driver
from fusedisk.core import paths
from fusedisk.core.errors import FusediskError, NotSupportedError, OptionError
from fusedisk.core.options import CreateOptions, parse_size

SECTOR = 512
"""Sizes of images are whole sectors, as QEMU makes them."""


async def create_image(
    drivers: Registry,
    format: str,
    filename: str,
    options: Mapping[str, Any],
    *,
    gate: Gate | None = None,
    check_backing: bool = True,
    overwrite: bool = False,
) -> CreateOptions:
    """Create an image and return its options as used.

    ``options`` are the format's creation options by name, as text or as values. ``size`` is in bytes or text such as
    ``10G``, rounded up to whole sectors; without it, the size of the ``backing_file`` is used. That name is relative to
    the new image, stored as given, and needs ``backing_fmt``; ``check_backing`` False skips opening the file. ``gate``
    decides what the backing file may refer to. ``overwrite`` allows to replace an existing file.

    Raises OptionError for wrong options, ImageError and others for the backing file, WouldLoseDataError, HostError and
    LockConflictError for the file itself.
    """
    driver = drivers.load_format(format)
    if driver.create_options_type is None:
        raise NotSupportedError(f"{driver.name} images cannot be created.")
    target = target_of(drivers, filename)
    given = {key: value for key, value in options.items() if value is not None}
    backing = _backing_options(drivers, driver, given, target.filename)
    if backing is not None:
        if check_backing:
            given.setdefault("size", await _look_at_backing(drivers, backing, target.filename, gate))
        elif "size" not in given:
            raise OptionError(
                f"the new image '{filename}' needs a size, since its backing file is not opened to take it from."
            )
    if "size" not in given:
        raise OptionError(f"the new image '{filename}' needs a size, such as 10G.")
    given["size"] = whole_sectors(parse_size(given["size"]))
    parsed = driver.create_options_type.parse(given, format)
    await driver.check_create(parsed, target.filename)
    nocow = bool(getattr(parsed, "nocow", False))
    async with new_files(drivers, target, overwrite=overwrite, nocow=nocow) as files:
        await driver.create(files, parsed)
    return parsed


def _backing_options(
    drivers: Registry, driver: type[Driver], given: Mapping[str, Any], filename: str
) -> dict[str, Any] | None:
    """Return options that open the backing file, None without one. Raises OptionError for a contradiction."""
    reference, format = given.get("backing_file"), given.get("backing_fmt")
    if reference is None:
        if format is not None:
            raise OptionError(f"a backing format is given ('{format}'), but no backing file.")
        return None
    if not driver.supports_backing:
        raise OptionError(f"{driver.name} images cannot have a backing file.")
    if format is None:
        raise OptionError(
            f"the backing file '{reference}' is given without its format, and a guess could be wrong: add it with -F."
        )
    drivers.load_format(format)
    resolved = resolve_reference(reference, filename)
    options = parse_filename(resolved, drivers)
    named = options.get("filename")
    if isinstance(named, str) and paths.real(named) == paths.real(filename):
        raise OptionError(f"the new image '{filename}' cannot be its own backing file.")
    if not resolved.startswith("json:"):
        options = {"file": options}
    options["driver"] = format
    return options


async def _look_at_backing(drivers: Registry, options: dict[str, Any], filename: str, gate: Gate | None) -> int:
    """Return the backing file's size. Raises an error if it does not open, or stands on the file to be created."""
    graph = Graph(drivers, gate)
    try:
        backend = await graph.open_backend(options, name="the new image")
        target = _identity(filename)
        for node in graph.nodes.values():
            name = node.driver.exact_filename() if node.driver.is_protocol else None
            if name is not None and target is not None and _identity(name) == target:
                raise OptionError(
                    f"'{filename}' is part of the backing chain that the new image would stand on, choose another name."
                )
        return backend.length
    except FusediskError as exc:
        if not isinstance(exc, OptionError):
            exc.message = f"the backing file cannot be used: {exc.message}"
        raise
    finally:
        with trio.CancelScope(shield=True):
            await graph.close()


def _identity(filename: str) -> tuple[int, int] | None:
    try:
        found = os.stat(filename)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def whole_sectors(size: int) -> int:
    """Return ``size`` rounded up to whole sectors."""
    return min((size + SECTOR - 1) // SECTOR * SECTOR, (1 << 63) - SECTOR)


def options_text(options: CreateOptions) -> str:
    """Return the options for people to read, as ``cluster_size=65536 compat=1.1``, without size and backing file."""
    apart = ("size", "backing_file", "backing_fmt")
    pairs = [(name, getattr(options, field.name)) for name, field in options.names().items() if name not in apart]
    return " ".join(f"{name}={_option_text(value)}" for name, value in pairs if value is not None)


def _option_text(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def describe_options(kind: type[CreateOptions]) -> list[tuple[str, str]]:
    """Return name and help of every creation option, for ``-o help``."""
    described = []
    for name, field in kind.names().items():
        text = str(field.metadata.get("help", ""))
        if choices := field.metadata.get("choices"):
            text += f" ({', '.join(choices)})"
        if field.default not in (None, dataclasses.MISSING):
            text += f" [default: {_option_text(field.default)}]"
        described.append((name, text))
    return described
