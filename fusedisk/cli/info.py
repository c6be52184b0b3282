"""``fusedisk info``: information about an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from fusedisk.cli.image import ImageChoice, image_options
from fusedisk.cli.output import escape, exact_size_text, output_option, print_facts, print_json, say, size_text
from fusedisk.cli.running import run_reading

if TYPE_CHECKING:
    from fusedisk.core.errors import FusediskError

_TOLD = frozenset(
    (
        "filename",
        "format",
        "virtual-size",
        "actual-size",
        "cluster-size",
        "dirty-flag",
        "encrypted",
        "backing-filename",
        "backing-filename-format",
        "full-backing-filename",
        "format-specific",
        "snapshots",
    )
)
"""Keys with a line of their own in :func:`_facts`; all others are shown under their name."""


@click.command(
    epilog="""\b
Examples:
  fusedisk info vm.qcow2
  fusedisk info --backing-chain today.qcow2      # the image and everything it stands on
  fusedisk info --output json vm.qcow2 | jq '."virtual-size"'
  fusedisk info -U vm.qcow2                      # while a virtual machine runs on it
  fusedisk info driver=raw,file.filename=disk.img,offset=1M""",
)
@image_options
@click.option("--backing-chain", is_flag=True, help="Show the backing files too, from the top down.")
@output_option
def command(backing_chain: bool, output: str, **choice: Any) -> None:
    """Show format, size and backing file of IMAGE.

    The backing file is named, not opened, unless --backing-chain asks for it; a data file is only named.
    """
    chain, missing = run_reading(_gather, ImageChoice(**choice), backing_chain)
    if output == "json":
        print_json(chain if backing_chain else chain[0])
    else:
        for index, image in enumerate(chain):
            if index:
                say()
            _print_image(image)
    if missing is not None:
        raise missing


async def _gather(choice: ImageChoice, backing_chain: bool) -> tuple[list[dict[str, Any]], FusediskError | None]:
    """Return the information about each image, and the error that kept the next one from being opened."""
    from fusedisk.block.image.information import chain_information

    async with choice.open(follow_backing=backing_chain, look_only=True) as backend:
        return await chain_information(backend.node)


def _print_image(image: dict[str, Any]) -> None:
    print_facts(_facts(image))
    specific = image.get("format-specific")
    if specific is not None:
        say(f"{specific['type']}:")
        print_facts(_specific_facts(specific["data"], image["filename"]), "  ")
    if image.get("snapshots"):
        say("snapshots:")
        print_snapshots(image["snapshots"], "  ")


def _facts(image: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "image", image["filename"]
    yield "format", image["format"]
    yield "virtual size", exact_size_text(image["virtual-size"])
    if "actual-size" in image:
        yield "on the host", exact_size_text(image["actual-size"])
    if "cluster-size" in image:
        yield "cluster size", size_text(image["cluster-size"])
    if image.get("encrypted"):
        yield "encrypted", "yes"
    if image.get("dirty-flag"):
        yield "dirty", "yes, it was not closed properly"
    if "backing-filename" in image:
        name, full = image["backing-filename"], image.get("full-backing-filename")
        if full in (None, name):
            yield "backing file", _with_presence(name, full)
        else:
            yield "backing file", name
            yield "found at", _with_presence(full, full)
        if "backing-filename-format" in image:
            yield "backing format", image["backing-filename-format"]
    for key, value in image.items():
        if key not in _TOLD:
            yield key.replace("-", " "), _value_text(value)


def _specific_facts(data: dict[str, Any], image: str) -> Iterator[tuple[str, str]]:
    from fusedisk.block.graph.filenames import resolve_reference

    for key, value in data.items():
        text = ", ".join(map(_bitmap_text, value)) if key == "bitmaps" else _value_text(value)
        if key == "data-file" and not image.startswith("json:"):
            text = _with_presence(text, resolve_reference(value, image))
        yield key.replace("-", " "), text


def _bitmap_text(bitmap: dict[str, Any]) -> str:
    return f"{bitmap['name']} ({', '.join([size_text(bitmap['granularity']), *bitmap['flags']])})"


def _with_presence(text: str, path: str | None) -> str:
    """Return a file that an image names, marked if it is missing."""
    from fusedisk.block.graph.filenames import has_protocol

    if path is None or has_protocol(path) or os.path.exists(path):
        return text
    return f"{text} (missing)"


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "; ".join(map(_value_text, value)) or "none"
    return str(value)


def print_snapshots(snapshots: list[dict[str, Any]], indent: str = "") -> None:
    """A table of the image's internal snapshots."""
    heading = ("ID", "NAME", "VM STATE", "DATE", "VM CLOCK")
    rows = [heading, *(tuple(map(escape, _snapshot_row(snapshot))) for snapshot in snapshots)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        say(indent + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _snapshot_row(snapshot: dict[str, Any]) -> tuple[str, ...]:
    import datetime

    date = datetime.datetime.fromtimestamp(snapshot["date-sec"]).astimezone()
    clock = datetime.timedelta(seconds=snapshot["vm-clock-sec"], milliseconds=snapshot["vm-clock-nsec"] // 1_000_000)
    return (
        snapshot["id"],
        snapshot["name"],
        size_text(snapshot["vm-state-size"]),
        f"{date:%Y-%m-%d %H:%M:%S}",
        str(clock),
    )
