"""Shell completion: the scripts, and what they are told."""

from __future__ import annotations

import subprocess

import pytest

from tests.conftest import require_tool
from tests.support.commands import fusedisk, fusedisk_process


def _complete(line: str) -> list[tuple[str, str]]:
    """(type, value) of what bash is offered for the last word of ``line``."""
    words = line.split(" ")
    done = fusedisk_process(
        env={"_FUSEDISK_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    )
    assert done.code == 0, done.err
    pairs = [entry.partition(",") for entry in done.out.splitlines()]
    return [(kind, value) for kind, _, value in pairs]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_names_us_and_nothing_else(shell: str) -> None:
    done = fusedisk("completion", shell)
    assert done.code == 0
    assert "_FUSEDISK_COMPLETE" in done.out
    assert "fusedisk" in done.out


def test_bash_takes_the_script() -> None:
    script = fusedisk("completion", "bash").out
    done = subprocess.run(
        [require_tool("bash"), "-c", f"{script}\ncomplete -p fusedisk"], capture_output=True, text=True, check=True
    )
    assert "fusedisk" in done.stdout


def test_commands() -> None:
    names = ["mount", "umount", "list", "attach", "detach", "create", "info", "map", "measure", "check", "snapshot"]
    names += ["amend", "completion"]
    assert _complete("fusedisk ") == [("plain", name) for name in names]
    assert _complete("fusedisk u") == [("plain", "umount")]
    assert _complete("fusedisk completion ") == [("plain", name) for name in ("bash", "zsh", "fish")]


def test_options_and_their_choices() -> None:
    assert ("plain", "--backing-chain") in _complete("fusedisk info --b")
    assert _complete("fusedisk info --output ") == [("plain", "human"), ("plain", "json")]
    formats = [("plain", "qcow2"), ("plain", "raw")]
    assert _complete("fusedisk info -f ") == _complete("fusedisk create -F ") == formats
    assert _complete("fusedisk measure -O ") == formats
    assert _complete("fusedisk info -f q") == [("plain", "qcow2")]


@pytest.mark.parametrize("line", ["fusedisk info some", "fusedisk map some", "fusedisk create some"])
def test_images_complete_as_file_names(line: str) -> None:
    assert _complete(line) == [("file", "some")]
