"""A guest must not be able to turn its guessed raw disk into an image of another format."""

from __future__ import annotations

import errno

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import ReadOnlyError
from tests.support.memory import Store, stores
from tests.support.tasks import start
from tests.support.toy import MAGIC

MESSAGE = (
    "'memory:disk' was guessed to be raw, and this write would make it look like toy; name its format (--format raw) "
    "to allow it."
)


async def _guessed(graph: Graph, **options: object) -> Backend:
    return await graph.open_backend(
        {"file": {"driver": "memory", "filename": "disk"}, **options}, name="disk", writable=True
    )


@pytest.mark.parametrize(
    ("offset", "content"),
    [(0, MAGIC + bytes(504)), (0, MAGIC), (0, MAGIC + bytes(100_000)), (4, MAGIC[4:]), (7, MAGIC[7:])],
)
async def test_another_formats_header_is_refused(graph: Graph, offset: int, content: bytes) -> None:
    before = (MAGIC[:offset] + bytes(1)).ljust(200_000, b"\xee")
    store = Store(before)
    with stores(disk=store):
        backend = await _guessed(graph)
        with pytest.raises(ReadOnlyError) as caught:
            await backend.write(offset, content)
        assert str(caught.value) == MESSAGE
        assert caught.value.errno == errno.EPERM
        assert store.data == before
        await backend.write(0, b"a boot sector" + bytes(499))
        await backend.write(512, MAGIC)
        await backend.close()


async def test_neither_zeroing_nor_discarding_may_complete_a_header(graph: Graph) -> None:
    before = (MAGIC[:4] + b"\xff\0\0\2").ljust(4096, b"\xee")
    store = Store(before)
    with stores(disk=store):
        backend = await _guessed(graph, **{"discard": "unmap", "detect-zeroes": "on"})
        for change in (
            lambda: backend.write_zeroes(4, 3),
            lambda: backend.write(4, bytes(3)),
            lambda: backend.discard(4, 3),
        ):
            with pytest.raises(ReadOnlyError, match="look like toy"):
                await change()
        assert store.data == before
        await backend.write_zeroes(0, 4096)
        await backend.close()
    assert store.data == bytes(4096)


async def test_two_halves_of_a_header_at_once(graph: Graph) -> None:
    """Each half alone is harmless, and neither is there yet when the other is looked at."""
    store = Store(b"\xee" * 4096)
    with stores(disk=store):
        backend = await _guessed(graph)
        async with trio.open_nursery() as nursery:
            held = store.steps.hold("write")
            first = await start(nursery, lambda: backend.write(0, MAGIC[:4]))
            second = await start(nursery, lambda: backend.write(4, MAGIC[4:]))
            held.release()
            await first.join()
            with pytest.raises(ReadOnlyError, match="look like toy"):
                await second.join()
        await backend.close()
    assert not store.data.startswith(MAGIC)


async def test_a_named_format_is_not_guarded(graph: Graph) -> None:
    store = Store(4096)
    with stores(disk=store):
        backend = await graph.open_backend("memory:disk", format="raw", writable=True)
        await backend.write(0, MAGIC)
        await backend.close()
        assert store.data.startswith(MAGIC)
