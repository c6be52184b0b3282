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

    __slots__ = ("ahead", "next", "offset", "until", "window")

    def __init__(self) -> None:
        self.offset = self.next = 0
        """Of its last request, and the offset behind that."""
        self.window = 0
        """Bytes to be ahead of it."""
        self.ahead = 0
        """What was fetched, or is on its way, ends here."""
        self.until = 0
        """What is wanted ends here."""

    @property
    def wanted(self) -> int:
        """Bytes that are to be fetched."""
        return max(self.until - self.ahead, 0)


class Readahead:
    """The streams of one image."""

    def __init__(self, unit: int, capacity: int, batch: int) -> None:
        """``unit``: bytes that are fetched as one. ``capacity``: bytes that all streams may be ahead together, of
        which one takes at most an eighth of them. ``batch``: bytes of many units that are best fetched at a time."""
        self._unit = unit
        self._batch = batch
        self._longest = max(min(LONGEST_WINDOW, capacity // MAX_STREAMS), 2 * unit)
        self._gap = max(1 << 20, unit)
        self._streams: dict[int, Stream] = {}
        """Those that are sequential, by the offset behind their last request; who was neither read nor fetched for
        longest comes first."""
        self._others: dict[int, tuple[int, int]] = {}
        """Requests that belong to none of them, by the offset behind them, oldest first: their offset, and how many
        requests before them each continued the one before it."""

    def notice(self, offset: int, end: int, limit: int) -> int:
        """Somebody reads ``[offset, end)`` of ``limit`` bytes; returns how many bytes are wanted ahead of them."""
        streams, others = self._streams, self._others
        same = others.get(end)
        if same is not None and same[0] == offset:
            return 0
        following = 0
        if streams or offset in others or not offset % self._unit:  # random readers mostly come past here
            stream = streams.pop(offset, None)
            if stream is None:
                twice = streams.get(end)
                if twice is not None and twice.offset == offset:
                    # The same request once more, since not all of it could be answered at once.
                    return twice.wanted
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
                    return late.wanted
        if same is None and len(others) == MAX_STREAMS:
            del others[next(iter(others))]
        others[end] = offset, following
        return 0

    def _before_hole(self, offset: int) -> Stream | None:
        """Take out the stream that may go on at ``offset``, since only units that need not be fetched, holes in what is
        read, may lie between."""
        if not offset % self._unit:
            for position in self._streams:
                if self._reaches(position, offset):
                    return self._streams.pop(position)
        return None

    def _following(self, offset: int) -> int:
        """How many requests continued the one before them, with the one at ``offset``: take out what it continues."""
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
        """The stream that has just gone past there: parts of a long request may come in any order."""
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
        return stream.wanted

    def _step(self, window: int) -> int:
        """How much of its window a stream uses before more is wanted: a quarter, in whole batches where that is not
        most of it."""
        quarter = window // 4
        return quarter if window < 2 * self._batch else -(-quarter // self._batch) * self._batch

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
