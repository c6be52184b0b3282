"""``fusedisk amend``: other settings for an existing image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fusedisk.cli.image import complete_file, format_option, gate_options, need
from fusedisk.cli.option_values import collect, option_values
from fusedisk.cli.output import print_facts
from fusedisk.cli.progress import progress, progress_option
from fusedisk.cli.running import run_async

if TYPE_CHECKING:
    from fusedisk.core.options import CreateOptions


def _kinds(ctx: click.Context) -> list[type[CreateOptions]]:
    """The options of the format that is given, or else of all formats."""
    from fusedisk.drivers.table import DRIVERS

    given = ctx.params.get("format")
    kinds = [DRIVERS.load(name).amend_options_type for name in DRIVERS.names if given in (None, name)]
    return [kind for kind in kinds if kind is not None]


@click.command(
    epilog="""\b
Examples:
  fusedisk amend -o compat=1.1 old.qcow2
  fusedisk amend -o size=20G,lazy_refcounts=on vm.qcow2
  fusedisk amend -o refcount_bits=16,compat=0.10 vm.qcow2          # for programs that know version 2 only
  fusedisk amend --force -o backing_file=base.qcow2,backing_fmt=qcow2 today.qcow2   # the base has moved
  fusedisk amend --key-file old.key -o encrypt.state=active,encrypt.new-key-file=new.key vm.qcow2
  fusedisk amend -o encrypt.state=inactive,encrypt.old-key-file=old.key vm.qcow2
  fusedisk amend -f qcow2 -o help                                   # which options are there

If the process dies meanwhile, the image stays intact, with some of the changes made.""",
)
@click.argument("image", required=False, shell_complete=complete_file)
@format_option()
@option_values(_kinds, "What to change, by the format's own options; 'help' lists them.", required=True)
@click.option(
    "--force",
    is_flag=True,
    help="Allow changes that can lose data, such as erasing the last key slot or naming another backing file.",
)
@click.option(
    "--key-file",
    metavar="FILE",
    shell_complete=complete_file,
    help="File with the passphrase of an encrypted image; - reads the first line of standard input.",
)
@progress_option
@gate_options
def command(
    image: str | None,
    format: str | None,
    options: tuple[str, ...],
    force: bool,
    key_file: str | None,
    progress: bool,
    allow_path: tuple[str, ...],
    allow_any_reference: bool,
) -> None:
    """Change settings of IMAGE. Other settings and the disk's content stay as they are.

    If a change is impossible, nothing is changed.
    """
    if "help" in options:
        _print_options(format)
        return
    image = need("IMAGE", image)
    from fusedisk.block.graph.gate import Gate

    gate = Gate(allow_path, allow_any=allow_any_reference)
    run_async(_amend, image, format, collect(options), force, key_file, gate, progress, writes=True)


async def _amend(
    image: str, format: str | None, given: dict[str, str], force: bool, key_file: str | None, gate: object, asked: bool
) -> None:
    from fusedisk.block.graph.filenames import parse_argument
    from fusedisk.block.graph.gate import Gate
    from fusedisk.block.image.amend import amend_image
    from fusedisk.drivers.table import DRIVERS

    assert isinstance(gate, Gate)
    with progress("amending", 1, asked=asked, bytes=False) as tell:
        await amend_image(
            DRIVERS,
            parse_argument(image),
            given,
            format=format,
            force=force,
            key_file=key_file,
            gate=gate,
            progress=tell,
        )


def _print_options(format: str | None) -> None:
    from fusedisk.block.image.create import describe_options
    from fusedisk.core.errors import NotSupportedError
    from fusedisk.drivers.table import DRIVERS

    if format is None:
        raise click.UsageError("'-o help' needs -f, as formats have options of their own.")
    kind = DRIVERS.load_format(format).amend_options_type
    if kind is None:
        raise NotSupportedError(f"{format} images have no settings that can be changed.")
    print_facts(describe_options(kind))
