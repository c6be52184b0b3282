"""The documents, the help and the commands say the same."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

import click
import pytest

import fusedisk
from fusedisk.cli import exit_codes, main
from fusedisk.core import errors
from tests.support.commands import ROOT

DOCUMENT = ROOT / "docs" / "reference" / "command-line.md"
LIBRARY = ROOT / "docs" / "reference" / "python-api.md"
DRIVERS = DOCUMENT.with_name("drivers.md")
COMMON = {"--help"}


def _command(name: str) -> click.Command:
    found = main.cli.get_command(click.Context(main.cli), name)
    assert found is not None
    return found


def _section(name: str) -> str:
    sections = re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)
    (found,) = [text for text in sections if text.startswith(f"fusedisk {name}\n")]
    return found


def _options_of(command: click.Command) -> set[str]:
    return {opt for param in command.params if isinstance(param, click.Option) for opt in param.opts}


def _documented(section: str) -> set[str]:
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `-")]
    return {match for row in rows for match in re.findall(r"`(--?[A-Za-z][A-Za-z-]*)", row)}


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_option_is_documented_and_every_documented_one_exists(name: str) -> None:
    assert _documented(_section(name)) == _options_of(_command(name)) - COMMON - {"-h"}


@pytest.mark.parametrize("name", main.COMMANDS)
def test_choices_are_documented(name: str) -> None:
    section = _section(name)
    for param in _command(name).params:
        if isinstance(param, click.Option) and isinstance(param.type, click.Choice):
            for choice in param.type.choices:
                assert choice in section, f"{param.opts[0]} {choice}"


def test_the_groups_options_and_exit_codes_are_documented() -> None:
    text = DOCUMENT.read_text()
    for option in _options_of(main.cli):
        assert f"`{option}" in text
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    assert codes == {0, *(value for name, value in vars(exit_codes).items() if name.isupper())}


def _command_lines(text: str) -> list[list[str]]:
    """Every ``fusedisk …`` in an example, without what surrounds it."""
    found = []
    for line in text.splitlines():
        match = re.search(r"(?:^|[(\s])fusedisk (?=[a-z-])(.*)", line)
        if match:
            words = shlex.split(match[1].split(")")[0] if "$(" in line else match[1], comments=True)
            ends = [index for index, word in enumerate(words) if word in ("|", ">", "&&", "||", "<")]
            found.append(words[: ends[0]] if ends else words)
    return found


def _examples() -> list[tuple[str, list[str]]]:
    examples = []
    for path in (DOCUMENT, DRIVERS, ROOT / "README.md"):
        for block in re.findall(r"```console\n(.*?)```", path.read_text(), flags=re.DOTALL):
            lines = [
                line.removeprefix("$ ").removeprefix("sudo ") for line in block.splitlines() if line.startswith("$ ")
            ]
            examples += [(path.name, words) for words in _command_lines("\n".join(lines))]
    for name in main.COMMANDS:
        epilog = (_command(name).epilog or "").split("Examples:")[1].split("\n\n")[0]
        examples += [(f"{name} --help", words) for words in _command_lines(epilog)]
    return examples


@pytest.mark.parametrize(
    ("place", "words"), _examples(), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_every_example_is_a_right_command_line(place: str, words: list[str]) -> None:
    name, *args = words
    assert name in main.COMMANDS
    context = _command(name).make_context(name, args)
    context.close()


def test_there_are_examples_to_check() -> None:
    assert len(_examples()) > 30


# --- the library ----------------------------------------------------------------------------------------


def test_the_librarys_document_names_every_argument_and_method() -> None:
    text = LIBRARY.read_text()
    for name in inspect.signature(fusedisk.open).parameters:
        assert f"`{name}`" in text
    for name in vars(fusedisk.Disk):
        if not name.startswith("_"):
            assert re.search(rf"[` ]{name}[`(]", text), name
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", text, flags=re.MULTILINE))
    assert documented <= set(inspect.signature(fusedisk.open).parameters)


def test_the_librarys_document_names_only_what_exists() -> None:
    text = LIBRARY.read_text()
    for name in re.findall(r"`([A-Z][A-Za-z]+Error)`", text):
        assert hasattr(errors, name) or name in ("OSError", "RuntimeError", "TypeError", "ValueError")
    for name in re.findall(r"fusedisk\.([a-z_]+)", text):
        assert name in fusedisk.__all__, name


@pytest.mark.parametrize("path", [LIBRARY, ROOT / "README.md"], ids=lambda path: path.name)
def test_python_examples_are_python(path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
