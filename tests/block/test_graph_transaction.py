"""Transactions of the graph: what each change does to edges, names, settings and lengths; all or nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio.testing

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.reopen import reopen
from fusedisk.block.graph.transaction import GraphChange
from fusedisk.block.model.children import Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.node import Node, NodeConfig
from fusedisk.core.errors import (
    HostError,
    NotSupportedError,
    OperationBlockedError,
    OptionError,
    PermissionConflictError,
    ReadOnlyError,
)
from tests.support.graphs import assert_sound, picture, read_by_name
from tests.support.memory import Store, stores
from tests.support.opening import Chain, chain_backend
from tests.support.tasks import start
from tests.support.toy import Table, tables

SIZE = 4096


def filled(byte: bytes, length: int = SIZE) -> Store:
    """A store with one byte all over."""
    return Store(byte * length)


def raw(name: str, **more: Any) -> dict[str, Any]:
    """Options of a raw disk over a store."""
    return {"driver": "raw", "file": {"driver": "memory", "filename": name}, **more}


@asynccontextmanager
async def overlay(graph: Graph, **header: Any) -> AsyncIterator[Backend]:
    """A toy image without data over ``memory:base``, its header's backing file; other disks lie in stores."""
    graph.gate.allow_any = True  # the header names memory
    with (
        tables(top=Table(SIZE, backing="json:" + '{"driver":"raw","file":{"driver":"memory","filename":"base"}}')),
        stores(file=Store(512), base=filled(b"b"), other=filled(b"o"), long=filled(b"l", 2 * SIZE), short=filled(b"s")),
    ):
        options = {"driver": "toy", "table": "top", "file": {"driver": "memory", "filename": "file"}, **header}
        backend = await graph.open_backend(options, name="disk", writable=True)
        yield backend
        await backend.close()
        assert not graph.nodes


async def open_disk(graph: Graph, options: dict[str, Any], *, writable: bool = False) -> Node:
    """Open a node that nobody uses yet."""
    return await graph.open_node(options, NodeConfig(read_only=not writable))


# --- names --------------------------------------------------------------------------------------------------


async def test_a_replaced_backing_file_is_in_the_name_of_all_nodes_above(graph: Graph) -> None:
    async with overlay(graph) as backend:
        above = await graph.insert_filter(backend.node, {"driver": "blkdebug"})
        assert above.filtered is not None
        top = above.filtered.node
        assert '"backing"' not in above.options_filename()
        assert top.filename == "memory:file"
        assert top.backing is not None
        base = top.backing.node
        await graph.replace(base, await open_disk(graph, raw("other")))
        for node in (top, above):
            assert '"other"' in node.options_filename()
            assert '"other"' in node.filename
            assert await read_by_name(node) == await backend.read(0, SIZE) == b"o" * SIZE
        assert base.closed
        assert_sound(graph)


async def test_the_name_is_plain_again_when_all_is_as_the_header_says(graph: Graph) -> None:
    async with overlay(graph) as backend:
        top = backend.node
        plain = top.options_filename()
        assert top.backing is not None
        base = top.backing.node
        base.kept_by_name = True
        await graph.set_backing(top, await open_disk(graph, raw("other")))
        assert top.options_filename() != plain
        await graph.set_backing(top, base, named=True)
        assert not top.backing_overridden
        assert top.options_filename() == plain
        base.kept_by_name = False
        assert await read_by_name(top) == b"b" * SIZE


async def test_a_detached_backing_file_is_not_opened_by_the_name(graph: Graph) -> None:
    async with overlay(graph) as backend:
        top = backend.node
        assert not top.backing_overridden
        await graph.set_backing(top, None)
        assert top.backing is None
        assert top.backing_overridden
        assert top.full_options()["backing"] is None
        assert await read_by_name(top) == await backend.read(0, SIZE) == bytearray(SIZE)
        await graph.set_backing(top, await open_disk(graph, raw("other")))
        assert await read_by_name(top) == await backend.read(0, SIZE) == b"o" * SIZE


