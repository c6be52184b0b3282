"""Opens the user's images as exports: image arguments, cache modes, overlays, names.

The graph belongs to the caller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Mapping, Sequence
from typing import Any

import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.cache_modes import CACHE_MODES
from fusedisk.block.graph.filenames import has_protocol, parse_filename
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.registry import Registry
from fusedisk.block.model.node import Node, NodeConfig
from fusedisk.core import paths
from fusedisk.core.errors import FusediskError, HostError, OptionError
from fusedisk.core.offload import run_opening
from fusedisk.core.options import parse_bool, parse_json
from fusedisk.export import overlay, views
from fusedisk.export.export import Export, FileSettings
from fusedisk.export.names import check_name, check_unique, default_name, inode_number

THROW_AWAY = "throw-away"
"""What takes the writes in place of an image, if that is to be lost at the end."""
Spec = str | dict[str, Any]
"""A file name or nested options."""


@dataclasses.dataclass(slots=True)
class ImageRequest:
    """One image to export; ``text`` is its name as the user gave it."""

    text: str
    spec: Spec
    name: str | None = None


@dataclasses.dataclass(slots=True)
class OpenSettings:
    """How to open the images of a mount, and the attributes of their files. Each field has the name of its option, and
    those of :class:`NodeConfig` have their names there, too."""

    format: str | None = None
    read_only: bool = False
    overlay: bool = False
    """A throw-away layer takes the writes."""
    overlay_file: str | None = None
    """A named layer takes the writes; an absolute path."""
    copy_on_read: bool = False
    detect_zeroes: str = "off"
    discard: str = "ignore"
    cache: str = "writeback"
    force_share: bool = False
    partitions: bool = False
    """Each partition is a file as well."""
    snapshots: bool = False
    """Each internal snapshot is a file as well."""
    key_file: str | None = None
    """The file with the passphrase of encrypted images; - is standard input."""
    file: FileSettings = dataclasses.field(default_factory=FileSettings)

    @property
    def write_cache(self) -> bool:
        """Whether writes may be answered before they are on stable storage."""
        return CACHE_MODES[self.cache].write_cache

    def config(self) -> NodeConfig:
        """The settings of the top node."""
        mode = CACHE_MODES[self.cache]
        return NodeConfig(
            force_share=self.force_share,
            cache_direct=mode.direct,
            cache_no_flush=mode.no_flush,
            discard=self.discard,
            detect_zeroes=self.detect_zeroes,
            copy_on_read=self.copy_on_read,
        )


async def open_exports(graph: Graph, images: Sequence[ImageRequest], settings: OpenSettings) -> list[Export]:
    """Open all images and make their files, each disk's before those of its parts.

    Raises a FusediskError; then nothing stays open."""
    backends: list[Backend] = []
    exports: list[Export] = []
    try:
        for image in images:
            backends.append(await _open(graph, image, settings))
        await _make_files(graph, images, backends, settings, exports)
    except BaseException:
        parts = [export.backend for export in exports if isinstance(export, views.View)]
        with trio.CancelScope(shield=True):
            for backend in reversed([*backends, *parts]):
                with contextlib.suppress(FusediskError):  # the first error says why
                    await backend.close()
        raise
    return exports


async def _make_files(
    graph: Graph,
    images: Sequence[ImageRequest],
    backends: Sequence[Backend],
    settings: OpenSettings,
    exports: list[Export],
) -> None:
    """Add the files of images to ``exports``, as they are opened."""
    for backend in backends:
        await backend.require_keys()
        backend.warn_of_writing("mount with --read-only or --overlay to avoid that")
    layer = THROW_AWAY if settings.overlay else settings.overlay_file
    names = [
        check_name(default_name(_image_name(backend, layer)) if image.name is None else image.name)
        for image, backend in zip(images, backends, strict=True)
    ]
    for name, image, backend in zip(names, images, backends, strict=True):
        export = await Export.open(backend, name, 0, settings.file)
        export.overlay, export.source = layer, image.text
        export.immutable = not export.writable and cannot_change(backend.node)
        exports.append(export)
        if settings.partitions:
            await views.open_partitions(graph, export, settings.file, exports)
        if settings.snapshots:
            await views.open_snapshots(graph, export, settings.file, exports, partitions=settings.partitions)
    check_unique((export.name, export.source) for export in exports)
    for export in exports:
        export.inode = inode_number(export.name)
        export.shared_image = settings.force_share


def cannot_change(top: Node) -> bool:
    """Whether no node of an image is open for writing or accepts other writers."""
    return all(node.config.read_only and not node.config.force_share for node in top.with_all_below())


async def _open(graph: Graph, image: ImageRequest, settings: OpenSettings) -> Backend:
    spec = await run_opening(absolute, image.spec, graph.drivers)
    if settings.key_file is not None:
        spec["encrypt"] = {"key-file": settings.key_file} | spec.get("encrypt", {})
    read_only = settings.read_only or parse_bool(spec.get("read-only", False), "option 'read-only'")
    if settings.overlay or settings.overlay_file is not None:
        layer = overlay.Layer(image.text, spec, settings.format, settings.config(), settings.write_cache)
        if settings.overlay_file is None:
            return await overlay.open_throw_away(graph, layer)
        return await overlay.open_named(graph, layer, settings.overlay_file)
    try:
        return await graph.open_backend(
            spec,
            name=image.text,
            writable=not read_only,
            format=settings.format,
            config=settings.config(),
            write_cache=settings.write_cache,
        )
    except HostError as exc:
        if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not settings.read_only:
            exc.message += " (to look at it only, mount it with --read-only or --overlay)"
        raise


def _image_name(backend: Backend, layer: str | None) -> str | None:
    """Return the file name for the export's default name: the image's, not its overlay's."""
    node = backend.node
    if layer is not None and node.backing is not None:
        node = node.backing.node
    return node.exact_filename()


def absolute(spec: Spec, drivers: Registry) -> dict[str, Any]:
    """Return ``spec`` as nested options with absolute file names, since the daemon leaves the working directory."""
    if isinstance(spec, Mapping):
        return _absolute(spec)
    if spec.startswith("json:"):
        return _absolute(parse_json(spec[5:]))
    return {"file": _absolute(parse_filename(spec, drivers))}


def _absolute(options: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            value = _absolute(value)
        elif isinstance(value, list):
            value = [_absolute(item) if isinstance(item, Mapping) else item for item in value]
        elif _is_path(key, value, options.get("driver")):
            value = paths.absolute(value)
        changed[key] = value
    return changed


def _is_path(key: str, value: object, driver: object) -> bool:
    if key == "key-file":
        return isinstance(value, str) and value != "-"
    return key == "filename" and _is_local(value, driver)


def _is_local(filename: object, driver: object) -> bool:
    """Whether a file name is a path. With a driver for local files it is, whatever it looks like."""
    if not isinstance(filename, str) or not filename:
        return False
    return driver in ("file", "host_device") or not has_protocol(filename)


def take_name(spec: Spec) -> tuple[Spec, str | None]:
    """Split the mount's option ``name`` off the options of an image. Raises OptionError."""
    if isinstance(spec, str) or "name" not in spec:
        return spec, None
    name = spec["name"]
    if not isinstance(name, str):
        raise OptionError(f"the option 'name' is a {type(name).__name__}, expected the name of a file.")
    return {key: value for key, value in spec.items() if key != "name"}, check_name(name)
