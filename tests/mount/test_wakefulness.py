"""Processors that do not sleep while a mount is busy."""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from fusedisk.core.errors import HostError
from fusedisk.mount import wakefulness
from fusedisk.mount.wakefulness import Wakefulness
from tests.support.mounts import Mounts, wait_until

ANY = 2_000_000_000


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """What was written to the device so far, in microseconds."""
    device = tmp_path / "cpu_dma_latency"
    device.touch()
    monkeypatch.setattr(wakefulness, "DEVICE", str(device))
    return lambda: [number for (number,) in struct.iter_unpack("=i", device.read_bytes())]


@pytest.mark.parametrize(("driver", "latency"), [("haltpoll", 0), ("intel_idle", 2), (None, 2)])
async def test_processors_stay_awake_while_it_is_busy(
    wanted: Callable[[], list[int]],
    driver: str | None,
    latency: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    name = tmp_path / "driver"
    monkeypatch.setattr(wakefulness, "_IDLE_DRIVER", str(name))
    if driver is not None:
        name.write_text(f"{driver}\n")
    mount = Wakefulness()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mount.run)
        await trio.sleep(10)
        assert wanted() == []
        for _ in range(1000):
            mount.busy()
            await trio.sleep(0.04)
        assert wanted() == [latency]
        await trio.sleep(0.1)
        assert wanted() == [latency, ANY]
        await trio.sleep(10)
        mount.busy()
        assert wanted() == [latency, ANY, latency]
        nursery.cancel_scope.cancel()
    mount.close()


async def test_a_device_that_fails_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wakefulness, "DEVICE", "/dev/full")
    mount = Wakefulness()
    mount.busy()
    mount.busy()
    assert caplog.messages == ["processors may sleep, as writing to '/dev/full' failed: No space left on device"]
    mount.close()


def test_who_may_not_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakefulness, "DEVICE", str(tmp_path / "none"))
    with pytest.raises(HostError) as caught:
        Wakefulness()
    assert str(caught.value) == (
        f"'{tmp_path}/none' could not be opened for writing, which --low-latency takes: No such file or directory. "
        "Mount as root, or without it."
    )


@pytest.fixture
def limit() -> Callable[[], int]:
    """What the whole machine wants at this moment, in microseconds."""
    if not os.access(wakefulness.DEVICE, os.W_OK):
        pytest.skip("this machine has no /dev/cpu_dma_latency, or not for us")

    def read() -> int:
        with open(wakefulness.DEVICE, "rb", buffering=0) as file:
            return int.from_bytes(file.read(4), "little")

    return read


@pytest.mark.parametrize("pause", [0.0, 200e-6])
def test_a_mount_that_is_read(mounts: Mounts, raw: Path, limit: Callable[[], int], pause: float) -> None:
    before = limit()
    if before <= 2:
        pytest.skip("something else keeps the processors awake")
    on = mounts.mount("--low-latency", "--kernel-cache=off", "--passthrough=off", raw)
    wait_until(lambda: limit() == before, "mounting is over")
    with (on / "disk").open("rb", buffering=0) as file:
        for count in itertools.count():
            os.pread(file.fileno(), 512, count % 2048 * 512)
            if limit() <= 2:
                break
            time.sleep(pause)  # as one who works on each block
            assert count < 1_000_000, "processors slept although one block was read after the other"
    wait_until(lambda: limit() == before, "processors may sleep again, as nothing is read")