async def test_new_options_of_a_backing_file_are_in_the_name(graph: Graph) -> None:
    async with overlay(graph) as backend:
        top = backend.node
        assert top.backing is not None
        base = top.backing.node
        await graph.replace(base.children["file"], await open_disk(graph, {"driver": "memory", "filename": "long"}))
        await reopen(graph, {base: {"offset": 1024, "size": SIZE}})
        assert await read_by_name(top) == await backend.read(0, SIZE) == b"l" * SIZE
        assert '"offset": 1024' in top.filename


async def test_filters_do_not_change_the_name_for_messages(graph: Graph) -> None:
    with stores(disk=filled(b"d")):
        backend = await graph.open_backend(raw("disk"), writable=True)
        node = backend.node
        assert node.filename == "memory:disk"
        added = await graph.insert_filter(node.children["file"], {"driver": "blkdebug"})
        assert node.filename == "memory:disk"
        assert node.full_options()["file"]["driver"] == "blkdebug"
        assert await read_by_name(node) == b"d" * SIZE
        await graph.remove_filter(added)
        assert node.full_options()["file"] == {"driver": "memory", "filename": "disk"}
        await backend.close()


# --- what comes with a change -------------------------------------------------------------------------------


async def test_lengths_go_up_through_filters_and_users_learn_them_once(graph: Graph) -> None:
    async with overlay(graph) as backend:
        with stores(one=filled(b"1")):
            disk = await graph.open_backend(
                {"driver": "copy-on-read", "file": raw("one", **{"node-name": "one"})}, writable=True
            )
            told: list[int] = []
            disk.on_resize.append(told.append)
            unconcerned: list[int] = []
            backend.on_resize.append(unconcerned.append)
            await graph.replace(graph.node("one"), await open_disk(graph, raw("long"), writable=True))
            assert disk.length == 2 * SIZE
            assert told == [2 * SIZE]
            assert not unconcerned
            assert await disk.read(SIZE, SIZE) == b"l" * SIZE
            await disk.close()


async def test_limits_go_up_through_filters(graph: Graph) -> None:
    with tables(fine=Table(SIZE, 512), coarse=Table(SIZE, 2048)), stores(a=Store(512), b=Store(512)):
        fine = {"driver": "toy", "table": "fine", "node-name": "fine", "file": {"driver": "memory", "filename": "a"}}
        coarse = {"driver": "toy", "table": "coarse", "file": {"driver": "memory", "filename": "b"}}
        backend = await graph.open_backend({"driver": "copy-on-read", "file": fine}, writable=True)
        assert backend.node.limits.cluster_size == 512
        await graph.replace(graph.node("fine"), await open_disk(graph, coarse, writable=True))
        assert backend.node.limits.cluster_size == 2048
        await backend.close()


async def test_generations_and_changes_are_bumped(graph: Graph) -> None:
    chain = Chain(Table(SIZE), Table(SIZE), Table(SIZE))
    async with chain_backend(graph, chain) as backend:
        with stores(other=filled(b"o")):
            nodes = [graph.node(f"layer{index}") for index in (1, 2)]
            generations, changes = [node.generation for node in nodes], graph.changes
            await graph.replace(graph.node("layer0"), await open_disk(graph, raw("other")))
            assert all(node.generation > before for node, before in zip(nodes, generations, strict=True))
            assert graph.changes > changes
            assert await backend.read(0, 1) == b"o"


async def test_settings_are_inherited_through_an_inserted_filter(graph: Graph) -> None:
    with stores(disk=filled(b"d")):
        backend = await graph.open_backend(raw("disk"), writable=True)
        node = backend.node
        storage = node.children["file"].node
        added = await graph.insert_filter(node.children["file"], {"driver": "copy-on-read"})
        await reopen(graph, {node: {"cache.no-flush": True}})
        assert added.config.cache_no_flush
        assert storage.config.cache_no_flush
        await graph.remove_filter(added)
        await reopen(graph, {node: {"cache.no-flush": False}})
        assert not storage.config.cache_no_flush
        await backend.close()


