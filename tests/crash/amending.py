"""Workloads that change settings, with writes between."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable
from functools import partial
from typing import Any

from fusedisk.block.image.amend import amend_node
from tests.crash.recording import Guest
from tests.crash.workloads import KIB, MIB, SNAPSHOTS, Workload, stamped

ZEROES = ("write -P 17 0 100k", "write -z 20k 60k", "write -z 120k 40k", "write -P 3 200k 8k")
SHARED_ZEROES = (*ZEROES, "snapshot one", "write -z 0 40k", "write -P 5 60k 12k", "snapshot two", "write -z 64k 20k")


async def _amend(changes: Iterable[dict[str, Any]], guest: Guest, random_: random.Random, unit: int) -> None:
    """One change after the other, with writes between."""
    backing = guest.backend.node.backing
    for change in changes:
        if isinstance(length := change.get("backing_file"), int):
            assert backing is not None
            change = {**change, "backing_file": _padded(backing.node.filename, length)}
        await amend_node(guest.backend.node, change, force=True)
        for _ in range(3):
            length = random_.randrange(1, 12) * 512
            await guest.write(random_.randrange((guest.length - length) // 512) * 512, stamped(length))
        await guest.flush()


def _amending(name: str, *changes: dict[str, Any], **settings: Any) -> Workload:
    return Workload(name, partial(_amend, changes), **settings)


def _padded(path: str, length: int) -> str:
    """Another name, about so long, of the same file."""
    folder, name = os.path.split(path)
    return f"{folder}/{'/' * (length - len(path))}{name}"


def _renames(*lengths: int) -> list[dict[str, Any]]:
    """Other names of these lengths for the backing file."""
    formats = itertools.cycle(("raw", "file"))
    return [{"backing_file": length, "backing_fmt": format} for length, format in zip(lengths, formats, strict=False)]


DOWN, UP = {"compat": "0.10"}, {"compat": "1.1"}

AMENDING: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _amending("amend-versions", DOWN, UP, DOWN, prepare=ZEROES),
        _amending("amend-versions-backing", DOWN, UP, DOWN, prepare=ZEROES, backing=True),
        _amending("amend-versions-snapshots", DOWN, UP, prepare=SHARED_ZEROES, backing=True),
        _amending("amend-versions-512", DOWN, UP, DOWN, prepare=SHARED_ZEROES, backing=True, cluster_size=512),
        _amending("amend-versions-64k", DOWN, UP, DOWN, backing=True, cluster_size=64 * KIB, size=MIB),
        _amending("amend-upgrade", UP, prepare=SNAPSHOTS, version=2),
        _amending("amend-upgrade-64k", UP, DOWN, backing=True, cluster_size=64 * KIB, version=2),
        _amending("amend-widths", *({"refcount_bits": bits} for bits in (64, 4, 32, 16, 8)), prepare=SNAPSHOTS),
        _amending(
            "amend-widths-512", *({"refcount_bits": bits} for bits in (64, 1, 32)), prepare=ZEROES[:1], cluster_size=512
        ),
        _amending(
            "amend-widths-lazy",
            {"refcount_bits": 32},
            {"lazy_refcounts": False},
            {"refcount_bits": 16, "compat": "0.10"},
            options="lazy_refcounts=on",
            prepare=ZEROES,
        ),
        _amending("amend-lazy", *({"lazy_refcounts": lazy} for lazy in (True, False, True, False)), prepare=SNAPSHOTS),
        _amending("amend-names", *_renames(5, 700, 3, 900, 901, 40), {"backing_file": ""}, backing=True),
        _amending("amend-names-64k", *_renames(900, 5, 1000, 64), backing=True, cluster_size=64 * KIB, size=MIB),
        _amending("amend-names-1k", *_renames(300, 250, 310, 5), backing=True, cluster_size=1024),
        _amending("amend-names-v2", *_renames(300, 450, 30), UP, DOWN, backing=True, version=2),
    )
}
