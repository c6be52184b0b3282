"""The exports that show the same bytes, such as a disk and its partitions, and the kernel's cached pages of them.

Their files are opened with FOPEN_DIRECT_IO, so reads and writes bypass the kernel's page cache. Some system calls fill
it all the same (sendfile, splice, a private mapping, readahead), and the next such call gets those pages without a
request. So each range that the kernel is about to cache is noted, and a request that changes some of it is answered
only after the kernel has dropped the pages. Shared mappings are refused (:mod:`..mount.negotiation`), so no such page
is ever dirty.

A file whose writer can only write is written past the cache, too, while other handles of it are cached (see
docs/adr/0031). It is a family of its own as long as there are such writers.

Positions are bytes of the disk, whichever file they belong to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusedisk.core.locks import Mutex

if TYPE_CHECKING:
    from fusedisk.export.export import Export
    from fusedisk.export.times import Times


class Family:
    """The exports of one disk. An export without relatives has a family of its own."""

    __slots__ = ("_dropping", "_kept", "keeps_some", "up_to_date", "written_ns")

    def __init__(self) -> None:
        self.up_to_date: set[Times] = set()
        """The times of its exports that are current."""
        self.written_ns = 0
        """The time of the last write by our clock; 0 without any."""
        self.keeps_some = False
        """Whether the kernel may have anything at all in its page cache."""
        self._kept: dict[Export, tuple[int, int]] = {}
        """For each file, one range around everything that the kernel may have in its page cache."""
        self._dropping = Mutex()

    def keep(self, export: Export, start: int, stop: int) -> None:
        """Note that the kernel keeps what it is about to read through ``export``. Call it before the bytes are read."""
        low, high = self._kept.get(export, (start, stop))
        self._kept[export] = min(low, start), max(high, stop)
        self.keeps_some = True

    def keeps(self, start: int, stop: int) -> bool:
        """Return whether the kernel may have some of a range in the page cache of any file."""
        return self._dropping.locked or any(low < stop and start < high for low, high in self._kept.values())

    def forget(self, export: Export) -> None:
        """Forget the pages of a file: from now on all its writers use the same cache."""
        self._kept.pop(export, None)
        self.keeps_some = bool(self._kept)

    async def drop(self, start: int, stop: int) -> bool:
        """Make the kernel drop its pages of a changed range; returns whether there may have been any. The change may be
        answered afterwards.

        The kernel may wait for reads of the same pages that are not answered yet, so the caller must not hold anything
        that a read needs.
        """
        if not self.keeps(start, stop):
            return False
        # A change that comes while pages are being dropped waits: they may be its own.
        async with self._dropping:
            for export, (low, high) in list(self._kept.items()):
                if low < stop and start < high:
                    # Before the pages are dropped: whatever is read from now on is new and noted again.
                    del self._kept[export]
                    if export.drop_pages is not None:
                        await export.drop_pages()
            self.keeps_some = bool(self._kept)
        return True