async def test_what_a_removed_filter_had_opened_stands_on_its_own(graph: Graph) -> None:
    with stores(disk=filled(b"d")):
        backend = await graph.open_backend({"driver": "blkdebug", "image": raw("disk")}, writable=True)
        assert backend.node.filtered is not None
        below = backend.node.filtered.node
        assert below.inherits_from is backend.node
        await graph.remove_filter(backend.node)
        assert backend.node is below
        assert below.inherits_from is None
        await backend.close()


async def test_what_leaves_a_parent_no_longer_follows_it(graph: Graph) -> None:
    async with overlay(graph) as backend:
        top = backend.node
        assert top.backing is not None
        base = top.backing.node
        base.kept_by_name = True
        await graph.set_backing(top, None)
        await reopen(graph, {top: {"cache.no-flush": True}})
        assert not base.config.cache_no_flush
        base.kept_by_name = False
        await graph.close_if_unused(base)


async def test_a_layer_that_is_skipped_hands_its_settings_down(graph: Graph) -> None:
    chain = Chain(Table(SIZE), Table(SIZE), Table(SIZE))
    async with chain_backend(graph, chain) as backend:
        base = graph.node("layer0")
        await graph.set_backing(backend.node, base)
        assert graph.nodes.keys() >= {"layer0", "layer2"}
        assert "layer1" not in graph.nodes
        await reopen(graph, {backend.node: {"cache.no-flush": True}})
        assert base.config.cache_no_flush


async def test_a_parent_with_auto_read_only_follows_its_new_storage(graph: Graph) -> None:
    with stores(disk=filled(b"d"), locked=filled(b"k")):
        node = await open_disk(graph, raw("disk", **{"auto-read-only": True}), writable=True)
        backend = graph.attach(node, "disk", writable=False)
        assert not node.config.read_only
        storage = await open_disk(graph, {"driver": "memory", "filename": "locked"})
        await graph.replace(node.children["file"], storage)
        assert node.config.read_only
        assert_sound(graph)
        await backend.close()


async def test_data_is_flushed_before_its_writer_leaves(graph: Graph) -> None:
    with tables(snap=Table(SIZE)), stores(disk=Store(SIZE), snapfile=Store(512)):
        backend = await graph.open_backend({"driver": "memory", "filename": "disk", "node-name": "d"}, writable=True)
        store: Store = backend.node.driver.store  # type: ignore[attr-defined]
        await backend.write(0, b"unflushed")
        await take_snapshot(graph, backend)
        assert store.durable[:9] == b"unflushed"
        await backend.close()


# --- several changes at once --------------------------------------------------------------------------------


SNAPSHOT: dict[str, Any] = {"driver": "toy", "table": "snap", "file": {"driver": "memory", "filename": "snapfile"}}


async def take_snapshot(graph: Graph, backend: Backend) -> Node:
    """What blockdev-snapshot does: a new overlay takes the writes, the old disk becomes read-only below it."""
    old = backend.node
    async with graph.changing() as change:
        new = await change.open_node({**SNAPSHOT, "backing": old.name}, over=old)
        change.replace(old, new)
        change.reopen(old, {"read-only": True})
    return new


async def test_a_live_snapshot_is_one_transaction(graph: Graph) -> None:
    with tables(snap=Table(SIZE)), stores(disk=filled(b"d"), snapfile=Store(512)):
        backend = await graph.open_backend(raw("disk"), writable=True)
        old = backend.node
        new = await take_snapshot(graph, backend)
        assert backend.node is new
        assert old.config.read_only
        await backend.write(0, b"new")
        assert await backend.read(0, 5) == b"newdd"
        assert await read_by_name(new) == await backend.read(0, SIZE)
        assert_sound(graph)
        # And back, as an active commit ends.
        async with graph.changing() as change:
            change.reopen(old, {"read-only": False})
            change.set_backing(new, None)
            change.replace(new, old)
        assert backend.node is old
        assert new.closed
        await backend.write(0, b"D")
        assert await backend.read(0, 3) == b"Ddd"
        assert_sound(graph)
        await backend.close()


