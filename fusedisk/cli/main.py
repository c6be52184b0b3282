"""The ``fusedisk`` command: its subcommands and the border where exceptions become exit codes.

A subcommand is a module of this package that exposes a click command named ``command``; it is imported when it is run,
completed or asked for its help. None imports trio, pyfuse3 or rich before it works, so help and completion are quick.

Exit codes: 0 done, 1 the operation failed (one sentence on stderr), 2 wrong usage or a wrong value on the command line,
70 a bug in fusedisk, 130 interrupted, 141 the reader of our output went away.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

import fusedisk
from fusedisk.cli import exit_codes
from fusedisk.cli.entry import prepare_streams
from fusedisk.cli.output import LineFormatter, flush, tell, tell_lines, write
from fusedisk.cli.shells import COMPLETE_VARIABLE, completer
from fusedisk.core import lock_holders
from fusedisk.core.errors import FusediskError, NodeNotFoundError, OptionError

COMMANDS = {
    "mount": "Mount images as flat raw files.",
    "umount": "Unmount, after everything is flushed.",
    "list": "Show what is mounted.",
    "attach": "Attach an image to a loop device.",
    "detach": "Detach a loop device, after everything is flushed.",
    "create": "Create a new image.",
    "resize": "Give the disk of an image another size.",
    "info": "Show an image's format, size and backing chain.",
    "map": "Show where the bytes of a disk lie.",
    "measure": "Show how much space an image would take.",
    "check": "Check an image's metadata, and repair it.",
    "snapshot": "List, create, apply or delete the snapshots inside an image.",
    "amend": "Change settings of an existing image.",
    "completion": "Print the completion script for a shell.",
}
"""Every subcommand, in the order of the help; ``fusedisk/cli/NAME.py`` is its module."""

SETTINGS: dict[str, Any] = {"max_content_width": 110}
"""click's settings for every command line."""


