"""Completion of command lines in shells: click's own, except for bash, which splits ``KEY=VALUE`` into three words."""

from __future__ import annotations

import os
from typing import ClassVar

import click
from click.shell_completion import BashComplete, ShellComplete, get_completion_class, split_arg_string

COMPLETE_VARIABLE = "_FUSEDISK_COMPLETE"

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' line word part response completion type value
    line=${COMP_LINE:0:COMP_POINT}
    response=$(env COMP_WORDS="$line" %(complete_var)s=bash_complete "$1")
    # bash replaces only what follows the last = or : of a word.
    word=${line##*[[:space:]]}
    part=${COMP_WORDS[COMP_CWORD]}
    [[ $part == [=:] ]] && part=
    COMPREPLY=()
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        case $type in
        dir) compopt -o dirnames ;;
        file) compopt -o default ;;
        plain)
            COMPREPLY+=("${value:$((${#word} - ${#part}))}")
            [[ $value == *= ]] && compopt -o nospace
            ;;
        esac
    done
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Bash(BashComplete):
    source_template: ClassVar[str] = _BASH

    @staticmethod
    def _check_version() -> None:
        """Do not ask which bash there is: the script may be for another machine."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words of the line up to the cursor, and the last one, which is to be completed."""
        if "COMP_CWORD" in os.environ:  # asked by the script of an older version
            return super().get_completion_args()
        *words, last = split_arg_string(f"{os.environ['COMP_WORDS']}x")  # a last word also after a space
        return words[1:], last.removesuffix("x")


def completer(shell: str, cli: click.Command) -> ShellComplete | None:
    """Return the completer of a shell for the program ``cli``; None for an unknown shell."""
    kind = _Bash if shell == "bash" else get_completion_class(shell)
    return None if kind is None else kind(cli, {}, "fusedisk", COMPLETE_VARIABLE)