async def test_one_node_takes_the_place_of_one_with_several_parents(graph: Graph) -> None:
    with (
        tables(a=Table(SIZE), b=Table(SIZE)),
        stores(fa=Store(512), fb=Store(512), base=filled(b"b"), new=filled(b"n")),
    ):
        base = await open_disk(graph, raw("base", **{"node-name": "base"}))
        disks = []
        for name in "ab":
            options = {"driver": "toy", "table": name, "file": {"driver": "memory", "filename": f"f{name}"}}
            disks.append(await graph.open_backend({**options, "backing": "base"}, writable=True))
        user = graph.attach(base, "user", writable=False)
        new = await open_disk(graph, raw("new"))
        await graph.replace(base, new)
        assert base.closed
        for disk in (*disks, user):
            assert await disk.read(0, SIZE) == b"n" * SIZE
            await disk.close()


async def test_a_new_user_and_its_filter_come_together(graph: Graph) -> None:
    with stores(disk=filled(b"d")):
        backend = await graph.open_backend(raw("disk"), writable=True)
        node = backend.node
        async with graph.changing() as change:
            filter = await change.open_filter(node, {"driver": "copy-on-read"})
            change.insert_filter(filter, node)
            job = change.attach(filter, "job", writable=False)
            assert job.root is None
        assert job.node is backend.node is filter
        assert await job.read(0, 1) == b"d"
        await job.close()
        await backend.close()


async def test_a_node_that_shuts_out_todays_users_may_be_put_between(graph: Graph) -> None:
    with stores(disk=filled(b"d")):
        backend = await graph.open_backend({"driver": "memory", "filename": "disk", "node-name": "d"}, writable=True)
        async with graph.changing() as change:
            window = await change.open_node({"driver": "raw", "file": "d", "offset": 1024}, over=backend.node)
            change.replace(graph.node("d"), window)
        assert backend.length == SIZE - 1024
        await backend.write(0, b"x")
        assert graph.node("d").driver.store.data[1024:1026] == b"xd"  # type: ignore[attr-defined]
        assert_sound(graph)
        await backend.close()


async def test_reopening_may_give_children_by_name(graph: Graph) -> None:
    async with overlay(graph) as backend:
        top = backend.node
        other = await open_disk(graph, raw("other", **{"node-name": "other"}))
        await reopen(graph, {top: {"backing": "other", "detect-zeroes": "on"}})
        assert top.backing is not None
        assert top.backing.node is other
        assert top.config.detect_zeroes == "on"
        await reopen(graph, {top: {"backing": None}})
        assert top.backing is None
        assert other.closed
        other = await open_disk(graph, {"driver": "memory", "filename": "other", "node-name": "o"}, writable=True)
        with pytest.raises(OptionError, match="must be the name of a node"):
            await reopen(graph, {top: {"backing": {"driver": "raw"}}})
        await reopen(graph, {top: {"file": "o"}})
        assert top.children["file"].node is other


# --- all or nothing -----------------------------------------------------------------------------------------


FAILURES = {
    "reopen": HostError,
    "permissions": ReadOnlyError,
    "frozen": OperationBlockedError,
    "loop": OptionError,
    "blocked": OperationBlockedError,
    "window": OptionError,
    "open": HostError,
    "flush": HostError,
}