def _say_and_exit(text: Callable[[click.Context], str]) -> Callable[[click.Context, click.Parameter, bool], None]:
    """Return the callback of an option that only prints something."""

    def callback(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            write(f"{text(ctx)}\n")
            ctx.exit()

    return callback


HELP = click.Option(
    ["-h", "--help"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_say_and_exit(click.Context.get_help),
    help="Show this message and exit.",
)
"""Replaces click's --help, which ignores write errors."""


class LazyGroup(click.Group):
    """A group whose commands are the modules that :data:`COMMANDS` names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, without importing anything."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        found = importlib.import_module(f"fusedisk.cli.{cmd_name}").command
        assert isinstance(found, click.Command)
        found.context_settings = {**SETTINGS, **found.context_settings}  # for help and completion too
        if HELP not in found.params:
            found.params.append(HELP)
        return found

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without arguments, print the help to stderr and exit 2."""
        if not args and not ctx.resilient_parsing:
            tell_lines(ctx.get_help())
            ctx.exit(exit_codes.USAGE)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest what a mistyped name may have meant."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(COMMANDS)}."
            raise click.UsageError(f"there is no command '{name}', {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of commands from their literal descriptions."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Command names, then options."""
        names = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    cls=LazyGroup,
    context_settings=SETTINGS,
    epilog="""\b
Examples:
  fusedisk mount vm.qcow2 /mnt/disk       # /mnt/disk/vm is the disk, flat and writable
  fusedisk umount /mnt/disk               # flushed when it returns
  fusedisk attach vm.qcow2                # prints /dev/loop0, with /dev/loop0p1 and so on
  fusedisk create -f qcow2 new.qcow2 10G
  fusedisk info --backing-chain vm.qcow2
  fusedisk map --output json vm.qcow2

'fusedisk COMMAND --help' shows more examples. An IMAGE is a path, PROTOCOL:NAME, json:{...}, or options such as
driver=qcow2,file.driver=file,file.filename=vm.qcow2.""",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_say_and_exit(lambda ctx: f"fusedisk {fusedisk.__version__}"),
    help="Show the version and exit.",
)
@click.option(
    "-v",
    "--verbose",
    count=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, param, value: set_up_logging(value),
    help="Say more on stderr; twice: everything. Shows tracebacks.",
)
def cli() -> None:
    """Virtual disk images, mounted as flat raw files."""


cli.params.append(HELP)


def set_up_logging(verbose: int) -> None:
    """Log warnings to stderr, with ``-v`` also information, with ``-vv`` everything."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("fusedisk: %(message)s" if not verbose else "%(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The program: run ``args`` (default: the process's own) and exit."""
    prepare_streams()
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: Sequence[str]) -> int:
    """Run one command line; returns the exit code. Exceptions of the command are reported on stderr here."""
    code = report_errors(lambda: _invoke(args))
    return report_errors(flush) or code


def mount_of_process(pid: int) -> str | None:
    """Return the mount that a process serves, in words; None if it serves none."""
    from fusedisk.mount import runtime

    for record in runtime.records():
        if record.pid == pid and record.alive and not record.hidden:
            attached = "" if record.loop is None else f", attached as {record.loop}"
            return f"the mount at '{record.place}' (pid {pid}{attached})"
    return None


def _invoke(args: Sequence[str]) -> None:
    lock_holders.describe_process[:] = [mount_of_process]
    if COMPLETE_VARIABLE in os.environ:
        _complete(os.environ[COMPLETE_VARIABLE])
        return
    with cli.make_context("fusedisk", list(args)) as context:
        cli.invoke(context)


def _complete(instruction: str) -> None:
    """Answer a shell's request for completion: ``SHELL_source`` or ``SHELL_complete``."""
    shell, _, wanted = instruction.partition("_")
    asked = completer(shell, cli)
    if asked is None or wanted not in ("source", "complete"):
        raise click.exceptions.Exit(exit_codes.FAILED)
    write(asked.source() if wanted == "source" else f"{asked.complete()}\n")


def report_errors(work: Callable[[], None]) -> int:
    """Run ``work`` and report its exceptions on stderr; returns the exit code."""
    try:
        work()
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else exit_codes.FAILED
    except BaseException as exc:
        return report(exc)
    return 0


def report(exc: BaseException) -> int:
    """Report an error in one sentence; returns the exit code."""
    if isinstance(exc, click.exceptions.Exit):
        return exc.exit_code
    causes = list(leaves(exc))
    if any(isinstance(cause, KeyboardInterrupt | click.Abort) for cause in causes):
        return exit_codes.INTERRUPTED
    if all(isinstance(cause, BrokenPipeError) for cause in causes):
        return exit_codes.BROKEN_PIPE
    verbose = logging.getLogger().isEnabledFor(logging.INFO)
    if isinstance(exc, click.ClickException):
        return _report_usage(exc)
    if all(isinstance(cause, FusediskError) for cause in causes):
        for cause in causes:
            assert isinstance(cause, FusediskError)
            where = f" ({cause.where()})" if verbose and cause.where() else ""
            tell(f"{cause}{where}")
        wrong_values = all(isinstance(cause, OptionError | NodeNotFoundError) for cause in causes)
        return exit_codes.USAGE if wrong_values else exit_codes.FAILED
    bug = next(cause for cause in causes if not isinstance(cause, FusediskError))
    if verbose:
        tell_lines("".join(traceback.format_exception(exc)).rstrip())
    hint = "" if verbose else "; run with -v for the traceback (fusedisk -v COMMAND ...)"
    tell(f"internal error: {type(bug).__name__}: {bug}{hint}")
    return exit_codes.BUG


def leaves(exc: BaseException) -> Iterator[BaseException]:
    """Return the exceptions inside a group, however nested; any other exception is its own leaf."""
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from leaves(inner)
    else:
        yield exc


def _report_usage(exc: click.ClickException) -> int:
    tell(" ".join(exc.format_message().split()))
    if isinstance(exc, click.UsageError) and exc.ctx is not None:
        tell_lines(f"Try '{exc.ctx.command_path} --help' for help.")
    return exc.exit_code
