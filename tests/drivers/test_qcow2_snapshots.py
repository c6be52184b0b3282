"""Internal snapshots of qcow2: what is made here QEMU lists and applies, and the other way round."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.reopen import reopen
from fusedisk.block.model.check_result import Repair
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.core.errors import (
    NotSupportedError,
    OptionError,
    OutOfRangeError,
    ReadOnlyError,
    SnapshotNotFoundError,
)
from fusedisk.drivers.format.qcow2.check import check as checking
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, qemu_io
from tests.support.images import make_qcow2, make_sparse_raw, random_commands
from tests.support.jitter import JITTER_DRIVERS
from tests.support.qcow2 import assert_clean, driver_of, opened, raw_content
from tests.support.thinning import thinned

KIB = 1 << 10
MIB = 1 << 20


def named(name: str, **fields: Any) -> SnapshotInfo:
    return SnapshotInfo("", name, 1_700_000_000_123_456_789, **fields)


async def snapshot_content(path: Path, snapshot: str) -> bytes:
    """What our driver reads in a snapshot."""
    async with opened(path, writable=False, **{"internal-snapshot": snapshot}) as backend:
        return bytes(await backend.read(0, backend.length))


def their_snapshot_content(path: Path, snapshot: str, folder: Path) -> bytes:
    """What QEMU reads in a snapshot."""
    out = folder / "snapshot.raw"
    qemu_img("convert", "-f", "qcow2", "-l", f"snapshot.name={snapshot}", "-O", "raw", path, out)
    return out.read_bytes()


async def assert_sound(path: Path) -> None:
    """Neither QEMU nor we find anything wrong."""
    assert_clean(path)
    graph = Graph(DRIVERS)
    try:
        file = await graph.open_backend({"driver": "file", "filename": str(path)})
        result = await checking.check(file.node, Repair.NOTHING, lambda done, total: None)
    finally:
        await graph.close()
    assert (result.corruptions, result.leaks, result.check_errors) == (0, 0, 0), list(result.findings)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "v2": {"compat": "0.10"},
    "512": {"cluster_size": 512},
    "2M": {"cluster_size": 2 * MIB},
    "refcounts of 8 bits": {"refcount_bits": 8, "cluster_size": 4096},
    "refcounts of 4 bits": {"refcount_bits": 4, "cluster_size": 4096},
    "refcounts of 32 bits": {"refcount_bits": 32, "cluster_size": 4096},
    "refcounts of 64 bits": {"refcount_bits": 64, "cluster_size": 512},
    "extended L2": {"extended_l2": "on"},
    "lazy refcounts": {"lazy_refcounts": "on", "cluster_size": 4096},
    "preallocated": {"preallocation": "metadata", "cluster_size": 4096},
    "compressed": {"cluster_size": 4096},
    "backing": {"cluster_size": 4096},
}


@pytest.fixture(params=thinned(KINDS, 3))
def image(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An image with data, zeroes and holes."""
    kind, options = request.param, KINDS[request.param]
    random_ = random.Random(kind)
    size, cluster = 4 * MIB + 3 * 512, options.get("cluster_size", 64 * KIB)
    backing = None
    if kind == "backing":
        backing = make_sparse_raw(tmp_path / "base.raw", 3 * MIB, (0, 700_000), (MIB, 400_000))
    commands = random_commands(random_, size, cluster, 20, compressed=60 if kind == "compressed" else 0)
    if kind == "v2" or kind == "backing":
        commands = [command for command in commands if command.startswith("write -P")]
    return make_qcow2(tmp_path / "disk.qcow2", size, *commands, backing=backing, **options)


