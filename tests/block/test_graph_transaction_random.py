"""Random changes of the graph while requests run, against an oracle of the disk's bytes.

After each change, refused ones included, the graph must be sound and every name must open to the node's bytes. A
change that is refused must leave everything as it was.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.graph import Graph
from fusedisk.block.graph.transaction import GraphChange
from fusedisk.block.model.edge import Child
from fusedisk.block.model.extent import ZERO
from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.errors import FusediskError, HostError
from tests.support.graphs import assert_sound, picture, read_by_name
from tests.support.memory import Store, stores
from tests.support.oracle import random_bytes, random_range
from tests.support.toy import Table, tables

SIZE = 8 * 1024
WRITERS = 3
DEEPEST = 6


class World:
    """A disk under load, and what can be done to its graph."""

    def __init__(self, graph: Graph, seed: int, known: contextlib.ExitStack) -> None:
        self.graph = graph
        self.rng = random.Random(seed)
        self.known = known
        self.oracle = bytearray(random_bytes(self.rng, SIZE))
        self.extra: list[Backend] = []
        self.done: dict[str, int] = {}
        self.over = False
        self._names = 0

    def new_store(self, content: bytes | int) -> str:
        self._names += 1
        store = Store(content)
        store.steps.eager = False
        self.known.enter_context(stores(**{f"s{self._names}": store}))
        return f"s{self._names}"

    def new_overlay(self) -> dict[str, Any]:
        """Options of an empty image of its own, without a backing file."""
        file = self.new_store(512)
        table = Table(SIZE)
        table.steps.eager = False
        self.known.enter_context(tables(**{file: table}))
        return {"driver": "toy", "table": file, "file": {"driver": "memory", "filename": file}, "backing": None}

    async def open(self) -> None:
        base = {"driver": "raw", "file": {"driver": "memory", "filename": self.new_store(bytes(self.oracle))}}
        options = {**self.new_overlay(), "backing": base}
        self.disk = await self.graph.open_backend(options, name="disk", writable=True)

    # --- load -------------------------------------------------------------------------------------------

    async def load(self, index: int) -> None:
        """Read and write one part of the disk, and compare, until all is over."""
        rng, part = random.Random(index), SIZE // WRITERS
        start = index * part
        while not self.over:
            offset, length = random_range(rng, part, 1500)
            offset += start
            if rng.random() < 0.5:
                assert await self.disk.read(offset, length) == self.oracle[offset : offset + length]
            elif rng.random() < 0.7:
                data = random_bytes(rng, length)
                await self.disk.write(offset, data)
                self.oracle[offset : offset + length] = data
            else:
                await self.disk.write_zeroes(offset, length, may_unmap=True)
                self.oracle[offset : offset + length] = bytes(length)
            await trio.lowlevel.checkpoint()

    async def check(self) -> None:
        """What must hold after each change."""
        assert_sound(self.graph)
        nodes = list(self.graph.nodes.values())
        async with self.graph.drained(*nodes):
            for node in [self.disk.node, *self.rng.sample(nodes, 2)]:
                data = memoryview(bytearray(node.length))
                await io.read(node, 0, data)
                # A filter that another user's writes go past does not see its file grow.
                assert (await read_by_name(node))[: node.length] == data, node.full_options()
                if node is self.disk.node:
                    assert data == self.oracle

    # --- choices ----------------------------------------------------------------------------------------

    def nodes(self, *drivers: str) -> list[Node]:
        """The open nodes, all or those of some drivers."""
        found = [node for node in self.graph.nodes.values() if node.is_open]
        return [node for node in found if node.driver.name in drivers] if drivers else found

    def layers(self) -> list[Node]:
        """The disk's layers with a backing file, the top one first."""
        found, queue = [], [self.disk.node]
        for node in queue:
            if node.backing is not None:
                found.append(node)
            queue += [edge.node for edge in node.children.values()]
        return found

    # --- changes: each records itself -------------------------------------------------------------------

    async def insert(self, change: GraphChange) -> None:
        node = self.rng.choice(self.nodes())
        target: Node | Child = self.rng.choice([node, *node.parents])
        options = {"driver": self.rng.choice(["blkdebug", "copy-on-read"])}
        change.insert_filter(await change.open_filter(target, options), target)

    async def remove(self, change: GraphChange) -> None:
        filters = [node for node in self.nodes("blkdebug", "copy-on-read") if node not in change._opened]
        if filters:
            change.remove_filter(self.rng.choice(filters))

    async def snapshot(self, change: GraphChange) -> None:
        if len(self.layers()) >= DEEPEST:
            return
        old = self.disk.node
        new = await change.open_node(self.new_overlay(), over=old)
        change.replace(old, new)
        change.set_backing(new, old)
        if self.rng.random() < 0.7:
            change.reopen(old, {"read-only": True})

    async def copy_backing(self, change: GraphChange) -> None:
        """An equal copy takes the place of all below one layer."""
        layer = self.rng.choice(self.layers())
        edge = layer.backing
        assert edge is not None
        source = edge.node
        copier = self.graph.attach(source, "copier", writable=False)
        data = await copier.read(0, copier.length)
        await copier.close()
        name = self.new_store(bytes(data))
        new = await change.open_node({"driver": "raw", "file": {"driver": "memory", "filename": name}}, over=source)
        if self.rng.random() < 0.5:
            change.set_backing(layer, new)
        else:
            change.replace(edge if self.rng.random() < 0.5 else source, new)

    async def put_layer_between(self, change: GraphChange) -> None:
        if len(self.layers()) >= DEEPEST:
            return
        layer = self.rng.choice(self.layers())
        assert layer.backing is not None
        source = layer.backing.node
        new = await change.open_node({**self.new_overlay(), "read-only": True}, over=source)
        change.set_backing(new, source)
        change.set_backing(layer, new)

    async def skip_empty_layer(self, change: GraphChange) -> None:
        for layer in self.layers():
            assert layer.backing is not None
            below = layer.backing.node
            table = getattr(below.driver, "toy", None)
            if below.backing is not None and table is not None and not table.clusters() and not table.clusters(ZERO):
                change.set_backing(layer, below.backing.node)
                return

    async def reopen(self, change: GraphChange) -> None:
        node = self.rng.choice(self.nodes())
        key = self.rng.choice(["read-only", "cache.no-flush"])
        change.reopen(node, {key: self.rng.random() < 0.5})

    async def attach(self, change: GraphChange) -> None:
        node = self.rng.choice(self.nodes())
        self.extra.append(change.attach(node, "extra", writable=False))

    CHANGES: tuple[Any, ...] = (
        insert,
        insert,
        remove,
        snapshot,
        copy_backing,
        put_layer_between,
        skip_empty_layer,
        reopen,
        attach,
    )

    async def inject(self, change: GraphChange) -> None:
        """Something that makes the change fail, at one of its stages."""
        kind = self.rng.choice(["prepare", "prepare", "permissions", "window", "frozen", "open"])
        if kind == "prepare":
            node = self.rng.choice(self.nodes("memory"))
            node.driver.store.steps.fail("reopen", HostError("injected."))  # type: ignore[attr-defined]
            change.reopen(node, {"cache.no-flush": not node.config.cache_no_flush})
        elif kind == "permissions":
            assert self.disk.root is not None
            change.replace(self.disk.root, await self._second_writer(change))
        elif kind == "window":
            node = self.rng.choice(self.nodes("raw"))
            change.reopen(node, {"offset": node.length + 1})
        elif kind == "frozen":
            assert self.disk.root is not None
            self.disk.root.frozen.append("injected")
            change.replace(self.disk.root, self.rng.choice(self.nodes()))
        else:
            node = self.nodes("memory")[0]
            node.driver.store.steps.fail("open", HostError("injected."))  # type: ignore[attr-defined]
            await change.open_node({"driver": "memory", "filename": node.driver.options.filename}, over=node)

    async def _second_writer(self, change: GraphChange) -> Node:
        """A disk with a writer of its own, so a second one is refused."""
        name = self.new_store(SIZE)
        node = await change.open_node({"driver": "memory", "filename": name}, over=self.disk.node)
        change.attach(node, "first writer", writable=True)
        return node

    # --- running ----------------------------------------------------------------------------------------

    async def step(self) -> None:
        """Change something."""
        if self.extra and self.rng.random() < 0.3:
            backend = self.extra.pop(self.rng.randrange(len(self.extra)))
            await backend.close()
            return
        chosen = self.rng.choices(self.CHANGES, k=self.rng.randint(1, 3))
        before, extra = picture(self.graph), len(self.extra)
        refused = await self._attempt(chosen, fails=self.rng.random() < 0.3)
        if refused is None:
            for name in chosen:
                self.done[name.__name__] = self.done.get(name.__name__, 0) + 1
            return
        self.done["refused"] = self.done.get("refused", 0) + 1
        del self.extra[extra:]
        assert self.disk.root is not None
        self.disk.root.frozen.clear()
        for node in self.nodes("memory"):
            node.driver.store.steps.heal()  # type: ignore[attr-defined]
        assert picture(self.graph) == before, (chosen, refused)

    async def _attempt(self, chosen: list[Any], *, fails: bool) -> FusediskError | None:
        """Make several changes as one; returns why they were refused."""
        try:
            async with self.graph.changing() as change:
                for name in chosen:
                    await name(self, change)
                if fails:
                    await self.inject(change)
        except FusediskError as exc:
            return exc
        assert not fails, chosen
        return None

    async def step_beside_others(self) -> None:
        """Change something while other tasks do so, too."""
        for _ in range(3):
            await self._attempt(self.rng.choices(self.CHANGES, k=2), fails=False)
            attached = [backend for backend in self.extra if backend.root is not None]
            if attached and self.rng.random() < 0.5:
                await self.rng.choice(attached).close()

    async def step_together(self) -> None:
        """Several tasks change the graph at once."""
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(self.step_beside_others)
        self.extra = [backend for backend in self.extra if backend.root is not None]

    async def run(self, steps: int, step: Callable[[World], Awaitable[None]] = step) -> None:
        """Change the graph ``steps`` times under load."""
        await self.open()
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                for index in range(WRITERS):
                    nursery.start_soon(self.load, index)
                for _ in range(steps):
                    await step(self)
                    await self.check()
                    for _ in range(self.rng.randrange(20)):
                        await trio.lowlevel.checkpoint()
                self.over = True
        for backend in self.extra:
            await backend.close()
        assert await self.disk.read(0, SIZE) == self.oracle
        await self.disk.close()
        assert not self.graph.nodes


async def _run(graph: Graph, seed: int, steps: int, step: Callable[[World], Awaitable[None]] = World.step) -> World:
    with contextlib.ExitStack() as known:
        world = World(graph, seed, known)
        await world.run(steps, step)
        return world


@pytest.mark.parametrize("seed", range(12))
async def test_random_changes_under_load(graph: Graph, seed: int) -> None:
    await _run(graph, seed, 25)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 124))
async def test_many_random_changes_under_load(graph: Graph, seed: int) -> None:
    await _run(graph, seed, 60)


@pytest.mark.parametrize("seed", range(4))
async def test_several_tasks_change_the_graph_at_once(graph: Graph, seed: int) -> None:
    await _run(graph, seed, 6, World.step_together)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 208))
async def test_several_tasks_change_the_graph_at_once_many_times(graph: Graph, seed: int) -> None:
    await _run(graph, seed, 20, World.step_together)


async def test_each_kind_of_change_happens(graph: Graph) -> None:
    """The runs above would show little if most of their changes were refused."""
    world = await _run(graph, 1, 60)
    assert world.done.keys() == {change.__name__ for change in World.CHANGES} | {"refused"}
    assert sum(world.done.values()) > 2 * world.done["refused"]
