"""blkdebug: its rules as QEMU reads them, injected errors, breakpoints, limits and names."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.node import Node
from fusedisk.core.errors import (
    FusediskError,
    GateError,
    HostError,
    NoSpaceError,
    OptionError,
    PermissionConflictError,
)
from fusedisk.drivers.filter.blkdebug import BlkdebugDriver
from fusedisk.drivers.filter.blkdebug_rules import EVENTS, InjectError, Rules, SetState, parse_config
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, run_tool
from tests.support import tasks

KIB = 1 << 10
MIB = 1 << 20


def debug_node(backend: Backend) -> BlkdebugDriver:
    """The first blkdebug driver below a backend."""
    node: Node = backend.node
    while not isinstance(node.driver, BlkdebugDriver):
        node = (node.filtered or node.children["file"]).node
    return node.driver


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "16M")
    return path


@asynccontextmanager
async def opened(options: dict[str, Any] | str, **settings: Any) -> AsyncIterator[Backend]:
    graph = Graph(DRIVERS)
    try:
        yield await graph.open_backend(options, **{"writable": True, **settings})
    finally:
        await graph.close()


def over_raw(raw: Path, **options: Any) -> dict[str, Any]:
    return {"driver": "blkdebug", "image": {"driver": "file", "filename": str(raw)}, **options}


def over_qcow2(image: Path, **options: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "file": over_raw(image, **options)}


# --- rules ----------------------------------------------------------------------------------------------


def error(event: str = "none", **fields: Any) -> InjectError:
    return InjectError(event=event, **fields)


def test_rule_waits_for_its_event() -> None:
    rules = Rules([error("l2_update")], [])
    assert rules.strike("write", 0, 512) is None
    rules.happen("l2_load")
    assert rules.strike("write", 0, 512) is None
    rules.happen("l2_update")
    assert rules.strike("write", 0, 512) is not None
    assert rules.strike("write", 0, 512) is not None, "it stays armed"


def test_rule_without_event_is_armed_from_the_start() -> None:
    assert Rules([error()], []).strike("read", 0, 512) is not None


def test_once() -> None:
    rules = Rules([error("l2_update", once=True)], [])
    rules.happen("l2_update")
    assert rules.strike("write", 0, 512) is not None
    assert rules.strike("write", 0, 512) is None
    rules.happen("l2_update")
    assert rules.strike("write", 0, 512) is None


def test_another_event_arms_other_errors() -> None:
    rules = Rules([error("l2_update", errno=5), error("l2_load", errno=28)], [])
    rules.happen("l2_update")
    rules.happen("l2_load")
    rule = rules.strike("write", 0, 512)
    assert rule is not None
    assert rule.errno == 28
    rules.happen("cluster_alloc")
    assert rules.strike("write", 0, 512) is rule, "an event without rules changes nothing"


def test_states() -> None:
    rules = Rules(
        [error("l2_update", state=2)],
        [SetState(event="l2_update", state=1, new_state=2), SetState(event="l2_load", state=2, new_state=3)],
    )
    rules.happen("l2_load")
    assert rules.state == 1
    rules.happen("l2_update")
    assert rules.state == 2
    assert rules.strike("write", 0, 512) is None, "the event came in state 1"
    rules.happen("l2_update")
    assert rules.strike("write", 0, 512) is not None
    rules.happen("l2_load")
    assert rules.state == 3


@pytest.mark.parametrize(
    ("offset", "length", "hit"), [(0, 512, False), (512, 512, True), (0, 4096, True), (1024, 512, False)]
)
def test_sector(offset: int, length: int, hit: bool) -> None:
    assert (Rules([error(sector=1)], []).strike("write", offset, length) is not None) is hit


def test_iotype() -> None:
    rules = Rules([error(iotype="discard")], [])
    assert rules.strike("write", 0, 512) is None
    assert rules.strike("discard", 0, 512) is not None
    assert Rules([error()], []).strike("block-status", 0, 512) is None, "hit only where it is named"
    assert Rules([error(iotype="block-status")], []).strike("block-status", 0, 512) is not None


def test_error_zero_shields_what_comes_after_it() -> None:
    rules = Rules([error(errno=0, sector=3), error(errno=5)], [])
    assert rules.strike("write", 3 * 512, 512) is None
    assert rules.strike("write", 4 * 512, 512) is not None


def test_config_file() -> None:
    text = """
    # a comment
    [inject-error]
      event = "l2_update"
    errno = "28"
    [inject-error "named"]
    event = "none"
    [set-state]
    event = "l2_load"
    new_state = "3"
    """
    assert parse_config(text, "x") == {
        "inject-error": [{"event": "l2_update", "errno": "28"}, {"event": "none"}],
        "set-state": [{"event": "l2_load", "new_state": "3"}],
    }


@pytest.mark.parametrize("text", ["[nothing]", 'event = "l2_load"', "[set-state]\nevent = l2_load", "what"])
def test_config_file_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"'rules.cfg', line \d"):
        parse_config(text, "rules.cfg")


def test_events_are_those_of_qemu(image: Path) -> None:
    """QEMU opens an image with a rule for each event, so it knows every name."""
    rules = [{"event": event, "state": 77} for event in EVENTS]
    options = over_qcow2(image) | {"file": over_raw(image) | {"inject-error": rules}}
    run_tool("qemu-io", "-c", "quit", "json:" + json.dumps(options))


# --- requests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("immediately", [False, True])
async def test_requests_of_each_kind_fail(raw: Path, immediately: bool) -> None:
    requests: dict[str, Any] = {
        "read": lambda backend: backend.read(512, 512),
        "write": lambda backend: backend.write(512, bytes(512)),
        "write-zeroes": lambda backend: backend.write_zeroes(512, 512),
        "discard": lambda backend: backend.discard(512, 512),
        "flush": lambda backend: backend.flush(),
        "block-status": lambda backend: backend.block_status(512, 512),
    }
    for kind in requests:
        rule = {"event": "none", "iotype": kind, "errno": errno.ENOSPC, "immediately": immediately, "once": True}
        async with opened(over_raw(raw, **{"inject-error": [rule], "discard": "unmap"})) as backend:
            for other, request in requests.items():
                if other != kind:
                    await request(backend)
            with pytest.raises(NoSpaceError) as caught:
                await requests[kind](backend)
            assert caught.value.errno == errno.ENOSPC
            await requests[kind](backend)


async def test_passes_through_otherwise(raw: Path) -> None:
    async with opened(over_raw(raw, discard="unmap")) as backend:
        assert backend.length == MIB
        await backend.write(1000, b"x" * 5000)
        await backend.write_zeroes(2000, 1000)
        await backend.truncate(2 * MIB)
        assert await backend.read(1000, 5000) == b"x" * 1000 + bytes(1000) + b"x" * 3000
        await backend.flush()
    data = raw.read_bytes()
    assert len(data) == 2 * MIB
    assert data[1000:2000] == b"x" * 1000


async def test_error_at_an_event_of_qcow2(image: Path) -> None:
    rule = {"event": "l1_update", "errno": errno.ENOSPC, "once": True}
    async with opened(over_qcow2(image, **{"inject-error": [rule]})) as backend:
        await backend.write(0, b"x" * 512)
        with pytest.raises(NoSpaceError):
            await backend.flush()
        await backend.write(0, b"y" * 512)
        assert await backend.read(0, 512) == b"y" * 512
        await backend.flush()


def qemu_fails_at(image: Path, file: dict[str, Any]) -> bool:
    """Whether an allocating write of QEMU's fails over the same filter."""
    name = "json:" + json.dumps({"driver": "qcow2", "file": file})
    # Old versions report a failed request with exit status 0.
    return "write failed" in run_tool("qemu-io", "-c", "write 0 64k", name, check=False)


