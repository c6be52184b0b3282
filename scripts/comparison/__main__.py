"""``scripts/compare``: ours and theirs in turns, medians and their ratio."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from scripts.comparison.cases import MIB, Case, Failed, check, has_snapshot_command, host_calls, snapshot, speed

GROUPS = ("host-calls", "speed", "check", "snapshot")
QCOW2_GROUPS = ("check", "snapshot")
"""What only qcow2 has: metadata without data, and snapshots."""


@click.command()
@click.option("--format", "format", default="qcow2", show_default=True, help="A format that both can write.")
@click.option("--case", "groups", multiple=True, type=click.Choice(GROUPS), help="What to compare (default: all).")
@click.option("--runs", default=5, show_default=True, help="How often; the medians are told.")
@click.option("--size", default=1024, show_default=True, metavar="MIB", help="The disk of the speed cases.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the images go (default: the temporary folder).")
def main(format: str, groups: tuple[str, ...], runs: int, size: int, folder: Path | None) -> None:
    """Compare fusedisk with QEMU's tools on the same work.

    Ratios are ours divided by theirs. Host calls are those to the file of the image, opening and closing
    included, and do not depend on the machine's load.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title="median (lowest – highest)", title_style="dim")
    for column in ("case", "unit", "fusedisk", "QEMU", "ratio"):
        table.add_column(column, justify="left" if column in ("case", "unit") else "right")
    failed = False
    with tempfile.TemporaryDirectory(prefix="fusedisk-compare.", dir=folder) as made:
        for case in _cases(format, groups or GROUPS, size * MIB, console):
            console.print(case.name, style="dim")
            try:
                _add_rows(table, case, *_compare(case, Path(made).resolve(), 1 if case.group == "host-calls" else runs))
            except Failed as exc:
                failed = True
                console.print(f"failed: {case.name}: {exc}", markup=False)
    console.print(table)
    raise SystemExit(int(failed))


def _cases(format: str, groups: tuple[str, ...], size: int, console: Console) -> list[Case]:
    cases: list[Case] = []
    if format != "qcow2":
        groups = tuple(group for group in groups if group not in QCOW2_GROUPS)
    if "host-calls" in groups:
        cases += [
            host_calls(format, pattern, flush_every, over)
            for over in (False, True)
            if format == "qcow2" or not over
            for pattern in ("sequential", "random")
            for flush_every in (1, 16, 0)
        ]
    if "speed" in groups:
        cases += [speed(format, "sequential", size), speed(format, "random", size)]
    if "check" in groups:
        cases.append(check())
    if "snapshot" in groups:
        if has_snapshot_command():
            cases.append(snapshot())
        else:
            console.print("skipped: snapshot, which fusedisk has no command for yet")
    return cases


Runs = list[dict[str, float]]


def _compare(case: Case, folder: Path, runs: int) -> tuple[Runs, Runs]:
    """All runs, the two in turns, each first in every second turn."""
    ours: Runs = []
    theirs: Runs = []
    sides = [(ours, case.ours), (theirs, case.theirs)]
    for turn in range(runs):
        for found, measure in sides if turn % 2 == 0 else sides[::-1]:
            found.append(measure(folder))
    return ours, theirs


def _add_rows(table: Table, case: Case, ours: Runs, theirs: Runs) -> None:
    for unit in ours[0]:
        mine, others = [run[unit] for run in ours], [run[unit] for run in theirs]
        bottom = statistics.median(others)
        ratio = f"{statistics.median(mine) / bottom:.2f}" if bottom else "–"
        table.add_row(case.name, unit, _cell(mine), _cell(others), ratio)


def _cell(values: list[float]) -> str:
    text = f"{statistics.median(values):.4g}"
    return text if len(set(values)) == 1 else f"{text} ({min(values):.4g} – {max(values):.4g})"


if __name__ == "__main__":
    main()
