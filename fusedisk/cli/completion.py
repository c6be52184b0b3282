"""``fusedisk completion``: the script that teaches a shell to complete our command lines."""

from __future__ import annotations

import click

from fusedisk.cli.main import cli
from fusedisk.cli.output import write
from fusedisk.cli.shells import completer

SHELLS = ("bash", "zsh", "fish")


@click.command(
    epilog="""\b
Examples:
  eval "$(fusedisk completion bash)"                                   # in ~/.bashrc
  eval "$(fusedisk completion zsh)"                                    # in ~/.zshrc
  fusedisk completion fish > ~/.config/fish/completions/fusedisk.fish

An installation below /usr or /usr/local has these scripts already, where the shells find them.""",
)
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the completion script for SHELL: bash, zsh or fish.

    Commands, options and their values, formats and file names are completed.
    """
    found = completer(shell, cli)
    assert found is not None
    write(f"{found.source()}\n")
