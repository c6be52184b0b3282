"""The files of an image on the host: made for ``create``, opened through the gate for ``check``."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.filenames import parse_filename, resolve_reference
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.registry import Registry
from fusedisk.block.model.children import Role
from fusedisk.block.model.driver import Driver
from fusedisk.block.model.files import Files
from fusedisk.block.model.node import Node
from fusedisk.core import paths
from fusedisk.core.errors import OptionError, WouldLoseDataError


class Target(NamedTuple):
    """Where a new file goes."""

    protocol: type[Driver]
    filename: str


def target_of(drivers: Registry, filename: str) -> Target:
    """Return where a file name leads. Raises OptionError unless it names a file or device."""
    parsed = parse_filename(filename, drivers)
    name, place = parsed.get("driver"), parsed.get("filename")
    if not isinstance(name, str) or not isinstance(place, str) or parsed.keys() - {"driver", "filename"}:
        raise OptionError(f"'{filename}' cannot be created, expected the name of a file or device.")
    return Target(drivers.load(name), place)


class NewFiles(Files):
    """The files of a new image."""

    main: Node

    def __init__(self, graph: Graph, image: Target, *, overwrite: bool, nocow: bool) -> None:
        self.made: list[str] = []
        """New files, to be removed if the creation fails."""
        self.backends: list[Backend] = []
        self._graph = graph
        self._image = image
        self._overwrite = overwrite
        self._nocow = nocow

    async def create(self, *others: str) -> list[Node]:
        targets = [self._image]
        for name in others:
            targets.append(self._beside(name, targets))
        if not self._overwrite:
            for each in targets:
                _refuse_existing(each.filename)
        for each in sorted(targets, key=lambda target: os.path.lexists(target.filename)):
            if not os.path.lexists(each.filename):
                self.made.append(each.filename)
            await each.protocol.create_file(each.filename, 0, "off", self._nocow)
        for each in targets:
            spec = {"driver": each.protocol.name, "filename": each.filename}
            self.backends.append(await self._graph.open_backend(spec, name="the new image", writable=True))
        self.main, *_ = nodes = [backend.node for backend in self.backends]
        return nodes

    def _beside(self, name: str, targets: list[Target]) -> Target:
        """Return where another file of the image goes."""
        found = target_of(self._graph.drivers, resolve_reference(name, self._image.filename))
        if paths.real(found.filename) == paths.real(self._image.filename):
            raise OptionError(f"the new image '{self._image.filename}' cannot be its own data file.")
        if any(paths.real(found.filename) == paths.real(each.filename) for each in targets):
            raise OptionError(f"the new image '{self._image.filename}' names the file '{name}' twice.")
        return found


@asynccontextmanager
async def new_files(
    drivers: Registry, image: Target, *, overwrite: bool = False, nocow: bool = False
) -> AsyncIterator[NewFiles]:
    """Give the files of a new image to a format. If that fails, remove what is new."""
    graph = Graph(drivers)
    files = NewFiles(graph, image, overwrite=overwrite, nocow=nocow)
    try:
        try:
            yield files
            for backend in files.backends:
                await backend.close()
        finally:
            with trio.CancelScope(shield=True):
                await graph.close()
    except BaseException:
        for filename in files.made:
            with contextlib.suppress(OSError):
                os.unlink(filename)
        raise


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


class CheckedFiles(Files):
    """The files of an image that is checked."""

    async def open(self, name: str) -> Node:
        main, number = self.main, len(self.main.children) + 1
        edge = await main.graph.open_child(main, f"file-{number}", Role.DATA_FILE, name, implicit=True)
        return edge.node
