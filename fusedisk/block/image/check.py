"""Opening images for a check.

A check looks at the storage of an image, not at its disk: neither backing files nor keys nor data files are needed, and
an image that is marked dirty or corrupt opens like any other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import trio

from fusedisk.block.graph.filenames import parse_filename
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.opening import pop_common_options
from fusedisk.block.graph.probing import probe
from fusedisk.block.graph.registry import Registry
from fusedisk.block.image.files import CheckedFiles
from fusedisk.block.model import permissions
from fusedisk.block.model.driver import Driver
from fusedisk.block.model.files import Files
from fusedisk.block.model.node import Node, NodeConfig
from fusedisk.core.errors import OptionError
from fusedisk.core.offload import run_opening
from fusedisk.core.options import nest


class Checkable(NamedTuple):
    """An image's files, open for a check, and the driver of its format."""

    driver: type[Driver]
    files: Files

    @property
    def storage(self) -> Node:
        """The image's own file."""
        return self.files.main

    @property
    def supported(self) -> bool:
        """Whether images of this format can be checked at all."""
        return self.driver.check.__func__ is not Driver.check.__func__  # type: ignore[attr-defined]


@asynccontextmanager
async def open_for_check(
    drivers: Registry,
    spec: str | Mapping[str, Any],
    *,
    format: str | None = None,
    writable: bool = False,
    force_share: bool = False,
    gate: Gate | None = None,
) -> AsyncIterator[Checkable]:
    """Open the storage of an image. ``spec`` and ``format`` are those of :meth:`Graph.open_backend`; if neither names
    the format, it is detected. ``force_share`` opens it although another process writes to it.

    Raises HostError, LockConflictError, OptionError or, for a format that is only recognised, UnsupportedFeatureError.
    """
    options = await run_opening(_format_options, spec, format, drivers)
    config, _ = pop_common_options(options, NodeConfig(read_only=not writable, force_share=force_share))
    driver_name, storage_options = _storage_options(options, drivers)
    graph = Graph(drivers, gate)
    try:
        storage = await graph.open_node(storage_options, config)
        share = permissions.ALL if force_share else permissions.CONSISTENT_READ | permissions.WRITE_UNCHANGED
        graph.attach(storage, "check", writable=writable, shared=share)
        driver = await probe(drivers, storage) if driver_name is None else drivers.load(driver_name)
        yield Checkable(driver, CheckedFiles(storage))
    finally:
        with trio.CancelScope(shield=True):
            await graph.close()


def _format_options(spec: str | Mapping[str, Any], format: str | None, drivers: Registry) -> dict[str, Any]:
    """Return the options of the image's format node."""
    options: dict[str, Any]
    if format is not None:
        drivers.load_format(format)
    if isinstance(spec, str):
        parsed = parse_filename(spec, drivers)
        options = parsed if spec.startswith("json:") else {"file": parsed}
    else:
        options = nest(spec)
    if format is not None:
        options["driver"] = format
    return options


def _storage_options(options: dict[str, Any], drivers: Registry) -> tuple[str | None, dict[str, Any]]:
    """Return the format's driver, None if it must be probed, and the options of the storage below it.

    For a protocol driver, the node itself is the storage.
    """
    driver = options.pop("driver", None)
    if driver is not None and drivers.load(str(driver)).is_protocol:
        return str(driver), {"driver": driver, **options}
    storage: Any = options.pop("file", None)
    filename = options.pop("filename", None)
    if isinstance(storage, dict):
        storage = dict(storage)
    elif storage is None and isinstance(filename, str):
        storage = {"filename": filename}
    else:
        raise OptionError("the image to check needs the option 'file' or 'filename'.")
    if "driver" not in storage:
        if not isinstance(storage.get("filename"), str):
            raise OptionError("options of a 'file' child need a 'driver' or a 'filename'.")
        storage = parse_filename(storage["filename"], drivers) | {k: v for k, v in storage.items() if k != "filename"}
    for name in ("backing", "node-name"):
        options.pop(name, None)
    if driver is not None:
        kind = drivers.load(str(driver))
        children = {child.name.partition(".")[0] for child in kind.children_of(options)}
        kind.options_type.parse({key: value for key, value in options.items() if key not in children}, str(driver))
    return driver, storage
