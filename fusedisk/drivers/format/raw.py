"""``raw``: the bytes of the file as they are, or a window of them.

On disk: nothing of its own. Concurrent requests are safe since there is no state; overlapping ones are ordered by
the node below. Source: QAPI's BlockdevOptionsRaw.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fusedisk.block import io
from fusedisk.block.driver import ChildSpec, Driver, Role
from fusedisk.block.extent import DATA, Extent, WriteExtent
from fusedisk.block.limits import Limits
from fusedisk.block.node import Node
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
    asks_before_waiting = True
    options_type = RawOptions
    create_options_type = RawCreateOptions
    child_specs = (ChildSpec("file", Role.FILE),)

    def __init__(self, node: Node, options: RawOptions) -> None:
        super().__init__(node, options)
        self._offset = options.offset
        self._windowed = bool(options.offset) or options.size is not None

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """Anything can be raw, so every other format goes first."""
        return 1

    def may_be_named(self) -> bool:
        """By every image."""
        return True

    def exact_filename(self) -> str | None:
        """The file's own name, unless only a window of it is shown."""
        return None if self._windowed else super().exact_filename()

    async def open(self) -> None:
        """Check the window. Raises OptionError where it does not lie in the file."""
        storage = self.node.children["file"].node
        size = self.options.size
        if self._offset > storage.length or (size is not None and self._offset + size > storage.length):
            raise OptionError(
                f"offset {self._offset} and size {'to the end' if size is None else size} ask for more than "
                f"the {storage.length} bytes of '{storage.filename}'."
            )

    async def reopen_prepare(self, config: Any, options: Any) -> object:
        """Another window is fine as long as it lies in the file."""
        storage = self.node.children["file"].node
        size = storage.length - options.offset if options.size is None else options.size
        if size < 0 or options.offset + size > storage.length:
            raise OptionError(f"the new window of '{storage.filename}' goes past its {storage.length} bytes.")
        return options

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
        """A window that starts between the file's blocks makes the file do the aligning; nothing to add."""

    async def map(self, offset: int, length: int) -> Extent:
        """All data, shifted by the window's start."""
        return self.lookup(offset, length)

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        """Where the bytes are read from."""
        return self.lookup_in_place(offset, length)

    def lookup(self, offset: int, length: int) -> Extent:
        """All data, shifted by the window's start."""
        return Extent(DATA, length, self.node.children["file"], offset + self._offset, recurse=True)

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent:
        """Where the bytes are read from."""
        return WriteExtent(length, self.node.children["file"], offset + self._offset)

    def host_descriptor(self) -> int | None:
        """The file's, unless only a window of it is shown."""
        return None if self._windowed else self.node.children["file"].node.driver.host_descriptor()

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Passed on to the file child."""
        await io.write_zeroes(self.node.children["file"].node, offset + self._offset, length, flags)

    async def preallocate(self, offset: int, length: int) -> None:
        """Passed on to the file child."""
        await io.preallocate(self.node.children["file"].node, offset + self._offset, length)

    async def discard(self, offset: int, length: int) -> None:
        """Passed on to the file child."""
        await io.discard(self.node.children["file"].node, offset + self._offset, length)

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        """Resize the file; a fixed window keeps its size."""
        if self.options.size is not None:
            raise NotSupportedError(
                f"'{self.node.filename}' shows a fixed window of its file, which cannot be resized."
            )
        await io.truncate(self.node.children["file"].node, length + self._offset, preallocation, flags)

    def has_zero_init(self) -> bool:
        """Passed on to the file child."""
        return self.node.children["file"].node.driver.has_zero_init()

    @classmethod
    async def create(cls, file: Node, options: Any, data_file: Node | None = None) -> None:
        """An image of ``size`` bytes."""
        await io.truncate(file, options.size, options.preallocation)