@pytest.mark.parametrize(
    "rules",
    [
        {"inject-error": [{"event": "cluster_alloc"}]},
        {"inject-error": [{"event": "cluster_alloc", "state": 2}]},
        {
            "inject-error": [{"event": "write_aio", "state": 2}],
            "set-state": [{"event": "cluster_alloc", "state": 1, "new_state": 2}],
        },
        {
            "inject-error": [{"event": "write_aio", "state": 2}],
            "set-state": [{"event": "write_aio", "state": 1, "new_state": 2}],
        },
        {"inject-error": [{"event": "write_aio", "sector": 1 << 30}]},
        {"inject-error": [{"event": "write_aio", "iotype": "read"}]},
    ],
)
async def test_rules_mean_what_they_mean_to_qemu(image: Path, tmp_path: Path, rules: dict[str, Any]) -> None:
    theirs = tmp_path / "theirs.qcow2"
    theirs.write_bytes(image.read_bytes())
    ours_failed = False
    async with opened(over_qcow2(image, **rules)) as backend:
        try:
            await backend.write(0, b"x" * 64 * KIB)
        except HostError:
            ours_failed = True
        debug_node(backend).rules = Rules([], [])
    assert ours_failed == qemu_fails_at(theirs, over_raw(theirs, **rules))


