"""What a page of the documentation tells its reader to type, and what it shows in return.

In a ``console`` block a line that starts with ``$ `` is a command, continued by lines that start with ``> ``; the lines
below it are its output, where ``…`` stands for any text, and alone on a line for any lines. Output that a page does not
show is not compared. A command must succeed unless the next one is ``echo $?``. Any other block whose first line is a
comment with an absolute path (``# /etc/fstab``) is a file that the reader makes.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"# (/\S+)\n")
_SHOWN_CODE = "echo $?"


class Command(NamedTuple):
    """A command of a page: the line that it stands in, what to run, and the output that is shown."""

    line: int
    text: str
    output: list[str]


class File(NamedTuple):
    """A file that a page has its reader make."""

    path: str
    text: str


def steps(page: Path) -> list[Command | File]:
    """Return what a page has its reader do, in order."""
    text = page.read_text()
    found: list[Command | File] = []
    for block in _BLOCK.finditer(text):
        first_line = text.count("\n", 0, block.start()) + 2
        path = _PATH.match(block[2])
        if block[1] == "console":
            found += _commands(block[2], first_line)
        elif path is not None:
            found.append(File(path[1], block[2]))
    return found


def _commands(block: str, first_line: int) -> list[Command]:
    found: list[Command] = []
    for number, line in enumerate(block.splitlines(), first_line):
        if line.startswith("$ "):
            found.append(Command(number, line[2:], []))
        elif line.startswith("> "):
            assert not found[-1].output, f"line {number} continues output"
            found[-1] = found[-1]._replace(text=f"{found[-1].text}\n{line[2:]}")
        elif line and not line.startswith("#"):
            found[-1].output.append(line)
    return found


def script(todo: list[Command | File], results: Path) -> str:
    """Return a Bash script that does ``todo``; of command N it leaves ``N.out`` and ``N.code`` in ``results``.

    All commands run in one shell, as for the reader: variables and the directory stay. The script ends after the first
    command that fails and may not.
    """
    lines = ["code=0"]
    for index, step in enumerate(todo):
        if isinstance(step, File):
            lines.append(f"sudo tee {shlex.quote(step.path)} >/dev/null <<'END_OF_FILE'\n{step.text}END_OF_FILE")
            continue
        lines += [f"{{ (exit $code)\n{step.text}\n}} >'{results}/{index}.out' 2>&1 </dev/null", "code=$?"]
        lines.append(f"echo $code >'{results}/{index}.code'")
        if not _may_fail(todo, index):
            lines.append("[ $code = 0 ] || exit 0")
    return "\n".join([*lines, ""])


def _may_fail(todo: list[Command | File], index: int) -> bool:
    following = todo[index + 1] if index + 1 < len(todo) else None
    return isinstance(following, Command) and following.text == _SHOWN_CODE


def differences(page: str, todo: list[Command | File], results: Path) -> str | None:
    """Return a sentence about the first command that did not do what the page shows; None if all of them did."""
    for index, step in enumerate(todo):
        if isinstance(step, File):
            continue
        where = f"{page}:{step.line}: $ {step.text}\n"
        if not (results / f"{index}.code").exists():
            return f"{where}did not end"
        found = (results / f"{index}.out").read_text(errors="replace")
        code = int((results / f"{index}.code").read_text())
        if code and not _may_fail(todo, index):
            return f"{where}exited {code}:\n{found}"
        if step.output and not matches(step.output, found.splitlines()):
            return f"{where}the page shows:\n{chr(10).join(step.output)}\nbut it printed:\n{found}"
    return None


def matches(shown: list[str], printed: list[str]) -> bool:
    """Whether output is what a page shows; blank lines and blanks at the end of lines do not count."""
    parts = [r"(?:.*\n)*?" if line == "…" else _pattern(line) for line in shown]
    text = "".join(f"{line.rstrip()}\n" for line in printed if line.strip())
    return re.fullmatch("".join(parts), text) is not None


def _pattern(line: str) -> str:
    return ".*".join(re.escape(part) for part in line.rstrip().split("…")) + r"\n"
