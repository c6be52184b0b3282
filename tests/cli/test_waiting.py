"""Nobody waits for long without a word."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from fusedisk.cli import waiting


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
