"""Users and groups on the command line: a name of this machine, or a number. What looks like one is one, as in
chown(1). Both functions raise click.BadParameter."""

from __future__ import annotations

import re
from collections.abc import Callable

import click

_MOST = 2**32 - 2
"""The number above it stands for none."""
_NUMBER = re.compile("[0-9]+")


def user(text: str) -> int:
    """A user's number."""
    import pwd

    return _number("user", text, lambda name: pwd.getpwnam(name).pw_uid)


def group(text: str) -> int:
    """A group's number."""
    import grp

    return _number("group", text, lambda name: grp.getgrnam(name).gr_gid)


def _number(kind: str, text: str, find: Callable[[str], int]) -> int:
    try:
        number = int(text[:20]) if _NUMBER.fullmatch(text) else find(text)
    except (KeyError, ValueError):
        number = _MOST + 1
    if number > _MOST:
        raise click.BadParameter(f"'{text}' is neither a {kind} of this machine nor a number up to {_MOST}.")
    return number
