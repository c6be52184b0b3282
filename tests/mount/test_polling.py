"""How the channel waits for the next request, in a time that the tests make."""

from __future__ import annotations

import pytest

from fusedisk.mount.nap import TICK
from fusedisk.mount.polling import ASK, Polling

US = 1e-6
WAKING = 30 * US


class Timeline:
    """A connection whose requests come ``gap`` after each answer and take ``answering`` to be answered; seconds."""

    def __init__(self, polling: Polling) -> None:
        self.polling = polling
        self.now = 1.0
        self.asking = 0.0
        """Seconds that asking took."""
        self.ways: list[str] = []
        """How each request was waited for: ``asked``, ``napped`` or ``waited``."""

    def requests(self, count: int, *, gap: float, answering: float = 20 * US) -> list[str]:
        """Let some come; returns how each was waited for."""
        for _ in range(count):
            came, asked = self.now + gap, 0.0
            if self.polling.should_nap and gap < TICK:
                way, self.now = "napped", came + WAKING
            else:
                if self.polling.should_nap:
                    self.polling.overslept()
                if self.polling.spin_until:
                    asked = min(came, self.polling.spin_until)
                    self.asking += asked - self.now
                if came < self.polling.spin_until:
                    way, self.now = "asked", came
                else:
                    way, self.now = "waited", came + WAKING
                    self.polling.woke(self.now, asked)
                    asked = 0.0
            self.now += answering
            self.polling.answered(self.now, asked)
            self.ways.append(way)
        return self.ways[-count:]


@pytest.fixture
def timeline() -> Timeline:
    return Timeline(Polling(may_ask=True))


def test_nothing_is_asked_or_napped_for_after_a_long_pause(timeline: Timeline) -> None:
    assert timeline.requests(20, gap=0.1) == ["waited"] * 20
    assert not timeline.asking


def test_short_gaps_are_bridged_by_asking(timeline: Timeline) -> None:
    timeline.requests(5, gap=12 * US)
    assert timeline.requests(1000, gap=12 * US) == ["asked"] * 1000


def test_gaps_longer_than_it_is_worth_are_bridged_by_asking_now_and_then(timeline: Timeline) -> None:
    ways = timeline.requests(1000, gap=45 * US)
    assert 30 < ways.count("asked") < 150
    assert ways.count("asked") + ways.count("napped") > 990
    assert timeline.asking < 1000 * 6 * US


def test_who_answers_for_long_asks_for_longer(timeline: Timeline) -> None:
    timeline.requests(5, gap=45 * US, answering=100 * US)
    assert timeline.requests(1000, gap=45 * US, answering=100 * US) == ["asked"] * 1000


def test_gaps_that_asking_does_not_bridge_are_hardly_asked_for(timeline: Timeline) -> None:
    ways = timeline.requests(1000, gap=2 * ASK)
    assert ways.count("napped") > 970
    assert timeline.asking < 1000 * 2 * US


def test_it_asks_again_soon_after_gaps_have_become_shorter(timeline: Timeline) -> None:
    timeline.requests(1000, gap=2 * ASK)
    timeline.requests(100, gap=10 * US)
    assert timeline.requests(100, gap=10 * US) == ["asked"] * 100


def test_it_stops_asking_soon_after_gaps_have_become_longer(timeline: Timeline) -> None:
    timeline.requests(1000, gap=10 * US)
    assert timeline.requests(20, gap=2 * ASK).count("waited") <= 8


def test_one_processor_is_never_taken_from_who_is_waited_for() -> None:
    timeline = Timeline(Polling(may_ask=False))
    timeline.requests(5, gap=12 * US)
    assert timeline.requests(100, gap=12 * US) == ["napped"] * 100
    assert not timeline.asking


def test_it_waits_again_after_a_nap_in_which_nothing_came(timeline: Timeline) -> None:
    timeline.requests(100, gap=2 * ASK)
    assert timeline.polling.should_nap
    timeline.polling.overslept()
    assert not timeline.polling.should_nap
    assert not timeline.polling.spin_until
