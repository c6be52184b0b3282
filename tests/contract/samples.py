"""How to get a disk of each driver. A new driver in the table needs a line in ``SAMPLES``, or the suite fails.

Whoever writes a driver: write its sample first, then run ``pytest tests/contract -k NAME`` until it passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import mmap
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.image.create import create_image
from fusedisk.drivers.format.qcow2.driver import Qcow2Driver
from tests.conftest import require_root, require_tool, run_tool
from tests.support.registry import FORMAT_DRIVERS as DRIVERS

SIZE = 4 << 20
"""Bytes of every sample."""

Options = dict[str, Any]
Make = Callable[[Path], contextlib.AbstractAsyncContextManager[Options]]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A driver's disk of ``SIZE`` bytes that reads as zeroes, in a directory of its own."""

    make: Make
    """Makes the storage and gives the options that open it (writable or not); takes it away afterwards."""
    remembers: bool = True
    """Reads give what was written."""
    grows: bool = True
    """It can be made longer."""
    shrinks: bool = True
    """It can be made shorter."""
    storage: str | None = "file"
    """The option with the node that it stores its bytes in; None for drivers at the bottom."""
    writes_always: bool = False
    """It makes no sense over something read-only."""
    locked: bool = True
    """A second writer in another graph is refused by image locks."""
    plain_name: bool = False
    """The name printed for it, once opened by probing, is that of its file."""


