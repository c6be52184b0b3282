"""Features of the kernel that libfuse does not know: changes INIT and its answer between the two."""

from __future__ import annotations

from mmap import PAGESIZE

from fusedisk.mount import wire

MAX_BACKGROUND = 64
"""Requests that nobody waits for (readahead, asynchronous direct I/O) in flight at once; the kernel allows only root
more than a few."""
_CONGESTION = 48
_WANTED = (
    wire.ASYNC_READ
    | wire.BIG_WRITES
    | wire.ASYNC_DIO
    | wire.PARALLEL_DIROPS
    | wire.MAX_PAGES
    | wire.HANDLE_KILLPRIV_V2  # our files never have such bits
)
_REFUSED = wire.AUTO_INVAL_DATA
"""libfuse takes it: before each cached read that follows a write the kernel asks for the attributes, to drop what it
has cached if the file's time of change is not its own. Files change through the kernel only, or we tell it."""
_OFFERED = wire.IN_HEADER.size
_REPLY = wire.OUT_HEADER.size


class Negotiation:
    """One INIT and its reply."""

    def __init__(self, *, passthrough: bool, longest: int, maps_uncached: bool = True) -> None:
        """``longest``: bytes of data in one request at most. ``maps_uncached``: without it the kernel refuses shared
        mappings (ENODEV) of files that it does not cache. Where several files show the same bytes it must: a page that
        is written through memory comes back whole, over what was written through the other files meanwhile."""
        self._wanted = (wire.DIRECT_IO_ALLOW_MMAP if maps_uncached else 0) | (wire.PASSTHROUGH if passthrough else 0)
        self._longest = longest
        self._unique = 0
        self._features = 0
        self.taken = 0
        """The features in force, once there was a reply: bits of flags and, above them, of flags2."""

    @property
    def writes_drop_pages(self) -> bool:
        """Whether the kernel drops its pages of what is written past its cache (Linux 6.6, as the feature offered)."""
        return bool(self._features & wire.DIRECT_IO_ALLOW_MMAP)

    @property
    def passthrough(self) -> bool:
        """Whether files may be opened so that the kernel accesses the host file directly."""
        return bool(self.taken & wire.PASSTHROUGH)

    @property
    def maps_uncached(self) -> bool:
        """Whether the kernel allows shared mappings of files that it does not cache."""
        return bool(self.taken & wire.DIRECT_IO_ALLOW_MMAP)

    def offered(self, head: bytearray, unique: int) -> None:
        """The kernel's INIT request, which has this number."""
        _, _, _, flags, more = wire.INIT_IN.unpack_from(head, _OFFERED)
        self._unique = unique
        self._features = flags | (more << 32 if flags & wire.INIT_EXT else 0)

    def answered(self, reply: memoryview, length: int, unique: int) -> None:
        """Ask for other features in libfuse's reply, if it is the one to INIT and long enough for that."""
        if unique != self._unique or length < _REPLY + wire.INIT_OUT.size:
            return
        self._unique = 0
        fields = list(wire.INIT_OUT.unpack_from(reply, _REPLY))
        wanted = _WANTED
        if self._features & wire.INIT_EXT:
            wanted |= wire.INIT_EXT | self._wanted
        self.taken = (fields[3] | fields[10] << 32) & ~_REFUSED | wanted & self._features
        fields[3], fields[10] = self.taken & 0xFFFFFFFF, self.taken >> 32
        fields[4:8] = [MAX_BACKGROUND, _CONGESTION, self._longest, 1]
        fields[8] = self._longest // PAGESIZE if self.taken & wire.MAX_PAGES else 0
        fields[11] = 1 if self.passthrough else 0
        wire.INIT_OUT.pack_into(reply, _REPLY, *fields)
