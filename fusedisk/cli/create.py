"""``fusedisk create``: a new image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fusedisk.cli.image import complete_file, complete_format, gate_options, need
from fusedisk.cli.option_values import collect, option_values
from fusedisk.cli.output import exact_size_text, print_facts, say
from fusedisk.cli.progress import allocation_progress, progress_option
from fusedisk.cli.running import run_async

if TYPE_CHECKING:
    from fusedisk.block.graph.gate import Gate
    from fusedisk.core.options import CreateOptions


def _kinds(ctx: click.Context) -> list[type[CreateOptions]]:
    """The options of the format that is given."""
    from fusedisk.drivers.table import DRIVERS

    format = ctx.params.get("format") or "raw"
    kind = DRIVERS.load(format).create_options_type if format in DRIVERS.names else None
    return [] if kind is None else [kind]


@click.command(
    epilog="""\b
Examples:
  fusedisk create -f qcow2 vm.qcow2 10G
  fusedisk create -f qcow2 -b vm.qcow2 -F qcow2 today.qcow2      # an overlay, as large as what it stands on
  fusedisk create -f qcow2 -o cluster_size=2M,preallocation=metadata vm.qcow2 1T
  fusedisk create -f raw -o preallocation=full disk.img 512M
  fusedisk create -f qcow2 -o help                               # which options are there

SIZE is a number of bytes, or a number with a unit in powers of 1024: 64k, 512M, 10G, 1.5T.""",
)
@click.argument("filename", required=False, metavar="FILE", shell_complete=complete_file)
@click.argument("size", required=False)
@click.option(
    "-f",
    "--format",
    default="raw",
    show_default=True,
    metavar="FMT",
    shell_complete=complete_format,
    help="Format of the new image.",
)
@option_values(_kinds, "The format's own options; 'help' lists them.")
@click.option("-b", "--backing", metavar="FILE", help="Backing file; a relative name starts from the new image.")
@click.option(
    "-F", "--backing-format", metavar="FMT", shell_complete=complete_format, help="Format of the backing file."
)
@click.option("-u", "--unsafe", is_flag=True, help="Do not open the backing file; it need not exist.")
@click.option(
    "--force", is_flag=True, help="Replace an existing file that is not empty, or the content of a block device."
)
@progress_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on success.")
@gate_options
def command(
    filename: str | None,
    size: str | None,
    format: str,
    options: tuple[str, ...],
    backing: str | None,
    backing_format: str | None,
    unsafe: bool,
    force: bool,
    progress: bool,
    quiet: bool,
    allow_path: tuple[str, ...],
    allow_any_reference: bool,
) -> None:
    """Create the image FILE with a disk of SIZE.

    With a backing file the size may be left out. A file of that name that is not empty is replaced with --force only,
    and never while something uses it.
    """
    if "help" in options:
        _print_options(format)
        return
    filename = need("FILE", filename)
    apart = {"size": size, "backing_file": backing, "backing_fmt": backing_format}
    given = collect(options, {key: value for key, value in apart.items() if value is not None})
    from fusedisk.block.graph.gate import Gate

    gate = Gate(allow_path, allow_any=allow_any_reference)
    created = run_async(_create, format, filename, given, gate, not unsafe, force, progress, writes=True)
    if not quiet:
        _print_created(format, filename, created)


async def _create(
    format: str, filename: str, given: dict[str, str], gate: Gate, check_backing: bool, force: bool, asked: bool
) -> CreateOptions:
    from fusedisk.block.image.create import create_image
    from fusedisk.core.options import parse_size
    from fusedisk.drivers.table import DRIVERS

    size = given.get("size")
    total = parse_size(size) if size is not None and given.get("preallocation") in ("full", "falloc") else 0
    async with allocation_progress("preallocating" if total else "creating", filename, total, asked=asked):
        return await create_image(
            DRIVERS, format, filename, given, gate=gate, check_backing=check_backing, overwrite=force
        )


def _print_created(format: str, filename: str, created: CreateOptions) -> None:
    from fusedisk.block.image.create import options_text

    values = {name: getattr(created, field.name) for name, field in created.names().items()}
    text = f"Created '{filename}', {format}, {exact_size_text(values['size'])}"
    if values.get("backing_file"):
        text += f", over '{values['backing_file']}' ({values['backing_fmt']})"
    details = options_text(created)
    say(text + (f": {details}" if details else ""))


def _print_options(format: str) -> None:
    from fusedisk.block.image.create import describe_options
    from fusedisk.core.errors import NotSupportedError
    from fusedisk.drivers.table import DRIVERS

    kind = DRIVERS.load_format(format).create_options_type
    if kind is None:
        raise NotSupportedError(f"{format} images cannot be created.")
    print_facts(describe_options(kind))
