"""``fusedisk check``: whether an image's metadata is sound, and repairing it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from fusedisk.cli.image import one_image_options
from fusedisk.cli.output import output_option, print_json, say, tell
from fusedisk.cli.progress import progress, progress_option
from fusedisk.cli.running import run_async

if TYPE_CHECKING:
    from fusedisk.block.model.check_result import CheckResult

EXIT_ERRORS, EXIT_CORRUPT, EXIT_LEAKS, EXIT_UNSUPPORTED = 1, 2, 3, 63
"""The exit codes of ``qemu-img check``."""


@click.command(
    epilog="""\b
Examples:
  fusedisk check vm.qcow2
  fusedisk check -r leaks vm.qcow2               # give leaked space back, nothing else
  fusedisk check -r all --dry-run vm.qcow2       # what repairing would do
  fusedisk check -r all vm.qcow2
  fusedisk check --output json vm.qcow2

Exit codes: 0 sound, 1 something could not be looked at, 2 corruptions are left, 3 only leaks are left, 63 images of
this format cannot be checked.""",
)
@one_image_options
@click.option(
    "-r",
    "--repair",
    type=click.Choice(["leaks", "all"]),
    help="Free leaked space, or fix everything.",
)
@click.option("-n", "--dry-run", is_flag=True, help="With --repair: change nothing, and show what would be done.")
@progress_option
@output_option
def command(
    image: str,
    format: str | None,
    repair: str | None,
    dry_run: bool,
    force_share: bool,
    progress: bool,
    output: str,
) -> None:
    """Check the metadata of IMAGE, as qemu-img does; with --repair, repair it.

    Corruptions endanger data; leaks only waste space, and a process that dies while it writes may leave some. Neither
    the backing files nor the disk's content are looked at.
    """
    if dry_run and repair is None:
        raise click.UsageError("--dry-run needs --repair.")
    writes = repair is not None and not dry_run
    if force_share and writes:
        raise click.UsageError("an image that another process may write to cannot be repaired.")
    result, facts = run_async(_check, image, format, repair, dry_run, force_share, progress, writes=writes)
    if output == "json":
        print_json(facts | result.information())
    else:
        _print(result, repair is not None, dry_run)
    raise click.exceptions.Exit(_exit_code(result))


async def _check(
    image: str, format: str | None, repair: str | None, dry_run: bool, force_share: bool, asked: bool
) -> tuple[CheckResult, dict[str, Any]]:
    from fusedisk.block.graph.filenames import parse_argument
    from fusedisk.block.image.check import open_for_check
    from fusedisk.block.model.check_result import Repair
    from fusedisk.drivers.table import DRIVERS

    mode = Repair(repair or "nothing")
    writable = mode is not Repair.NOTHING and not dry_run
    spec = parse_argument(image)
    async with contextlib.AsyncExitStack() as stack:
        found = await stack.enter_async_context(
            open_for_check(DRIVERS, spec, format=format, writable=writable, force_share=force_share)
        )
        if not found.supported:
            tell(f"'{image}' is a {found.driver.name} image, which has nothing to check.")
            raise click.exceptions.Exit(EXIT_UNSUPPORTED)
        advance = stack.enter_context(progress("checking", 1, asked=asked, bytes=False))
        result = await found.driver.check(found.files, mode, advance, dry_run=dry_run)
        return result, {"filename": image, "format": found.driver.name}


def _exit_code(result: CheckResult) -> int:
    if result.check_errors:
        return EXIT_ERRORS
    if result.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if result.leaks else 0


def _print(result: CheckResult, repairing: bool, dry_run: bool) -> None:
    for sentence in result.findings:
        say(sentence)
    if repairing and result.repairs:
        say("What repairing would do:" if dry_run else "What was repaired:")
        for sentence in result.repairs:
            say(f"  {sentence}")
    if result.corruptions_fixed or result.leaks_fixed:
        say(f"Fixed: {result.corruptions_fixed} corruptions, {result.leaks_fixed} leaked clusters.")
    if result.clean:
        say("No errors were found.")
    if result.corruptions:
        say(f"{result.corruptions} corruptions: data may be damaged, or become so when the image is written to.")
    if result.leaks:
        say(f"{result.leaks} leaked clusters: wasted space, no harm to data.")
    if result.check_errors:
        say(f"{result.check_errors} things could not be checked.")
    if result.total_clusters:
        share = 100 * result.allocated_clusters / result.total_clusters
        say(
            f"{result.allocated_clusters} of {result.total_clusters} clusters allocated ({share:.2f}%), "
            f"{result.fragmented_clusters} fragmented, {result.compressed_clusters} compressed."
        )
    if result.image_end_offset:
        say(f"Image end offset: {result.image_end_offset}")
