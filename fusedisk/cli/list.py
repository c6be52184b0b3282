"""``fusedisk list``: what is mounted, from which image, by which process."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, Any, Literal

import click

from fusedisk.cli.output import escape, output_option, print_json, say, size_text, tell, write

if TYPE_CHECKING:
    from fusedisk.mount.runtime import MountRecord

_SERVING, _STALE, _ENDING, _FAILED = "serving", "stale", "ending", "failed"
_WIDE = 10_000


@click.command(
    epilog="""\b
Examples:
  fusedisk list
  fusedisk list --output json | jq '.[].mountpoint'"""
)
@output_option
def command(output: str) -> None:
    """Show what is mounted. Root sees everybody's mounts, others their own.

    A stale mount is one whose daemon has died; 'fusedisk umount' cleans it up.
    """
    found = _gather()
    if output == "json":
        print_json(found)
    elif found:
        _print_table(found)
    else:
        say("Nothing is mounted.")


def _gather() -> list[dict[str, Any]]:
    """One entry for each mount. Records of mounts that are gone are removed, after their error was told once."""
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
    """What became of a mount; None: it is gone, and there is nothing to say about it."""
    if record.alive:
        return _SERVING if record.mounted else _ENDING
    if record.error is not None:
        return _FAILED
    return _STALE if record.mounted else None


def describe(record: MountRecord, state: str = _SERVING) -> dict[str, Any]:
    """A mount as programs shall see it."""
    alive = state in (_SERVING, _ENDING)
    return {
        "mountpoint": record.place,
        "state": state,
        "pid": record.pid,
        "memory": _memory(record.pid) if alive else None,
        "error": record.error,
        "log": record.log if os.path.exists(record.log) else None,
        "loop-device": record.loop,
        "exports": [
            {
                "name": export.name,
                "image": export.image,
                "format": export.format,
                "virtual-size": export.size,
                "read-only": export.read_only,
                "overlay": export.overlay,
                "loop-devices": _loop_devices(record.place, export.name),
            }
            for export in record.exports
        ],
    }


def _loop_devices(mountpoint: str, name: str) -> list[str]:
    """The loop devices that stand on a file, whoever attached them."""
    from fusedisk.mount import loop_device

    return loop_device.attached_to(f"{mountpoint}/{name}") + loop_device.attached_to(mountpoint)


def _memory(pid: int) -> int | None:
    """Resident memory of a process in bytes."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def _print_table(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("IMAGE", "FORMAT", "SIZE", "FILE", "DEVICE", "PROCESS", "MEMORY"):
        justify: Literal["left", "right"] = "right" if heading in ("SIZE", "MEMORY") else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading not in ("IMAGE", "FILE"))
    for mount in found:
        for export in mount["exports"]:
            process = f"{mount['pid']}" if mount["state"] == _SERVING else f"{mount['pid']} ({mount['state']})"
            cells = (
                export["image"],
                export["format"] + _notes(export),
                size_text(export["virtual-size"]),
                f"{mount['mountpoint']}/{export['name']}",
                ", ".join(export["loop-devices"]) or "-",
                process,
                size_text(mount["memory"]) if mount["memory"] is not None else "-",
            )
            table.add_row(*(Text(escape(cell)) for cell in cells))
    # Only a terminal has an edge to break lines at.
    text = io.StringIO()
    at_terminal = sys.stdout.isatty()
    Console(file=text, force_terminal=at_terminal, width=None if at_terminal else _WIDE).print(table)
    write(text.getvalue())
    for mount in found:
        if mount["error"] is not None:
            tell(f"{mount['mountpoint']}: {mount['error']}")


def _notes(export: dict[str, Any]) -> str:
    notes = [text for text, holds in (("read-only", export["read-only"]), ("overlay", export["overlay"])) if holds]
    return f" ({', '.join(notes)})" if notes else ""
