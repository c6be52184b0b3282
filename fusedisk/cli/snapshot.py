"""``fusedisk snapshot``: the snapshots inside an image."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import click

from fusedisk.cli.image import ImageChoice, image_options
from fusedisk.cli.info import print_snapshots
from fusedisk.cli.output import output_option, print_json, say
from fusedisk.cli.progress import progress, progress_option
from fusedisk.cli.running import run_async

if TYPE_CHECKING:
    from fusedisk.block.graph.backend import Backend


@click.command(
    epilog="""\b
Examples:
  fusedisk snapshot vm.qcow2                     # what snapshots there are
  fusedisk snapshot -c before-upgrade vm.qcow2
  fusedisk snapshot -a before-upgrade vm.qcow2   # the disk is what it was then; what it was till now is lost
  fusedisk snapshot -d before-upgrade vm.qcow2
  fusedisk snapshot --output json vm.qcow2
  fusedisk mount driver=qcow2,file.filename=vm.qcow2,internal-snapshot=before-upgrade,name=then --read-only /mnt/disk

Names need not be unique. --apply takes an id or a name and looks for the id first, --delete takes a name; where several
snapshots have the same name, the oldest one counts.""",
)
@image_options
@click.option("-l", "--list", "listing", is_flag=True, help="List the snapshots. The default.")
@click.option("-c", "--create", metavar="NAME", help="Keep the disk's content and size as they are now.")
@click.option("-a", "--apply", metavar="SNAPSHOT", help="Go back to the snapshot; the snapshot stays.")
@click.option("-d", "--delete", metavar="NAME", help="Delete the snapshot, and free the space that it alone used.")
@progress_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing on success.")
@output_option
def command(
    listing: bool,
    create: str | None,
    apply: str | None,
    delete: str | None,
    progress: bool,
    quiet: bool,
    output: str,
    **choice: Any,
) -> None:
    """List, create, apply or delete the internal snapshots of IMAGE.

    An image that another process uses is left alone; one whose process died in the midst of a change has either the old
    snapshots or the new ones.
    """
    if listing + sum(value is not None for value in (create, apply, delete)) > 1:
        raise click.UsageError("give only one of --list, --create, --apply and --delete.")
    image = ImageChoice(**choice)
    if create is apply is delete is None:
        _print_list(run_async(_list, image), output)
        return
    if image.force_share:
        raise click.UsageError("the snapshots of an image that another process may write to cannot be changed.")
    if create is not None:
        made = run_async(_create, image, create, progress, writes=True)
        if output == "json":
            print_json(made)
            return
        text = f"Created snapshot {made['id']} ('{made['name']}') of '{image.image}'."
    elif apply is not None:
        text = f"Applied snapshot {run_async(_apply, image, apply, progress, writes=True)} to '{image.image}'."
    else:
        assert delete is not None
        text = f"Deleted snapshot {run_async(_delete, image, delete, progress, writes=True)} of '{image.image}'."
    if not quiet:
        say(text)


def _print_list(snapshots: list[dict[str, Any]], output: str) -> None:
    if output == "json":
        print_json(snapshots)
    elif snapshots:
        print_snapshots(snapshots)


async def _list(image: ImageChoice) -> list[dict[str, Any]]:
    async with image.open(follow_backing=False) as backend:
        return [found.information() for found in backend.list_snapshots()]


@contextlib.asynccontextmanager
async def _writable(image: ImageChoice) -> AsyncIterator[Backend]:
    # No snapshot needs to know what its disk stands on.
    async with image.open(follow_backing=False, writable=True) as backend:
        yield backend


async def _create(image: ImageChoice, name: str, asked: bool) -> dict[str, Any]:
    from fusedisk.block.model.snapshot_info import SnapshotInfo

    async with _writable(image) as backend:
        with progress("keeping", 1, asked=asked, bytes=False) as tell:
            made = await backend.create_snapshot(SnapshotInfo("", name, time.time_ns()), tell)
        return made.information()


async def _apply(image: ImageChoice, id_or_name: str, asked: bool) -> str:
    from fusedisk.block.request.snapshot import find_snapshot

    async with _writable(image) as backend:
        found = find_snapshot(backend.list_snapshots(), id_or_name, image.image)
        with progress("applying", 1, asked=asked, bytes=False) as tell:
            await backend.apply_snapshot(found.id, tell)
        return f"{found.id} ('{found.name}')"


async def _delete(image: ImageChoice, name: str, asked: bool) -> str:
    from fusedisk.block.request.snapshot import find_snapshot_by

    async with _writable(image) as backend:
        found = find_snapshot_by(backend.list_snapshots(), image.image, name=name)
        with progress("deleting", 1, asked=asked, bytes=False) as tell:
            await backend.delete_snapshot(found.id, tell)
        return f"{found.id} ('{found.name}')"
