"""Replay crashes of all workloads and print what was found as a table: ``scripts/crash``."""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import trio

from tests.crash.amending import AMENDING
from tests.crash.judge import Checker, Result, judge
from tests.crash.recording import Recording
from tests.crash.replay import power_cuts, prefixes
from tests.crash.workloads import FORMATS, WORKLOADS
from tests.support.profiles import PROFILES

ALL = WORKLOADS | AMENDING | FORMATS

COLUMNS = (
    "workload",
    "host writes",
    "host flushes",
    "process deaths",
    "power cuts",
    "different images",
    "leaks",
    "bad",
)


class Row(NamedTuple):
    """What one workload has shown."""

    workload: str
    writes: int
    flushes: int
    deaths: int
    cuts: int
    different: int
    leaks: int
    failures: list[str]

    def text(self) -> str:
        """A line of the table."""
        return table_line([*map(str, self[:-1]), str(len(self.failures))])


def table_line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


async def replay(name: str, seeds: range, cuts: int, tries: int, checker: Checker) -> Row:
    """Crashes of one workload: its process dies behind every host write; the power goes at ``cuts`` places, ``tries``
    ways each."""
    results: list[tuple[Recording, Result, Result]] = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            recording = await ALL[name].record(Path(folder), seed)
            deaths = await judge(recording, prefixes(recording.base, recording.log), checker)
            random_ = random.Random(seed)
            changes = [cut for cut, operation in enumerate(recording.log, 1) if operation.kind in ("write", "discard")]
            chosen = sorted(random_.sample(changes, min(cuts, len(changes))))
            found = power_cuts(recording.base, recording.log, random_, tries, cuts=chosen)
            results.append((recording, deaths, await judge(recording, found, checker)))
    kinds = [operation.kind for recording, _, _ in results for operation in recording.log]
    judged = [result for _, *both in results for result in both]
    return Row(
        workload=name,
        writes=kinds.count("write") + kinds.count("discard"),
        flushes=kinds.count("flush"),
        deaths=sum(deaths.crashes for _, deaths, _ in results),
        cuts=sum(cut.crashes for _, _, cut in results),
        different=sum(result.different for result in judged),
        leaks=max(result.leaks for result in judged),
        failures=[failure for result in judged for failure in result.failures],
    )


async def replay_all(names: Sequence[str], seeds: range, cuts: int, tries: int) -> bool:
    """Print a table of all workloads; returns whether all was well."""
    click.echo(table_line(COLUMNS))
    click.echo(table_line("---" for _ in COLUMNS))
    failures: list[str] = []
    total = 0
    for name in names:
        with Checker() as checker:
            row = await replay(name, seeds, cuts, tries, checker)
        click.echo(row.text())
        total += row.deaths + row.cuts
        failures += [f"{name}: {failure}" for failure in row.failures]
    click.echo(f"\n{total} crashes, {len(failures)} of them bad.")
    for failure in failures:
        click.echo(failure)
    return not failures


@click.command()
@click.argument("names", nargs=-1, metavar="[WORKLOAD]...")
@click.option("--format", "formats", multiple=True, type=click.Choice([*PROFILES]), help="Only these formats.")
@click.option("--seed", default=1, show_default=True, help="The first seed.")
@click.option("--seeds", default=1, show_default=True, help="How many recordings of each workload.")
@click.option("--cuts", default=100, show_default=True, help="Places of each recording where the power goes.")
@click.option("--tries", default=4, show_default=True, help="Ways in which it goes at each of them.")
def main(names: tuple[str, ...], formats: tuple[str, ...], seed: int, seeds: int, cuts: int, tries: int) -> None:
    """Replay crashes of each WORKLOAD, or of all."""
    logging.getLogger("fusedisk").setLevel(logging.ERROR)  # images that are not closed properly are what we are after
    unknown = set(names) - ALL.keys()
    if unknown:
        raise click.BadParameter(f"no workload '{min(unknown)}', known are {', '.join(ALL)}.")
    chosen = names or tuple(name for name in ALL if not formats or ALL[name].profile.name in formats)
    good = trio.run(replay_all, chosen, range(seed, seed + seeds), cuts, tries)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
