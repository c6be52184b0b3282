"""``fusedisk list``: what is mounted, from which image, by which process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from fusedisk.cli.output import escape, output_option, print_json, say, size_text, tell

if TYPE_CHECKING:
    from fusedisk.mount.runtime import ExportRecord, MountRecord

_SERVING, _STALE, _ENDING, _FAILED = "serving", "stale", "ending", "failed"
_WIDTH = 80
"""Columns where the output is no terminal."""
_MAX_NAME_WIDTH = 24
"""Columns that names of files are aligned in; longer ones stand out."""


@click.command(
    epilog="""\b
Examples:
  fusedisk list
  fusedisk list --output json | jq '.[].mountpoint'"""
)
@output_option
def command(output: str) -> None:
    """Show what is mounted. Root sees everybody's mounts, others their own.

    A stale mount is one whose daemon has died; 'fusedisk umount' cleans it up. An ending one is unmounted, but its
    daemon still flushes, or goes on for other users, which are named.
    """
    found = _gather()
    if output == "json":
        print_json(found)
    elif found:
        _print(found)
    else:
        say("Nothing is mounted.")


def _gather() -> list[dict[str, Any]]:
    """Return one entry for each mount. Records of mounts that are gone are removed after their error was shown once."""
    from fusedisk.mount import runtime

    found = []
    for record in runtime.records():
        state = _state(record)
        if state in (_FAILED, None):
            record.remove()
        if state is not None:
            found.append(describe(record, state))
    return found


def _state(record: MountRecord) -> str | None:
    """Return the state of a mount; None: it is gone, without an error to show."""
    if record.alive:
        unseen = record.hidden and not record.closing
        return _SERVING if record.mounted or record.foreign or unseen else _ENDING
    if record.error is not None:
        return _FAILED
    return _STALE if record.mounted else None


def describe(record: MountRecord, state: str = _SERVING) -> dict[str, Any]:
    """Return a mount's entry in the JSON output."""
    from fusedisk.mount import namespaces

    alive = state in (_SERVING, _ENDING)
    held = state == _ENDING and not record.closing and record.device
    return {
        "mountpoint": record.place,
        "state": state,
        "pid": record.pid,
        "mount-namespace": namespaces.of(record.pid) if record.foreign else None,
        "pid-namespace": record.pid_namespace if alive and record.hidden else None,
        "held-by": [str(copy) for copy in namespaces.copies(record.device)] if held else [],
        "memory": _memory(record.pid) if alive and not record.hidden else None,
        "error": record.error,
        "log": record.log if record.has_log() else None,
        "loop-device": record.loop,
        "exports": [_describe_export(record, export) for export in record.exports],
    }


def _describe_export(record: MountRecord, export: ExportRecord) -> dict[str, Any]:
    from fusedisk.mount import beneath, loop_device

    path = record.path_of(export)
    return {
        "name": export.name,
        "path": path,
        "part-of": export.part_of,
        "image": export.image,
        "changed-files": [
            {"file": changed.name, "state": changed.state, "now": changed.now}
            for changed in beneath.changed_files(record, export)
        ],
        "format": export.format,
        "virtual-size": export.size,
        "read-only": export.read_only,
        "overlay": export.overlay,
        "loop-devices": loop_device.attached_to(path),  # also those that others attached
    }


def _memory(pid: int) -> int | None:
    """Return the resident memory of a process in bytes."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def _print(found: list[dict[str, Any]]) -> None:
    """A line for each mount, and below it one for each of its files: disks, each with its parts."""
    width = shutil.get_terminal_size((_WIDTH, 0)).columns if sys.stdout.isatty() else _WIDTH
    for mount in found:
        _print_line([escape(f"{mount['mountpoint']}:"), *_process(mount)], 4, width)
        for holder in mount["held-by"]:
            say(f"    goes on for {holder}")
        rows = list(_rows(mount["exports"]))
        aligned = [len(name) for name, _ in rows if len(name) <= _MAX_NAME_WIDTH]
        for name, cells in rows:
            _print_line([f"{name:<{max(aligned, default=0)}}", *cells], 8, width)
    for mount in found:
        if mount["error"] is not None:
            tell(f"{mount['mountpoint']}: {mount['error']}")


def _process(mount: dict[str, Any]) -> Iterator[str]:
    yield f"pid {mount['pid']}" if mount["state"] == _SERVING else f"pid {mount['pid']} ({mount['state']})"
    if mount["memory"] is not None:
        yield size_text(mount["memory"])
    if mount["mount-namespace"] is not None:
        yield "in another mount namespace"
    if mount["pid-namespace"] is not None:
        yield "in another PID namespace"


def _rows(exports: list[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Name, indented, and what to tell of each file; an image and a format only where they are not the disk's."""
    for disk in exports:
        if disk["part-of"] is None:
            states = {file["file"]: f"{file['file']} ({file['state']})" for file in disk["changed-files"]}
            files = [states.pop(disk["image"], disk["image"]), *states.values()]
            yield f"  {escape(disk['name'])}", [*_cells(disk), *map(escape, files)]
            yield from _rows_of_parts(exports, disk["name"], "    ")


def _rows_of_parts(exports: list[dict[str, Any]], whole: str, indent: str) -> Iterator[tuple[str, list[str]]]:
    for part in exports:
        if part["part-of"] == whole:
            yield f"{indent}{escape(part['name'])}", _cells(part)
            yield from _rows_of_parts(exports, part["name"], f"{indent}  ")


def _cells(export: dict[str, Any]) -> list[str]:
    notes = [text for text, holds in (("read-only", export["read-only"]), ("overlay", export["overlay"])) if holds]
    format_ = "" if export["part-of"] is not None else export["format"]
    kind = ", ".join([format_, *notes] if format_ else notes)
    cells = [f"{size_text(export['virtual-size']):>8}", kind, ", ".join(export["loop-devices"])]
    return [cell for cell in cells if cell]


def _print_line(cells: Iterable[str], indent: int, width: int) -> None:
    """Cells two blanks apart. One that does not fit begins a new line, and is never broken: it may be a path that
    somebody copies."""
    line = ""
    for cell in cells:
        if line and len(line) + 2 + len(cell) > width:
            say(line.rstrip())
            line = " " * indent + cell.lstrip()
        else:
            line = f"{line}  {cell}" if line else cell
    say(line.rstrip())
