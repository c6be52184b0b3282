"""What a :class:`~fusedisk.drivers.format.change_log.ChangeLog` of a qcow2 image holds; see docs/adr/0029.

A successor writes the changes of each kind to the file, in the order of the kinds and with barriers between them, and
those of one kind in the order in which they were made. That is the commit that the dead process did not get to. Then it
opens the image as usual and frees the clusters of the last two kinds.
"""

from __future__ import annotations

import enum


class Kind(enum.IntEnum):
    """Kinds of changes. The bytes are those of the file."""

    REFCOUNTS = 1
    """A part of a refcount block."""
    REFCOUNT_TABLE = 2
    """An entry that leads to a new refcount block."""
    L2 = 3
    """Entries of an L2 table."""
    L1 = 4
    """An entry of the L1 table."""
    FREED = 5
    """Clusters that wait to be freed: the first one's number, and for each the change of its refcount, 8 bytes in the
    machine's byte order. See :class:`.freed.Freed`."""
    FREED_DISCARD = 6
    """The same, and their space may go back to the host."""
