"""Who is taken for a sequential reader, and how far ahead of them is gone."""

from __future__ import annotations

import random

from fusedisk.compression.readahead import FIRST_WINDOW, LONGEST_WINDOW, MAX_STREAMS, Readahead

UNIT = 64 << 10
SIZE = 1 << 30


def ahead(readahead: Readahead) -> list[tuple[int, int]]:
    """All that is wanted, which is taken as fetched."""
    found = []
    while (stream := readahead.next_stream()) is not None:
        found.append((stream.ahead, stream.until))
        stream.ahead = stream.until
    return found


def test_the_third_request_in_a_row_starts_it_and_it_goes_farther_each_time() -> None:
    readahead = Readahead(UNIT, 1 << 30, UNIT)
    assert not readahead.notice(0, 4096, SIZE)
    assert not readahead.notice(4096, 8192, SIZE)
    assert readahead.notice(8192, 12288, SIZE)
    assert ahead(readahead) == [(12288, 12288 + FIRST_WINDOW)]
    reached, windows = 12288 + FIRST_WINDOW, []
    for offset in range(12288, 64 << 20, 4096):
        if readahead.notice(offset, offset + 4096, SIZE):
            ((start, end),) = ahead(readahead)
            assert start == reached, "nothing is asked for twice, nothing is left out"
            assert start > offset + 4096, "before the reader is there"
            windows.append(end - offset - 4096)
            reached = end
    assert windows[0] == 2 * FIRST_WINDOW
    assert windows == sorted(windows)
    assert windows[-1] == LONGEST_WINDOW


def test_random_readers_are_left_alone() -> None:
    readahead = Readahead(UNIT, 1 << 30, UNIT)
    rng = random.Random(1)
    for _ in range(10000):
        offset = rng.randrange(SIZE >> 12) << 12
        assert not readahead.notice(offset, offset + 4096, SIZE)
    for _ in range(1000):
        # One hot cluster, again and again.
        offset = rng.randrange(0, 16, 2) << 12
        assert not readahead.notice(offset, offset + 4096, SIZE)
    assert readahead.next_stream() is None


def test_several_readers_at_once_and_none_of_them_too_far_ahead() -> None:
    capacity = 8 << 20
    readahead = Readahead(UNIT, capacity, UNIT)
    positions = [number << 26 for number in range(MAX_STREAMS)]
    reached = list(positions)
    for _ in range(200):
        for number, position in enumerate(positions):
            positions[number] = position + UNIT
            readahead.notice(position, position + UNIT, SIZE)
            for _start, end in ahead(readahead):
                reached[end >> 26] = end
            assert sum(max(0, end - at) for end, at in zip(reached, positions, strict=True)) <= capacity
    assert all(end > at for end, at in zip(reached, positions, strict=True))


def test_wanted_takes_turns() -> None:
    readahead = Readahead(UNIT, 1 << 30, UNIT)
    for number in range(3):
        for step in range(3):
            at = (number << 26) + step * UNIT
            readahead.notice(at, at + UNIT, SIZE)
    order = []
    for _ in range(6):
        stream = readahead.next_stream()
        assert stream is not None
        order.append(stream.ahead >> 26)
        stream.ahead += 1
    assert sorted(order[:3]) == [0, 1, 2]
    assert order[3:] == order[:3]


def test_holes_and_repeated_requests_do_not_end_a_stream() -> None:
    readahead = Readahead(UNIT, 1 << 30, UNIT)
    readahead.notice(0, UNIT, SIZE)
    readahead.notice(0, UNIT, SIZE)
    # Clusters of zeroes between.
    readahead.notice(3 * UNIT, 4 * UNIT, SIZE)
    readahead.notice(3 * UNIT, 4 * UNIT, SIZE)
    assert readahead.notice(4 * UNIT, 5 * UNIT, SIZE)
    assert readahead.notice(4 * UNIT, 5 * UNIT, SIZE), "as long as it is wanted"
    assert ahead(readahead) == [(5 * UNIT, 5 * UNIT + FIRST_WINDOW)]
    assert not readahead.notice(100 * UNIT, 101 * UNIT, SIZE), "too far"


def test_parts_of_a_request_that_come_the_other_way_round_are_no_stream_of_their_own() -> None:
    readahead = Readahead(UNIT, 1 << 30, UNIT)
    for step in range(3):
        readahead.notice(step * UNIT, (step + 1) * UNIT, SIZE)
    for step in range(4, 40, 2):
        readahead.notice(step * UNIT, (step + 1) * UNIT, SIZE)
        readahead.notice((step - 1) * UNIT, step * UNIT, SIZE)
    assert [stream.next for stream in readahead._streams.values()] == [39 * UNIT]
    readahead.notice(100 * UNIT, 101 * UNIT, SIZE)
    assert readahead._others == {101 * UNIT: (100 * UNIT, 0)}


def test_random_requests_between_do_not_end_a_stream() -> None:
    readahead = Readahead(UNIT, 1 << 30, UNIT)
    rng = random.Random(2)
    wanted = []
    for step in range(100):
        wanted.append(readahead.notice(step * UNIT, (step + 1) * UNIT, SIZE))
        ahead(readahead)
        for _ in range(0 if step < 2 else 2 * MAX_STREAMS):
            offset = (SIZE >> 1) + rng.randrange(1 << 15) * 4096
            readahead.notice(offset + 1, offset + 2, SIZE)
    assert sum(wanted) > 3
    assert len(readahead._others) == MAX_STREAMS


def test_it_ends_where_the_disk_does() -> None:
    readahead = Readahead(UNIT, 1 << 30, UNIT)
    size = 5 * UNIT + 100
    for step in range(4):
        readahead.notice(step * UNIT, (step + 1) * UNIT, size)
    assert ahead(readahead) == [(4 * UNIT, size)]
    assert not readahead.notice(4 * UNIT, 5 * UNIT, size)


def test_what_is_forgotten_is_wanted_again_by_who_reads_on() -> None:
    readahead = Readahead(UNIT, 1 << 30, UNIT)
    for step in range(3):
        readahead.notice(step * UNIT, (step + 1) * UNIT, SIZE)
    readahead.forget()
    assert readahead.next_stream() is None
    assert readahead.notice(3 * UNIT, 4 * UNIT, SIZE)
    assert ahead(readahead)[0][0] == 4 * UNIT
