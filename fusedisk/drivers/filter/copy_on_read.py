"""``copy-on-read``: sets the copy-on-read flag on reads, so that the node below stores the data of its backing file.

The ``copy-on-read`` option that every node has does the same for that node; the filter can be inserted and removed
while the disk is in use. Concurrent requests are safe: the node below turns such reads into serialising requests over
whole clusters. Source: QAPI's BlockdevOptionsCor.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusedisk.block.model import permissions
from fusedisk.block.model.children import ChildSpec, Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.flags import COPY_ON_READ, Buffer
from fusedisk.block.request import io
from fusedisk.block.request.filter import FilterDriver
from fusedisk.core.errors import OptionError


class CopyOnReadDriver(FilterDriver):
    """Passes everything through and sets the copy-on-read flag on reads."""

    name = "copy-on-read"
    child_specs = (ChildSpec("file", Role.FILTERED),)
    moves_bytes = True

    def may_be_named(self) -> bool:
        return True

    async def open(self) -> None:
        """Raise OptionError over a read-only node, which cannot store what is read."""
        below = self.below
        if below.config.read_only:
            raise OptionError(f"copy-on-read writes into '{below.filename}', which is open read-only.")

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        """Need what the parents need, and the *write unchanged* permission."""
        return perm | permissions.CONSISTENT_READ | permissions.WRITE_UNCHANGED, shared | permissions.WRITE_UNCHANGED

    async def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Read with the copy-on-read flag."""
        for buffer in buffers:
            await io.read(self.below, offset, buffer, COPY_ON_READ)
            offset += len(buffer)