async def test_limits(raw: Path) -> None:
    options = {
        "align": 4096,
        "max-transfer": 8192,
        "opt-write-zero": 4096,
        "max-write-zero": 8192,
        "max-discard": 16384,
    }
    async with opened(over_raw(raw, **options)) as backend:
        limits = backend.node.limits
        assert (limits.request_alignment, limits.max_transfer, limits.zeroes_alignment) == (4096, 8192, 4096)
        assert (limits.max_write_zeroes, limits.max_discard) == (8192, 16384)
        seen: list[tuple[int, int]] = []
        driver = debug_node(backend)
        write = driver.pwritev

        async def watched(offset: int, buffers: Any, flags: int) -> None:
            seen.append((offset, sum(map(len, buffers))))
            await write(offset, buffers, flags)

        driver.pwritev = watched  # type: ignore[method-assign]
        await backend.write(1, b"x" * 20_000)
        assert [offset % 4096 + length % 4096 for offset, length in seen] == [0] * len(seen)
        assert max(length for _, length in seen) == 8192
        assert await backend.read(0, 20_002) == b"\0" + b"x" * 20_000 + b"\0"


@pytest.mark.parametrize(
    "options",
    [
        {"align": 511},
        {"align": 4096, "max-transfer": 512},
        {"align": 512, "opt-write-zero": 100},
        {"opt-discard": 4096, "max-discard": 512},
        {"inject-error": [{"event": "no_such_event"}]},
        {"inject-error": [{"errno": 5}]},
        {"inject-error": [{"event": "l2_load", "what": 1}]},
        {"inject-error": "x"},
        {"set-state": [{"event": "l2_load", "state": -1}]},
        {"take-child-perms": ["everything"]},
        {"config": "/nowhere/rules.cfg"},
    ],
)
async def test_options_refused(raw: Path, options: dict[str, Any]) -> None:
    graph = Graph(DRIVERS)
    with pytest.raises(FusediskError):
        await graph.open_backend(over_raw(raw, **options), writable=True)
    assert not graph.nodes
    await graph.close()


@pytest.mark.parametrize("number", [-1, 512, 1 << 31, 1 << 62])
async def test_an_errno_that_no_error_has_is_refused(raw: Path, number: int) -> None:
    graph = Graph(DRIVERS)
    rule = {"event": "none", "errno": number}
    with pytest.raises(OptionError, match=rf"inject-error\.0 has the errno {number}, expected 0 to 511\.$"):
        await graph.open_backend(over_raw(raw, **{"inject-error": [rule]}))
    await graph.close()


async def test_permissions(raw: Path) -> None:
    image = {"driver": "file", "filename": str(raw), "node-name": "storage"}
    options = over_raw(raw) | {"image": image, "unshare-child-perms": ["write", "consistent-read"]}
    graph = Graph(DRIVERS)
    await graph.open_backend(options)
    with pytest.raises(PermissionConflictError):
        graph.attach(graph.node("storage"), "another", writable=False)
    await graph.close()


# --- names ----------------------------------------------------------------------------------------------


