"""The log of a qcow2 image's changes in memory: when it is emptied, and when it tells nothing. What a successor makes
of it: tests/crash/test_takeover.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from fusedisk.block.image.amend import amend_node
from fusedisk.core.errors import CorruptImageError, FusediskError, NoSpaceError
from fusedisk.drivers.format.change_log import Change, changes_in
from fusedisk.drivers.format.qcow2.changes import Kind
from fusedisk.drivers.format.qcow2.entries import COPIED, OFFSET_MASK
from tests.support.memory import Store
from tests.support.qcow2 import created_in_memory, driver_of, in_memory

CLUSTER = 65536


def found_in(buffer: bytearray) -> list[Change]:
    """What a successor reads."""
    changes = changes_in(buffer)
    assert changes is not None
    return list(changes)


async def test_a_first_write_is_logged_until_it_is_flushed(store: Store) -> None:
    buffer = bytearray(4096)
    async with in_memory(store) as backend:
        driver_of(backend).log_changes(buffer)
        await backend.write(3 * CLUSTER, b"x")
        assert {change.kind for change in found_in(buffer)} == {Kind.REFCOUNTS, Kind.L1, Kind.L2}
        await backend.write(3 * CLUSTER, b"y")
        before = found_in(buffer)
        await backend.flush()
        assert found_in(buffer) == []
        for change in before:
            assert store.data[change.place :][: len(change.data)] == change.data


async def test_what_could_not_be_written_stays_in_the_log(store: Store) -> None:
    buffer = bytearray(4096)
    async with in_memory(store) as backend:
        driver_of(backend).log_changes(buffer)
        await backend.write(0, b"x")
        before = found_in(buffer)
        for skip in (0, 1, 1):  # refcounts are written once
            store.steps.fail("write", NoSpaceError("full"), skip=skip)
            with pytest.raises(FusediskError):
                await backend.flush()
            assert found_in(buffer) == before
        await backend.flush()
        assert found_in(buffer) == []


async def test_little_space_leads_to_a_commit(store: Store) -> None:
    buffer = bytearray(512)
    async with in_memory(store) as backend:
        driver_of(backend).log_changes(buffer)
        for cluster in range(40):
            await backend.write(2 * cluster * CLUSTER, b"x")
            assert changes_in(buffer) is not None


async def test_a_closed_image_leaves_nothing_in_the_log(store: Store) -> None:
    """Also where closing frees what no request used."""
    buffer = bytearray(4096)
    async with in_memory(store) as backend:
        driver_of(backend).log_changes(buffer)
        await backend.write(0, b"x")
        await backend.flush()
        store.steps.fail("write", NoSpaceError("full"))
        with pytest.raises(NoSpaceError):
            await backend.write(CLUSTER, b"x" * CLUSTER)
        assert found_in(buffer)
    assert found_in(buffer) == []


async def test_the_changes_of_a_corrupt_image_are_not_for_a_successor(store: Store) -> None:
    buffer = bytearray(4096)
    async with in_memory(store) as backend:
        driver = driver_of(backend)
        driver.log_changes(buffer)
        await backend.write(0, b"x")
        assert changes_in(buffer) is not None
        table = driver.image.l2.get(driver.image.l1[0] & OFFSET_MASK)
        assert table is not None
        table[1] = COPIED | 512
        with pytest.raises(CorruptImageError):
            await backend.write(CLUSTER, b"x")
        assert changes_in(buffer) is None
        with pytest.raises(CorruptImageError):
            await backend.close()


@pytest.mark.parametrize("change", [{"refcount_bits": 64}, {"compat": "0.10"}], ids=str)
async def test_settings_change_and_the_log_goes_on(change: dict[str, Any]) -> None:
    """Whichever write of the change fails."""
    for skip in itertools.count():
        store, buffer = await created_in_memory(Store(), size=1 << 20, cluster_size=512), bytearray(1 << 16)
        async with in_memory(store) as backend:
            driver_of(backend).log_changes(buffer)
            await backend.write(0, b"x" * 4096)
            await backend.write_zeroes(0, 2048)
            await backend.flush()
            store.steps.fail("write", NoSpaceError("full"), skip=skip)
            try:
                await amend_node(backend.node, change, force=True)
            except FusediskError:
                assert found_in(buffer) == []
            done = store.steps.heal() > 0
            assert found_in(buffer) == []
            await backend.write(1 << 19, b"y" * 512)
            assert {change.kind for change in found_in(buffer)} >= {Kind.REFCOUNTS, Kind.L2}
        if done:
            assert skip
            return
