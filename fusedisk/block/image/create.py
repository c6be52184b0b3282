"""Making a new image: the file first, then the format's own structures in it.

A failure leaves no new file behind. An existing file is replaced only after the options are checked, a new data file
exists, and the protocol driver has its locks. A failure later than that leaves it half-written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import stat
from collections.abc import Mapping
from typing import Any, NamedTuple

import trio

from fusedisk.block.graph.filenames import parse_filename, resolve_reference
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.registry import Registry
from fusedisk.block.model.driver import Driver
from fusedisk.core import paths
from fusedisk.core.errors import FusediskError, NotSupportedError, OptionError, WouldLoseDataError
from fusedisk.core.options import CreateOptions, parse_size

SECTOR = 512
"""Sizes of images are whole sectors, as QEMU makes them."""


class _Target(NamedTuple):
    """Where the image goes."""

    protocol: type[Driver]
    filename: str


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
    target = _target(drivers, driver, filename)
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
    assert driver.create_options_type is not None
    parsed = driver.create_options_type.parse(given, format)
    await driver.check_create(parsed, target.filename)
    targets = [target]
    if (data_file := getattr(parsed, "data_file", None)) is not None:
        targets.append(_data_target(drivers, data_file, target))
    if not overwrite:
        for each in targets:
            _refuse_existing(each.filename)
    await _write(drivers, driver, targets, parsed)
    return parsed


def _refuse_existing(filename: str) -> None:
    """Raise WouldLoseDataError for a block device and for a file that is not empty."""
    try:
        found = os.stat(filename)
    except (OSError, ValueError):
        return
    if stat.S_ISBLK(found.st_mode):
        raise WouldLoseDataError(f"'{filename}' is a block device, whose content a new image would replace (--force).")
    if stat.S_ISREG(found.st_mode) and found.st_size:
        raise WouldLoseDataError(
            f"'{filename}' exists and holds {found.st_size} bytes, which a new image would replace (--force).",
            errno=errno.EEXIST,
        )


def _target(drivers: Registry, driver: type[Driver], filename: str) -> _Target:
    if driver.create_options_type is None:
        raise NotSupportedError(f"{driver.name} images cannot be created.")
    parsed = parse_filename(filename, drivers)
    name = parsed.get("driver")
    place = parsed.get("filename")
    if not isinstance(name, str) or not isinstance(place, str) or parsed.keys() - {"driver", "filename"}:
        raise OptionError(f"'{filename}' cannot be created, expected the name of a file or device.")
    return _Target(drivers.load(name), place)


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


async def _write(drivers: Registry, driver: type[Driver], targets: list[_Target], options: CreateOptions) -> None:
    """Make the files and let the format write into them. After a failure the new files are removed."""
    nocow = bool(getattr(options, "nocow", False))
    made = []
    try:
        for each in sorted(targets, key=lambda target: os.path.lexists(target.filename)):
            if not os.path.lexists(each.filename):
                made.append(each.filename)
            await each.protocol.create_file(each.filename, 0, "off", nocow)
        await _format(drivers, driver, targets, options)
    except BaseException:
        for filename in made:
            with contextlib.suppress(OSError):
                os.unlink(filename)
        raise


def _data_target(drivers: Registry, data_file: str, image: _Target) -> _Target:
    """Return the external data file; its name is relative to the image, like that of a backing file."""
    parsed = parse_filename(resolve_reference(data_file, image.filename), drivers)
    name, place = parsed.get("driver"), parsed.get("filename")
    if not isinstance(name, str) or not isinstance(place, str) or parsed.keys() - {"driver", "filename"}:
        raise OptionError(f"the data file '{data_file}' cannot be created, expected the name of a file or device.")
    if paths.real(place) == paths.real(image.filename):
        raise OptionError(f"the new image '{image.filename}' cannot be its own data file.")
    return _Target(drivers.load(name), place)


async def _format(drivers: Registry, driver: type[Driver], targets: list[_Target], options: CreateOptions) -> None:
    graph = Graph(drivers)
    try:
        backends = []
        for target in targets:
            spec = {"driver": target.protocol.name, "filename": target.filename}
            backends.append(await graph.open_backend(spec, name="the new image", writable=True))
        image, *data_files = (backend.node for backend in backends)
        await driver.create(image, options, *data_files)
        for backend in backends:
            await backend.close()
    finally:
        with trio.CancelScope(shield=True):
            await graph.close()


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
