"""``fusedisk completion``: the script that teaches a shell to complete our command lines."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from fusedisk.cli.main import COMPLETE_VARIABLE, cli
from fusedisk.cli.output import write


@click.command(
    epilog="""\b
Examples:
  eval "$(fusedisk completion bash)"                                   # in ~/.bashrc
  eval "$(fusedisk completion zsh)"                                    # in ~/.zshrc
  fusedisk completion fish > ~/.config/fish/completions/fusedisk.fish""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script for SHELL.

    Commands, options, formats and file names are completed.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    write(f"{kind(cli, {}, 'fusedisk', COMPLETE_VARIABLE).source()}\n")
