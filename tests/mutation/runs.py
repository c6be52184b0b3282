"""Runs of many damaged images of one feature set, and their sums."""

from __future__ import annotations

import dataclasses
import random
import resource
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import trio

from tests.mutation.damage import Places, damage
from tests.mutation.images import make_sample
from tests.mutation.judge import Judge, Verdict
from tests.mutation.plain_judge import PlainJudge
from tests.support.profiles import QCOW2

MEMORY = 400 << 20
"""Bytes by which the process may grow, whatever an image says."""

Report = Callable[[int, list[str], Verdict], None]
"""Called with the seed of an image on which we are wrong, what was done to it, and how we were."""


@dataclasses.dataclass(slots=True)
class Tally:
    """Sums over images."""

    images: int = 0
    agreeing: int = 0
    """Nothing was wrong, and QEMU was a judge."""
    exceptions: Counter[str] = dataclasses.field(default_factory=Counter)
    states: Counter[str] = dataclasses.field(default_factory=Counter)
    repaired: int = 0
    seconds: float = 0.0
    """The longest check or repair of ours."""
    grown: int = 0
    """Bytes by which the process grew at most."""

    def count(self, verdict: Verdict) -> None:
        """Add one image."""
        self.images += 1
        if verdict.exception is not None:
            self.exceptions[verdict.exception] += 1
        self.agreeing += not verdict.wrong
        self.states[verdict.state] += 1
        self.repaired += verdict.repaired
        self.seconds = max(self.seconds, verdict.seconds)

    def add(self, other: Tally) -> None:
        """Add the sums of another run."""
        self.images += other.images
        self.agreeing += other.agreeing
        self.exceptions += other.exceptions
        self.states += other.states
        self.repaired += other.repaired
        self.seconds = max(self.seconds, other.seconds)
        self.grown = max(self.grown, other.grown)

    def __str__(self) -> str:
        states = ", ".join(f"{self.states[state]} {state}" for state in ("clean", "leaky", "corrupt", "refused"))
        exceptions = "".join(f", {count} exceptions ({name})" for name, count in sorted(self.exceptions.items()))
        return (
            f"{self.images} images, {self.agreeing} agreeing: {states}; {self.repaired} repaired{exceptions}; "
            f"worst {self.seconds:.2f} s, grew {self.grown >> 20} MiB"
        )


async def run(name: str, seeds: Iterable[int], folder: Path, report: Report) -> Tally:
    """Damage a sample of the feature set once for each seed, and judge."""
    sample = await make_sample(name, folder)
    judge = Judge(sample, folder) if sample.profile is QCOW2 else PlainJudge(sample, folder)
    places = (sample.profile.places or Places)(sample.content)
    whole = await judge.judge(sample.content)
    assert not whole.wrong, f"{name}: the whole image: {whole.wrong}"
    tally = Tally()
    start = _most_memory()
    for seed in seeds:
        image, done = damage(places, random.Random(f"{name} {seed}"))
        verdict = await judge.judge(image)
        tally.count(verdict)
        if verdict.wrong:
            report(seed, done, verdict)
    tally.grown = _most_memory() - start
    return tally


def run_alone(name: str, seeds: range, folder: Path) -> Tally:
    """:func:`run` for a process of its own, which prints what is wrong."""

    def report(seed: int, done: list[str], verdict: Verdict) -> None:
        print(f"{name} --seed {seed} --count 1: {'; '.join(done)}", *verdict.wrong, sep="\n    ", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutate-", dir=folder) as made:
        return trio.run(run, name, seeds, Path(made), report)


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
