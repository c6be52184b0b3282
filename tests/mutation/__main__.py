"""``scripts/mutate``: long runs of damaged images, a line for each feature set."""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import sys
from pathlib import Path

from tests.mutation.images import ALL_SETS, FEATURE_SETS
from tests.mutation.runs import MEMORY, Tally, run_alone
from tests.support.profiles import PROFILES


def main() -> int:
    """Run; 1 where we were wrong."""
    parser = argparse.ArgumentParser(
        prog="scripts/mutate",
        description="Damage images and compare our check with an independent reader's.",
    )
    parser.add_argument("--set", action="append", choices=ALL_SETS, help="a feature set (default: all)")
    parser.add_argument("--format", choices=[*PROFILES], help="the sets of one format (default: all)")
    parser.add_argument("--count", type=int, default=1000, help="images of each set (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first image's (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="for images (default: %(default)s)")
    args = parser.parse_args()
    wrong = False
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
        for name in args.set or _sets(args.format):
            seeds = range(args.seed, args.seed + args.count)
            shares = [pool.submit(run_alone, name, seeds[job :: args.jobs], args.folder) for job in range(args.jobs)]
            tally = Tally()
            for share in shares:
                tally.add(share.result())
            print(f"{name}: {tally}", flush=True)
            wrong = wrong or tally.agreeing < tally.images or tally.grown > MEMORY
    return int(wrong)


def _sets(format: str | None) -> list[str]:
    """The feature sets of one format, or of all."""
    return [name for name in ALL_SETS if format in (None, "qcow2" if name in FEATURE_SETS else name.split("-")[0])]


if __name__ == "__main__":
    sys.exit(main())
