"""Manual pages and completion scripts, made from the commands themselves when the package is built.

``python -m fusedisk.cli.manual FOLDER`` writes them below a folder as they lie below ``/usr``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

import fusedisk
from fusedisk.cli.main import COMMANDS, cli
from fusedisk.cli.shells import completer

_EXIT_CODES = {
    "0": "Done.",
    "1": "The operation failed; stderr has one sentence.",
    "2": "The command line, or a value on it, is wrong.",
    "70": "A bug in fusedisk; fusedisk -v COMMAND shows the traceback.",
    "130": "Interrupted.",
    "141": "The reader of the output went away.",
}
_SCRIPTS = {
    "bash": "share/bash-completion/completions/fusedisk",
    "zsh": "share/zsh/site-functions/_fusedisk",
    "fish": "share/fish/vendor_completions.d/fusedisk.fish",
}


def files() -> dict[str, str]:
    """Everything, by its path below ``/usr``."""
    found = {f"share/man/man1/{name}.1": text for name, text in pages().items()}
    for shell, path in _SCRIPTS.items():
        script = completer(shell, cli)
        assert script is not None
        found[path] = f"{script.source()}\n"
    return found


def pages() -> dict[str, str]:
    """Every manual page, in the macros of man(7), by its name."""
    with click.Context(cli, info_name="fusedisk") as context:
        found = {"fusedisk": _page(context, "virtual disk images, mounted as flat raw files")}
        for name, summary in COMMANDS.items():
            command = cli.get_command(context, name)
            assert command is not None
            with click.Context(command, info_name=name, parent=context) as inner:
                found[f"fusedisk-{name}"] = _page(inner, summary[0].lower() + summary[1:].rstrip("."))
    return found


def _page(context: click.Context, summary: str) -> str:
    words = context.command_path
    name = words.replace(" ", "-")
    usage = " ".join(context.command.collect_usage_pieces(context))
    lines = [
        f'.TH {_text(name.upper())} 1 "" "fusedisk {fusedisk.__version__}" "User Commands"',
        ".SH NAME",
        f"{_text(name)} \\- {_text(summary)}",
        ".SH SYNOPSIS",
        f".B {_text(words)}",
        _text(usage),
        ".SH DESCRIPTION",
        *_paragraphs(context.command.help or ""),
    ]
    if context.parent is None:
        lines += [".SH COMMANDS", *_items(COMMANDS)]
    lines += [".SH OPTIONS", *_items(_options(context))]
    for paragraph in (context.command.epilog or "").split("\n\n"):
        if paragraph.startswith("\b\nExamples:"):
            examples = paragraph.removeprefix("\b\nExamples:\n")
            lines += [".SH EXAMPLES", ".nf", *map(_text, examples.splitlines()), ".fi", ".SH NOTES"]
        else:
            lines += _paragraphs(paragraph)
    if lines[-1] == ".SH NOTES":
        lines.pop()
    if context.parent is None:
        lines += [".SH EXIT STATUS", *_items(_EXIT_CODES), ".SH SEE ALSO", _names(list(COMMANDS))]
    else:
        lines += [".SH SEE ALSO", ".BR fusedisk (1)"]
    return "\n".join(lines) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(filter(None, text.split("\n\n"))):
        if number:
            yield ".PP"
        yield _text(" ".join(paragraph.split()))


def _options(context: click.Context) -> dict[str, str]:
    options = (param for param in context.command.get_params(context) if isinstance(param, click.Option))
    return dict(filter(None, (option.get_help_record(context) for option in options)))


def _items(items: dict[str, str]) -> Iterator[str]:
    for name, text in items.items():
        yield from (".TP", f"\\fB{_text(name)}\\fR", _text(text))


def _names(commands: list[str]) -> str:
    return "\n".join(f".BR {_text(f'fusedisk-{name}')} (1){',' if name != commands[-1] else ''}" for name in commands)


def _text(text: str) -> str:
    """One line that roff prints as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    text = text.replace("^", "\\(ha").replace("~", "\\(ti").replace('"', "\\(dq")
    return re.sub(r"^(?=\.)", r"\\&", text)


def write(folder: Path) -> dict[str, str]:
    """Write every file below ``folder``; returns where each lies, and where below ``/usr`` it belongs."""
    written = {}
    for name, text in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written[str(path)] = name
    return written


if __name__ == "__main__":
    write(Path(sys.argv[1]))
