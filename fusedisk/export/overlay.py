"""Layers that take the writes in place of an image, which is opened read-only as their backing file and never touched.

A throw-away layer is a qcow2 file without a name: it is unlinked as soon as it is open, so that it goes away with the
process, however that ends. A named layer is an ordinary qcow2 overlay, made if it is missing; an existing one must
have this very image as its backing file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from typing import Any

import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.filenames import resolve_reference
from fusedisk.block.graph.graph import Graph
from fusedisk.block.image.create import create_image
from fusedisk.block.model.children import BackingReference
from fusedisk.block.model.node import Node, NodeConfig
from fusedisk.core import paths
from fusedisk.core.errors import ImageError, host_error

_FORMAT = "qcow2"


@dataclasses.dataclass(slots=True)
class Layer:
    """An image, and how to open its top layer."""

    text: str
    """How the user named the image."""
    image: dict[str, Any]
    """Nested options of the image."""
    format: str | None
    config: NodeConfig
    write_cache: bool


async def open_throw_away(graph: Graph, layer: Layer) -> Backend:
    """Open the image under a layer that disappears with this process. Its file is sparse and lies in $TMPDIR, by
    default /var/tmp.

    Raises a FusediskError; then nothing stays behind.
    """
    image = await _open_image(graph, layer)
    try:
        path = _temporary_file()
        try:
            await create_image(graph.drivers, _FORMAT, path, {"size": image.length})
            options = {"driver": _FORMAT, "file": _file_options(path), "backing": image.node.name}
            # The layer does not survive a crash, so it need not be flushed to disk.
            config = dataclasses.replace(layer.config, cache_no_flush=True)
            return await graph.open_backend(options, name=layer.text, writable=True, config=config)
        finally:
            os.unlink(path)
    finally:
        with trio.CancelScope(shield=True):
            await image.close()


def _temporary_file() -> str:
    """Make an empty temporary file that may grow large. Raises HostError."""
    place = os.environ.get("TMPDIR") or "/var/tmp"
    try:
        fd, path = tempfile.mkstemp(".qcow2", "fusedisk-overlay-", paths.absolute(place))
    except OSError as exc:
        raise host_error(exc, place, "make an overlay in") from exc
    os.close(fd)
    return path


def _file_options(path: str) -> dict[str, Any]:
    return {"driver": "file", "filename": path}


async def open_named(graph: Graph, layer: Layer, path: str) -> Backend:
    """Open the image under the qcow2 layer ``path``, which is made if it is missing.

    Raises ImageError if an existing layer stands on something else; then it is not changed.
    """
    image = await _open_image(graph, layer)
    try:
        if os.path.lexists(path):
            await _check_reference(graph, layer, path, image.node)
        else:
            await create_image(
                graph.drivers,
                _FORMAT,
                path,
                {
                    "size": image.length,
                    "backing_file": _reference(image.node, path),
                    "backing_fmt": image.node.driver.name,
                },
                check_backing=False,
            )
        options = {"driver": _FORMAT, "file": _file_options(path), "backing": image.node.name}
        return await graph.open_backend(
            options, name=layer.text, writable=True, config=layer.config, write_cache=layer.write_cache
        )
    finally:
        with trio.CancelScope(shield=True):
            await image.close()


async def _open_image(graph: Graph, layer: Layer) -> Backend:
    config = dataclasses.replace(layer.config, copy_on_read=False, detect_zeroes="off", discard="ignore")
    return await graph.open_backend(layer.image, name=layer.text, format=layer.format, config=config)


def _reference(image: Node, path: str) -> str:
    """Return the image's name for the layer's header: without a directory if both lie in the same one."""
    filename = image.exact_filename()
    if filename is None:
        return image.options_filename()
    if os.path.dirname(filename) == os.path.dirname(path):
        return os.path.basename(filename)
    return filename


async def _check_reference(graph: Graph, layer: Layer, path: str, image: Node) -> None:
    reference = await _read_reference(graph, path)
    if reference is not None and _leads_to(reference.filename, path, image):
        if reference.format in (None, image.driver.name):
            return
        raise ImageError(
            f"the overlay '{path}' takes '{layer.text}' for {reference.format}, but it was opened as "
            f"{image.driver.name}: say --format {reference.format} if that is right."
        )
    found = f"stands on '{reference.filename}'" if reference is not None else "stands on nothing"
    raise ImageError(
        f"the overlay '{path}' {found}, not on '{layer.text}': choose another --overlay-file, or mount the "
        f"overlay itself."
    )


async def _read_reference(graph: Graph, path: str) -> BackingReference | None:
    """Return the backing file that an overlay's header names, without opening that file."""
    alone = Graph(graph.drivers, look_only=True)
    try:
        # Looked at before it is opened for good, which is when its locks are taken.
        options = {"driver": _FORMAT, "file": _file_options(path), "backing": None}
        backend = await alone.open_backend(options, config=NodeConfig(force_share=True))
        return backend.node.driver.backing_reference()
    finally:
        with trio.CancelScope(shield=True):
            await alone.close()


def _leads_to(reference: str, path: str, image: Node) -> bool:
    filename = image.exact_filename()
    resolved = resolve_reference(reference, path)
    if filename is None:
        return resolved == image.options_filename()
    with contextlib.suppress(OSError):
        return os.path.samefile(resolved, filename)
    return False
