"""What was written is handed to the OS after a while, flushed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from fusedisk.core.errors import NoSpaceError
from fusedisk.export.export import WRITE_BEHIND_SECONDS, Export
from tests.support.memory import Store
from tests.support.qcow2 import created_in_memory, in_memory, opened


async def test_metadata_reaches_the_file_without_a_flush(autojump_clock: Any, tmp_path: Path) -> None:
    store = await created_in_memory(Store(), size=1 << 20)
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        export = await Export.open(backend, "disk", 2)
        nursery.start_soon(export.write_behind)
        for number in range(3):
            await export.write(number << 16, b"x" * 4096)
            assert (await content(store, tmp_path)).count(b"x") == number * 4096, "nothing refers to it"
            await trio.sleep(WRITE_BEHIND_SECONDS * 1.5)
            assert (await content(store, tmp_path)).count(b"x") == (number + 1) * 4096
        writes = len(store.steps.of("write", "flush"))
        await trio.sleep(1000)
        assert len(store.steps.of("write", "flush")) == writes, "who writes nothing leaves the file alone"
        nursery.cancel_scope.cancel()


async def test_a_failure_is_left_for_the_flush_to_tell(autojump_clock: Any, tmp_path: Path) -> None:
    store = await created_in_memory(Store(), size=1 << 20)
    async with in_memory(store) as backend, trio.open_nursery() as nursery:
        export = await Export.open(backend, "disk", 2)
        nursery.start_soon(export.write_behind)
        await export.write(0, b"x" * 4096)
        store.steps.fail("write", NoSpaceError("full"))
        await trio.sleep(WRITE_BEHIND_SECONDS * 1.5)
        await export.write(8192, b"x" * 4096)
        await trio.sleep(WRITE_BEHIND_SECONDS * 1.5)
        assert (await content(store, tmp_path)).count(b"x") == 8192
        await export.flush()
        nursery.cancel_scope.cancel()


async def content(store: Store, folder: Path) -> bytes:
    """What somebody finds who opens the image as it lies."""
    path = folder / "copy.qcow2"
    path.write_bytes(store.data)
    async with opened(path, writable=False) as backend:
        return bytes(await backend.read(0, backend.length))
