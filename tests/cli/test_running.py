"""Signals: Ctrl-C in a command's asynchronous part, and others while a daemon starts."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import trio

from fusedisk.cli import background
from fusedisk.cli.running import run_async


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """As in a program that a shell runs in the foreground."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_it_comes_where_a_cancellation_may_come() -> None:
    done = []

    async def command() -> None:
        signal.raise_signal(signal.SIGINT)
        done.append("what must not be cut in two")
        try:
            await trio.lowlevel.checkpoint()
        finally:
            done.append("what must be closed")
        done.append("never")

    with pytest.raises(KeyboardInterrupt):
        run_async(command)
    assert done == ["what must not be cut in two", "what must be closed"]


def test_results_and_errors_come_out() -> None:
    async def command(value: int) -> int:
        return 6 // value

    assert run_async(command, 2) == 3
    with pytest.raises(ZeroDivisionError):
        run_async(command, 0)


def test_signals_that_are_ignored_stay_so_while_a_daemon_starts() -> None:
    """As under nohup, which must not lose its command with the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with background._interruptible():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(SystemExit, match="143"):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])
