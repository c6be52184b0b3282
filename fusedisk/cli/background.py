"""Runs a daemon as a child in the background, and reports its start to the command that started it.

The parent prints the child's warnings up to then and, after a failure, its error, and takes over its exit code; it
returns when the child is ready.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from fusedisk.cli import daemon_log, exit_codes, waiting
from fusedisk.cli.output import tell
from fusedisk.core.errors import FusediskError, HostError, OptionError

log = logging.getLogger(__name__)

Report = Callable[[FusediskError | None], None]
"""Called once by a daemon: None when it is ready, else with the error that says why it will never be."""


def run_in_background(serve: Callable[[Report], int], log_path: str, keep_fd: int | None = None) -> None:
    """Fork; the child runs ``serve`` detached from terminal and caller and exits with the code that it returns.

    Returns in the parent when the child has reported that it is ready; otherwise raises what it reported, as HostError,
    or as OptionError for wrong options. Must be called before any thread is started. ``keep_fd``, which is no standard
    stream, and no other descriptor stays open in the child.
    """
    receiving, sending = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(receiving)
        _run_child(serve, log_path, sending, keep_fd)
    os.close(sending)
    try:
        with _interruptible(), open(receiving, "rb") as pipe:
            waiting.is_readable(
                receiving,
                None,
                lambda: f"the images are still being opened by the daemon (pid {pid}): waiting for that.",
            )
            answer = pipe.read()
    except BaseException:
        # The child cleans up after itself.
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    if not answer:
        _, status = os.waitpid(pid, 0)
        raise HostError(f"the mount's daemon ended before it was ready ({_ending(status)}), its log is '{log_path}'.")
    failure, wrong_usage, warnings = json.loads(answer)
    for sentence in warnings:
        tell(sentence)
    if failure is not None:
        os.waitpid(pid, 0)
        raise OptionError(failure) if wrong_usage else HostError(failure)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make signals that would end this process at once raise SystemExit, so that the child is ended too. Signals that
    are ignored, as under nohup(1), stay ignored."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    deadly = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in deadly:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in deadly:
            signal.signal(number, signal.SIG_DFL)


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"exit status {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _run_child(serve: Callable[[Report], int], log_path: str, sending: int, keep_fd: int | None) -> NoReturn:
    code = exit_codes.BUG
    try:
        let_go_of_caller({sending, keep_fd if keep_fd is not None else sending})
        handler = daemon_log.log_to(log_path)
        daemon_log.remove_old()

        def report(failure: FusediskError | None) -> None:
            answer = (failure and str(failure), isinstance(failure, OptionError), handler.hand_over())
            try:
                os.write(sending, json.dumps(answer).encode())
            except BrokenPipeError:
                log.warning("the command that started the mount has ended, so the mount ends too")
                os.kill(os.getpid(), signal.SIGTERM)
            os.close(sending)

        code = serve(report)
        if code == 0:
            handler.end()
    except BaseException:
        log.exception("a bug in fusedisk: the daemon ends")
    finally:
        logging.shutdown()
        os._exit(code)


def let_go_of_caller(keep: set[int]) -> None:
    """Become a daemon: leave the caller's session, and close its descriptors, so that its locks and pipes do not live
    as long as this process. The descriptors in ``keep`` stay; the standard streams become /dev/null."""
    os.setsid()
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def notify_service_manager(state: str) -> None:
    """Notify systemd, if it started us and asks for that (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError as exc:
            log.warning("sending '%s' to the service manager failed: %s", state, exc)
