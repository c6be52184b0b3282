"""A repair is interrupted: the next one finishes it, and nothing that could be read is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.block.model.files import Files
from fusedisk.core.errors import FusediskError
from fusedisk.drivers.format.qcow2.driver import Qcow2Driver
from fusedisk.drivers.table import DRIVERS
from tests.crash.judge import Checker, content_of
from tests.crash.replay import Operation, power_cuts, prefixes, read_log
from tests.mutation.damage import Places, damage
from tests.mutation.images import FEATURE_SETS
from tests.support.memory import Store, stores
from tests.support.qcow2 import MEMORY_DRIVERS
from tests.support.thinning import thinned

SETS = ("v2", "v3", "clusters-512", "snapshots", "compressed-zlib", "extended-l2")


@pytest.fixture
def checker() -> Iterator[Checker]:
    with Checker() as checker:
        yield checker


async def repair(image: bytes) -> tuple[bytes, CheckResult]:
    """The image after ``check -r all``. Raises ImageError where that cannot be."""
    store = Store(image)
    with stores(image=store):
        graph = Graph(MEMORY_DRIVERS)
        try:
            backend = await graph.open_backend({"driver": "memory", "filename": "image"}, writable=True)
            result = await Qcow2Driver.check(Files(backend.node), Repair.ALL, lambda done, total: None)
        finally:
            await graph.close()
    return bytes(store.data), result


async def recorded(image: bytes, folder: Path) -> list[Operation]:
    """What a repair writes."""
    path, log = folder / "image", folder / "log"
    path.write_bytes(image)
    log.write_bytes(b"")
    graph = Graph(DRIVERS)
    storage = {
        "driver": "blklogwrites",
        "file": {"driver": "file", "filename": str(path)},
        "log": {"driver": "file", "filename": str(log)},
    }
    backend = await graph.open_backend(storage, writable=True)
    await Qcow2Driver.check(Files(backend.node), Repair.ALL, lambda done, total: None)
    await graph.close()
    return read_log(log)


async def check_repairs(name: str, folder: Path, checker: Checker, images: int, crashes: int) -> None:
    sample = FEATURE_SETS[name](folder)
    whole = sample.path.read_bytes()
    whole += bytes(-len(whole) % 512)
    interrupted = 0
    for seed in range(1000):
        random_ = random.Random(f"{name} {seed}")
        broken, _ = damage(Places(whole), random_)
        broken += bytes(-len(broken) % 512)
        try:
            found, result = await repair(broken)
            content = await content_of(found, None)
        except FusediskError:
            continue
        if found == broken or not result.clean:
            continue
        log = await recorded(broken, folder)
        every = list(prefixes(broken, log)) + list(power_cuts(broken, log, random_, 2))
        for crash in random_.sample(every, min(len(every), crashes)):
            again, result = await repair(crash.image)
            where = f"seed {seed}, after operation {crash.cut}, {crash.what}"
            assert result.clean, f"{where}: {result.findings[:2]}"
            verdict = checker.check(again).result()
            assert not verdict.corruptions, f"{where}: {verdict.text}"
            found_again = await content_of(again, None)
            # Names that a damaged length makes of whatever follows need not stay.
            assert found_again.disk == content.disk, where
            assert [*found_again.snapshots.values()] == [*content.snapshots.values()], where
        interrupted += 1
        if interrupted == images:
            return
    raise AssertionError(f"only {interrupted} damaged images could be repaired")


@pytest.mark.parametrize("name", thinned(SETS))
async def test_some_interrupted_repairs(name: str, tmp_path: Path, checker: Checker) -> None:
    await check_repairs(name, tmp_path, checker, images=6, crashes=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
async def test_many_interrupted_repairs(name: str, tmp_path: Path, checker: Checker) -> None:
    await check_repairs(name, tmp_path, checker, images=60, crashes=8)
