"""The command line of the bench; see ``scripts/bench --help``."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

import click
import psutil
from rich.console import Console
from rich.progress import Progress

from scripts.benchmark.images import FORMATS, MIB, Image, make_images, settle
from scripts.benchmark.machine import summary
from scripts.benchmark.memory import LIMIT, Memory, measure_memory
from scripts.benchmark.report import Result, as_json, print_memory, print_results
from scripts.benchmark.servers import SERVERS, ServerError, versions
from scripts.benchmark.workloads import CONTENDERS, OURS, WORKLOADS

GIB = 1 << 30
MEMORY = "memory"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Runs of each; the median counts.",
)
@click.option("--runtime", type=float, default=3.0, show_default=True, help="Seconds of each run.")
@click.option("--size", type=click.IntRange(min=16), default=1024, show_default=True, help="Image size in MiB.")
@click.option("--quick", is_flag=True, help="Two runs of one second on 256 MiB.")
@click.option("--workload", "-w", "names", multiple=True, type=click.Choice([*WORKLOADS, MEMORY]), help="Only this.")
@click.option("--format", "-f", "formats", multiple=True, type=click.Choice(list(FORMATS)), help="Only this.")
@click.option("--server", "-s", "servers", multiple=True, type=click.Choice(list(SERVERS)), help="Only this.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all runs here.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where the images go.",
)
@click.option("--check", is_flag=True, help="Exit with 2 where a goal is missed.")
def main(
    runs: int,
    runtime: float,
    size: int,
    quick: bool,
    names: tuple[str, ...],
    formats: tuple[str, ...],
    servers: tuple[str, ...],
    json_file: Path | None,
    folder: Path | None,
    check: bool,
) -> None:
    """Compare `fusedisk mount` with qemu-storage-daemon's FUSE export.

    Both serve the same fully allocated image, warm in the page cache, in turns; fio measures with direct I/O.
    The ratio is ours divided by theirs, its goal beside it; CPU seconds are the daemon's (ours / theirs).
    In tables of their own, fusedisk is compared with the host's file (passthrough) and with itself (a chain of images).
    The memory of both is taken with a 1 TiB qcow2 mounted. Rows that cannot run on this machine are skipped and named.
    """
    if quick:
        runs, runtime, size = 2, 1.0, 256
    names = names or (*WORKLOADS, MEMORY)
    formats = formats or tuple(FORMATS)
    chosen = list(servers or SERVERS)
    console = Console()
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, _interrupt)
    console.print(", ".join(f"{name} {version}" for name, version in versions().items()), style="dim")
    console.print(summary(), style="dim")
    with tempfile.TemporaryDirectory(prefix="fusedisk-bench.", dir=folder) as temporary:
        place = Path(temporary).resolve()
        results: list[Result] = []
        if set(names) != {MEMORY}:
            try:
                results = compare(console, place, chosen, names, formats, runs, runtime, size)
            except ServerError as exc:
                raise click.ClickException(f"the images could not be made: {exc}.") from None
            print_results(console, results)
        memory: dict[str, Memory] = {}
        failed = any(result.errors for result in results)
        if MEMORY in names:
            for server in chosen:
                try:
                    memory[server] = measure_memory(server, place)
                except (ServerError, OSError, psutil.Error) as exc:
                    failed = True
                    console.print(f"failed: {server}, memory: {exc}", markup=False)
            print_memory(console, memory)
    if json_file is not None:
        settings = {"runs": runs, "runtime": runtime, "size": size * MIB}
        json_file.write_text(json.dumps(as_json(results, memory, settings), indent=2) + "\n")
        console.print(f"All runs are in {json_file}.", markup=False)
    missed = [sentence for result in results for sentence in result.missed]
    if OURS in memory and memory[OURS].peak > LIMIT:
        missed.append(
            f"{MEMORY}: the peak is {memory[OURS].peak / MIB:.1f} MiB, the goal at most {LIMIT / MIB:.0f} MiB"
        )
    if check:
        for sentence in missed:
            console.print(f"missed: {sentence}", markup=False)
    sys.exit(1 if failed else 2 if check and missed else 0)


def compare(
    console: Console,
    place: Path,
    servers: list[str],
    names: tuple[str, ...],
    formats: tuple[str, ...],
    runs: int,
    runtime: float,
    size: int,
) -> list[Result]:
    """Measure every workload on every format, the contenders in turns, each first in every second turn."""
    results = []
    for workload in [WORKLOADS[name] for name in names if name in WORKLOADS]:
        contenders = workload.contenders(servers)
        if contenders and workload.unable:
            console.print(f"skipped: {workload.name}: {workload.unable}", markup=False)
        elif contenders:
            results += [Result(fmt, workload, contenders) for fmt in formats if fmt in workload.images]
    results.sort(key=lambda result: list(FORMATS).index(result.fmt))
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("making the images", total=sum(_turns(result) for result in results) * runs)
        images = make_images(place, size * MIB, tuple({result.fmt: None for result in results}))
        for result in results:
            progress.update(task, description=f"{result.fmt} {result.workload.name}")
            pieces = result.workload.pieces
            for turn in range(runs * pieces):
                for contender in result.contenders if turn % 2 == 0 else result.contenders[::-1]:
                    if contender not in result.errors:
                        measure_once(result, contender, images[result.fmt], place, runtime / pieces)
                    progress.advance(task)
    return results


def _turns(result: Result) -> int:
    """How often somebody is measured for one run of each."""
    return len(result.contenders) * result.workload.pieces


def measure_once(result: Result, name: str, image: Image, place: Path, runtime: float) -> None:
    """Add one run of the contender *name* to *result*, or the reason why there is none."""
    contender = CONTENDERS[name]
    if contender.bottom:
        image = image.bottom
    settle(image)
    try:
        with contender.server(image.path, image.fmt, place) as served:
            before = _cpu_seconds(served.process)
            found = result.workload.job.measure(served.path, runtime)
            cpu = _cpu_seconds(served.process) - before
    except (ServerError, OSError, psutil.Error) as exc:
        result.errors[name] = str(exc)
    else:
        result.runs.setdefault(name, []).append(found.value)
        if served.process is not None:
            result.cpu.setdefault(name, []).append(cpu * GIB / found.served)


def _cpu_seconds(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    own = process.cpu_times()
    seconds = own.user + own.system + own.children_user + own.children_system
    for helper in process.children(recursive=True):
        times = helper.cpu_times()
        seconds += times.user + times.system
    return float(seconds)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C, so that nothing stays mounted."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
