"""``-o KEY=VALUE,...``: reading it, listing what there is, and completing it in the shell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from fusedisk.core.options import CreateOptions

_Command = TypeVar("_Command", bound=Callable[..., Any])
Kinds = Callable[[click.Context], "Iterable[type[CreateOptions]]"]
"""The options of the formats that a command line may mean."""


def option_values(kinds: Kinds, help: str, *, required: bool = False) -> Callable[[_Command], _Command]:
    """The option ``-o`` of a command, for the creation or amend options that ``kinds`` tells."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(text) for text in _continuations(kinds, ctx, incomplete)]

    return click.option(
        "-o",
        "options",
        multiple=True,
        required=required,
        metavar="KEY=VALUE,...",
        shell_complete=complete,
        help=help,
    )


def collect(texts: Iterable[str], *more: dict[str, str]) -> dict[str, str]:
    """All options by name, of every ``-o`` and of ``more``. Raises OptionError for one that is given twice."""
    from fusedisk.core.errors import OptionError
    from fusedisk.core.options import split_dotted

    given: dict[str, str] = {}
    for source in (*map(split_dotted, texts), *more):
        for key, value in source.items():
            if key in given:
                raise OptionError(f"the option '{key}' is given twice ('{given[key]}' and '{value}').")
            given[key] = value
    return given


def _continuations(kinds: Kinds, ctx: click.Context, incomplete: str) -> Iterator[str]:
    """Every text that ``incomplete`` may grow to: another key with its ``=``, or a value of the last key."""
    before, comma, last = incomplete.rpartition(",")
    lead = before + comma
    key, equals, value = last.partition("=")
    fields = {name: field for kind in kinds(ctx) for name, field in kind.names().items()}
    if equals:
        if key in fields:
            yield from (f"{lead}{key}={word}" for word in _values(fields[key]) if word.startswith(value))
        return
    given = {pair.partition("=")[0] for pair in before.split(",")}
    yield from (f"{lead}{name}=" for name in fields if name.startswith(key) and name not in given)
    if fields and not lead and "help".startswith(key):
        yield "help"


def _values(field: Field[Any]) -> tuple[str, ...]:
    """The words that an option takes; none where there are too many to list."""
    choices: tuple[str, ...] = field.metadata.get("choices") or ()
    return choices or (("on", "off") if field.metadata.get("kind") == "bool" else ())
