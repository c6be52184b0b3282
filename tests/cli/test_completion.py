"""Shell completion: the scripts, and what they are told."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require_tool
from tests.support.commands import fusedisk, fusedisk_process, process_command, process_environment


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
    names = ["mount", "umount", "list", "attach", "detach", "create", "resize", "info", "map", "measure"]
    names += ["check", "snapshot", "amend", "completion"]
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


def _values(line: str) -> list[str]:
    return [value for kind, value in _complete(line) if kind == "plain"]


def test_keys_of_options_complete() -> None:
    assert "cluster_size=" in _values("fusedisk create -f qcow2 -o ")
    assert "help" in _values("fusedisk create -f qcow2 -o ")
    assert _values("fusedisk create -f qcow2 -o clu") == ["cluster_size="]
    assert _values("fusedisk create -o pre") == ["preallocation="]  # raw
    assert _values("fusedisk create -f none -o ") == []
    assert _values("fusedisk amend -o comp") == ["compat="]
    assert _values("fusedisk measure -O qcow2 -o ext") == ["extended_l2="]
    assert _values("fusedisk create -f qcow2 -o compat=v3,comp") == ["compat=v3,compression_type="]


def test_values_of_options_complete() -> None:
    sizes = "fusedisk create -f qcow2 -o compat=v3,preallocation=f"
    assert _values(sizes) == ["compat=v3,preallocation=falloc", "compat=v3,preallocation=full"]
    assert _values("fusedisk amend -o lazy_refcounts=") == ["lazy_refcounts=on", "lazy_refcounts=off"]
    assert _values("fusedisk create -f qcow2 -o cluster_size=6") == []
    assert _values("fusedisk create -f qcow2 -o nosuch=") == []


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fusedisk cre", ["create"]),
        ("fusedisk create -f qcow2 -o clus", ["cluster_size="]),
        ("fusedisk create -f qcow2 -o lazy_refcounts=", ["on", "off"]),
        ("fusedisk create -f qcow2 -o lazy_refcounts=on,compat=v", ["v2", "v3"]),
        ("fusedisk create -f qcow2 -b 'two words' -o compat=v", ["v2", "v3"]),
    ],
)
def test_bash_replaces_the_part_of_a_word_that_it_looks_at(tmp_path: Path, line: str, offered: list[str]) -> None:
    program = tmp_path / "fusedisk"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(process_command())} "$@"\n')
    program.chmod(0o755)
    script = fusedisk("completion", "bash").out
    # How bash splits a line: an equals sign is a word of its own.
    words = shlex.split(line.replace("=", " = ") + ("" if line[-1] == "=" else "\n"))
    ask = f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)} COMP_WORDS=({shlex.join(words)})"
    ask += f"\nCOMP_CWORD={len(words) - 1}; _fusedisk_completion fusedisk 2>/dev/null\n"
    done = subprocess.run(
        [require_tool("bash"), "-c", script + ask + 'printf "%s\\n" "${COMPREPLY[@]}"'],
        env=process_environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == offered
