"""Changing the settings of an existing image: the door, and opening an image for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trio

from fusedisk.block.graph.filenames import parse_filename
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.registry import Registry
from fusedisk.block.model import permissions
from fusedisk.block.model.node import Node
from fusedisk.block.model.observer import Change
from fusedisk.block.request.snapshot import alone
from fusedisk.block.request.space import between_lengths
from fusedisk.core.errors import NotSupportedError, PermissionConflictError
from fusedisk.core.offload import run_opening
from fusedisk.core.options import nest
from fusedisk.core.progress import Progress, no_progress


async def amend_image(
    drivers: Registry,
    spec: str | Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    format: str | None = None,
    force: bool = False,
    key_file: str | None = None,
    gate: Gate | None = None,
    progress: Progress = no_progress,
) -> None:
    """Open the image that ``spec`` and ``format`` name (as :meth:`Graph.open_backend` takes them) and amend it.

    Its backing files are opened only where the disk may grow over what they hold. ``key_file`` holds the passphrase of
    an encrypted image. Raises what opening and :func:`amend_node` raise.
    """
    graph = Graph(drivers, gate, follow_backing=options.get("size") is not None)
    try:
        if key_file is not None:
            spec = await run_opening(_with_key, spec, key_file, drivers)
        backend = await graph.open_backend(spec, writable=True, format=format)
        backend.name = backend.node.filename
        await amend_node(backend.node, options, force=force, progress=progress)
        await backend.close()
    finally:
        with trio.CancelScope(shield=True):
            await graph.close()


def _with_key(spec: str | Mapping[str, Any], key_file: str, drivers: Registry) -> dict[str, Any]:
    options: dict[str, Any]
    if isinstance(spec, str):
        parsed = parse_filename(spec, drivers)
        options = parsed if spec.startswith("json:") else {"file": parsed}
    else:
        options = nest(spec)
    options["encrypt"] = {"key-file": key_file} | options.get("encrypt", {})
    return options


async def amend_node(
    node: Node, options: Mapping[str, Any], *, force: bool = False, progress: Progress = no_progress
) -> None:
    """Give an image the settings in ``options``, those of its format, as text or as values; the others stay.

    Waits for all requests in flight, and holds back those that come later. A new backing file counts when the image is
    opened next. Raises OptionError and NotSupportedError for what cannot be changed, and see :meth:`Driver.amend`.
    """
    kind = node.driver.amend_options_type
    if kind is None:
        raise NotSupportedError(f"{node.driver.name} images have no settings that can be changed.")
    parsed = kind.parse(options, node.driver.name)
    async with alone(node, "amend"):
        old = node.length
        size = getattr(parsed, "size", None)
        wanted = old if size is None else size
        if wanted != old:
            node.check_operation("resize")
            if not node.perm & permissions.RESIZE:
                raise PermissionConflictError(f"No user of node '{node.name}' has asked for the resize permission.")
            await node.before_change(*between_lengths(old, wanted), Change.AMEND)
        try:
            await node.driver.amend(parsed, progress, force=force)
        finally:
            node.take_length(await node.driver.length())
            node.changed(*between_lengths(old, wanted, node.length), Change.AMEND)
    if node.length != old:
        node.resized()
