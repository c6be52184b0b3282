"""``raw``: the bytes of the file as they are, or a window of them.

It stores nothing on disk and has no state, so concurrent requests are safe; the node below orders overlapping ones.
Source: QAPI's BlockdevOptionsRaw.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fusedisk.block.model.children import ChildSpec, Role
from fusedisk.block.model.driver import Driver
from fusedisk.block.model.extent import DATA, Extent, WriteExtent
from fusedisk.block.model.files import Files
from fusedisk.block.model.limits import Limits
from fusedisk.block.model.node import Node
from fusedisk.block.request import io, space
from fusedisk.core.errors import NotSupportedError, OptionError
from fusedisk.core.options import CreateOptions, Options, option


@dataclasses.dataclass(slots=True)
class RawOptions(Options):
    """Options of ``raw``."""

    offset: int = option(0, kind="size", help="where in the file the disk starts, in bytes")
    size: int | None = option(None, kind="size", help="how many bytes of the file the disk has; default: the rest")


@dataclasses.dataclass(slots=True)
class RawCreateOptions(CreateOptions):
    """Creation options of ``raw``."""

    size: int = option(None, kind="size", help="virtual size")
    preallocation: str = option("off", choices=("off", "falloc", "full"), help="how much space to reserve")
    nocow: bool = option(False, kind="bool", help="no copy-on-write for the file (btrfs)")


class RawDriver(Driver):
    """A window of the ``file`` child."""

    name = "raw"
    passes_status = True
    can_run_at_once = True
    options_type = RawOptions
    create_options_type = RawCreateOptions
    child_specs = (ChildSpec("file", Role.FILE),)

    def __init__(self, node: Node, options: RawOptions) -> None:
        super().__init__(node, options)
        self._offset = options.offset
        self._windowed = bool(options.offset) or options.size is not None

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """Return the lowest score: any file can be raw, so every other format goes first."""
        return 1

    def may_be_named(self) -> bool:
        """Any image may name it."""
        return True

    def exact_filename(self) -> str | None:
        """Return the file's name, None for a window of it."""
        return None if self._windowed else super().exact_filename()

    async def open(self) -> None:
        """Check the window. Raises OptionError unless it lies in the file."""
        self.check_children()

    def check_children(self) -> None:
        """Raise OptionError unless the window lies in the file."""
        storage, offset, size = self.node.children["file"].node, self.options.offset, self.options.size
        if offset + (size or 0) > storage.length:
            raise OptionError(
                f"offset {offset} and size {'to the end' if size is None else size} ask for more than "
                f"the {storage.length} bytes of '{storage.filename}'."
            )

    async def reopen_prepare(self, config: Any, options: Any) -> object:
        """Accept a new window; ``check_children`` checks it."""
        return options

    def shows_other_bytes(self, options: Any) -> bool:
        """Whether the window is another."""
        return (options.offset, options.size) != (self.options.offset, self.options.size)

    def reopen_commit(self, state: object) -> None:
        """Move the window."""
        assert isinstance(state, RawOptions)
        self._offset = state.offset
        self._windowed = bool(state.offset) or state.size is not None
        self.node.change_mapping()

    async def length(self) -> int:
        """The window's length."""
        if self.options.size is not None:
            return int(self.options.size)
        return self.node.children["file"].node.length - self._offset

    def refresh_limits(self, limits: Limits) -> None:
        """Add nothing: the file node aligns the requests that the window shifts off its blocks."""

    async def map(self, offset: int, length: int) -> Extent:
        """Return all data, shifted by the window's start."""
        return self.lookup(offset, length)

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        """Return the same place as ``map``: writes never allocate."""
        return self.lookup_in_place(offset, length)

    def lookup(self, offset: int, length: int) -> Extent:
        """Return all data, shifted by the window's start."""
        return Extent(DATA, length, self.node.children["file"], offset + self._offset, recurse=True)

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent:
        """Return the same place as ``lookup``: writes never allocate."""
        return WriteExtent(length, self.node.children["file"], offset + self._offset)

    def host_descriptor(self) -> int | None:
        """Return the file's descriptor, None for a window of it."""
        return None if self._windowed else self.node.children["file"].node.driver.host_descriptor()

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Pass the request to the file, shifted."""
        await io.write_zeroes(self.node.children["file"].node, offset + self._offset, length, flags)

    async def preallocate(self, offset: int, length: int) -> None:
        """Pass the request to the file, shifted."""
        await space.preallocate(self.node.children["file"].node, offset + self._offset, length)

    async def discard(self, offset: int, length: int) -> None:
        """Pass the request to the file, shifted."""
        await space.discard(self.node.children["file"].node, offset + self._offset, length)

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        """Resize the file; a fixed window keeps its size."""
        if self.options.size is not None:
            raise NotSupportedError(
                f"'{self.node.filename}' shows a fixed window of its file, which cannot be resized."
            )
        await space.truncate(self.node.children["file"].node, length + self._offset, preallocation, flags)

    def has_zero_init(self) -> bool:
        """Return the file's answer."""
        return self.node.children["file"].node.driver.has_zero_init()

    @classmethod
    async def create(cls, files: Files, options: Any) -> None:
        """Make an image of ``size`` bytes."""
        (file,) = await files.create()
        await space.truncate(file, options.size, options.preallocation)