async def _spoil(change: GraphChange, failure: str, top: Node, other: Node) -> None:
    """Add something to a change that fails at one of its stages."""
    assert top.backing is not None
    base, storage = top.backing.node, top.children["file"].node
    steps = storage.driver.store.steps  # type: ignore[attr-defined]
    if failure == "reopen":
        steps.fail("reopen", HostError("no."))
        change.reopen(storage, {"cache.no-flush": True})
    elif failure == "permissions":
        change.reopen(top, {"read-only": True})
    elif failure == "frozen":
        top.backing.frozen.append("a job streams through it")
    elif failure == "loop":
        change.replace(other.children["file"], top)
    elif failure == "blocked":
        base.block_operation("reopen", "a job works on it")
    elif failure == "window":
        change.reopen(base, {"offset": SIZE + 1})
    elif failure == "open":
        steps.fail("open", HostError("no."))
        await change.open_node({"driver": "memory", "filename": "file"}, over=top)
    else:
        steps.fail("flush", HostError("no."))
        new = await change.open_node({"driver": "memory", "filename": "long"}, over=storage)
        change.replace(top.children["file"], new)


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_failure_leaves_everything_as_it_was(graph: Graph, failure: str) -> None:
    async with overlay(graph) as backend:
        top = backend.node
        assert top.backing is not None
        base = top.backing.node
        other = await open_disk(graph, raw("other"))
        keeper = graph.attach(other, "keeper", writable=False)
        await backend.write(0, b"written")
        before, name = picture(graph), top.full_options()

        async def attempt() -> None:
            async with graph.changing() as change:
                change.insert_filter(await change.open_filter(top, {"driver": "copy-on-read"}), top)
                change.set_backing(top, other)
                change.reopen(base, {"cache.no-flush": True})
                await _spoil(change, failure, top, other)

        with pytest.raises(FAILURES[failure]):
            await attempt()
        assert picture(graph) == before
        assert top.full_options() == name
        assert_sound(graph)
        top.backing.frozen.clear()
        base.blockers.clear()
        assert await backend.read(0, 9) == b"writtenbb"
        await keeper.close()


async def _detach(graph: Graph, edge: Child) -> None:
    async with graph.changing() as change:
        change.detach_child(edge)


async def test_words_for_what_is_refused(graph: Graph) -> None:
    async with overlay(graph, **{"node-name": "top"}) as backend:
        top = backend.node
        assert top.backing is not None
        top.backing.frozen.append("a job streams through it")
        with pytest.raises(OperationBlockedError, match=r"^The link 'backing' from 'top' cannot change now: a job str"):
            await graph.set_backing(top, None)
        top.backing.frozen.clear()
        with pytest.raises(NotSupportedError, match=r"^node 'top' is toy, whose child 'file' cannot come or go while"):
            await _detach(graph, top.children["file"])
        with pytest.raises(OptionError, match=r"^driver 'raw' is no filter, only filters can be inserted\.$"):
            await graph.insert_filter(top, {"driver": "raw"})
        await _detach(graph, top.backing)
        assert top.backing is None
        assert top.backing_overridden
        top.block_operation("replace", "a job works on it")
        with pytest.raises(OperationBlockedError, match=r"^Node 'top' cannot do replace now: a job works on it\.$"):
            await graph.insert_filter(top, {"driver": "blkdebug"})
        assert backend.root is not None
        with pytest.raises(OperationBlockedError):
            await graph.replace(backend.root, top.children["file"].node)
        top.unblock_operation("replace", "a job works on it")
        other = await open_disk(graph, raw("other"))
        async with graph.changing() as change:
            change.attach_child(top, other, "backing", Role.BACKING)
        assert await backend.read(0, 2) == b"oo"
        assert await read_by_name(top) == b"o" * SIZE


async def test_permissions_are_those_of_the_graph_as_it_will_be(graph: Graph) -> None:
    """Each change alone is refused; both together fit."""
    with stores(one=filled(b"1"), two=filled(b"2")):
        first = await graph.open_backend({"driver": "memory", "filename": "one"}, writable=True)
        second = await graph.open_backend({"driver": "memory", "filename": "two"}, writable=True)
        one, two = first.node, second.node
        assert first.root is not None
        assert second.root is not None
        with pytest.raises(PermissionConflictError):
            await graph.replace(first.root, two)
        async with graph.changing() as change:
            change.replace(first.root, two)
            change.replace(second.root, one)
        assert (await first.read(0, 1), await second.read(0, 1)) == (b"2", b"1")
        assert_sound(graph)
        await first.close()
        await second.close()


# --- draining -----------------------------------------------------------------------------------------------