async def test_a_sequence_of_everything(image: Path, tmp_path: Path) -> None:
    """Snapshots made, applied and deleted by us and by QEMU in turns, compared with what the disk held."""
    random_ = random.Random(7)
    held: dict[str, bytes] = {}
    for step in range(9):
        ours = random_.random() < 0.6
        kind = "create" if len(held) < 2 else random_.choice(("create", "apply", "delete"))
        name = f"s{step}" if kind == "create" else random_.choice(list(held))
        async with opened(image) as backend:
            length = min(backend.length, 1 << 20)
            await backend.write(random_.randrange(length // 512) * 512, random_.randbytes(512))
            await scribble_inside(backend, random_)
            if ours:
                await change(backend, kind, name)
            content = bytes(await backend.read(0, backend.length))
        if not ours:
            qemu_img("snapshot", {"create": "-c", "apply": "-a", "delete": "-d"}[kind], name, image)
        if kind == "create":
            held[name] = content
        elif kind == "apply":
            content = held[name]
        else:
            del held[name]
        await assert_sound(image)
        assert raw_content(image, tmp_path) == content
        for other, kept in held.items():
            assert await snapshot_content(image, other) == kept
            assert their_snapshot_content(image, other, tmp_path) == kept


async def scribble_inside(backend: Backend, random_: random.Random) -> None:
    for _ in range(5):
        length = random_.choice((512, 4096, 70_000, 200_000))
        offset = random_.randrange((backend.length - length) // 512) * 512
        if random_.random() < 0.7 or driver_of(backend).image.header.version == 2:
            await backend.write(offset, (random_.randbytes(257) * (length // 257 + 1))[:length])
        else:
            await backend.discard(offset, length)


async def change(backend: Backend, kind: str, name: str) -> None:
    if kind == "create":
        await backend.create_snapshot(named(name))
        return
    (found,) = [found for found in backend.list_snapshots() if found.name == name]
    await (backend.apply_snapshot if kind == "apply" else backend.delete_snapshot)(found.id)


async def test_all_fields_are_kept(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB, "write -P 1 0 64k")
    wanted = named("all", vm_clock=123_456_789_012, icount=77)
    async with opened(path) as backend:
        made = await backend.create_snapshot(wanted)
    assert made == wanted._replace(id="1", disk_size=MIB)
    async with opened(path, writable=False) as backend:
        assert backend.list_snapshots() == [made]
    (theirs,) = (entry for entry in snapshots_in_info(path))
    assert theirs == made.information()


def snapshots_in_info(path: Path) -> list[dict[str, Any]]:
    """What QEMU tells."""
    found: list[dict[str, Any]] = json.loads(qemu_img("info", "--output=json", path)).get("snapshots", [])
    return found


async def test_extra_data_of_later_versions_is_kept(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB, "write -P 1 0 64k")
    async with opened(path) as backend:
        await backend.create_snapshot(named("old"))
        driver = driver_of(backend)
        driver.snapshots[0] = dataclasses.replace(driver.snapshots[0], unknown_extra=b"from the future!")
        await backend.create_snapshot(named("new"))
    assert_clean(path)
    async with opened(path) as backend:
        assert [found.unknown_extra for found in driver_of(backend).snapshots] == [b"from the future!", b""]
        await backend.delete_snapshot("2")
        await backend.apply_snapshot("1")
    assert b"from the future!" in path.read_bytes()
    assert_clean(path)


# --- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [512, 65536])
async def test_the_size_comes_back(tmp_path: Path, cluster_size: int) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB, "write -P 1 0 1M", cluster_size=cluster_size)
    lengths: list[int] = []
    async with opened(path) as backend:
        backend.on_resize.append(lengths.append)
        await backend.create_snapshot(named("small"))
        await backend.truncate(40 * MIB)
        await backend.write(39 * MIB, b"\2" * MIB)
        await backend.create_snapshot(named("large"))
        await backend.apply_snapshot("1")
        assert backend.length == MIB
        with pytest.raises(OutOfRangeError):
            await backend.read(MIB, 1)
        await backend.truncate(2 * MIB)
        assert await backend.read(MIB, MIB) == bytes(MIB)
        await backend.apply_snapshot("2")
        assert backend.length == 40 * MIB
        assert await backend.read(39 * MIB, MIB) == b"\2" * MIB
    assert lengths == [40 * MIB, MIB, 2 * MIB, 40 * MIB]
    await assert_sound(path)
    assert await snapshot_content(path, "small") == b"\1" * MIB
    qemu_img("snapshot", "-a", "small", path)
    async with opened(path) as backend:
        assert backend.length == MIB
        await backend.apply_snapshot("2")
        assert backend.length == 40 * MIB
    qemu_io(path, "read -P 2 39M 1M", "read -P 1 0 1M", fmt="qcow2")
    await assert_sound(path)


async def test_version_2_knows_one_size(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB, "write -P 1 0 64k", compat="0.10")
    async with opened(path) as backend:
        await backend.create_snapshot(named("one"))
        driver = driver_of(backend)
        driver.snapshots[0].disk_size = 2 * MIB
        before = path.read_bytes()
        with pytest.raises(NotSupportedError, match="version 2"):
            await backend.apply_snapshot("1")
        assert path.read_bytes() == before
        driver.snapshots[0].disk_size = MIB
        await backend.apply_snapshot("1")


async def test_a_disk_of_no_size(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 0)
    async with opened(path) as backend:
        await backend.create_snapshot(named("none"))
        await backend.truncate(MIB)
        await backend.write(0, b"x" * 100)
        await backend.create_snapshot(named("some"))
        await backend.apply_snapshot("1")
        assert backend.length == 0
    await assert_sound(path)
    qemu_img("snapshot", "-a", "some", path)
    assert raw_content(path, tmp_path)[:100] == b"x" * 100


# --- what else goes on ----------------------------------------------------------------------------------


async def test_space_goes_back_to_the_host(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 64 * MIB, "write -P 1 0 32M")
    async with opened(path) as backend:
        await backend.create_snapshot(named("one"))
        await backend.write(0, b"\2" * (32 * MIB))
        await backend.flush()
        with_both = path.stat().st_blocks * 512
        await backend.delete_snapshot("1")
    assert path.stat().st_blocks * 512 < with_both - 30 * MIB
    async with opened(path, **{"pass-discard-snapshot": False}) as backend:
        await backend.create_snapshot(named("one"))
        await backend.write(0, b"\3" * (32 * MIB))
        await backend.delete_snapshot("1")
    assert path.stat().st_blocks * 512 > with_both - 2 * MIB
    await assert_sound(path)


async def test_space_is_used_again(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 8 * MIB, "write -P 1 0 4M", cluster_size=4096)
    lengths = []
    async with opened(path) as backend:
        for _ in range(12):
            await backend.create_snapshot(named("one"))
            await backend.write(0, b"\2" * 8192)
            await backend.apply_snapshot("1")
            await backend.delete_snapshot("1")
            lengths.append(path.stat().st_size)
    assert lengths[-1] == lengths[2]
    await assert_sound(path)


async def test_what_is_cached_goes_with_its_clusters(tmp_path: Path) -> None:
    """L2 tables and inflated clusters come to lie where others were, which were read before."""
    path = make_qcow2(tmp_path / "disk.qcow2", MIB, cluster_size=4096)
    async with opened(path) as backend:
        await backend.create_snapshot(named("empty"))
        for number in range(1, 10):
            await backend.write_compressed(0, bytes([number]) * 4096)
            assert await backend.read(0, 4096) == bytes([number]) * 4096
            await backend.apply_snapshot("1")
            assert await backend.read(0, 4096) == bytes(4096)
        for number in range(1, 10):
            await backend.create_snapshot(named("full"))
            await backend.write(number * 4096, bytes([number]) * 4096)
            assert await backend.read(number * 4096, 4096) == bytes([number]) * 4096
            await backend.delete_snapshot("2")
            for earlier in range(1, number + 1):
                assert await backend.read(earlier * 4096, 4096) == bytes([earlier]) * 4096
    await assert_sound(path)


@pytest.mark.parametrize("seed", range(8))
async def test_requests_in_flight(tmp_path: Path, seed: int) -> None:
    """A snapshot holds what was answered before it was asked for, and of what is in flight each request wholly or not
    at all; writers go on over the snapshot without changing it."""
    path = make_qcow2(tmp_path / "disk.qcow2", 2 * MIB, "write -P 255 0 1M", cluster_size=4096)
    random_ = random.Random(seed)
    answered = [0] * 16
    snapshots: list[tuple[list[int], list[int]]] = []
    graph = Graph(JITTER_DRIVERS)
    storage = {"driver": "jitter", "seed": seed, "file": {"driver": "file", "filename": str(path)}}
    backend = await graph.open_backend({"driver": "qcow2", "file": storage}, writable=True)
    region = 32 * KIB

    async def writer(number: int) -> None:
        for version in range(1, 12):
            # Neither the start nor the end is a cluster's.
            await backend.write(number * region + 1000, bytes([version]) * (region - 3000))
            answered[number] = version

    async def snapshotter() -> None:
        for index in range(5):
            before = list(answered)
            await backend.create_snapshot(named(f"s{index}"))
            snapshots.append((before, list(answered)))
            for _ in range(random_.randrange(40)):
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for number in range(16):
            nursery.start_soon(writer, number)
        nursery.start_soon(snapshotter)
    await graph.close()
    await assert_sound(path)
    for index, (before, after) in enumerate(snapshots):
        content = await snapshot_content(path, f"s{index}")
        for number in range(16):
            part = content[number * region + 1000 :][: region - 3000]
            version = 0 if part[0] == 255 else part[0]
            assert part == bytes([part[0]]) * len(part)
            # One write more may have reached the disk without being answered yet.
            assert before[number] <= version <= after[number] + 1


async def test_through_a_filter(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB, "write -P 1 0 64k")
    graph = Graph(DRIVERS)
    spec = {"driver": "copy-on-read", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}}
    backend = await graph.open_backend(spec, writable=True)
    await backend.create_snapshot(named("one"))
    await backend.truncate(2 * MIB)
    await backend.write(0, b"x" * 65536)
    await backend.apply_snapshot(backend.list_snapshots()[0].id)
    assert backend.length == MIB
    assert await backend.read(0, 65536) == b"\1" * 65536
    await graph.close()
    await assert_sound(path)


# --- opening a snapshot ---------------------------------------------------------------------------------


async def test_an_open_snapshot_is_read_only(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB, "write -P 1 0 64k")
    qemu_img("snapshot", "-c", "2", path)
    qemu_io(path, "write -P 2 0 64k", fmt="qcow2")
    qemu_img("snapshot", "-c", "b", path)
    # "2" is the name of the first and the id of the second: the id counts.
    assert (await snapshot_content(path, "2"))[:65536] == b"\2" * 65536
    assert (await snapshot_content(path, "1"))[:65536] == b"\1" * 65536
    with pytest.raises(OptionError, match="read-only"):
        async with opened(path, **{"internal-snapshot": "b"}):
            pass
    with pytest.raises(SnapshotNotFoundError, match="'none'"):
        await snapshot_content(path, "none")
    async with opened(path, writable=False, **{"internal-snapshot": "b"}) as backend:
        with pytest.raises(ReadOnlyError):
            await backend.create_snapshot(named("c"))
        with pytest.raises(OptionError, match="read-only"):
            await reopen(backend.graph, {backend.node: {"read-only": False}})
        with pytest.raises(NotSupportedError, match="internal-snapshot"):
            await reopen(backend.graph, {backend.node: {"internal-snapshot": "1"}})


async def test_formats_without_snapshots(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(4096))
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(
        {"driver": "raw", "file": {"driver": "file", "filename": str(raw)}}, writable=True
    )
    assert backend.list_snapshots() == []
    with pytest.raises(NotSupportedError, match=r"disk\.raw.*snapshots"):
        await backend.create_snapshot(named("one"))
    with pytest.raises(NotSupportedError, match="virtual machine"):
        await backend.load_vmstate(0, 10)
    await graph.close()


# --- VM state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
async def test_vm_state_goes_with_its_snapshot(tmp_path: Path, cluster_size: int) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB + 512, "write -P 1 0 1M", cluster_size=cluster_size)
    state = random.Random(1).randbytes(300_001)
    async with opened(path) as backend:
        for start in range(0, len(state), 32_768):
            await backend.save_vmstate(start, state[start : start + 32_768])
        assert await backend.load_vmstate(0, len(state)) == state
        assert await backend.load_vmstate(7, 100) == state[7:107]
        await backend.save_vmstate(100, b"?")
        await backend.save_vmstate(100, state[100:101])
        made = await backend.create_snapshot(named("running", vm_state_size=len(state)))
        assert await backend.load_vmstate(0, len(state)) == bytes(len(state))
        await backend.create_snapshot(named("disk only"))
        await backend.save_vmstate(0, b"other" * 100)
        await backend.apply_snapshot(made.id)
        assert await backend.load_vmstate(0, len(state)) == state
        assert backend.length == MIB + 512
        # What is saved now is not the snapshot's.
        await backend.save_vmstate(50, b"changed")
        await backend.apply_snapshot("2")
        assert await backend.load_vmstate(0, 1000) == bytes(1000)
        await backend.apply_snapshot(made.id)
        assert await backend.load_vmstate(0, len(state)) == state
        await backend.truncate(2 * MIB)
        assert await backend.read(MIB, MIB) == bytes(MIB)
    await assert_sound(path)
    assert [entry["vm-state-size"] for entry in snapshots_in_info(path)] == [len(state), 0]
    async with opened(path, writable=False, **{"internal-snapshot": "running"}) as backend:
        assert await backend.load_vmstate(0, len(state)) == state


async def test_vm_state_is_where_qemu_has_it(tmp_path: Path) -> None:
    """Behind the first L2 table's span that the disk does not reach into. A longer disk shows what lies there."""
    path = make_qcow2(tmp_path / "disk.qcow2", 5 * MIB, "write -P 1 0 64k", cluster_size=4096)
    async with opened(path) as backend:
        await backend.save_vmstate(0, b"\7" * 5000)
        offset = 6 * MIB  # spans of 2 MiB
    _put_size(path, 8 * MIB)
    # What is left of the last cluster reads as zeroes.
    qemu_io(path, f"read -P 7 {offset} 5000", f"read -P 0 {offset + 5000} 3192", fmt="qcow2")
    qemu_io(path, f"write -P 9 {offset} 8k", fmt="qcow2")
    _put_size(path, 5 * MIB)
    async with opened(path) as backend:
        assert await backend.load_vmstate(0, 9000) == b"\x09" * 8192 + bytes(808)
    assert_clean(path)


def _put_size(path: Path, size: int) -> None:
    """Say in the header that the disk is ``size`` bytes long; its L1 table must be long enough."""
    with path.open("r+b") as file:
        file.seek(36)
        assert int.from_bytes(file.read(4), "big") >= 4
        file.seek(24)
        file.write(size.to_bytes(8, "big"))
