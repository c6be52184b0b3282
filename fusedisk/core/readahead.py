"""Finding out who reads sequentially, and how far ahead of them to go. Bytes and decisions only, no I/O.

A stream is taken for sequential with its third request in a row. From then on there is always something wanted ahead
of it: little at first, and each time that it has used a quarter of that, twice as much.
"""

from __future__ import annotations

SEQUENTIAL = 2
"""Requests that continued the one before them, after which a stream is sequential."""
FIRST_WINDOW = 256 << 10
LONGEST_WINDOW = 16 << 20
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
        self._streams: dict[int, Stream] = {}
        """Who has read on, by the offset behind their last request; who was neither read nor fetched for longest comes
        first."""
        self._firsts: dict[int, int] = {}
        """Requests that continued no other: their offsets, by the offset behind them, oldest first."""

    def notice(self, offset: int, end: int, limit: int) -> bool:
        """Somebody reads ``[offset, end)`` of ``limit`` bytes; tells whether that makes anything wanted."""
        streams, firsts = self._streams, self._firsts
        stream = streams.pop(offset, None) if streams else None
        if stream is None:
            same = streams.get(end) if streams else None
            if same is not None and same.offset == offset:
                # The same request once more, since not all of it could be answered at once.
                return same.ahead < same.until
            if firsts.get(end) == offset:
                return False
            stream = self._before(offset)
        if stream is not None:
            if len(streams) == MAX_STREAMS:
                del streams[next(iter(streams))]
            streams[end] = stream
            return self._advance(stream, offset, end, limit)
        late = self._passed(offset, end) if streams else None
        if late is not None:
            return late.ahead < late.until
        if len(firsts) == MAX_STREAMS:
            del firsts[next(iter(firsts))]
        firsts[end] = offset
        return False

    def _before(self, offset: int) -> Stream | None:
        """Take out the stream that goes on at ``offset``: one with a first request before it, or, since only units that
        need not be fetched, holes in what is read, may lie between, any that ends not far from there."""
        start = self._firsts.pop(offset, None)
        if start is not None:
            return Stream(start, offset)
        if not offset % self._unit:
            for position in self._streams:
                if self._reaches(position, offset):
                    return self._streams.pop(position)
            for position in self._firsts:
                if self._reaches(position, offset):
                    return Stream(self._firsts.pop(position), position)
        return None

    def _reaches(self, position: int, offset: int) -> bool:
        return 0 < offset - position <= self._gap and not position % self._unit

    def _passed(self, offset: int, end: int) -> Stream | None:
        """The stream that has just gone past there: parts of a long request may come in any order."""
        for position, stream in self._streams.items():
            if stream.following >= SEQUENTIAL and position - self._gap <= offset and end <= position:
                return stream
        return None

    def _advance(self, stream: Stream, offset: int, end: int, limit: int) -> bool:
        stream.offset, stream.next = offset, end
        stream.following += 1
        if stream.following < SEQUENTIAL:
            return False
        stream.ahead = max(stream.ahead, end)
        if stream.until - end <= stream.window - stream.window // 4 and stream.until < limit:
            # Twice as far as before.
            first = max(FIRST_WINDOW, 2 * (end - offset), 2 * self._unit)
            stream.window = min(max(2 * stream.window, first), self._longest)
            stream.until = min(end + stream.window, limit)
        return stream.ahead < stream.until

    def wanted(self) -> Stream | None:
        """A stream with something wanted, each in turn; the caller moves its ``ahead`` on."""
        for position, stream in self._streams.items():
            if stream.ahead < stream.until:
                # Behind the others; the order tells also who has read last, for which this is as good.
                self._streams[position] = self._streams.pop(position)
                return stream
        return None

    def forget(self) -> None:
        """Nothing is wanted until somebody reads on."""
        for stream in self._streams.values():
            stream.until = stream.ahead = stream.next