async def test_only_users_whose_requests_change_are_drained(graph: Graph) -> None:
    """A request that hangs on a node delays nobody else's change, not even that of another parent of the node."""
    async with overlay(graph) as backend, trio.open_nursery() as nursery:
        assert backend.node.backing is not None
        base = backend.node.backing.node
        reader = graph.attach(base, "reader", writable=False)
        store: Store = base.children["file"].node.driver.store  # type: ignore[attr-defined]
        held = store.steps.hold("read")
        waiting = await start(nursery, lambda: reader.read(0, 1))
        await held.reached.wait()
        with trio.fail_after(10):
            added = await graph.insert_filter(backend.node, {"driver": "copy-on-read"})
            await graph.set_backing(added.children["file"].node, await open_disk(graph, raw("other")))
            assert await backend.read(0, 1) == b"o"
            await graph.remove_filter(added)
        assert not waiting.done
        held.release()
        await waiting.join()
        await reader.close()


async def test_the_users_of_the_new_node_are_not_drained(graph: Graph) -> None:
    async with overlay(graph) as backend, trio.open_nursery() as nursery:
        other = await open_disk(graph, raw("other"))
        reader = graph.attach(other, "reader", writable=False)
        store: Store = other.children["file"].node.driver.store  # type: ignore[attr-defined]
        held = store.steps.hold("read")
        waiting = await start(nursery, lambda: reader.read(0, 1))
        await held.reached.wait()
        assert backend.node.backing is not None
        with trio.fail_after(10):
            await graph.replace(backend.node.backing.node, other)
            assert await backend.read(0, 1) == b"o"
        assert not waiting.done
        held.release()
        await waiting.join()
        await reader.close()


async def test_a_drain_waits_for_all_users(graph: Graph) -> None:
    async with overlay(graph) as backend, trio.open_nursery() as nursery:
        store: Store = backend.node.backing.node.children["file"].node.driver.store  # type: ignore[union-attr, attr-defined]
        reader = graph.attach(backend.node, "reader", writable=False)
        holds = [store.steps.hold("read", offset) for offset in (10, 20)]
        reads = [
            await start(nursery, lambda user=user, at=at: user.read(at, 1))
            for user, at in ((backend, 10), (reader, 20))
        ]
        for hold in holds:
            await hold.reached.wait()

        async def section() -> None:
            async with graph.drained(backend.node):
                assert backend.in_flight == reader.in_flight == 0

        change = await start(nursery, section)
        for hold, read in zip(holds, reads, strict=True):
            assert not change.done
            hold.release()
            await read.join()
            await trio.testing.wait_all_tasks_blocked()
        await change.join()
        await reader.close()


async def test_a_filter_is_open_before_anything_is_held_back(graph: Graph) -> None:
    async with overlay(graph) as backend, trio.open_nursery() as nursery:
        slow = Store(512)
        with stores(slow=slow), tables(slow=Table(SIZE)):
            opening = slow.steps.hold("open")
            inserting = await start(nursery, lambda: _put_overlay(graph, backend))
            await opening.reached.wait()
            with trio.fail_after(10):
                assert await backend.read(0, 1) == b"b"
            opening.release()
            await inserting.join()
            assert await backend.read(0, 1) == b"b"


async def _put_overlay(graph: Graph, backend: Backend) -> None:
    old = backend.node
    async with graph.changing() as change:
        options = {"driver": "toy", "table": "slow", "file": {"driver": "memory", "filename": "slow"}, "backing": None}
        new = await change.open_node(options, over=old)
        change.replace(old, new)
        change.set_backing(new, old)


async def test_a_backend_is_not_closed_while_a_change_is_prepared(graph: Graph) -> None:
    store = Store(SIZE)
    with stores(disk=store):
        backend = await graph.open_backend({"driver": "memory", "filename": "disk"}, writable=True)
        await backend.write(0, b"x")
        async with trio.open_nursery() as nursery:
            prepare = store.steps.hold("reopen")
            nursery.start_soon(reopen, graph, {backend.node: {"cache.no-flush": False}})
            await prepare.reached.wait()
            closing = await start(nursery, backend.close)
            await trio.testing.wait_all_tasks_blocked()
            flushed, closed = store.steps.of("flush"), closing.done
            prepare.release()
            await closing.join()
        assert not flushed
        assert not closed
        assert store.durable[:1] == b"x"
