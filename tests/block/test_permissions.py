"""Permissions on edges: what one user needs and another does not share is refused, in both orders, with a sentence."""

from __future__ import annotations

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model import permissions
from fusedisk.block.model.node import NodeConfig
from fusedisk.core.errors import LockConflictError, PermissionConflictError
from tests.support.memory import MemoryDriver, Store, stores
from tests.support.opening import Chain, chain_backend
from tests.support.toy import Table

READ = permissions.CONSISTENT_READ
WRITE = permissions.WRITE


async def test_two_writers_conflict(graph: Graph) -> None:
    with stores(disk=Store(512)):
        first = await graph.open_backend(
            {"driver": "memory", "filename": "disk", "node-name": "d"}, name="a", writable=True
        )
        before = first.root.perm, first.root.shared
        with pytest.raises(PermissionConflictError) as caught:
            graph.attach(first.node, "b", writable=True)
        assert str(caught.value) == (
            "'b' needs the permission 'write, resize' on 'memory:disk', but 'a' uses it and does not share that."
        )
        assert (first.root.perm, first.root.shared) == before
        assert len(first.node.parents) == 1
        reader = graph.attach(first.node, "c", writable=False)
        await reader.close()
        await first.close()


@pytest.mark.parametrize("writer_first", [True, False])
async def test_a_user_that_shares_no_writing_conflicts_with_a_writer(graph: Graph, writer_first: bool) -> None:
    with stores(disk=Store(512)):
        node = await graph.open_node({"driver": "memory", "filename": "disk"}, NodeConfig(read_only=False))
        node.kept_by_name = True

        def writer() -> object:
            return graph.attach(node, "writer", writable=True, perm=READ | WRITE, shared=permissions.ALL)

        def careful() -> object:
            return graph.attach(node, "careful", writable=False, perm=READ, shared=permissions.ALL & ~WRITE)

        order = (writer, careful) if writer_first else (careful, writer)
        first = order[0]()
        with pytest.raises(PermissionConflictError) as caught:
            order[1]()
        assert str(caught.value) == (
            "'writer' needs the permission 'write' on 'memory:disk', but 'careful' uses it and does not share that."
        )
        await first.close()
        second = order[1]()
        await second.close()
        node.kept_by_name = False
        await graph.close_if_unused(node)


async def test_nobody_writes_to_a_backing_file_in_use(graph: Graph) -> None:
    chain = Chain(Table(512), Table(512))
    async with chain_backend(graph, chain) as backend:
        base = graph.node("layer0")
        with pytest.raises(PermissionConflictError) as caught:
            graph.attach(base, "intruder", writable=True)
        assert str(caught.value) == (
            "'intruder' needs the permission 'write, resize' on 'memory:file0', but node 'layer1' uses it and does not "
            "share that."
        )
        storage = backend.node.children["file"].node
        with pytest.raises(
            PermissionConflictError, match=r"^'intruder' needs the permission 'write, resize' on 'memory:"
        ):
            graph.attach(storage, "intruder", writable=True)
        assert [edge.perm for edge in base.parents] == [READ]
        assert base.children["file"].perm == READ
        assert storage.perm & (WRITE | permissions.RESIZE) == WRITE | permissions.RESIZE


async def test_what_a_driver_refuses_changes_nothing(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for nodes that had agreed before it was asked."""
    calls: list[str] = []

    def check(self: MemoryDriver, perm: int, shared: int) -> None:
        calls.append(f"check {self.options.filename}")
        if perm & WRITE and self.options.filename == "file1":
            raise LockConflictError("somebody else has it.")

    monkeypatch.setattr(MemoryDriver, "check_permissions", check)
    monkeypatch.setattr(MemoryDriver, "abort_permissions", lambda self: calls.append(f"abort {self.options.filename}"))
    chain = Chain(Table(512), Table(512))
    with chain.known():
        node = await graph.open_node(chain.options(), NodeConfig())
        node.kept_by_name = True
        for part in (node, node.children["file"].node):
            part.config.read_only = False
        edge = node.children["file"]
        before = edge.perm, edge.shared
        committed = len(chain.files[1].permissions)
        calls.clear()
        with pytest.raises(LockConflictError):
            graph.attach(node, "writer", writable=True)
        assert (edge.perm, edge.shared) == before
        assert len(chain.files[1].permissions) == committed
        assert calls.count("abort file0") == calls.count("check file0")
        assert calls.count("abort file1") == calls.count("check file1") - 1
        assert not node.parents
        node.kept_by_name = False
        await graph.close_if_unused(node)


async def test_permissions_loosen_when_a_user_goes(graph: Graph) -> None:
    store = Store(512)
    with stores(disk=store):
        node = await graph.open_node({"driver": "memory", "filename": "disk"}, NodeConfig(read_only=False))
        node.kept_by_name = True
        writer = graph.attach(node, "writer", writable=True)
        assert store.permissions[-1][0] & WRITE
        await writer.close()
        assert store.permissions[-1] == (0, permissions.ALL)
        node.kept_by_name = False
        await graph.close_if_unused(node)


async def test_writes_need_a_user_that_asked(graph: Graph) -> None:
    with stores(disk=Store(512)):
        node = await graph.open_node({"driver": "memory", "filename": "disk"}, NodeConfig(read_only=False))
        reader = graph.attach(node, "reader", writable=False)
        with pytest.raises(PermissionConflictError) as caught:
            await reader.write(0, b"x")
        assert str(caught.value) == f"No user of node '{node.name}' has asked for the write permission."
        await reader.close()


async def test_edges_of_one_group_share_a_node_that_is_refused_to_others(graph: Graph) -> None:
    group, store = object(), Store(1024)
    with stores(disk=store):
        disk = await graph.open_backend(
            {"driver": "memory", "filename": "disk", "node-name": "d"}, name="disk", writable=True
        )
        assert disk.root is not None
        window = {"driver": "raw", "file": "d", "offset": 512}
        with pytest.raises(PermissionConflictError):
            await graph.open_node(window, NodeConfig(read_only=False), group=group)
        disk.root.group = group
        with pytest.raises(PermissionConflictError):
            await graph.open_node(window, NodeConfig(read_only=False))
        node = await graph.open_node(window, NodeConfig(read_only=False), group=group)
        part = graph.attach(node, "part", writable=True)
        with pytest.raises(PermissionConflictError, match="'other' needs"):
            graph.attach(disk.node, "other", writable=True)
        assert store.permissions[-1][1] & WRITE == 0
        await part.write(0, b"x" * 512)
        assert await disk.read(512, 512) == b"x" * 512
        await part.close()
        await disk.close()