def _plain(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@contextlib.asynccontextmanager
async def _file(directory: Path) -> AsyncIterator[Options]:
    yield {"driver": "file", "filename": str(_plain(directory / "disk.raw"))}


@contextlib.asynccontextmanager
async def _raw(directory: Path) -> AsyncIterator[Options]:
    async with _file(directory) as file:
        yield {"driver": "raw", "file": file}


@contextlib.asynccontextmanager
async def _loop_device(directory: Path) -> AsyncIterator[Options]:
    require_root()
    require_tool("losetup")
    device = run_tool("losetup", "-f", "--show", _plain(directory / "disk.raw")).strip()
    try:
        yield {"driver": "host_device", "filename": device}
    finally:
        run_tool("losetup", "-d", device)


@contextlib.asynccontextmanager
async def _null(directory: Path) -> AsyncIterator[Options]:
    yield {"driver": "null-co", "size": SIZE, "read-zeroes": True}


def created(format: str, **options: object) -> Make:
    """``make`` for a format whose images fusedisk creates."""

    @contextlib.asynccontextmanager
    async def make(directory: Path) -> AsyncIterator[Options]:
        path = directory / f"disk.{format}"
        await create_image(DRIVERS, format, str(path), {"size": SIZE, **options})
        yield {"driver": format, "file": {"driver": "file", "filename": str(path)}}

    return make


def filtering(driver: str, option: str = "file", **more: Any) -> Make:
    """``make`` for a filter: over a raw disk, or over what ``more`` puts into ``option``."""

    @contextlib.asynccontextmanager
    async def make(directory: Path) -> AsyncIterator[Options]:
        async with _raw(directory) as below:
            yield {"driver": driver, option: below, **more}

    return make


@contextlib.asynccontextmanager
async def _log_writes(directory: Path) -> AsyncIterator[Options]:
    async with _raw(directory) as below:
        log = directory / "log"
        log.touch()
        yield {"driver": "blklogwrites", "file": below, "log": {"driver": "file", "filename": str(log)}}


@contextlib.asynccontextmanager
async def _copy_on_read(directory: Path) -> AsyncIterator[Options]:
    async with created("qcow2")(directory) as below:
        yield {"driver": "copy-on-read", "file": below}


@contextlib.asynccontextmanager
async def _encrypted(directory: Path) -> AsyncIterator[Options]:
    key = directory / "key"
    key.write_text("a passphrase")
    encrypt = {"encrypt.format": "luks", "encrypt.iter-time": 10, "encrypt.key-file": str(key)}
    async with created("qcow2", **encrypt)(directory) as options:
        yield options | {"encrypt.key-file": str(key)}


@functools.cache
def _shared_memory() -> memoryview:
    """A small memfd. One for all tests, as they count open files."""
    descriptor = os.memfd_create("changes")
    os.ftruncate(descriptor, mmap.PAGESIZE)
    buffer = memoryview(mmap.mmap(descriptor, mmap.PAGESIZE))
    os.close(descriptor)
    return buffer


@contextlib.asynccontextmanager
async def _logged(directory: Path) -> AsyncIterator[Options]:
    """A qcow2 image whose changes in memory are logged in a memfd."""
    plain_open, buffer = Qcow2Driver.open, _shared_memory()

    async def open_and_log(self: Qcow2Driver) -> None:
        await plain_open(self)
        self.log_changes(buffer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qcow2Driver, "open", open_and_log)
        async with created("qcow2", cluster_size=4096)(directory) as options:
            yield options


SAMPLES: dict[str, Sample] = {
    "qcow2": Sample(created("qcow2"), plain_name=True),
    "raw": Sample(_raw, plain_name=True),
    "file": Sample(_file, storage=None),
    "host_device": Sample(_loop_device, storage=None, grows=False, shrinks=False),
    "null-co": Sample(_null, remembers=False, storage=None, locked=False),
    "copy-on-read": Sample(_copy_on_read, writes_always=True),
    "blkdebug": Sample(filtering("blkdebug", "image"), storage="image"),
    "blklogwrites": Sample(_log_writes),
    "tiny": Sample(created("tiny"), plain_name=True),
}
"""By the driver's name in the table. Variants of a driver carry a second word: ``qcow2 v2``."""

VARIANTS: dict[str, Sample] = {
    "tiny large": Sample(created("tiny", block_size=1 << 20), plain_name=True),
    "tiny tree": Sample(created("tiny", levels=2), plain_name=True),
    "qcow2 v2": Sample(created("qcow2", compat="0.10"), plain_name=True),
    "qcow2 small": Sample(created("qcow2", cluster_size=512), plain_name=True),
    "qcow2 large": Sample(created("qcow2", cluster_size=2 << 20), plain_name=True),
    "qcow2 preallocated": Sample(created("qcow2", preallocation="metadata"), plain_name=True),
    "qcow2 lazy": Sample(created("qcow2", lazy_refcounts=True), plain_name=True),
    "qcow2 data file": Sample(created("qcow2", data_file="disk.data"), plain_name=True),
    "qcow2 encrypted": Sample(_encrypted),
    "qcow2 logged": Sample(_logged, plain_name=True),
    "qcow2 subclusters": Sample(created("qcow2", extended_l2=True), plain_name=True),
}


def over(name: str) -> Sample:
    """A filter without any difference over another sample."""

    @contextlib.asynccontextmanager
    async def make(directory: Path) -> AsyncIterator[Options]:
        async with SAMPLES[name].make(directory) as below:
            yield {"driver": "bare", "file": below}

    return dataclasses.replace(SAMPLES[name], make=make, storage="file", plain_name=False)


@contextlib.asynccontextmanager
async def _joined(directory: Path) -> AsyncIterator[Options]:
    """Parts of odd sizes and of different formats."""
    parts = []
    for format, size in (("qcow2", 1_000_448), ("raw", 512), ("raw", SIZE - 1_000_960)):
        path = str(directory / f"part{len(parts)}")
        await create_image(DRIVERS, format, path, {"size": size})
        parts.append({"driver": format, "file": {"driver": "file", "filename": path}})
    yield {"driver": "joined", "children": parts}


OF_TESTS: dict[str, Sample] = {
    **{f"bare {name}": over(name) for name in SAMPLES},
    "tickets": Sample(filtering("tickets", tickets=1 << 40)),
    "joined": Sample(_joined, storage="children"),
}
"""Drivers of :mod:`tests.support.filters`."""

ALL = SAMPLES | VARIANTS | OF_TESTS


def driver_of(name: str) -> str:
    """The driver of a sample."""
    return name.split()[0]
