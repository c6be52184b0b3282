"""Results, as a table for people and as JSON for machines."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.benchmark.machine import describe
from scripts.benchmark.memory import LIMIT, Memory
from scripts.benchmark.servers import versions
from scripts.benchmark.workloads import OURS, THEIRS, Workload

SHOWN = {"IOPS": (1e3, "k/s", 1), "B/s": (1e6, "MB/s", 0), "s": (1.0, "s", 2)}
"""By a job's unit: what one of the table's units is, its name, and its digits."""
CPU_GOAL = 1.0
"""CPU seconds for each GiB, ours divided by theirs, at most."""


@dataclass
class Result:
    """All runs of one workload on one format."""

    fmt: str
    workload: Workload
    contenders: tuple[str, ...] = (OURS, THEIRS)
    """Those of the workload's pair that take part."""
    runs: dict[str, list[float]] = field(default_factory=dict)
    """By contender, in the workload's unit."""
    errors: dict[str, str] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    """By contender, its daemon's CPU seconds for each GiB served."""

    def median(self, name: str) -> float | None:
        """The median of a contender's runs; None when it has none, or failed."""
        runs = self.runs.get(name)
        return statistics.median(runs) if runs and name not in self.errors else None

    @property
    def ratio(self) -> float | None:
        """The first contender's rate divided by the second's: above 1, the first is faster. Seconds the other way."""
        first, second = map(self.median, self.workload.pair)
        if not first or not second:
            return None
        return second / first if self.workload.unit == "s" else first / second

    def cpu_median(self, name: str) -> float | None:
        """CPU seconds for each GiB served, the median of a contender's runs; None when it has none, or failed."""
        taken = self.cpu.get(name)
        return statistics.median(taken) if taken and name not in self.errors else None

    @property
    def cpu_ratio(self) -> float | None:
        """The first one's CPU seconds for each GiB divided by the second's: below 1, the first is cheaper."""
        first, second = map(self.cpu_median, self.workload.pair)
        return first / second if first is not None and second else None

    @property
    def goal(self) -> float | None:
        """At least this ratio; None where nothing is promised."""
        return self.workload.goal_on(self.fmt)

    @property
    def cpu_goal(self) -> float | None:
        """At most this CPU ratio; None where fusedisk is compared with itself or with no daemon."""
        return CPU_GOAL if self.workload.pair == (OURS, THEIRS) else None

    @property
    def missed(self) -> list[str]:
        """A sentence for each goal that was measured and not reached."""
        name, found = f"{self.fmt}, {self.workload.name}", []
        if self.ratio is not None and self.goal is not None and self.ratio < self.goal:
            found.append(f"{name}: the ratio is {self.ratio:.2f}, the goal at least {self.goal:.2f}")
        if self.cpu_ratio is not None and self.cpu_goal is not None and self.cpu_ratio > self.cpu_goal:
            found.append(f"{name}: the CPU ratio is {self.cpu_ratio:.2f}, the goal at most {self.cpu_goal:.2f}")
        return found


def print_results(console: Console, results: list[Result]) -> None:
    """Print a table for each group of contenders, a row for each result: medians, their ranges, and the ratio."""
    for contenders in dict.fromkeys(result.contenders for result in results):
        table = Table(title="median (lowest – highest)", title_style="dim")
        table.add_column("format")
        table.add_column("workload")
        for column in (*contenders, "ratio", "goal", "CPU s/GiB", "ratio"):
            table.add_column(column, justify="right")
        for result in results:
            if result.contenders == contenders:
                table.add_row(*_row(result))
        console.print(table)
    for result in results:
        for contender, error in result.errors.items():
            console.print(f"failed: {contender}, {result.fmt}, {result.workload.name}: {error}", markup=False)


def print_memory(console: Console, memory: dict[str, Memory]) -> None:
    """Print what each daemon took, and whether ours keeps its promise."""
    table = Table(title="resident memory, 1 TiB qcow2", title_style="dim")
    for column in ("daemon", "mounted", "after use", "peak"):
        table.add_column(column, justify="left" if column == "daemon" else "right")
    for server, taken in memory.items():
        table.add_row(server, *(f"{value / (1 << 20):.1f} MiB" for value in asdict(taken).values()))
    console.print(table)
    if OURS in memory:
        kept = memory[OURS].peak <= LIMIT
        verdict = "[green]under 100 MiB[/]" if kept else "[red]NOT under 100 MiB[/]"
        console.print(f"fusedisk's daemon is {verdict} at its peak.")


def as_json(results: list[Result], memory: dict[str, Memory], settings: dict[str, Any]) -> dict[str, Any]:
    """All runs with what they were made on."""
    return {
        "machine": describe(),
        "versions": versions(),
        "settings": settings,
        "results": [
            {
                "format": result.fmt,
                "workload": result.workload.name,
                "pair": result.workload.pair,
                "unit": result.workload.unit,
                "runs": result.runs,
                "median": {name: result.median(name) for name in result.runs},
                "ratio": result.ratio,
                "goal": result.goal,
                "cpu_seconds_per_gib": result.cpu,
                "cpu_ratio": result.cpu_ratio,
                "cpu_goal": result.cpu_goal,
                "missed": result.missed,
                "errors": result.errors,
            }
            for result in results
        ],
        "memory": {server: asdict(taken) for server, taken in memory.items()},
        "memory_limit": LIMIT,
    }


def _row(result: Result) -> list[str]:
    ratio, goal, cpu = result.ratio, result.goal, result.cpu_ratio
    shown = "–" if ratio is None else _coloured(ratio, ratio >= (1 if goal is None else goal))
    wanted = "–" if goal is None else f"≥ {goal:.2f}"
    if goal is not None and ratio is not None:
        wanted += " reached" if ratio >= goal else " MISSED"
    taken = " / ".join("–" if (c := result.cpu_median(name)) is None else f"{c:.2f}" for name in result.contenders)
    cheap = "–" if cpu is None else _coloured(cpu, result.cpu_goal is None or cpu <= result.cpu_goal)
    cells = [_cell(result, name) for name in result.contenders]
    return [result.fmt, result.workload.name, *cells, shown, wanted, taken, cheap]


def _coloured(ratio: float, good: bool) -> str:
    return f"[{'green' if good else 'yellow'}]{ratio:.2f}[/]"


def _cell(result: Result, name: str) -> str:
    median = result.median(name)
    if median is None:
        return "failed" if name in result.errors else "–"
    runs = result.runs[name]
    scale, unit, digits = SHOWN[result.workload.unit]
    low, high = (f"{value / scale:.{digits}f}" for value in (min(runs), max(runs)))
    return f"{median / scale:.{digits}f} {unit} ({low} – {high})"
