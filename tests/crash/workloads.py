"""Workloads for crash tests: what a guest does, and the image that it does it to."""

from __future__ import annotations

import itertools
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import trio

from tests.conftest import qemu_img, qemu_io
from tests.crash.recording import Guest, Recording, record
from tests.crash.replay import SECTOR
from tests.support.profiles import PROFILES, QCOW2, FormatProfile
from tests.support.qcow2 import pausing_everywhere

KIB = 1 << 10
MIB = 1 << 20

Run = Callable[[Guest, random.Random, int], Awaitable[None]]
"""Called with the guest, a random source and the cluster size."""


class Workload(NamedTuple):
    """A workload and its image."""

    name: str
    run: Run
    size: int = 256 * KIB
    cluster_size: int = 4096
    version: int = 3
    options: str = ""
    """More creation options, as for qemu-img."""
    prepare: tuple[str, ...] = ()
    """qcow2 only: qemu-io commands for the image, ``snapshot NAME`` for an internal snapshot between them."""
    backing: bool = False
    pressure: bool = False
    """Little memory, so that there are commits between the guest's flushes."""
    profile: FormatProfile = QCOW2

    async def record(self, folder: Path, seed: int) -> Recording:
        """Make the image, run the workload on it, and return what happened."""
        image, backing = await self.make(folder)
        return await record(image, self.runner(seed), profile=self.profile, backing=backing, pressure=self.pressure)

    async def make(self, folder: Path) -> tuple[Path, Path | None]:
        """Make the image; returns it and the raw file below it, if there is one."""
        image, below = folder / f"{self.name}.{self.profile.name}", folder / f"{self.name}.raw"
        if self.backing:
            random_ = random.Random(self.name)
            below.write_bytes(
                b"".join(b"base%08d" % random_.randrange(10**8) * 42 + b"....base" for _ in range(self.size // SECTOR))
            )
        options: dict[str, object] = self.profile.block(self.cluster_size)
        if self.profile is QCOW2:
            options["compat"] = "0.10" if self.version == 2 else "1.1"
        options |= dict(option.split("=") for option in self.options.split(",") if option)
        await self.profile.create(image, self.size, options, (below, "raw") if self.backing else None)
        for is_snapshot, commands in itertools.groupby(self.prepare, lambda command: command.startswith("snapshot ")):
            if is_snapshot:
                for command in commands:
                    qemu_img("snapshot", "-c", command.split()[1], image)
            else:
                qemu_io(image, *commands, fmt="qcow2", options="-d unmap")
        return image, below if self.backing else None

    def runner(self, seed: int) -> Callable[[Guest], Awaitable[None]]:
        """Return what the guest does."""

        async def run(guest: Guest) -> None:
            await self.run(guest, random.Random(seed), self.cluster_size)

        return run


_stamps = itertools.count(1)


def stamped(length: int) -> bytes:
    """Bytes that no other request has written, sector by sector."""
    stamp = b"w%07d" % (next(_stamps) % 10**7)
    return b"".join((stamp + b"%08d" % index) * 32 for index in range(-(-length // SECTOR)))[:length]


def places(random_: random.Random, size: int, unit: int, count: int) -> Iterator[tuple[int, int]]:
    """``count`` ranges of sectors: some small, some whole units, some long, at random places."""
    for _ in range(count):
        length = random_.choice((SECTOR, unit, unit, 2 * unit, random_.randrange(1, 5 * unit // SECTOR) * SECTOR))
        length = min(length, size)
        offset = random_.randrange((size - length) // SECTOR + 1) * SECTOR
        if random_.random() < 0.5:
            offset = offset // unit * unit
        yield offset, min(length, size - offset)


async def allocation(guest: Guest, random_: random.Random, unit: int) -> None:
    """First writes, of all sizes, everywhere."""
    for index, (offset, length) in enumerate(places(random_, guest.length, unit, 40), 1):
        await guest.write(offset, stamped(length))
        if index % 8 == 0:
            await guest.flush()


async def sequential(guest: Guest, random_: random.Random, unit: int) -> None:
    """From front to back, with a flush now and then."""
    await _write_through(guest, random_, unit, 0)


async def last_part(guest: Guest, random_: random.Random, unit: int) -> None:
    """The last eighth, from front to back."""
    await _write_through(guest, random_, unit, guest.length // 8 * 7)


async def _write_through(guest: Guest, random_: random.Random, unit: int, offset: int) -> None:
    while offset < guest.length:
        length = min(random_.choice((unit // 2, unit, 3 * unit)), guest.length - offset)
        await guest.write(offset, stamped(length))
        offset += length
        if random_.random() < 0.1:
            await guest.flush()


async def overwrite(guest: Guest, random_: random.Random, unit: int) -> None:
    """The same few places again and again."""
    few = list(places(random_, guest.length, unit, 5))
    for index in range(1, 41):
        offset, length = random_.choice(few)
        await guest.write(offset, stamped(length))
        if index % 7 == 0:
            await guest.flush()


async def small(guest: Guest, random_: random.Random, unit: int) -> None:
    """Writes of odd lengths at odd places."""
    for index in range(1, 41):
        length = random_.randrange(1, 2 * unit)
        await guest.write(random_.randrange(guest.length - length), stamped(length))
        if index % 9 == 0:
            await guest.flush()


async def discards(guest: Guest, random_: random.Random, unit: int) -> None:
    """Writes and discards by turns, so that freed clusters are used again."""
    await _writes_and(guest, random_, unit, lambda offset, length: guest.discard(offset, length, unit))


async def zeroes(guest: Guest, random_: random.Random, unit: int) -> None:
    """Writes and write-zeroes by turns, with and without unmapping."""

    async def zero(offset: int, length: int) -> None:
        await guest.write_zeroes(offset, length, may_unmap=random_.random() < 0.5)

    await _writes_and(guest, random_, unit, zero)


async def _writes_and(
    guest: Guest, random_: random.Random, unit: int, other: Callable[[int, int], Awaitable[None]]
) -> None:
    for index, (offset, length) in enumerate(places(random_, guest.length, unit, 50), 1):
        if random_.random() < 0.6:
            await guest.write(offset, stamped(length))
        else:
            await other(offset, 2 * length if offset + 2 * length <= guest.length else length)
        if index % 6 == 0:
            await guest.flush()


async def growth(guest: Guest, random_: random.Random, unit: int) -> None:
    """The disk grows while it is written, its L1 table with it."""
    for round_ in range(5):
        for offset, length in places(random_, guest.length, unit, 6):
            await guest.write(offset, stamped(length))
        if round_ % 2:
            await guest.flush()
        await guest.resize(guest.length * 2 + random_.randrange(8) * SECTOR)
        if random_.random() < 0.5:
            await guest.flush()


async def appending(guest: Guest, random_: random.Random, unit: int) -> None:
    """Writes make the disk longer, as on a growable mount; now and then it shrinks, and old content lies behind it."""
    for round_ in range(4):
        for index in range(8):
            length = random_.randrange(1, 2 * unit // SECTOR + 1) * SECTOR
            at = guest.length
            await guest.resize(at + length)
            await guest.write(at, stamped(length))
            if index % 4 == 3 and random_.random() < 0.5:
                await guest.flush()
        if round_ % 2 == 0:
            await guest.resize(random_.randrange(guest.length // 2, guest.length) // SECTOR * SECTOR)
            if random_.random() < 0.5:
                await guest.flush()


async def shrinking(guest: Guest, random_: random.Random, unit: int) -> None:
    """The disk shrinks and grows while it is written."""
    for _ in range(8):
        for offset, length in places(random_, guest.length, unit, 5):
            await guest.write(offset, stamped(length))
        if random_.random() < 0.5:
            await guest.flush()
        await guest.resize(random_.randrange(8 * unit, 128 * KIB) // SECTOR * SECTOR)
        if random_.random() < 0.5:
            await guest.flush()


async def mixed(guest: Guest, random_: random.Random, unit: int) -> None:
    """Everything."""
    for offset, length in places(random_, guest.length, unit, 60):
        match random_.randrange(6):
            case 0:
                await guest.write_zeroes(offset, length, may_unmap=random_.random() < 0.5)
            case 1:
                await guest.discard(offset, length, unit)
            case _:
                await guest.write(offset, stamped(length))
        if random_.random() < 0.15:
            await guest.flush()


async def snapshotting(guest: Guest, random_: random.Random, unit: int) -> None:
    """Snapshots are made, applied and deleted between writes and discards."""
    await _snapshotting(guest, random_, unit, grows=False)


async def snapshotting_growth(guest: Guest, random_: random.Random, unit: int) -> None:
    """The same on a disk that grows, and shrinks when an old snapshot is applied."""
    await _snapshotting(guest, random_, unit, grows=True)


async def _snapshotting(guest: Guest, random_: random.Random, unit: int, *, grows: bool) -> None:
    names: list[str] = []
    for index in range(24):
        for offset, length in places(random_, guest.length, unit, random_.randrange(4)):
            if random_.random() < 0.8 or guest.backend.node.backing is not None:
                await guest.write(offset, stamped(length))
            else:
                await guest.discard(offset, length, unit)
        if grows and random_.random() < 0.2:
            await guest.resize(guest.length + random_.randrange(1, 200) * SECTOR)
        kind = random_.choice(("create", "create", "apply", "delete", "flush"))
        if kind == "create" or not names:
            names.append(f"s{index}")
            await guest.create_snapshot(names[-1])
        elif kind == "apply":
            await guest.apply_snapshot(random_.choice(names))
        elif kind == "delete":
            await guest.delete_snapshot(names.pop(random_.randrange(len(names))))
        else:
            await guest.flush()


async def compressing(guest: Guest, random_: random.Random, unit: int) -> None:
    """Compressed writes of one and of several clusters, with others among them."""
    clusters = guest.length // unit
    for _ in range(50):
        first = random_.randrange(clusters)
        count = min(random_.choice((1, 1, 2, 5)), clusters - first)
        match random_.randrange(8):
            case 0:
                await guest.discard(first * unit, count * unit, unit)
            case 1:
                await guest.write(first * unit + unit // 2, stamped(unit // 4))
            case 2:
                await guest.write_compressed(first * unit, random_.randbytes(count * unit))
            case _:
                await guest.write_compressed(first * unit, stamped(count * unit))
        if random_.random() < 0.15:
            await guest.flush()


async def beside_snapshots(guest: Guest, random_: random.Random, unit: int) -> None:
    """Snapshots are made and deleted beside a writer, who allocates and copies but writes what is there already: so it
    is known what a snapshot holds."""
    names: list[str] = []

    async def writer() -> None:
        for offset, length in places(random_, guest.length, unit, 8):
            await guest.write(offset, bytes(guest.oracle.current[offset : offset + length]))
            if random_.random() < 0.2:
                await guest.flush()

    for index in range(12):
        for offset, length in places(random_, guest.length, unit, random_.randrange(4)):
            await guest.write(offset, stamped(length))
        with pausing_everywhere():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer)
                await trio.lowlevel.checkpoint()
                if names and random_.random() < 0.5:
                    await guest.delete_snapshot(names.pop(random_.randrange(len(names))))
                else:
                    names.append(f"s{index}")
                    await guest.create_snapshot(names[-1])


async def parallel(guest: Guest, random_: random.Random, unit: int) -> None:
    """Four writers, each in sectors of its own that share clusters with the others', and one who flushes."""

    # Whole sectors: which of two writes to the same sector comes first is for the disk to choose.
    part = max(unit // 4, SECTOR)

    async def writer(number: int) -> None:
        for _ in range(12):
            start = random_.randrange(guest.length // (4 * part)) * 4 * part
            await guest.write(start + number * part, stamped(part))
            await trio.lowlevel.checkpoint()

    async def flusher() -> None:
        for _ in range(6):
            await guest.flush()

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(writer, number)
        nursery.start_soon(flusher)


FULL = ("write -P 17 0 128k", "write -P 19 160k 40k")
COMPRESSED = tuple(f"write -c -P {n + 1} {n * 4}k 4k" for n in range(40))
SNAPSHOTS = ("write -P 17 0 160k", "snapshot one", "write -P 19 16k 64k", "snapshot two", "write -P 23 100k 9k")

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("allocation", allocation),
        Workload("allocation-v2", allocation, version=2),
        Workload("allocation-64k", allocation, size=MIB, cluster_size=64 * KIB),
        Workload("allocation-512", allocation, cluster_size=512, options="refcount_bits=1"),
        Workload("sequential", sequential),
        Workload("overwrite", overwrite, prepare=FULL),
        Workload("small", small),
        Workload("copy-on-write", allocation, backing=True),
        Workload("copy-on-write-small", small, backing=True),
        Workload("discard", discards, prepare=FULL),
        Workload("discard-v2", discards, prepare=FULL, version=2),
        Workload("discard-backing", discards, backing=True),
        Workload("write-zeroes", zeroes, prepare=FULL),
        Workload("write-zeroes-v2", zeroes, prepare=FULL, version=2),
        Workload("preallocated", mixed, options="preallocation=metadata"),
        Workload("growth", growth, size=16 * KIB, cluster_size=512),
        Workload("growth-v2", growth, size=16 * KIB, cluster_size=512, version=2),
        Workload(
            "refcount-growth",
            last_part,
            size=2 * MIB,
            cluster_size=512,
            options="refcount_bits=64",
            prepare=("write -P 17 0 1792k",),
        ),
        Workload("snapshots", mixed, prepare=SNAPSHOTS),
        Workload("snapshots-v2", allocation, prepare=SNAPSHOTS, version=2),
        Workload("compressed", mixed, prepare=COMPRESSED),
        Workload("mixed-512", mixed, cluster_size=512),
        Workload("appending", appending, size=8 * KIB),
        Workload("appending-512", appending, size=8 * KIB, cluster_size=512),
        Workload("appending-backing", appending, size=24 * KIB, backing=True),
        Workload("appending-snapshots", appending, size=8 * KIB, prepare=("write -P 17 0 8k", "snapshot one")),
        Workload("appending-extended-l2", appending, size=32 * KIB, cluster_size=16 * KIB, options="extended_l2=on"),
        Workload("shrinking", shrinking),
        Workload("shrinking-512", shrinking, cluster_size=512),
        Workload("shrinking-snapshots", shrinking, prepare=SNAPSHOTS),
        Workload("pressure", discards, prepare=FULL, pressure=True),
        Workload("pressure-512", mixed, cluster_size=512, pressure=True),
        Workload("pressure-backing", mixed, backing=True, cluster_size=1024, pressure=True),
        Workload("lazy-refcounts", mixed, options="lazy_refcounts=on"),
        Workload("lazy-refcounts-growth", growth, size=16 * KIB, cluster_size=512, options="lazy_refcounts=on"),
        Workload("lazy-refcounts-snapshots", mixed, options="lazy_refcounts=on", prepare=SNAPSHOTS),
        Workload("snapshot-changes", snapshotting, prepare=FULL),
        Workload("snapshot-changes-v2", snapshotting, prepare=FULL, version=2),
        Workload("snapshot-changes-512", snapshotting_growth, cluster_size=512, options="refcount_bits=4"),
        Workload("snapshot-changes-backing", snapshotting, backing=True),
        Workload("snapshot-changes-compressed", snapshotting, prepare=COMPRESSED),
        Workload("snapshot-changes-growth", snapshotting_growth, prepare=FULL),
        Workload("snapshot-changes-lazy", snapshotting, options="lazy_refcounts=on"),
        Workload("compressed-writes", compressing),
        Workload("compressed-writes-512", compressing, cluster_size=512, size=64 * KIB, pressure=True),
        Workload("compressed-writes-64k", compressing, cluster_size=64 * KIB, size=2 * MIB, prepare=SNAPSHOTS),
        Workload("compressed-writes-zstd", compressing, options="compression_type=zstd", backing=True),
        Workload("compressed-writes-v2", compressing, version=2),
        Workload("extended-l2", mixed, cluster_size=16 * KIB, options="extended_l2=on", size=512 * KIB),
        Workload("extended-l2-small", small, cluster_size=16 * KIB, options="extended_l2=on", backing=True),
        Workload("extended-l2-zeroes", zeroes, cluster_size=16 * KIB, options="extended_l2=on", prepare=FULL),
        Workload("extended-l2-snapshots", mixed, cluster_size=16 * KIB, options="extended_l2=on", prepare=SNAPSHOTS),
        Workload(
            "extended-l2-preallocated",
            mixed,
            cluster_size=16 * KIB,
            options="extended_l2=on,preallocation=metadata",
            backing=True,
        ),
        Workload("extended-l2-compressed-writes", compressing, cluster_size=16 * KIB, options="extended_l2=on"),
        Workload("extended-l2-growth", growth, cluster_size=16 * KIB, options="extended_l2=on", size=48 * KIB),
        Workload("extended-l2-parallel", parallel, cluster_size=16 * KIB, options="extended_l2=on", backing=True),
        Workload("beside-snapshots", beside_snapshots, prepare=FULL),
        Workload("beside-snapshots-512", beside_snapshots, cluster_size=512),
        Workload("beside-snapshots-v2", beside_snapshots, prepare=FULL, version=2),
        Workload("parallel", parallel),
        Workload("parallel-backing", parallel, backing=True),
    )
}


def workloads_of(profile: FormatProfile) -> Iterator[Workload]:
    """Yield the workloads that any format has to stand, each on every kind of its images."""
    can = profile.can
    runs: dict[str, Run] = {"allocation": allocation, "small": small, "overwrite": overwrite, "parallel": parallel}
    if {"zeroes", "discard"} <= can:
        runs |= {"mixed": mixed, "discard": discards, "write-zeroes": zeroes}
    if "resize" in can:
        runs |= {"growth": growth, "shrinking": shrinking}
    for variant, more in profile.variants.items():
        options = ",".join(f"{name}={value}" for name, value in more.items())
        for name, run in runs.items():
            size = 16 * KIB if run is growth else 256 * KIB
            name = "-".join(part for part in (profile.name, variant, name) if part)
            plain = Workload(name, run, size, profile.block_sizes[1], options=options, profile=profile)
            block = profile.block_sizes[0]
            yield plain
            yield plain._replace(name=f"{name}-{block}", cluster_size=block)
            if "backing" in can and run not in (growth, shrinking):
                yield plain._replace(name=f"{name}-backing", backing=True)


FORMATS: dict[str, Workload] = {
    workload.name: workload
    for profile in PROFILES.values()
    if profile is not QCOW2
    for workload in workloads_of(profile)
}
"""The workloads of all formats that have nothing more."""
