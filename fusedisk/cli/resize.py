"""``fusedisk resize``: another size for the disk of an image."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from fusedisk.cli.image import complete_file, format_option, gate_options
from fusedisk.cli.output import exact_size_text, say
from fusedisk.cli.progress import allocation_progress, progress_option
from fusedisk.cli.running import run_async

if TYPE_CHECKING:
    from fusedisk.block.graph.gate import Gate


class _Resize(click.Command):
    """Takes ``-1G`` for a size, where click would look for the option ``-1``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" not in args:
            sizes = [arg for arg in args if re.match("-[0-9]", arg)]
            args = [arg for arg in args if arg not in sizes] + ["--", *sizes]
        return super().parse_args(ctx, args)


@click.command(
    cls=_Resize,
    epilog="""\b
Examples:
  fusedisk resize vm.qcow2 20G
  fusedisk resize vm.qcow2 +1G                       # that much more
  fusedisk resize --shrink vm.qcow2 -512M            # that much less; what lies behind is lost
  fusedisk resize -f raw --preallocation full disk.img 40G

Partitions and filesystems stay as large as they are: make them smaller before, or larger afterwards.""",
)
@click.argument("image", shell_complete=complete_file)
@click.argument("size", metavar="[+|-]SIZE")
@format_option()
@click.option(
    "--preallocation",
    type=click.Choice(["off", "metadata", "falloc", "full"]),
    default="off",
    show_default=True,
    help="Reserve space for what is added.",
)
@click.option("--shrink", is_flag=True, help="Allow a smaller size, and lose what is cut off.")
@progress_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on success.")
@gate_options
def command(
    image: str,
    size: str,
    format: str | None,
    preallocation: str,
    shrink: bool,
    progress: bool,
    quiet: bool,
    allow_path: tuple[str, ...],
    allow_any_reference: bool,
) -> None:
    """Give the disk in IMAGE another size, rounded up to whole 512-byte sectors. What is added reads as zeroes.

    SIZE is a number of bytes, or one with a unit such as 512M or 10G; with + or - it is the difference. An image that
    is mounted, or that a virtual machine runs on, is refused.
    """
    from fusedisk.block.graph.gate import Gate

    gate = Gate(allow_path, allow_any=allow_any_reference)
    old, new = run_async(_resize, image, size, format, preallocation, shrink, gate, progress)
    if not quiet:
        say(f"Resized '{image}' from {exact_size_text(old)} to {exact_size_text(new)}.")


async def _resize(
    image: str,
    size: str,
    format: str | None,
    preallocation: str,
    shrink: bool,
    gate: Gate,
    asked: bool,
) -> tuple[int, int]:
    from fusedisk.block.graph.filenames import parse_argument
    from fusedisk.block.image.resize import resize_image
    from fusedisk.drivers.table import DRIVERS

    return await resize_image(
        DRIVERS,
        parse_argument(image),
        size,
        format=format,
        preallocation=preallocation,
        shrink=shrink,
        gate=gate,
        working=lambda old, new: allocation_progress(
            "resizing", image, max(0, new - old) if preallocation in ("falloc", "full") else 0, asked=asked
        ),
    )
