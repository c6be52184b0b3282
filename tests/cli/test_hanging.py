"""Files that do not answer: a command or daemon that waits for one ends on a signal.

A pipe without anybody at its other end stands for such a file: each test's program opens one where it would open or
flush an image. A loop that hangs itself is one whose thread takes no signals.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import process_environment

PATIENCE = 60.0

PROLOGUE = """
import os, signal, sys, threading, trio
from fusedisk.core import host_open

def hang(*args):
    print("waits", flush=True)
    return open("pipe")

def no_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    print("waits", flush=True)
    threading.Event().wait()
"""

OPENING = """
host_open.Found.__init__ = hang
from fusedisk.cli.main import main
main()
"""

RESOLVING = """
from fusedisk.core import paths
from fusedisk.mount import mountinfo
paths.real = mountinfo.absolute = hang
from fusedisk.cli.main import main
main()
"""

LOOP = """
from fusedisk.cli.running import run_async
async def command():
    no_signals()
run_async(command, writes=sys.argv[1] == "writes")
"""

DAEMON = """
from types import SimpleNamespace
from fusedisk.cli import daemon
from fusedisk.export.opening import OpenSettings

class Session:
    device = "0:0"
    def stop(self): pass
    def close(self): pass

class Daemon(daemon.Daemon):
    async def _serve(self):
        if sys.argv[1] == "opening":
            no_signals()
        self.session = Session()
        self.registry = [SimpleNamespace(writable=sys.argv[2] == "writable", name="x")]
        self._report = None
        if sys.argv[1] == "serving":
            no_signals()
        print("waits", flush=True)
        await trio.sleep_forever()
    async def _flush(self):
        await trio.to_thread.run_sync(hang)

request = daemon.MountRequest([], "/mountpoint", OpenSettings())
sys.exit(trio.run(Daemon(request, lambda failure: print(failure, file=sys.stderr)).run))
"""

STILL_WRITING = (
    "'/mountpoint' still waits for the host to write to its images, and ends when that is done (SIGKILL ends it at "
    "once, and loses unwritten data).\n"
)


class Program:
    """A program that waits for something, in a directory of its own."""

    def __init__(self, place: Path, text: str, *args: str) -> None:
        os.mkfifo(place / "pipe")
        (place / "program.py").write_text(PROLOGUE + text)
        self._process = subprocess.Popen(
            [sys.executable, place / "program.py", *args],
            cwd=place,
            env=process_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.line()

    def line(self) -> None:
        """Wait until it waits."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "waits\n", self._process.communicate(timeout=PATIENCE)

    def told(self) -> str:
        """What it says next."""
        assert self._process.stderr is not None
        return self._process.stderr.readline()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Exit code, and what it has said since."""
        try:
            return self._process.wait(PATIENCE), self._process.communicate()[1]
        finally:
            self._process.kill()


@pytest.mark.parametrize(
    "command",
    ["info x", "map x", "check x", "check -r all x", "measure x", "snapshot --list x", "create -f qcow2 x 1M"],
)
def test_a_command_that_opens_one_ends_on_an_interrupt(tmp_path: Path, command: str) -> None:
    (tmp_path / "x").touch()
    program = Program(tmp_path, OPENING, *command.split())
    program.send(signal.SIGINT)
    assert program.end() == (130, "")


@pytest.mark.parametrize("command", ["umount x", "detach x"])
def test_a_command_that_looks_for_one_ends_on_an_interrupt(tmp_path: Path, command: str) -> None:
    program = Program(tmp_path, RESOLVING, *command.split())
    program.send(signal.SIGINT)
    assert program.end() == (130, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
def test_a_daemon_that_opens_one_ends_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "m").mkdir()
    program = Program(tmp_path, OPENING, "mount", "--foreground", "x", "m")
    program.send(number)
    assert program.end() == (1, "fusedisk: the mount was stopped before it was ready.\n")


def test_a_loop_that_hangs_itself_ends_on_an_interrupt(tmp_path: Path) -> None:
    program = Program(tmp_path, LOOP, "reads")
    program.send(signal.SIGINT)
    assert program.end() == (130, "")


def test_what_may_lose_something_says_so_and_ends_on_another_interrupt(tmp_path: Path) -> None:
    program = Program(tmp_path, LOOP, "writes")
    program.send(signal.SIGINT)
    assert program.told() == (
        "fusedisk: still waiting for the host to write; Ctrl-C again ends this at once, and what is written may be "
        "lost.\n"
    )
    program.send(signal.SIGINT)
    assert program.end() == (130, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_a_daemon_whose_loop_hangs_before_it_serves_ends_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    program = Program(tmp_path, DAEMON, "opening")
    program.send(number)
    assert program.end() == (
        1,
        "the mount was stopped before it was ready, while it waited for a file that does not answer.\n",
    )


@pytest.mark.parametrize("hanging", ["serving", "flushing"])
def test_a_daemon_that_cannot_flush_says_so(tmp_path: Path, hanging: str) -> None:
    program = Program(tmp_path, DAEMON, hanging, "writable")
    program.send(signal.SIGQUIT)
    assert program.told().endswith(STILL_WRITING)
    program.send(signal.SIGKILL)
    assert program.end() == (-signal.SIGKILL, "")


@pytest.mark.parametrize("hanging", ["serving", "flushing"])
def test_a_daemon_that_has_nothing_to_lose_ends(tmp_path: Path, hanging: str) -> None:
    program = Program(tmp_path, DAEMON, hanging, "read-only")
    program.send(signal.SIGQUIT)
    code, said = program.end()
    assert code == 1
    assert said == "'/mountpoint' was ended while it waited for a file that does not answer.\n"
