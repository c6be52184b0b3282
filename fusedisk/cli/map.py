"""``fusedisk map``: where the bytes of a disk lie."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from fusedisk.cli.image import ImageChoice, image_options
from fusedisk.cli.output import output_option, say, write
from fusedisk.cli.progress import progress, progress_option
from fusedisk.cli.running import run_reading

if TYPE_CHECKING:
    from fusedisk.block.image.mapping import MapEntry


def parse_size_option(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Bytes from 4096, 64k or 10G; anything else is wrong usage."""
    from fusedisk.core.errors import OptionError
    from fusedisk.core.options import parse_size

    if value is None:
        return None
    try:
        return parse_size(value, "it")
    except OptionError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


@click.command(
    epilog="""\b
Examples:
  fusedisk map vm.qcow2                               # what has data, and in which file of the chain
  fusedisk map --output json vm.qcow2                 # every range, as qemu-img prints it
  fusedisk map --start-offset 1M --max-length 64k vm.qcow2

In JSON, "depth" counts backing files down from the image, "present" tells that some layer holds the range, "zero" that
it reads as zeroes, "data" that there are bytes for it on the host, at "offset" of that layer's file.""",
)
@image_options
@click.option(
    "-s", "--start-offset", callback=parse_size_option, default="0", metavar="SIZE", help="Where to start (default: 0)."
)
@click.option(
    "-l", "--max-length", callback=parse_size_option, metavar="SIZE", help="How many bytes to show (default: all)."
)
@progress_option
@output_option
def command(start_offset: int, max_length: int | None, progress: bool, output: str, **choice: Any) -> None:
    """Show where the bytes of the disk in IMAGE lie, through its whole backing chain.

    For people: the ranges with data, their place on the host and the file. Compressed ranges have no place of their
    own and say so.
    """
    run_reading(_print_map, ImageChoice(**choice), start_offset, max_length, output == "json", progress)


async def _print_map(choice: ImageChoice, start: int, length: int | None, as_json: bool, asked: bool) -> None:
    from fusedisk.block.image.mapping import map_entries

    async with choice.open() as backend:
        total = backend.length - start if length is None else length
        printer = _JsonPrinter(start) if as_json else _TablePrinter()
        with progress("mapping", total, asked=asked, shown=not sys.stdout.isatty()) as tell:
            async for entry in map_entries(backend, start, length):
                printer.entry(entry)
                tell(entry.start + entry.length - start, total)
        printer.end()


_JSON = ("false", "true")


class _JsonPrinter:
    """One line for each entry, as qemu-img writes it, so that a map of any size streams."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._lead = "["

    def entry(self, entry: MapEntry) -> None:
        place = f', "offset": {entry.offset}' if entry.offset is not None else ""
        write(
            f'{self._lead}{{ "start": {entry.start}, "length": {entry.length}, "depth": {entry.depth}, '
            f'"present": {_JSON[entry.present]}, "zero": {_JSON[entry.zero]}, "data": {_JSON[entry.data]}{place}}}'
        )
        self._lead = ",\n"

    def end(self) -> None:
        from fusedisk.block.image.mapping import MapEntry

        if self._lead == "[":  # qemu-img tells nothing by one entry of no length
            self.entry(MapEntry(self._start, 0, 0, False, False, False, None, None, False))
        say("]")


class _TablePrinter:
    """The ranges with data; their head as soon as it is known that there is an answer."""

    def __init__(self) -> None:
        self._begun = False

    def _begin(self) -> None:
        if not self._begun:
            say(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
            self._begun = True

    def entry(self, entry: MapEntry) -> None:
        self._begin()
        if not entry.data or entry.zero:
            return
        place = f"{entry.offset:#x}" if entry.offset is not None else "compressed" if entry.compressed else "encrypted"
        row = f"{entry.start:<#16x}{entry.length:<#16x}{place:<16}{entry.filename or ''}"
        say(row.rstrip())

    def end(self) -> None:
        self._begin()
