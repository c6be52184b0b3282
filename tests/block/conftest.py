"""A graph of test drivers that is checked and closed after each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.node import Node
from fusedisk.block.request import places
from fusedisk.drivers.protocol import host_file
from tests.support.registry import TEST_DRIVERS


@pytest.fixture
async def graph() -> AsyncIterator[Graph]:
    """An empty graph; afterwards nothing may be in flight, and everything must close."""
    graph = Graph(TEST_DRIVERS)
    yield graph
    for node in graph.nodes.values():
        assert_idle(node)
    await graph.close()
    assert not graph.nodes


@pytest.fixture
def quick_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's disk is never slow, whatever filesystem there is."""
    monkeypatch.setattr(host_file, "lives_in_memory", lambda fd: True)
    monkeypatch.setattr(host_file.Pace, "is_quick", lambda self, now: True)


@pytest.fixture
def places_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are remembered from the first request on, and again from the first one after a change."""
    monkeypatch.setattr(places, "STEADY", 0)
    monkeypatch.setattr(places, "PAUSE", 0)


def assert_idle(node: Node) -> None:
    """No request is in flight on a node, and nothing waits for one."""
    assert not node.tracked
    assert node.serialising == 0
    assert not node.flush_mutex.locked
    assert all(backend.in_flight == 0 for backend in node.graph.backends_over(node))
