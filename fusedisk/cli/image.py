"""The image argument of commands that look at one image, and the options that say how to open it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from fusedisk.block.graph.backend import Backend

_Command = TypeVar("_Command", bound=Callable[..., Any])


class ImageChoice(NamedTuple):
    """Which image to open and how, as given on the command line."""

    image: str
    format: str | None
    force_share: bool
    allow_path: tuple[str, ...]
    allow_any_reference: bool

    @contextlib.asynccontextmanager
    async def open(
        self, *, follow_backing: bool = True, writable: bool = False, look_only: bool = False
    ) -> AsyncIterator[Backend]:
        """The image, open read-only unless ``writable``; ``look_only`` as for Graph. Raises a FusediskError."""
        from fusedisk.block.graph.filenames import parse_argument
        from fusedisk.block.graph.gate import Gate
        from fusedisk.block.graph.graph import Graph
        from fusedisk.block.model.node import NodeConfig
        from fusedisk.drivers.table import DRIVERS

        gate = Gate(self.allow_path, allow_any=self.allow_any_reference)
        graph = Graph(DRIVERS, gate, follow_backing=follow_backing, look_only=look_only)
        config = NodeConfig(force_share=self.force_share)
        spec = parse_argument(self.image)
        backend = await graph.open_backend(spec, name=self.image, format=self.format, config=config, writable=writable)
        try:
            yield backend
        finally:
            from fusedisk.core.alone import shield

            with shield():
                await graph.close()


def need(name: str, value: str | None) -> str:
    """The value of an argument that not every use of its command needs. Raises MissingParameter for None."""
    if value is None:
        context = click.get_current_context()
        raise click.MissingParameter(ctx=context, param_hint=f"'{name}'", param_type="argument")
    return value


def complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete file names."""
    return [CompletionItem(incomplete, type="file")]


def complete_format(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete names of image formats."""
    from fusedisk.drivers.table import DRIVERS

    return [CompletionItem(name) for name in DRIVERS.formats if name.startswith(incomplete)]


def gate_options(command: _Command) -> _Command:
    """``--allow-path`` and ``--allow-any-reference``."""
    command = click.option(
        "--allow-any-reference",
        is_flag=True,
        help="Open every file that the image refers to. Only for images that you trust.",
    )(command)
    return click.option(
        "--allow-path",
        metavar="DIR",
        multiple=True,
        type=click.Path(),
        help="Also open referenced files below DIR (may be repeated).",
    )(command)


def image_options(command: _Command) -> _Command:
    """What :func:`one_image_options` gives, and the gate's options: an image with all that it refers to."""
    return one_image_options(gate_options(command))


def one_image_options(command: _Command) -> _Command:
    """The IMAGE argument with :func:`opening_options`."""
    return click.argument("image", shell_complete=complete_file)(opening_options(command))


def format_option(what: str = "image") -> Callable[[_Command], _Command]:
    """``--format`` of what already exists."""
    return click.option(
        "-f",
        "--format",
        metavar="FMT",
        shell_complete=complete_format,
        help=f"Format of the {what} (default: detected).",
    )


def opening_options(command: _Command) -> _Command:
    """``--format`` and ``--force-share``."""
    command = click.option(
        "-U",
        "--force-share",
        is_flag=True,
        help="Read while another process writes to the image; the answer may be out of date.",
    )(command)
    return format_option()(command)
