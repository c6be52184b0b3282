"""Results, as a table for people and as JSON for machines."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.benchmark.memory import LIMIT, Memory
from scripts.benchmark.servers import versions
from scripts.benchmark.workloads import Workload

OURS = "fusedisk"
THEIRS = "qemu-storage-daemon"
CPU_GOAL = 1.0
"""CPU seconds for each GiB, ours divided by theirs, at most."""


@dataclass
class Result:
    """All runs of one workload on one format."""

    fmt: str
    workload: Workload
    runs: dict[str, list[float]] = field(default_factory=dict)
    """By server, in the workload's unit."""
    errors: dict[str, str] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    """By server, the daemon's CPU seconds for each GiB served."""

    def median(self, server: str) -> float | None:
        """The median of a server's runs; None when it has none, or failed."""
        runs = self.runs.get(server)
        return statistics.median(runs) if runs and server not in self.errors else None

    @property
    def ratio(self) -> float | None:
        """Ours divided by theirs: above 1, fusedisk is faster."""
        ours, theirs = self.median(OURS), self.median(THEIRS)
        return ours / theirs if ours is not None and theirs else None

    def cpu_median(self, server: str) -> float | None:
        """CPU seconds for each GiB served, the median of a server's runs; None when it has none, or failed."""
        taken = self.cpu.get(server)
        return statistics.median(taken) if taken and server not in self.errors else None

    @property
    def cpu_ratio(self) -> float | None:
        """Our CPU seconds for each GiB divided by theirs: below 1, fusedisk is cheaper."""
        ours, theirs = self.cpu_median(OURS), self.cpu_median(THEIRS)
        return ours / theirs if ours is not None and theirs else None

    @property
    def missed(self) -> list[str]:
        """A sentence for each goal that was measured and not reached."""
        name, found = f"{self.fmt}, {self.workload.name}", []
        if self.ratio is not None and self.workload.goal is not None and self.ratio < self.workload.goal:
            found.append(f"{name}: the ratio is {self.ratio:.2f}, the goal at least {self.workload.goal:.2f}")
        if self.cpu_ratio is not None and self.cpu_ratio > CPU_GOAL:
            found.append(f"{name}: the CPU ratio is {self.cpu_ratio:.2f}, the goal at most {CPU_GOAL:.2f}")
        return found


def print_results(console: Console, results: list[Result], servers: list[str]) -> None:
    """Print a row for each result: medians, their ranges, and the ratio."""
    table = Table(title="median (lowest – highest)", title_style="dim")
    table.add_column("format")
    table.add_column("workload")
    for server in servers:
        table.add_column(server, justify="right")
    for column in ("ratio", "goal", "CPU s/GiB", "ratio"):
        table.add_column(column, justify="right")
    for result in results:
        cells = [_cell(result, server) for server in servers]
        ratio, goal, cpu = result.ratio, result.workload.goal, result.cpu_ratio
        shown = "–" if ratio is None else _coloured(ratio, ratio >= (1 if goal is None else goal))
        wanted = "–" if goal is None else f"≥ {goal:.2f}"
        if goal is not None and ratio is not None:
            wanted += " reached" if ratio >= goal else " MISSED"
        taken = " / ".join("–" if (c := result.cpu_median(server)) is None else f"{c:.2f}" for server in servers)
        cheap = "–" if cpu is None else _coloured(cpu, cpu <= CPU_GOAL)
        table.add_row(result.fmt, result.workload.name, *cells, shown, wanted, taken, cheap)
    console.print(table)
    for result in results:
        for server, error in result.errors.items():
            console.print(f"failed: {server}, {result.fmt}, {result.workload.name}: {error}", markup=False)


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
        "machine": {
            "kernel": platform.release(),
            "architecture": platform.machine(),
            "cpus": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
        },
        "versions": versions(),
        "settings": settings,
        "results": [
            {
                "format": result.fmt,
                "workload": result.workload.name,
                "unit": result.workload.unit,
                "runs": result.runs,
                "median": {server: result.median(server) for server in result.runs},
                "ratio": result.ratio,
                "goal": result.workload.goal,
                "cpu_seconds_per_gib": result.cpu,
                "cpu_ratio": result.cpu_ratio,
                "cpu_goal": CPU_GOAL,
                "missed": result.missed,
                "errors": result.errors,
            }
            for result in results
        ],
        "memory": {server: asdict(taken) for server, taken in memory.items()},
        "memory_limit": LIMIT,
    }


def _coloured(ratio: float, good: bool) -> str:
    return f"[{'green' if good else 'yellow'}]{ratio:.2f}[/]"


def _cell(result: Result, server: str) -> str:
    median = result.median(server)
    if median is None:
        return "failed" if server in result.errors else "–"
    runs = result.runs[server]
    scale, unit = (1e3, "k/s") if result.workload.unit == "IOPS" else (1e6, "MB/s")
    digits = 1 if scale == 1e3 else 0
    low, high = (f"{value / scale:.{digits}f}" for value in (min(runs), max(runs)))
    return f"{median / scale:.{digits}f} {unit} ({low} – {high})"
