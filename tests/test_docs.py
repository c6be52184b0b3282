"""What the documents name exists."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from fusedisk.cli import main
from scripts import driver_options

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{document} links to {target}, which does not exist"


def test_every_decision_record_is_in_the_index() -> None:
    index = (ROOT / "docs/adr/README.md").read_text()
    for record in (ROOT / "docs/adr").glob("[0-9]*.md"):
        assert f"]({record.name})" in index, f"docs/adr/README.md does not list {record.name}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("[!a]*/*.md")]:
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "README.md" or f"]({name})" in index, f"docs/README.md does not list {name}"


def test_the_page_of_drivers_is_what_they_declare() -> None:
    text = driver_options.PAGE.read_text()
    assert driver_options.shown(text) == driver_options.tables()
    assert driver_options.page(text) == text, "run: python -m scripts.driver_options"


def _code(document: str) -> str:
    return "\n".join(re.findall(r"```.*?```", (ROOT / document).read_text(), flags=re.DOTALL))


def _options() -> dict[str, set[str]]:
    """The options that each subcommand takes."""
    context = click.Context(main.cli)
    commands = {name: main.cli.get_command(context, name) for name in main.COMMANDS}
    return {name: {opt for param in found.params for opt in param.opts} for name, found in commands.items() if found}


def test_commands_of_the_readme_take_the_options_it_gives_them() -> None:
    options = _options()
    seen = 0
    for line in re.findall(r"^\$ .*$", _code("README.md"), flags=re.MULTILINE):
        for part in re.split(r"&&|\|", line[2:].split(" #")[0]):
            words = part.split()
            if words[0] != "fusedisk":
                continue
            assert words[1] in options, part
            unknown = [word for word in words[2:] if word.startswith("-") and word not in options[words[1]]]
            assert not unknown, f"'{part.strip()}': there is no {', '.join(unknown)}"
            seen += 1
    assert seen > 5


def test_options_that_the_readme_names_exist() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    text = re.sub(r"^\|.*\|$", "", text, flags=re.MULTILINE)  # the comparison has options of others
    ours = set().union(*_options().values(), {"--help", "--fix", "--all"})
    named = set(re.findall(r"`(--[a-z-]+)", text))
    assert named
    assert named <= ours, f"README.md names {', '.join(sorted(named - ours))}"


def test_the_tree_of_the_readme_is_the_tree() -> None:
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    paths = [line.split()[0] for line in tree.splitlines()]
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / path).exists(), f"README.md lists {path}, which does not exist"
    shown = {path.rstrip("/") for path in paths}
    packages = {f"fusedisk/{found.parent.name}" for found in ROOT.glob("fusedisk/*/__init__.py")}
    assert packages <= shown, f"README.md does not list {', '.join(sorted(packages - shown))}"
