"""Detects sequential streams and sizes their readahead windows. Bytes and decisions only, no I/O.

A stream counts as sequential from its third request in a row. From then on a window ahead of it is to be fetched: small
at first, and twice as large each time the stream has used a quarter of it.
"""

from __future__ import annotations

SEQUENTIAL = 2
"""How many requests must continue the one before them until a stream counts as sequential."""
FIRST_WINDOW = 256 << 10
LONGEST_WINDOW = 16 << 20
MAX_STREAMS = 8


class Stream:
    """One reader."""

    __slots__ = ("ahead", "next", "offset", "until", "window")

    def __init__(self) -> None:
        self.offset = self.next = 0
        """Start and end of its last request."""
        self.window = 0
        """Bytes to stay ahead of it."""
        self.ahead = 0
        """End of what was fetched or is being fetched."""
        self.until = 0
        """End of what is to be fetched."""

    @property
    def bytes_wanted(self) -> int:
        """Bytes still to be fetched."""
        return max(self.until - self.ahead, 0)


class Readahead:
    """The streams of one image."""

    def __init__(self, unit: int, capacity: int, batch: int) -> None:
        """``unit``: bytes that are fetched as one. ``capacity``: bytes that all streams together may be ahead; one
        stream gets at most an eighth. ``batch``: bytes, many units, that are best fetched at a time."""
        self._unit = unit
        self._batch = batch
        self._longest = max(min(LONGEST_WINDOW, capacity // MAX_STREAMS), 2 * unit)
        self._gap = max(1 << 20, unit)
        self._streams: dict[int, Stream] = {}
        """Sequential streams by the end of their last request, the least recently read or fetched one first."""
        self._others: dict[int, tuple[int, int]] = {}
        """Other requests by their end, oldest first: their offset, and how many requests in a row led to them."""

    def notice(self, offset: int, end: int, limit: int) -> int:
        """Note a read of ``[offset, end)`` on a disk of ``limit`` bytes; return how many bytes to fetch ahead of it."""
        streams, others = self._streams, self._others
        same = others.get(end)
        if same is not None and same[0] == offset:  # the same request again
            return 0
        following = 0
        if streams or offset in others or not offset % self._unit:  # False for most random reads
            stream = streams.pop(offset, None)
            if stream is None:
                twice = streams.get(end)
                if twice is not None and twice.offset == offset:
                    # The same request again, because not all of it could be answered at once.
                    return twice.bytes_wanted
                stream = self._before_hole(offset)
            if stream is None:
                following = self._following(offset)
                if following == SEQUENTIAL:
                    stream = Stream()
                    if len(streams) == MAX_STREAMS:
                        del streams[next(iter(streams))]
            if stream is not None:
                streams[end] = stream
                return self._advance(stream, offset, end, limit)
            if not following:
                late = self._passed(offset, end)
                if late is not None:
                    return late.bytes_wanted
        if same is None and len(others) == MAX_STREAMS:
            del others[next(iter(others))]
        others[end] = offset, following
        return 0

    def _before_hole(self, offset: int) -> Stream | None:
        """Remove and return the stream that may continue at ``offset``: what lies between may be holes, which need no
        fetching."""
        if not offset % self._unit:
            for position in self._streams:
                if self._reaches(position, offset):
                    return self._streams.pop(position)
        return None

    def _following(self, offset: int) -> int:
        """Remove the request that the one at ``offset`` continues; return how many in a row that makes."""
        others = self._others
        before = others.pop(offset, None)
        if before is None and not offset % self._unit:
            for position in others:
                if self._reaches(position, offset):
                    before = others.pop(position)
                    break
        return before[1] + 1 if before is not None else 0

    def _reaches(self, position: int, offset: int) -> bool:
        return 0 < offset - position <= self._gap and not position % self._unit

    def _passed(self, offset: int, end: int) -> Stream | None:
        """The stream that has just passed this range: parts of a long request may arrive in any order."""
        for position, stream in self._streams.items():
            if position - self._gap <= offset and end <= position:
                return stream
        return None

    def _advance(self, stream: Stream, offset: int, end: int, limit: int) -> int:
        stream.offset, stream.next = offset, end
        stream.ahead = max(stream.ahead, end)
        if stream.until - end <= stream.window - self._step(stream.window) and stream.until < limit:
            # Twice as far as before.
            first = max(FIRST_WINDOW, 2 * (end - offset), 2 * self._unit)
            stream.window = min(max(2 * stream.window, first), self._longest)
            stream.until = min(end + stream.window, limit)
        return stream.bytes_wanted

    def _step(self, window: int) -> int:
        """How much of its window a stream uses before the window moves on: a quarter, rounded up to whole batches if
        the window is large enough."""
        quarter = window // 4
        return quarter if window < 2 * self._batch else -(-quarter // self._batch) * self._batch

    def next_stream(self) -> Stream | None:
        """Return a stream with something to fetch, each in turn; the caller then advances its ``ahead``."""
        for position, stream in self._streams.items():
            if stream.ahead < stream.until:
                # Move it to the end, so that each stream gets its turn; a fetch counts like a read in this order.
                self._streams[position] = self._streams.pop(position)
                return stream
        return None

    def forget(self) -> None:
        """Fetch nothing more until a stream continues."""
        for stream in self._streams.values():
            stream.until = stream.ahead = stream.next
