"""``fusedisk measure``: how much space an image would take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fusedisk.cli.image import ImageChoice, complete_file, complete_format, gate_options, opening_options
from fusedisk.cli.map import parse_size_option
from fusedisk.cli.option_values import collect, option_values
from fusedisk.cli.output import exact_size_text, output_option, print_facts, print_json
from fusedisk.cli.progress import progress, progress_option
from fusedisk.cli.running import run_async

if TYPE_CHECKING:
    from fusedisk.block.image.measure import Measurement
    from fusedisk.core.options import CreateOptions


def _kind(target: str) -> type[CreateOptions] | None:
    """The creation options that matter for the size of an image."""
    from fusedisk.drivers.format.qcow2.measure import MeasureOptions
    from fusedisk.drivers.table import DRIVERS

    return MeasureOptions if target == "qcow2" else DRIVERS.load_format(target).create_options_type


def _kinds(ctx: click.Context) -> list[type[CreateOptions]]:
    from fusedisk.drivers.measure import TARGETS

    kind = _kind(target) if (target := ctx.params.get("target_format") or "raw") in TARGETS else None
    return [] if kind is None else [kind]


@click.command(
    epilog="""\b
Examples:
  fusedisk measure --size 100G -O qcow2
  fusedisk measure -O qcow2 vm.raw                               # a copy of this one
  fusedisk measure -O qcow2 -o cluster_size=2M,extended_l2=on vm.qcow2
  fusedisk measure -O qcow2 -o help                              # which options are there
  fusedisk measure --output json -O raw vm.qcow2

The required size is what the file takes at first, with the data of IMAGE if one is given; the fully allocated size what
it takes once everything was written. The numbers are those of qemu-img measure.""",
)
@click.argument("image", required=False, shell_complete=complete_file)
@opening_options
@gate_options
@click.option("-s", "--size", callback=parse_size_option, metavar="SIZE", help="Measure a new disk of this size.")
@click.option(
    "-O",
    "--target-format",
    default="raw",
    show_default=True,
    metavar="FMT",
    shell_complete=complete_format,
    help="Format of the new image.",
)
@option_values(_kinds, "Its creation options; 'help' lists them.")
@progress_option
@output_option
def command(
    image: str | None,
    size: int | None,
    target_format: str,
    options: tuple[str, ...],
    progress: bool,
    output: str,
    **choice: Any,
) -> None:
    """Show how much space a new image needs: for a disk of --size, or for a copy of the disk in IMAGE."""
    if "help" in options:
        _print_options(target_format)
        return
    if image is not None and size is not None:
        raise click.UsageError("IMAGE and --size exclude each other: the size of the copy is that of IMAGE.")
    if image is None and size is None:
        raise click.UsageError("Missing argument 'IMAGE' or option '--size'.")
    found = run_async(_measure, image, size, target_format, options, choice, progress)
    if output == "json":
        print_json(found.information())
        return
    facts = [("required size", found.required), ("fully allocated size", found.fully_allocated)]
    if found.bitmaps is not None:
        facts.append(("bitmaps size", found.bitmaps))
    print_facts((name, exact_size_text(value)) for name, value in facts)


async def _measure(
    image: str | None, size: int | None, target: str, texts: tuple[str, ...], choice: dict[str, Any], asked: bool
) -> Measurement:
    from fusedisk.drivers.measure import measure_copy, measure_new, target_options
    from fusedisk.drivers.table import DRIVERS

    options = target_options(DRIVERS, target, collect(texts))
    if image is None:
        assert size is not None
        return measure_new(options, size)
    async with ImageChoice(image, **choice).open() as backend:
        with progress("measuring", backend.length, asked=asked) as tell:
            return await measure_copy(options, backend, tell)


def _print_options(target: str) -> None:
    from fusedisk.block.image.create import describe_options

    kind = _kind(target)
    print_facts(describe_options(kind) if kind is not None else [])
