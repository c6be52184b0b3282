"""Nobody waits for long without a word."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest

from fusedisk.cli import waiting
from fusedisk.core.errors import OperationBlockedError


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    receiving, sending = os.pipe()
    yield receiving, sending
    os.close(receiving)
    os.close(sending)


def test_a_word_where_it_takes_long(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "_WORD_IN_SCRIPTS_AFTER", 0.01)
    assert not waiting.is_readable(pipe[0], 0.02, lambda: "still waiting.")
    assert capsys.readouterr().err == "fusedisk: still waiting.\n"
    writer = threading.Thread(target=lambda: os.write(pipe[1], b"x"))

    def word() -> str:
        writer.start()
        return "it comes."

    assert waiting.is_readable(pipe[0], None, word)
    writer.join()
    assert capsys.readouterr().err == "fusedisk: it comes.\n"


def test_no_word_where_it_does_not(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not waiting.is_readable(pipe[0], 0.01, lambda: "never said.")
    os.write(pipe[1], b"x")
    monkeypatch.setattr(waiting, "_WORD_IN_SCRIPTS_AFTER", 0.0)
    assert waiting.is_readable(pipe[0], None, lambda: "never said.")
    assert waiting.is_readable(pipe[0], 1e12)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("busy", "deadline", "told"), [(3, 0.0, []), (9, None, ["6"]), (9, 7.5, ["6"]), (20, 0.0, [])])
def test_short_visits_are_waited_for_in_silence(
    monkeypatch: pytest.MonkeyPatch, busy: int, deadline: float | None, told: list[str]
) -> None:
    """The clock moves by one with each attempt. For five seconds nothing is described, let alone told."""
    now, described = [0.0], []
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: None)
    said: list[str] = []
    monkeypatch.setattr(waiting, "tell", said.append)

    def describe() -> str:
        described.append(now[0])
        return f"attempt {now[0]:.0f}"

    def attempt() -> Callable[[], str] | None:
        now[0] += 1
        return describe if now[0] <= busy else None

    if deadline is not None and busy > max(5, deadline):
        with pytest.raises(OperationBlockedError, match=r"^attempt .*: end that first, wait with --wait"):
            waiting.until_free(attempt, deadline, "end that", grace=5.5)
    else:
        waiting.until_free(attempt, deadline, "end that", grace=5.5)
    assert said == [f"attempt {number}: waiting until that is over." for number in told]
    assert all(moment > 5.5 for moment in described)