async def test_prefix_with_config(raw: Path, tmp_path: Path) -> None:
    config = tmp_path / "rules.cfg"
    config.write_text('[inject-error]\nevent = "none"\niotype = "write"\nerrno = "30"\n')
    async with opened(f"blkdebug:{config}:{raw}") as backend:
        with pytest.raises(HostError) as caught:
            await backend.write(0, b"x")
        assert caught.value.errno == errno.EROFS


async def test_prefix_without_config_and_nested(raw: Path) -> None:
    async with opened(f"blkdebug::blkdebug::{raw}", writable=False) as backend:
        assert backend.length == MIB


@pytest.mark.parametrize("name", ["blkdebug:", "blkdebug:config", "blkdebug:config:"])
async def test_incomplete_prefix(name: str) -> None:
    graph = Graph(DRIVERS)
    with pytest.raises(OptionError, match="incomplete"):
        await graph.open_backend(name)
    await graph.close()


async def test_printed_options_open_the_same(raw: Path) -> None:
    given = over_raw(raw, align=512, **{"inject-error": [{"event": "none", "iotype": "write"}]})
    async with opened(given) as backend:
        printed = backend.node.options_filename()
    assert json.loads(printed.removeprefix("json:"))["image"]["filename"] == str(raw)
    async with opened(printed) as backend:
        assert backend.node.limits.request_alignment == 512
        with pytest.raises(HostError):
            await backend.write(0, b"x")


async def test_an_image_cannot_have_any_file_read_as_configuration(tmp_path: Path) -> None:
    outside = tmp_path / "secret.txt"
    outside.write_text("secret")
    home = tmp_path / "home"
    home.mkdir()
    base = home / "base.raw"
    base.write_bytes(bytes(MIB))
    overlay = home / "overlay.qcow2"
    reference = f"blkdebug:{outside}:{base}"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", reference, "-F", "raw", overlay, "1M")
    graph = Graph(DRIVERS, Gate())
    with pytest.raises(GateError):
        await graph.open_backend(str(overlay))
    await graph.close()


# --- breakpoints ----------------------------------------------------------------------------------------


async def test_breakpoint_suspends_once(image: Path) -> None:
    async with opened(over_qcow2(image)) as backend, trio.open_nursery() as nursery:
        driver = debug_node(backend)
        driver.set_breakpoint("write_aio", "here")
        task = await tasks.start(nursery, lambda: backend.write(0, b"x" * 512))
        await driver.wait_suspended("here")
        assert not task.done
        assert driver.is_suspended("here")
        assert await backend.read(0, 512) == bytes(512), "not published yet"
        driver.resume("here")
        await task.join()
        assert not driver.is_suspended("here")
        assert await backend.read(0, 512) == b"x" * 512
        with trio.fail_after(30):
            await backend.write(MIB, b"x" * 512)


async def test_removing_a_breakpoint_resumes(image: Path) -> None:
    async with opened(over_qcow2(image)) as backend, trio.open_nursery() as nursery:
        driver = debug_node(backend)
        driver.set_breakpoint("cluster_alloc", "here")
        task = await tasks.start(nursery, lambda: backend.write(0, b"x" * 512))
        assert driver.is_suspended("here")
        driver.remove_breakpoint("here")
        await task.join()
        driver.set_breakpoint("cluster_alloc", "there")
        driver.remove_breakpoint("there")
        with trio.fail_after(30):
            await backend.write(MIB, b"x" * 512)


async def test_a_suspended_request_can_be_cancelled(image: Path) -> None:
    async with opened(over_qcow2(image)) as backend, trio.open_nursery() as nursery:
        driver = debug_node(backend)
        driver.set_breakpoint("write_aio", "here")
        task = await tasks.start(nursery, lambda: backend.write(0, b"x" * 512))
        task.scope.cancel()
        await task.join()
        assert not driver.is_suspended("here")
        await backend.write(0, b"y" * 512)


async def test_unknown_tags_and_events(raw: Path) -> None:
    async with opened(over_raw(raw)) as backend:
        driver = debug_node(backend)
        with pytest.raises(OptionError):
            driver.set_breakpoint("no_such_event", "tag")
        with pytest.raises(OptionError):
            driver.resume("tag")
        with pytest.raises(OptionError):
            driver.remove_breakpoint("tag")
