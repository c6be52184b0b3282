"""One way to see the requests of a node.

A dirty bitmap, a write threshold, the tracker of a job, a copy before each write, a watcher of reads: each is an
:class:`Observer` that registers with :meth:`.Node.observe`. Every request that reaches the node tells it, whichever
way the request takes. What reaches a *child* of the node through another user (a disk and the files of its partitions)
is seen at the child only.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedisk.block.model.node import Node


class Change(enum.Enum):
    """The cause of a change of a node's content."""

    WRITE = "write"
    ZEROES = "zeroes"
    DISCARD = "discard"
    RESIZE = "resize"
    """The range lies between the old and the new length: cut off if the node got shorter, zeroes if it got longer."""
    SNAPSHOT = "snapshot"
    """A snapshot was applied. The range goes up to the longer one of the old and the new length."""
    AMEND = "amend"
    """A resize by changed settings of the image; the same range as for RESIZE."""
    REOPEN = "reopen"
    """Other options of the node: it shows other bytes of its file. The range is the same as for SNAPSHOT."""
    OUTSIDE = "outside"
    """The kernel may have written to the node's file directly."""
    STORAGE = "storage"
    """The content is as before, but it is stored otherwise: copy-on-read, preallocation, saving a snapshot. A flush
    must not skip it; observers are not told."""


class Observer:
    """Base of all observers. The methods do nothing; the flags say which of them are wanted.

    One instance may observe several nodes. The flags must not change while it is registered. A method must not raise,
    except ``before_change``.
    """

    wants_before: bool = False
    """Call ``before_change``. Writes then always take a task."""
    wants_changes: bool = False
    """Call ``changed``."""
    wants_reads: bool = False
    """Call ``read``. Reads then always take the door."""

    async def before_change(self, node: Node, offset: int, length: int, kind: Change) -> None:
        """Act before the driver gets a change; the change waits, and an error raised here fails it.

        The range may go past the end of the node, if the change makes it longer. To read the old content, call
        :func:`fusedisk.block.request.transfer.read`: the node's door would wait for the change that waits here. Changes
        already in flight when the observer registers are not announced; to see them all, register in a drained
        section."""

    def changed(self, node: Node, offset: int, length: int, kind: Change) -> None:
        """Learn that a range may differ from now on, and that ``node.length`` is as it is now.

        Called before the request is answered, also after a failure, since a part may be done. One change may be told
        twice: a write that is tried without a task and fails there is made again in a task."""

    def read(self, node: Node, offset: int, length: int) -> None:
        """Learn that a range is about to be read: for a request, for a node above, or to be written back with a part
        changed. It may go past the end of the node."""
