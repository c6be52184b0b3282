"""Finding out who reads sequentially, and how far ahead of them to go. Bytes and decisions only, no I/O.

A stream is taken for sequential with its third request in a row. From then on there is always something wanted ahead
of it: little at first, more with every time that it comes near the end of that.
"""

from __future__ import annotations

SEQUENTIAL = 2
"""Requests that continued the one before them, after which a stream is sequential."""
FIRST_WINDOW = 256 << 10
LONGEST_WINDOW = 4 << 20
MAX_STREAMS = 8


class Stream:
    """One reader."""

    __slots__ = ("ahead", "following", "next", "offset", "until", "window")

    def __init__(self, offset: int, end: int) -> None:
        self.offset = offset
        """Of its last request."""
        self.next = end
        """Offset behind its last request."""
        self.following = 0
        """Requests that continued the one before them."""
        self.window = 0
        """Bytes to be ahead of it."""
        self.ahead = end
        """What was fetched, or is on its way, ends here."""
        self.until = end
        """What is wanted ends here."""


class Readahead:
    """The streams of one image."""

    def __init__(self, unit: int, capacity: int) -> None:
        """``unit``: bytes that are fetched as one. ``capacity``: bytes that all streams may be ahead together, of
        which one takes at most an eighth of them."""
        self._unit = unit
        self._longest = max(min(LONGEST_WINDOW, capacity // MAX_STREAMS), 2 * unit)
        self._gap = max(1 << 20, unit)
        self._streams: list[Stream] = []

    def notice(self, offset: int, end: int, limit: int) -> bool:
        """Somebody reads ``[offset, end)`` of ``limit`` bytes; tells whether that makes anything wanted."""
        streams = self._streams
        for stream in streams:
            if stream.next == offset or self._skips_to(stream.next, offset):
                if stream is not streams[-1]:
                    streams.remove(stream)
                    streams.append(stream)
                return self._advance(stream, offset, end, limit)
            if stream.offset == offset and stream.next == end:
                # The same request once more, since not all of it could be answered at once.
                return stream.ahead < stream.until
        if len(streams) == MAX_STREAMS:
            del streams[0]
        streams.append(Stream(offset, end))
        return False

    def _skips_to(self, position: int, offset: int) -> bool:
        """Whether only units that need not be fetched, holes in what is read, may lie between."""
        return 0 < offset - position <= self._gap and not (position | offset) % self._unit

    def _advance(self, stream: Stream, offset: int, end: int, limit: int) -> bool:
        stream.offset, stream.next = offset, end
        stream.following += 1
        if stream.following < SEQUENTIAL:
            return False
        stream.ahead = max(stream.ahead, end)
        if stream.until - end <= stream.window // 2 and stream.until < limit:
            # Twice as far as before.
            first = max(FIRST_WINDOW, 2 * (end - offset), 2 * self._unit)
            stream.window = min(max(2 * stream.window, first), self._longest)
            stream.until = min(end + stream.window, limit)
        return stream.ahead < stream.until

    def wanted(self) -> Stream | None:
        """A stream with something wanted, each in turn; the caller moves its ``ahead`` on."""
        streams = self._streams
        for index, stream in enumerate(streams):
            if stream.ahead < stream.until:
                # Behind the others; the order tells also who has read last, for which this is as good.
                streams.append(streams.pop(index))
                return stream
        return None

    def forget(self) -> None:
        """Nothing is wanted until somebody reads on."""
        for stream in self._streams:
            stream.until = stream.ahead = stream.next
