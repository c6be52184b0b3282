"""One random run: build, open, work in batches, compare; and on failure the shortest prefix that shows it."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.block.model.files import Files
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request import attempts, places
from tests.conftest import qemu_img
from tests.differential.oracle import Mismatch, Oracle, Request, random_request
from tests.differential.scenario import MIB, SECRET, Chain, Scenario, build, open_options
from tests.support.registry import PROFILE_DRIVERS

_MOST_SNAPSHOTS = 4


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests that run at once, or one other step: grow, shrink, reopen, and create, apply or delete a snapshot."""

    kind: str
    requests: tuple[Request, ...] = ()
    length: int = 0
    choice: int = 0
    """Which of the snapshots, counted round and round."""

    def __str__(self) -> str:
        return f"{self.kind} {self.length or self.choice or ''}: " + "; ".join(map(str, self.requests))


def batches(scenario: Scenario, oracle: Oracle, count: int) -> Iterator[Batch]:
    """The steps of a run. Depends on the seed and on the oracle's windows and length only."""
    rng = random.Random(f"batches {scenario.seed}")
    kinds = ("apart", "overlapping", "grow", "shrink", "reopen", "create", "apply", "delete")
    resizes, snapshots = ("resize" in scenario.profile.can), ("snapshots" in scenario.profile.can)
    weights = (60, 30, 4 * resizes, 4 * resizes, 3, 4 * snapshots, 3 * snapshots, 2 * snapshots)
    for _ in range(count):
        kind = rng.choices(kinds, weights)[0]
        if kind == "grow":
            yield Batch(
                kind, length=oracle.length + rng.choice((512, 3 * 512, scenario.cluster_size, rng.randrange(1, MIB)))
            )
        elif kind == "shrink":
            start, size = oracle.windows[-1]
            at_end = start + size == oracle.length
            yield Batch(kind, length=rng.randint(start + max(1, size // 2) if at_end else start + size, oracle.length))
        elif kind == "reopen":
            yield Batch(kind)
        elif kind in ("create", "apply", "delete"):
            yield Batch(kind, choice=rng.randrange(1000))
        else:
            wanted = rng.choice((1, 2, 4, 8))
            yield Batch(kind, tuple(_requests(rng, scenario, oracle, wanted, apart=kind == "apart")))


def _requests(rng: random.Random, scenario: Scenario, oracle: Oracle, wanted: int, *, apart: bool) -> Iterator[Request]:
    taken: list[Request] = []
    windows = oracle.windows
    if not apart:
        # Close together, so that they meet.
        start, count = rng.choice(windows)
        span = min(count, max(4 * min(scenario.cluster_size, 64 << 10), 4096))
        windows = ((start + rng.randrange(count - span + 1), span),)
    for _ in range(wanted):
        request = random_request(rng, windows, min(scenario.cluster_size, 256 << 10), scenario.cluster_size)
        if request.kind == "compressed" and not scenario.compresses:
            continue
        if request.kind == "discard" and "discard" not in scenario.profile.can:
            continue
        if apart and any(request.overlaps(other) and (request.changes or other.changes) for other in taken):
            continue
        taken.append(request)
        yield request


# Reads and changes come by turns here: places are to be remembered all the same.
places.STEADY = places.PAUSE = 1
# What could not be written at once is tried again soon.
attempts.MAX_SKIPPED_ATTEMPTS = 1


class Run:
    """The state of one run."""

    def __init__(self, scenario: Scenario, directory: Path, chain: Chain) -> None:
        self.scenario = scenario
        self.directory = directory
        self.scratch = directory / "scratch"
        self.chain = chain
        self.fingerprints = self.chain.fingerprints()
        self.oracle = Oracle.of_image(self.chain, scenario.windows, self.scratch)
        self.kept: dict[str, Oracle] = {}
        """What our snapshots hold, by name."""
        self._snapshots = 0
        self._opening = random.Random(f"opening {scenario.seed}")
        self.graph: Graph
        self.backend: Backend

    async def open(self) -> None:
        """Open the chain, with other options each time."""
        self.graph = Graph(PROFILE_DRIVERS)
        options = open_options(self.scenario, self.chain, self._opening)
        self.backend = await self.graph.open_backend(options, writable=True)
        if random.Random(f"short way {self.scenario.seed} {self._snapshots}").random() < 0.5:
            self.backend.immediate.disable()

    async def close(self) -> None:
        """Close it, and leave nothing."""
        await self.backend.close()
        assert not self.graph.nodes

    async def step(self, batch: Batch) -> None:
        """Run one batch."""
        if batch.kind == "apart":
            await self.oracle.run_apart(self.backend, list(batch.requests))
        elif batch.kind == "overlapping":
            await self.oracle.run_overlapping(self.backend, list(batch.requests))
        elif batch.kind in ("grow", "shrink"):
            await self._resize(-(-batch.length // 512) * 512)
        elif batch.kind in ("create", "apply", "delete"):
            await self._change_snapshots(batch.kind, batch.choice)
        else:
            await self.close()
            await self.open()

    async def _resize(self, length: int) -> None:
        backing = self.backend.node.backing
        hides = backing is not None and backing.node.length > self.oracle.length
        snapshots = "snapshots" in self.backend.node.driver.information()
        if self.scenario.version == "0.10" and (hides or snapshots):
            return  # version 2 has nothing to hide it with, nor a size for each snapshot
        await self.backend.truncate(length, self._preallocation(length))
        self.oracle.resize(length)

    def _preallocation(self, length: int) -> str:
        """How space is reserved for what is added: in encrypted images that must not show what the file holds there."""
        if self.scenario.encryption[-1] is None or self.scenario.version == "0.10" or length <= self.oracle.length:
            return "off"
        rng = random.Random(f"preallocation {self.scenario.seed} {length}")
        return rng.choice(("off", "off", "metadata", "falloc", "full"))

    async def _change_snapshots(self, kind: str, choice: int) -> None:
        if self.scenario.data_file:
            return
        if kind == "create" or not self.kept:
            if len(self.kept) < _MOST_SNAPSHOTS:
                self._snapshots += 1
                name = f"ours{self._snapshots}"
                await self.backend.create_snapshot(SnapshotInfo("", name, choice))
                self.kept[name] = self.oracle.copy()
            return
        name = list(self.kept)[choice % len(self.kept)]
        id = next(found.id for found in self.backend.list_snapshots() if found.name == name)
        if kind == "apply":
            await self.backend.apply_snapshot(id)
            self.oracle.become(self.kept[name])
        else:
            await self.backend.delete_snapshot(id)
            del self.kept[name]

    async def check_as_it_lies(self) -> None:
        """A copy of the file, taken while it is open, is no worse than leaky, and has everything once it is flushed."""
        self._check_copy(compare=False)
        await self.backend.flush()
        self._check_copy(compare=True)

    def _check_copy(self, *, compare: bool) -> None:
        if self.scenario.data_file:
            return  # a copy of the image alone would share the data file with us
        copy = self.directory / "copy"
        shutil.copyfile(self.chain.top, copy)
        try:
            if self.scenario.profile.asks_for_repair(copy.read_bytes()[:512]):
                # QEMU, too, repairs it before it writes.
                qemu_img("check", "-q", "-r", "all", *SECRET, self.chain.name(copy), check=False)
            wrong = self.chain.check(copy)
            wrong.pop("leaks", None)
            if wrong:
                raise Mismatch(f"the judge's check of the image as it lies: {wrong}")
            if compare:
                content = Oracle.of_image(self.chain, self.oracle.windows, self.scratch, copy)
                self.oracle.compare(content, "the judge's reading of the image as it lies")
        finally:
            copy.unlink()

    async def check_closed(self) -> None:
        """The image is whole to the judge and to us, and the judge reads from it what the oracle says; nothing below it
        has changed."""
        if self.scenario.profile.may_leak:
            await our_check(self.chain, Repair.LEAKS)
        ours = await our_check(self.chain)
        if not ours.clean:
            raise Mismatch(f"our check: {ours.findings[:3]}")
        if wrong := self.chain.check():
            raise Mismatch(f"the judge's check: {wrong}")
        self.oracle.compare(Oracle.of_image(self.chain, self.oracle.windows, self.scratch), "the judge's reading")
        for name, expected in self.kept.items():
            self._check_snapshot(name, expected)
        if self.chain.fingerprints() != self.fingerprints:
            raise Mismatch("an image below the active one has changed")

    def _check_snapshot(self, name: str, expected: Oracle) -> None:
        """QEMU applies a snapshot to a copy of the image, and finds there what the disk held."""
        copy = self.directory / "copy"
        shutil.copyfile(self.chain.top, copy)
        try:
            qemu_img("snapshot", *SECRET, "-a", name, self.chain.name(copy))
            content = Oracle.of_image(self.chain, expected.windows, self.scratch, copy)
            expected.compare(content, f"QEMU's reading of snapshot {name}")
            found = self.chain.check(copy)
            if found.keys() - {"leaks"}:
                raise Mismatch(f"qemu-img check of the image with snapshot {name} applied: {found}")
        finally:
            copy.unlink()


async def our_check(chain: Chain, repair: Repair = Repair.NOTHING) -> CheckResult:
    """What our check says of the active image, which is closed."""
    graph = Graph(PROFILE_DRIVERS)
    try:
        spec = {"driver": "file", "filename": str(chain.top)}
        backend = await graph.open_backend(spec, writable=repair is not Repair.NOTHING)
        return await chain.profile.driver.check(Files(backend.node), repair, lambda done, total: None)
    finally:
        await graph.close()


async def run(scenario: Scenario, directory: Path, count: int, *, look_every: int) -> tuple[int, str] | None:
    """Run ``count`` batches; every ``look_every`` of them the whole disk and the file as it lies are compared.

    Returns None, or after how many batches something was wrong, and what.
    """
    state = Run(scenario, directory, await build(scenario, directory))
    done, last = 0, ""
    try:
        await state.open()
        await state.oracle.compare_backend(state.backend)
        for batch in batches(scenario, state.oracle, count):
            last = str(batch)
            with trio.fail_after(120):
                await state.step(batch)
            done += 1
            if done % look_every == 0:
                await state.oracle.compare_backend(state.backend)
                await state.check_as_it_lies()
        await state.oracle.compare_backend(state.backend)
        await state.close()
        await state.check_closed()
    except Exception as exc:
        return done + 1, f"{_cause(exc)!r} in or after: {last}"
    return None


def _cause(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


async def run_or_explain(scenario: Scenario, directory: Path, length: int | None = None) -> None:
    """Run ``length`` batches; if it fails, find the shortest prefix that does and fail with the way to repeat it."""
    count = length or scenario.batches
    look_every = max(count // 4, 1)
    first = directory / "run"
    first.mkdir()
    failure = await run(scenario, first, count, look_every=look_every)
    if failure is None:
        shutil.rmtree(first)
        return
    again = directory / "again"
    again.mkdir()
    shorter = await run(scenario, again, failure[0], look_every=1)
    prefix, why = shorter or failure
    raise AssertionError(
        f"{scenario}\nfails after {prefix} batches: {why}\n"
        f"replay: pytest tests/differential --seed {scenario.seed}; the images are in {directory}"
    )
