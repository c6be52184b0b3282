"""The disk that forgets."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.extent import DATA, ZERO
from fusedisk.block.request import io
from fusedisk.core.errors import OptionError
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img


async def test_size_and_content() -> None:
    graph = Graph(DRIVERS)
    backend = await graph.open_backend({"driver": "null-co", "size": "3M", "read-zeroes": "on"}, writable=True)
    assert backend.length == 3 << 20
    await backend.write(0, b"gone")
    await backend.write_zeroes(0, 1 << 20)
    await backend.discard(0, 1 << 20)
    await backend.flush()
    buffer = memoryview(bytearray(b"old!"))
    await backend.read_into(0, buffer)
    assert buffer == bytes(4)
    assert await backend.node.driver.map(0, 4096) == (ZERO, 4096, None, 0, False, False, None)
    assert await backend.node.driver.allocated_size() == 0
    await backend.truncate(5 << 20)
    assert backend.length == 5 << 20
    await io.write(backend.node, 5 << 20, (memoryview(b"more"),))
    assert backend.length == (5 << 20) + 4
    await graph.close()


async def test_reads_leave_the_buffer_unless_told() -> None:
    graph = Graph(DRIVERS)
    backend = await graph.open_backend({"driver": "null-co"})
    assert backend.length == 1 << 30
    buffer = memoryview(bytearray(b"old!"))
    await backend.read_into(0, buffer)
    assert buffer == b"old!"
    assert (await backend.node.driver.map(0, 512)).status == DATA
    assert not backend.node.driver.has_zero_init()
    await graph.close()


async def test_latency(autojump_clock: Any) -> None:
    graph = Graph(DRIVERS)
    backend = await graph.open_backend({"driver": "null-co", "latency-ns": 2_000_000_000}, writable=True)
    start = trio.current_time()
    await backend.read(0, 512)
    await backend.write(0, b"x")
    await backend.flush()
    await backend.write_zeroes(0, 512)
    assert trio.current_time() - start == pytest.approx(8)
    await graph.close()


async def test_names() -> None:
    graph = Graph(DRIVERS)
    backend = await graph.open_backend("null-co://", format="raw")
    assert backend.length == 1 << 30
    assert backend.node.exact_filename() == "null-co://"
    with pytest.raises(OptionError, match="expected null-co://"):
        await graph.open_backend("null-co:x")
    with pytest.raises(OptionError, match="expected 0 or more"):
        await graph.open_backend({"driver": "null-co", "latency-ns": -1})
    sized = await graph.open_backend({"driver": "null-co", "size": "1M"})
    assert sized.node.exact_filename() is None
    again = await graph.open_backend(sized.node.options_filename())
    assert again.length == 1 << 20
    assert "virtual size: 1 MiB" in qemu_img("info", sized.node.options_filename())
    await graph.close()
