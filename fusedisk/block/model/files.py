"""The files of one image, as ``Driver.create`` and ``Driver.check`` see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusedisk.core.errors import NotSupportedError

if TYPE_CHECKING:
    from fusedisk.block.model.node import Node


class Files:
    """What a format needs to reach the files of an image: its own file, and those that the image names.

    A format never opens a file by itself. This base class has one open file and no way to others, which is enough for
    an image in memory; ``fusedisk.block.image.files`` has those for files of the host.
    """

    def __init__(self, main: Node) -> None:
        self.main = main
        """The image's own file. For ``check`` only: ``create`` gets it from :meth:`create`."""

    async def open(self, name: str) -> Node:
        """Return the file that the image names, open for the same use as the main one. The name is relative to the
        image and goes through the gate, so GateError may be raised. The file stays open until the check ends."""
        raise NotSupportedError(f"'{self.main.filename}' is a single file, '{name}' cannot be reached from it.")

    async def create(self, *others: str) -> list[Node]:
        """Make the image's own file and the ``others``, whose names are relative to it. Return them in this order:
        empty, open, writable. To be called once, after the options are checked.

        No file is made if one of them exists with content that may not be replaced (WouldLoseDataError). Existing files
        are replaced last. All new ones are removed again if the creation fails.
        """
        if others:
            raise NotSupportedError(f"'{self.main.filename}' is a single file, '{others[0]}' cannot be made beside it.")
        return [self.main]
