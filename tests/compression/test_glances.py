"""Who is given a part of a piece, and who all of it."""

from __future__ import annotations

from fusedisk.compression.glances import MOST_GLANCES, Glances

SIZE = 64 << 10


def test_the_first_look_is_given_a_part_and_the_second_all_of_it() -> None:
    glances = Glances(SIZE, 1 << 32)
    assert glances.first(1, 4096)
    assert glances.first(2, 32768)
    assert not glances.first(1, 4096)
    assert not glances.first(2, 4096)


def test_a_piece_that_was_lost_again_begins_anew() -> None:
    glances = Glances(SIZE, 1 << 32)
    assert glances.first(1, 4096)
    assert not glances.first(1, 4096)
    assert not glances.first(1, 4096), "it did not inflate"
    glances.whole(1)
    assert glances.first(1, 4096)
    glances.whole(2)


def test_a_look_at_most_of_a_piece_is_given_all_of_it() -> None:
    glances = Glances(SIZE, 1 << 32)
    assert not glances.first(1, SIZE)
    assert not glances.first(1, SIZE - 4096)
    assert glances.first(1, SIZE // 2)


def test_looks_long_ago_are_forgotten_and_their_number_is_bounded() -> None:
    glances = Glances(SIZE, 1 << 32)
    for key in range(3 * MOST_GLANCES):
        assert glances.first(key, 4096)
    assert len(glances._seen) == MOST_GLANCES
    assert glances.first(0, 4096)
    assert not glances.first(3 * MOST_GLANCES - 1, 4096)


def test_who_comes_back_late_is_given_a_part_again() -> None:
    glances = Glances(SIZE, 800 * SIZE)
    for distance, seen in ((99, True), (100, False)):
        assert glances.first(0, 4096)
        for key in range(1, distance + 1):
            assert glances.first(distance * 1000 + key, 4096)
        assert glances.first(0, 4096) is not seen
        glances.whole(0)
    assert Glances(SIZE, SIZE // 2).first(0, 4096)
