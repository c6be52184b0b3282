"""Manual pages and completion scripts: made from the commands, right for groff, and installed with the package."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fusedisk.cli import exit_codes, main, manual
from tests.conftest import require_tool
from tests.support.commands import process_environment

PAGES = manual.pages()


def _printed(page: str) -> str:
    """What a reader sees. Raises for anything that groff warns of."""
    done = subprocess.run(
        [require_tool("groff"), "-man", "-ww", "-Tutf8", "-P-cbou", "-rLL=500n"],
        input=page,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_command_has_its_page() -> None:
    assert set(PAGES) == {"fusedisk", *(f"fusedisk-{name}" for name in main.COMMANDS)}


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_page_says_what_the_help_says(name: str) -> None:
    printed = _printed(PAGES[f"fusedisk-{name}"])
    words = re.sub(r"[\s‐]+", " ", printed)
    command = main.cli.get_command(click.Context(main.cli), name)
    assert command is not None
    for param in command.params:
        if isinstance(param, click.Option):
            assert param.help is not None
            assert all(opt in words for opt in param.opts)
            assert param.help.split("  ")[0] in words
    for line in (command.epilog or "").split("Examples:\n")[1].split("\n\n")[0].splitlines():
        assert line.strip() in printed
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "SEE ALSO"):
        assert f"\n{heading}\n" in printed


def test_the_main_page_names_the_commands_and_the_exit_codes() -> None:
    printed = _printed(PAGES["fusedisk"])
    for name in main.COMMANDS:
        assert f"fusedisk-{name}(1)" in printed
    codes = {int(code) for code in manual._EXIT_CODES}
    assert codes == {0, *(value for name, value in vars(exit_codes).items() if name.isupper())}


@pytest.mark.parametrize("text", ["a\\b", "'quoted'", ".dot", "--option", '`x` ~^"', "a-b"])
def test_text_is_printed_as_it_is(text: str) -> None:
    assert _printed(f'.TH X 1 "" "" ""\n.SH A\n{manual._text(text)}\n').split("A\n", 1)[1].strip().startswith(text)


def test_the_files_are_written_where_they_belong(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "fusedisk.cli.manual", tmp_path], env=process_environment(), check=True)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == set(manual.files())
    script = tmp_path / "share/bash-completion/completions/fusedisk"
    done = subprocess.run(
        [require_tool("bash"), "-c", f". {script}; complete -p fusedisk"], capture_output=True, text=True, check=True
    )
    assert "_fusedisk_completion" in done.stdout
    assert (tmp_path / "share/zsh/site-functions/_fusedisk").read_text().startswith("#compdef fusedisk\n")


def test_they_are_installed_with_the_package() -> None:
    installed = {path.as_posix().partition("/share/")[2] for path in importlib.metadata.files("fusedisk") or ()}
    wanted = {"man/man1/fusedisk.1", "man/man1/fusedisk-mount.1", "bash-completion/completions/fusedisk"}
    assert wanted | {"zsh/site-functions/_fusedisk", "fish/vendor_completions.d/fusedisk.fish"} <= installed
